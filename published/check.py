"""`python -m published check`: what a folder of weights holds, what is missing and what is not as published."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mapper import VokenMapper
from minigpt5 import Vokens
from published.clip_tokenizer import ClipTokenizer
from published.convert import readable
from published.fetch import KNOWN, sha256
from published.loading import WeightsError, matched, open_checkpoint, tensor_slices, with_file_below
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
    """Print what the folder holds, return what is wrong with it, one line a problem. Only headers are read, unless
    `hashes` asks for every file's SHA-256."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such folder")
    rows, problems, loaded = [("part", "state", "file", "dtype", "size", "published")], [], {}
    trained = sorted((root / "minigpt5").glob("[!.]*.safetensors"))
    for name, places, read in [*parts(root), *((f.stem, [f], partial(check_trained, f, loaded)) for f in trained)]:
        found, described = [], []
        try:
            loaded[name] = read()
        except ValueError as error:
            found += getattr(error, "problems", [str(error)])
        for place in places:
            files = [place] if place.suffix else sorted(place.glob("[!.]*.safetensors"))
            files = [file for file in files if file.is_file()]
            for file in files:
                published, problem = compared(file, root, hashes)
                found += problem
                described.append((f"{file.relative_to(root)}", dtypes(file), readable(file.stat().st_size), published))
            described += [] if files else [(f"{place.relative_to(root)}", "-", "-", "-")]
        missing = all(size == "-" for _, _, size, _ in described)
        state = "missing" if missing else "not right" if found else "complete"
        rows += [(name, state, *columns) for columns in described]
        problems += found
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    if not trained:
        print("minigpt5/ holds no checkpoint: train_uas.py writes one, `published fetch` gets the released ones")
    return problems + mismatches(loaded)


def dtypes(path: Path) -> str:
    if path.suffix != ".safetensors":
        return "-"
    try:
        return "+".join(sorted({tensor.get_dtype() for tensor in tensor_slices(path).values()}))
    except WeightsError:
        return "unreadable"


def compared(path: Path, root: Path, hashes: bool) -> tuple[str, list[str]]:
    """How `path` compares with the published file of its name, and a problem if only its size is the same."""
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
