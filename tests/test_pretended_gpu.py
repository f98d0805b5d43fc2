"""Whole commands on a GPU that is not there: values stay in the host's memory, beside them is written down which would
be on the GPU. What a GPU would refuse fails: operands on both sides, numpy() and pinning of the GPU's tensors."""

import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train_mls
import train_uas
from baselines import gill, train_sd
from common.cli import MINIATURE
from common.page import save_image
from experiments import pretrain
from experiments.recipes.recipe import Setup
from miniature.paint import draw
from miniature.world import sample_pair

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
KNOWN = {}  # a storage's address: what keeps it from being given away again, and whether it is on the GPU


def put(x, on_gpu):
    if x.untyped_storage().device == HOST:
        KNOWN[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage()), on_gpu
    return x


def place(x):
    """Whether it is on the GPU; None: made inside of autograd, and not yet met by others."""
    return KNOWN.get(x.untyped_storage()._cdata, (None, None))[1]


def moved(x, *args, device=None, dtype=None, copy=False, non_blocking=None, memory_format=None):
    device = next((value for value in args if isinstance(value, str | torch.device)), device)
    dtype = next((value for value in args if isinstance(value, torch.dtype)), dtype)
    to_gpu = bool(place(x)) if device is None else torch.device(device) != HOST
    copy, layout = copy or to_gpu != bool(place(x)), memory_format or torch.preserve_format
    y = x.to(dtype or x.dtype, copy=copy, memory_format=layout)
    return y if y is x else put(y, to_gpu)


class Calls(TorchFunctionMode):
    """Takes devices off Python's calls."""

    def __torch_function__(self, function, types, args=(), options=None):
        name, options = function.__name__, {key: x for key, x in (options or {}).items() if key != "pin_memory"}
        if function == torch.Tensor.device.__get__:
            return GPU if place(args[0]) else function(*args)
        if name in ("to", "cpu") and args[0].device == HOST and not any(map(torch.is_tensor, args[1:])):
            return moved(args[0], HOST) if name == "cpu" else moved(*args, **options)
        assert name not in ("pin_memory", "numpy", "__array__") or not place(args[0]), f"{name}() on the GPU"
        if name == "pin_memory":
            return args[0]
        on_gpu = torch.device(options.get("device") or HOST).type == "cuda"
        result = function(*args, **options | ({"device": HOST} if on_gpu else {}))
        for x in filter(torch.is_tensor, tree_leaves(result)):
            put(x, on_gpu) if on_gpu or place(x) is None else None
        return result


class Kernels(TorchDispatchMode):
    """What comes of the GPU's tensors is on the GPU; with them go none of the host's but single numbers and indices."""

    def __torch_dispatch__(self, function, types, args=(), options=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        tensors = [x for x in tree_leaves((args, options)) if torch.is_tensor(x)]
        places, old = [place(x) for x in tensors], {x.untyped_storage()._cdata for x in tensors}
        meet = name not in ("_to_copy", "copy_") and not (name in ("index", "index_put_") and places[0])
        if meet and True in places and any(x.dim() and y is False for x, y in zip(tensors, places, strict=True)):
            raise AssertionError(f"{name} of {[tuple(x.shape) for x in tensors]}, on the GPU: {places}")
        result = function(*args, **(options or {}))
        for x in filter(torch.is_tensor, tree_leaves(result)):
            if x.untyped_storage()._cdata not in old and {True, False} & set(places):
                put(x, True in places)
        return result


class HostGenerator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


@pytest.fixture
def gpu(monkeypatch):
    KNOWN.clear()
    answers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1}
    for name, answer in {**answers, "max_memory_allocated": 0, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, *rest, **options: autocast("cpu", *rest, **options))
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    # Layers that are computed again run inside of autograd, where tensors seem to be the host's: no detours for CPUs.
    monkeypatch.setattr("published.cpu.is_bf16_on_cpu", lambda _: False)
    with Kernels(), Calls():
        yield


def test_what_is_noticed(gpu):
    there, here = torch.zeros(2, 2, device=GPU), torch.zeros(2, 2)
    for fault in (lambda: there @ here, there.numpy, there.pin_memory, lambda: here[here.to(GPU).long()]):
        with pytest.raises(AssertionError):
            fault()
    assert (there.cpu() + here).device == HOST and (here.to(GPU) + there[0]).device == GPU


TRAIN = ["--drawn", "12", "--steps", "2", "--batch-size", "2", "--workers", "0", "--sample-every", "2"]
ASK = ["--image", "a.png", "--steps", "2", "--max-new-tokens", "4", "--force-image", "--prompt", "a red boat"]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (train_uas, TRAIN),
        (train_mls, TRAIN),
        (train_mls, [*TRAIN, "--prefix", "--gradient-checkpointing"]),
        (train_sd, [*TRAIN, "--gradient-checkpointing"]),
        (gill, TRAIN),
        (sample, [*ASK, "--turns", "2"]),
        (sample, [*ASK, "--int8"]),
    ],
)
def test_commands(gpu, monkeypatch, tmp_path, module, options):
    monkeypatch.chdir(tmp_path)
    save_image(draw(*sample_pair(0, 0)[::2]), tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["command", *options, "--device", "cuda"])
    module.main()


@pytest.mark.parametrize("part", [part for part in pretrain.PARTS if part != "language"])  # whose tokenizer takes long
def test_pretraining(gpu, part, tmp_path):
    recipe = pretrain.PARTS[part](shop := Setup(tmp_path, MINIATURE, GPU, pictures=16, tested=2))
    recipe.batch_size = 2
    recipe.export(pretrain.train(recipe, shop, minutes=1, last_step=1), tmp_path / "weights")
