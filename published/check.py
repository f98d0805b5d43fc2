"""`python -m published check`: what a folder of weights holds, what is missing and what is not as published."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mapper import VokenMapper
from minigpt5 import Vokens
from published.clip_tokenizer import ClipTokenizer
from published.fetch import KNOWN, sha256
from published.loading import WeightsError, matched, open_checkpoint, with_file_below
from published.parts import load, load_image_encoder, load_schedule, load_tokenizer, size_mismatches, tokenizer_file
from unet import UNetConfig

# 2.0, 2.1 and 2.1-base have the same names, shapes and number of bytes.
OTHER_UNET = "; Stable Diffusion 2.0 looks like this under 2.1's name"
UNCHECKED = ((r"^(model|lm_head|prefix_encoder)\.", None),)  # of a checkpoint: LoRA, tables, a prefix


def parts(root: Path) -> list[tuple[str, list[Path], Callable]]:
    """(name, its folders and files, a function that loads it). On the meta device a loader reads headers only."""
    vicuna, sd = root / "vicuna", root / "stable-diffusion"
    pieces, projection = tokenizer_file(vicuna), root / "minigpt4/llama_proj.safetensors"
    clip, header = sd / "tokenizer", {"device": "meta"}
    return [
        ("vicuna", [vicuna], partial(load, "llama", vicuna, **header)),
        ("vicuna tokenizer", [pieces], partial(load_tokenizer, vicuna)),
        ("image encoder", [root / "blip2", projection], partial(load_image_encoder, root, **header)),
        ("unet", [sd / "unet"], partial(load, "unet", sd / "unet", **header)),
        ("vae", [sd / "vae"], partial(load, "vae", sd / "vae", **header)),
        ("text encoder", [sd / "text_encoder"], partial(load, "text encoder", sd / "text_encoder", **header)),
        ("clip tokenizer", [clip / "vocab.json", clip / "merges.txt"], partial(ClipTokenizer, clip)),
        ("schedule", [sd / "scheduler/scheduler_config.json"], partial(load_schedule, sd / "scheduler")),
    ]


def check(root: Path, hashes: bool = False) -> list[str]:
    """Print a line for each part of the folder, return what is wrong, one line a problem. Only headers are read, unless
    `hashes` asks for the SHA-256 of every file that has the size of a published one."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such folder")
    problems, loaded = [], {}
    trained = sorted((root / "minigpt5").glob("[!.]*.safetensors"))
    for name, places, read in [*parts(root), *((f.stem, [f], partial(check_trained, f, loaded)) for f in trained)]:
        found = []
        try:
            loaded[name] = read()
        except ValueError as error:
            found += getattr(error, "problems", [str(error)])
        files = [f for place in places for f in ([place] if place.suffix else place.glob("[!.]*.safetensors"))]
        files = sorted(filter(Path.is_file, files))
        compared = [compare(file, root) for file in files] if hashes else []
        found += [problem for _, problem in compared if problem]
        state = "not right" if found else "complete"
        if compared and all(is_published for is_published, _ in compared):
            state += ", same hash as published"
        print(f"{name:16}  {state if files else 'missing'}")
        problems += found
    if not trained:
        print("minigpt5/ holds no checkpoint: train_uas.py writes one, `published fetch` gets the released ones")
    return problems + mismatches(loaded)


def compare(path: Path, root: Path) -> tuple[bool, str]:
    """Whether `path` has the hash of the published file of its name, and a problem if only the size is the same."""
    sd = root / "stable-diffusion"
    name = path.relative_to(sd).as_posix() if path.is_relative_to(sd) else path.name
    size, known = KNOWN.get(name, (None, ""))
    if size != path.stat().st_size:
        return False, ""
    if sha256(path) == known:
        return True, ""
    reason = "its size is the published file's, its hash is not" + OTHER_UNET * name.startswith("unet/")
    return False, f"{path}: {reason}"


def check_trained(path: Path, loaded: dict) -> None:
    """Compare a checkpoint with the sizes of the parts that it goes with, but for its adapters and Vicuna's tables."""
    if not {"vicuna", "unet", "text encoder"} <= loaded.keys():
        raise WeightsError(f"{path}: not checked, because parts that it goes with are missing or not right")
    checkpoint = open_checkpoint(path)
    llm_width = loaded["vicuna"].config.hidden_size
    tokens = len(loaded["text encoder"].text_model.embeddings.position_embedding.weight)
    with torch.device("meta"):
        model = VokenMapper(llm_width, loaded["unet"].config.cross_attention_dim, tokens)
        model.vokens = Vokens(loaded["vicuna"], checkpoint.vokens, 0)
    wanted = model.state_dict()
    matched(wanted, with_file_below(path, checkpoint.tensors, wanted), UNCHECKED, first_wins=True)


def mismatches(loaded: dict) -> list[str]:
    """What is wrong with parts that are each right but do not go together."""
    problems = size_mismatches(loaded)
    if "unet" in loaded and "schedule" in loaded:
        unet, predicts = loaded["unet"].config, loaded["schedule"].config.prediction_type
        trained = {64: "epsilon", 96: "v_prediction"}.get(unet.sample_size)  # Stable Diffusion 2 for 512, 768 pixels
        if unet.block_out_channels == UNetConfig().block_out_channels and trained not in (predicts, None):
            size = unet.sample_size
            problems.append(f"unet: with sample_size {size} it predicts {trained}, the schedule says {predicts}")
    return problems
