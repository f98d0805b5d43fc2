"""`python -m published check`: what a folder of weights holds, what is missing and what is not as published."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from llama import Vokens
from mapper import VokenMapper
from published.checkpoints import checkpoint_contents, file_below
from published.clip_tokenizer import ClipTokenizer
from published.convert import read_tensors, readable
from published.fetch import KNOWN, sha256
from published.loading import WeightsError, compare, tensor_files
from published.parts import load_image_encoder, load_llama, load_schedule, load_text_encoder, load_unet, load_vae
from tokenizer import Tokenizer
from unet import UNetConfig

# 2.0, 2.1 and 2.1-base have the same names, shapes and number of bytes.
OTHER_UNET = "; Stable Diffusion 2.0 looks like this under 2.1's name"


def parts(root: Path) -> list[tuple[str, list[Path], Callable]]:
    """(name, its folders and files, a function that loads it). On the meta device a loader reads headers only."""
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
    """Print what the folder holds, return what is wrong with it, one line a problem. Only headers are read, unless
    `hashes` asks for every file's SHA-256."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such folder")
    rows, problems, loaded = [("part", "state", "file", "dtype", "size", "published")], [], {}
    trained = sorted((root / "minigpt5").glob("*.safetensors"))
    for name, places, load in [*parts(root), *((f.stem, [f], lambda f=f: check_trained(f, loaded)) for f in trained)]:
        found = []
        try:
            loaded[name] = load()
        except ValueError as error:
            found += getattr(error, "problems", [str(error)])
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
        print("minigpt5/ holds no checkpoint: train_uas.py writes one, `published fetch` gets the released ones")
    return problems + mismatches(loaded)


def files_of(place: Path) -> list[Path]:
    try:
        return [file for file in ([place] if place.suffix else tensor_files(place)) if file.is_file()]
    except WeightsError:  # the loader reports it
        return []


def dtypes(path: Path) -> str:
    if path.suffix != ".safetensors":
        return "-"
    try:
        return "+".join(sorted({tensor.get_dtype() for tensor in read_tensors(path).values()}))
    except WeightsError:
        return "unreadable"


def published_state(path: Path, root: Path, hashes: bool) -> tuple[str, list[str]]:
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
    _, tensors = checkpoint_contents(path)
    llm_width = loaded["vicuna"].config.hidden_size
    tokens = len(loaded["text encoder"].text_model.embeddings.position_embedding.weight)
    with torch.device("meta"):
        model = VokenMapper(llm_width, loaded["unet"].config.cross_attention_dim, tokens)
        model.vokens = Vokens(tensors["vokens.input"].get_shape()[0] - 1, 0, llm_width)
    wanted, others = model.state_dict(), re.compile(r"model\.|lm_head\.|prefix_encoder\.")  # tables, LoRA, a prefix
    if below := file_below(path, wanted.keys() - tensors.keys()):
        held_below = checkpoint_contents(below)[1].keys() - tensors.keys()
        wanted = {name: tensor for name, tensor in wanted.items() if name not in held_below}
    if problems := compare(wanted, [path], lambda key: None if others.match(key) else key):
        raise WeightsError(problems[0], problems)


def mismatches(loaded: dict) -> list[str]:
    """What is wrong with parts that are each right but do not go together."""
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
        trained = {64: "epsilon", 96: "v_prediction"}.get(unet.sample_size)  # Stable Diffusion 2 for 512, 768 pixels
        if unet.block_out_channels == UNetConfig().block_out_channels and trained not in (predicts, None):
            size = unet.sample_size
            problems.append(f"unet: with sample_size {size} it predicts {trained}, the schedule says {predicts}")
    return problems
