"""`python -m published check`: what a folder of weights holds, what is missing and what is not as published."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from published import parts as loaders
from published.clip_tokenizer import ClipTokenizer
from published.fetch import PUBLISHED, sha256
from published.loading import WeightsError


def parts(root: Path) -> list[tuple[str, list[Path], Callable]]:
    """(name, its folders and files, a function that loads it). On the meta device a loader reads headers only."""
    vicuna, sd = root / "vicuna", root / "stable-diffusion"
    pieces, projection = loaders.tokenizer_file(vicuna), root / "minigpt4/llama_proj.safetensors"
    clip, load, header = sd / "tokenizer", loaders.load, {"device": "meta"}
    stack = partial(loaders.load_minigpt5, root, read_pictures=False, **header)
    return [
        ("vicuna", [vicuna], partial(load, "llama", vicuna, **header)),
        ("vicuna tokenizer", [pieces], partial(loaders.load_tokenizer, vicuna)),
        ("image encoder", [root / "blip2", projection], partial(loaders.load_image_encoder, root, **header)),
        ("unet", [sd / "unet"], partial(load, "unet", sd / "unet", **header)),
        ("vae", [sd / "vae"], partial(load, "vae", sd / "vae", **header)),
        ("text encoder", [sd / "text_encoder"], partial(load, "text encoder", sd / "text_encoder", **header)),
        ("clip tokenizer", [clip / "vocab.json", clip / "merges.txt"], partial(ClipTokenizer, clip)),
        ("schedule", [sd / "scheduler/scheduler_config.json"], partial(loaders.load_schedule, sd / "scheduler")),
        *((file.stem, [file], partial(stack, file)) for file in sorted((root / "minigpt5").glob("[!.]*.safetensors"))),
    ]


def check(root: Path, hashes: bool = False) -> list[str]:
    """Print a line for each part of the folder and for each problem, return the problems. Only headers are read, unless
    `hashes` asks for the SHA-256 of every file that has the size of a published one."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such folder")
    problems, loaded = [], {}
    for name, places, read in parts(root):
        own_problems = []
        try:
            loaded[name] = read()
        except ValueError as error:
            own_problems += getattr(error, "problems", [str(error)])
        files = [f for place in places for f in ([place] if place.suffix else place.glob("[!.]*.safetensors"))]
        files = sorted(filter(Path.is_file, files))
        comparisons = [compare(file, root) for file in files] if hashes else []
        own_problems += [problem for _, problem in comparisons if problem]
        state = "not right" if own_problems else "complete"
        if comparisons and all(is_published for is_published, _ in comparisons):
            state += ", same hash as published"
        print(f"{name:16}  {state if files else 'missing'}")
        problems += own_problems
    if not any((root / "minigpt5").glob("[!.]*.safetensors")):
        print("minigpt5/ holds no checkpoint: train_uas.py writes one, `published fetch` gets the released ones")
    problems += loaders.size_mismatches(loaded)
    problems = list(dict.fromkeys(problems))  # a checkpoint repeats those of its parts
    print("\n".join(problems) or "everything is there")
    return problems


def compare(path: Path, root: Path) -> tuple[bool, str]:
    """Whether `path` has the hash of the published file of its name, and a problem if only the size is the same."""
    sd = root / "stable-diffusion"
    name = path.relative_to(sd).as_posix() if path.is_relative_to(sd) else path.name
    size, digest = PUBLISHED.get(name, (None, ""))
    if size != path.stat().st_size:
        return False, ""
    if sha256(path) == digest:
        return True, ""
    hint = "; Stable Diffusion 2.0 has the same names and shapes as 2.1" * name.startswith("unet/")
    return False, f"{path}: its size is the published file's, its hash is not{hint}"
