"""Safetensors, checkpoints, pickles and config.json: what fuzz.py feeds to the loaders. See data_families.py."""

import json
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from random import Random
from unittest import mock

import safetensors.torch
import torch
from bad_files import BAD_CONFIGS, BAD_SAFETENSORS, MAY_LOAD, bad_config, cut, flip
from data_families import require, void
from helpers import DATA
from random_weights import GOLDEN_TOKENIZERS, write_random_weights

import train_uas
from common.tokenizer import Tokenizer
from published.clip_tokenizer import ClipTokenizer
from published.convert import read_tensors
from published.loading import find_checkpoint, load, load_trained, open_checkpoint, save_trained
from published.parts import (
    load_image_encoder,
    load_llama,
    load_minigpt5,
    load_schedule,
    load_text_encoder,
    load_unet,
    load_vae,
)
from scheduler import SAMPLERS
from trainer.checkpoint import load_checkpoint, save_checkpoint

GOLDEN = GOLDEN_TOKENIZERS.parent

# ---- weights and checkpoints


@cache
def weights() -> Path:
    """Random weights in the published layout, with a checkpoint; small enough to load in no time."""
    torch.manual_seed(0)
    folder = write_random_weights(Path(tempfile.mkdtemp()))
    return folder


@cache
def trained() -> tuple:
    """A model with an adapter, an optimiser that has made a step, their checkpoint's files."""
    model = load_minigpt5(weights(), read_pictures=False)
    model.add_adapters(lora={"targets": ("q_proj",), "rank": 2, "alpha": 4.0})
    parameters = list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = Path(tempfile.mkdtemp())
    state, save = {"step": 7, "data": DATA}, partial(save_trained, model, model.trained_parameters(), stage="uas")
    saved = save_checkpoint(folder, state, model.trained_parameters(), [optimizer], save)
    contents = {path.name: path.read_bytes() for path in saved.iterdir()}
    shutil.rmtree(folder)
    return model, optimizer, contents, {name: p.detach().clone() for name, p in model.trained_parameters().items()}


BAD_WEIGHTS = (*BAD_SAFETENSORS, *(f"a run's {name}" for name in BAD_SAFETENSORS))
BAD_WEIGHTS += ("index of shards", "state.json", "pickle changed", "pickle cut", "pickle runs code", "sentencepiece")


def read_bad_weights(what: str, rng: Random, folder: Path) -> str:
    if what == "index of shards":
        return read_bad_shards(rng, folder)
    if what.startswith("pickle"):
        return read_bad_pickle(what, rng, folder)
    if what == "sentencepiece":
        content = (GOLDEN_TOKENIZERS / "tokenizer.model").read_bytes()
        (folder / "tokenizer.model").write_bytes(rng.choice((cut, flip))(rng, content))
        return void(Tokenizer(folder / "tokenizer.model").encode("a cat [IMG0] ### ünï")) or "used"
    if what.startswith("a run's ") or what == "state.json":
        return read_bad_run(what, rng, folder)
    return read_bad_module(what, rng, folder) if rng.random() < 0.5 else read_bad_checkpoint(what, rng, folder)


def read_bad_module(what: str, rng: Random, folder: Path) -> str:
    """A frozen part."""
    good = {"weight": torch.randn(4, 6), "bias": torch.randn(4)}
    path = folder / "model.safetensors"
    path.write_bytes(BAD_SAFETENSORS[what](rng, safetensors.torch.save(good)))
    dtype = rng.choice((None, torch.float32, torch.bfloat16))
    layer = load(partial(torch.nn.Linear, 6, 4), [path], dtype=dtype)
    require(what in MAY_LOAD, "loaded in spite of that")
    require(all(p.is_floating_point() for p in layer.parameters()), "whole numbers as weights")
    expected = good["bias"] + good["weight"].sum(1)
    computed = layer.float()(torch.ones(1, 6))[0]
    require(what != "nothing" or torch.allclose(computed, expected, atol=0.1), "other weights than stored")
    return "used"


def read_bad_checkpoint(what: str, rng: Random, folder: Path) -> str:
    """trained.safetensors, as sample.py reads it."""
    model, _, contents, good = trained()
    path = folder / "trained.safetensors"
    path.write_bytes(BAD_SAFETENSORS[what](rng, contents["trained.safetensors"]))
    require(find_checkpoint(path) == path, "not found")
    load_minigpt5(weights(), path, read_pictures=False)
    require(what in MAY_LOAD, "loaded in spite of that")
    adapters = open_checkpoint(path).adapters
    require(adapters["lora"]["rank"] == 2 and 0 < adapters["lora"]["alpha"] < 1e6, f"{adapters}")
    load_trained(model, path)
    for name, parameter in model.trained_parameters().items():
        require(what != "nothing" or torch.equal(parameter, good[name]), f"{name} is not as saved")
        require(parameter.isfinite().all() or what == "another type", f"{name} is not finite")
    return "used"


def read_bad_run(what: str, rng: Random, folder: Path) -> str:
    """A run's newest checkpoint is bad, perhaps there is an older one: `load_checkpoint`."""
    model, optimizer, contents, _ = trained()
    older = rng.random() < 0.5
    for name in ("step-00000003", "step-00000007")[not older :]:
        (folder / name).mkdir()
        for file, content in contents.items():
            (folder / name / file).write_bytes(content)
    if older:
        (folder / "step-00000003" / "state.json").write_text(json.dumps({"step": 3, "data": DATA}), encoding="utf-8")
    newest = folder / "step-00000007"
    if what == "state.json":
        content = contents["state.json"]
        (newest / "state.json").write_bytes(bad_config(rng, json.loads(content), rng.choice(BAD_CONFIGS[1:])))
    else:
        name = rng.choice(("trained.safetensors", "optimizer.safetensors"))
        (newest / name).write_bytes(BAD_SAFETENSORS[what.removeprefix("a run's ")](rng, contents[name]))
    state = load_checkpoint(folder, model.trained_parameters(), [optimizer], partial(load_trained, model))
    require(isinstance(state["step"], int), f"step {state['step']!r}")
    for parameter in model.trained_parameters().values():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            require(
                kind == "step" or tensor.shape == parameter.shape, f"the optimiser's {kind} has shape {tensor.shape}"
            )
            require(tensor.is_floating_point(), f"the optimiser's {kind} is {tensor.dtype}")
    return "used"


def read_bad_shards(rng: Random, folder: Path) -> str:
    tensors = {"weight": torch.ones(4, 6), "bias": torch.ones(4)}
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    safetensors.torch.save_file(tensors, folder.parent / "outside.safetensors")
    good = dict.fromkeys(tensors, "a.safetensors")
    outside = {"weight": "../outside.safetensors", "bias": str(folder.parent / "outside.safetensors")}
    odd = (
        [],
        5,
        "a.safetensors",
        {},
        {"weight": 5},
        {"weight": None},
        {"weight": "b.safetensors"},
        {"weight": "a\0b"},
        {"weight": ["a"]},
    )
    weight_map = rng.choice((good, outside, {"weight": "/etc/passwd"}, {"weight": "x" * 5000}, {"weight": ""}, *odd))
    index = rng.choice(({"weight_map": weight_map}, {"weight_map": weight_map}, {"weight_map": weight_map}, {}))
    (folder / "a.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    load(partial(torch.nn.Linear, 6, 4), folder)
    require(weight_map is good, f"loaded with {weight_map}")
    return "used"


class Runs:
    def __reduce__(self):
        return sys.exit, ("unpickled",)


def read_bad_pickle(what: str, rng: Random, folder: Path) -> str:
    path = folder / "stage1.ckpt"
    if what == "pickle runs code":
        torch.save(
            {"state_dict": {"a": torch.ones(2), "b": Runs()}}, path, _use_new_zipfile_serialization=rng.random() < 0.5
        )
    else:
        content = (GOLDEN / "stage1.ckpt").read_bytes()
        path.write_bytes(cut(rng, content) if what == "pickle cut" else flip(rng, content))
        if rng.random() < 0.3:
            torch.save({"a": torch.ones(3), "b": {"c": 1}}, path, _use_new_zipfile_serialization=False)
            path.write_bytes((cut if what == "pickle cut" else flip)(rng, path.read_bytes()))
    tensors = read_tensors(path)
    require(what == "pickle changed", "loaded in spite of that")
    require(all(tensor[:].numel() >= 0 for tensor in tensors.values() if tensor.dim()), "")
    return "used"


# ---- config.json and other settings


@torch.no_grad()
def run_llama(folder: Path) -> None:
    llama = load_llama(folder)
    finite(llama(llama.model.embed_tokens(torch.tensor([[1, 5, 7]]))))


def finite(x: torch.Tensor) -> None:
    require(x.isfinite().all(), "computes what is no number")


@torch.no_grad()
def run_unet(folder: Path) -> None:
    unet = load_unet(folder)
    size, width = min(unet.config.sample_size, 16), unet.config.cross_attention_dim
    finite(unet(torch.ones(1, unet.config.in_channels, size, size), torch.tensor([500]), torch.ones(1, 3, width)))


@torch.no_grad()
def run_vae(folder: Path) -> None:
    vae = load_vae(folder)
    mean, _ = vae.encode(torch.ones(1, 3, 16, 16))
    finite(vae.decode(mean))


@torch.no_grad()
def run_text_encoder(folder: Path) -> None:
    finite(load_text_encoder(folder)(torch.tensor([[1, 5, 7]]), torch.ones(1, 3, dtype=torch.long)))


@torch.no_grad()
def run_image_encoder(folder: Path) -> None:
    encoder = load_image_encoder(folder.parent)
    finite(encoder(torch.ones(1, 3, *[encoder.vision_model.config.image_size] * 2)))


def run_schedule(folder: Path) -> None:
    schedule = load_schedule(folder)
    finite(schedule.alphas_cumprod)
    require(schedule.alphas_cumprod.min() > 0 and schedule.alphas_cumprod.max() <= 1, "a share of signal beyond 0 to 1")
    for sampler in SAMPLERS.values():
        made = sampler(schedule, 5)
        finite(made.step(torch.ones(1, 1, 1, 1), 0, torch.ones(1, 1, 1, 1)))


def run_clip_tokenizer(folder: Path) -> None:
    ids, _ = ClipTokenizer(folder)(["a cat, a dog"])
    require(ids.shape[0] == 1 and 3 <= ids.shape[1] <= 77, f"{ids.shape}")


def run_command(folder: Path) -> None:
    """WEIGHTS/minigpt5/config.json, which suits the options of a command to the weights."""
    arguments = ["train_uas.py", "--weights", str(folder.parent)]
    with mock.patch("sys.argv", arguments), mock.patch("sys.stderr", sys.stdout):
        try:
            args = train_uas.arguments()
        except SystemExit as error:  # argparse has said what is wrong, in one line
            raise ValueError(f"{folder}: argparse {error}") from None
    require(type(args.batch_size) is int and args.batch_size > 0, f"--batch-size {args.batch_size!r}")
    require(isinstance(args.lr, float | int) and not isinstance(args.lr, bool), f"--lr {args.lr!r}")
    require(isinstance(args.no_cap, bool) and isinstance(args.device, torch.device), f"{args}")


CONFIGS = {
    "vicuna/config.json": run_llama,
    "stable-diffusion/unet/config.json": run_unet,
    "stable-diffusion/vae/config.json": run_vae,
    "stable-diffusion/text_encoder/config.json": run_text_encoder,
    "blip2/config.json": run_image_encoder,
    "stable-diffusion/scheduler/scheduler_config.json": run_schedule,
    "stable-diffusion/tokenizer/vocab.json": run_clip_tokenizer,
    "stable-diffusion/tokenizer/tokenizer_config.json": run_clip_tokenizer,
    "minigpt5/config.json": run_command,
}
SETTINGS = {  # files that the random weights do not have
    "stable-diffusion/tokenizer/tokenizer_config.json": {"model_max_length": 77, "pad_token": "!"},
    "minigpt5/config.json": {"train_uas": {"batch_size": 4, "lr": 0.001, "no_cap": True, "device": "cpu", "vokens": 4}},
}


def read_config_file(what: str, rng: Random, folder: Path) -> str:
    name, damage = what.split(": ")
    shutil.copytree(weights(), folder, copy_function=lambda a, b: Path(b).symlink_to(a), dirs_exist_ok=True)
    path = folder / name
    content = SETTINGS.get(name) or json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(bad_config(rng, json.loads(json.dumps(content)), damage))
    CONFIGS[name](path.parent)
    return "used"


WEIGHT_FAMILIES = {
    "checkpoints": (BAD_WEIGHTS, read_bad_weights),
    "configs": (tuple(f"{name}: {damage}" for damage in BAD_CONFIGS for name in CONFIGS), read_config_file),
}
