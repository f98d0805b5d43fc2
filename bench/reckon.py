"""What MiniGPT-5 takes at the published sizes, reckoned from shapes alone: no weights, no GPU.

    python bench/reckon.py
    python bench/reckon.py --batch-sizes 1 2 4 --tokens 64

Everything runs on the meta device, whose tensors have shapes and no values. Two things are counted:

- arithmetic: floating-point operations of products, convolutions and attention, as torch counts them
- memory: bytes of all tensors alive at the worst moment of a step, beside those that are always there (weights; of what
  trains also gradients and AdamW's two moments)

Attention is taken to run in kernels that keep no scores, as on a GPU. Not counted: what torch.compile saves, kernels'
workspaces, what the allocator rounds up, the GPU's own context. Nothing is measured: the other files here do that.
"""

import argparse
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from common.cli import run
from common.collate import Batch
from generation import Sampling, paint
from llama import Llama, LlamaConfig
from minigpt5 import MiniGPT5, Noise
from scheduler import NoiseSchedule, ScheduleConfig
from trainer.compiled import checkpoint_gradients
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

VOKENS = 8
STORY = 1024  # tokens of a row of stage 2


class Ledger(TorchDispatchMode):
    """Counts what runs inside: `operations`, and `peak`, the most bytes of new tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.operations = self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        for tensor in tree_leaves((arguments, options)):
            if torch.is_tensor(tensor):
                self.known.add(tensor.untyped_storage())  # older than the ledger: not new
        if function.overloadpacket not in flop_registry:  # one made of others: count these
            with self:
                result = function.decompose(*arguments, **options)
            if result is not NotImplemented:
                return result
        result = function(*arguments, **options)
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            self.operations += count(*arguments, **options, out_val=result)
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def release(self, size: int) -> None:
        self.alive -= size


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """`scaled_dot_product_attention` as GPUs run it; the meta device would write all scores down."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = attn_mask.expand(*q.shape[:-1], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def published_stack(*configs) -> MiniGPT5:
    """All that a training step from precomputed features needs, or a picture, on the meta device, as on a GPU: frozen
    parts in bfloat16, what trains in float32. `configs` of Llama, UNet and VAE, where they are not the published."""
    llama, unet, vae = configs or (LlamaConfig(), UNetConfig(), VAEConfig())
    words = llama.vocab_size
    tokenizer = SimpleNamespace(base_vocabulary=words, image_id=words + VOKENS)
    tokenizer.voken_ids = list(range(words, words + VOKENS))
    with torch.device("meta"):
        frozen = [Llama(llama), UNet(unet), VAE(vae)]
        frozen = [part.bfloat16().requires_grad_(False) for part in frozen]
        frozen[1].to(memory_format=torch.channels_last)
        model = MiniGPT5(tokenizer, *frozen, NoiseSchedule(ScheduleConfig()), 77)
    return model


def size_of(parameters) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def kept_of(model: MiniGPT5, *parts: nn.Module) -> int:
    """Bytes of the parts' weights, and of what trains with its gradients and moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {parameter for part in parts for parameter in part.parameters() if not parameter.requires_grad}
    return size_of(frozen) + 4 * size_of(trained)


def step_of(model: MiniGPT5, batch: int, tokens: int, captioned: bool) -> Callable[[], None]:
    """The losses of rows with a picture at the end of each, and the backward pass into gradients that are there. All
    tokens and latents are zeros, on the model's device."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    target = VOKENS + 3  # with "###"
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.device)
    ends = torch.arange(tokens - target, tokens, device=model.device).repeat(batch, 1)
    which = torch.zeros(batch, dtype=torch.long, device=model.device)
    rows = Batch(ids, ends, torch.zeros_like(ends), which, ends[:, 0] - 1, torch.ones(batch, device=model.device))
    size, width = model.unet.config.sample_size, model.unet.config.cross_attention_dim
    latents = torch.zeros(batch, model.unet.config.in_channels, size, size, device=model.device)
    draws = Noise(which.bool(), latents, latents, which)
    captions = torch.zeros(batch, 77, width, device=model.device), torch.zeros(1, 77, width, device=model.device)

    def step() -> None:
        model.losses(rows, draws, (latents, latents), captions if captioned else None)["loss"].backward()

    return step


def picture_of(model: MiniGPT5, steps: int = 50) -> Callable[[], None]:
    """A picture of so many guided steps, from voken features to pixels."""
    features = torch.zeros(1, VOKENS, model.llama.config.hidden_size, device="meta")
    size = model.unet.config.sample_size
    latents = torch.zeros(1, model.unet.config.in_channels, size, size, device="meta")
    alphas = NoiseSchedule(ScheduleConfig()).alphas_cumprod.tolist()  # what a sampler reads before it begins

    def picture() -> None:
        with patch.object(torch.Tensor, "tolist", lambda _: alphas):
            paint(model, features, Sampling(steps=steps), latents)

    return picture


def reckon(call: Callable[[], None]) -> Ledger:
    with patch.object(F, "scaled_dot_product_attention", fused_attention), Ledger() as ledger:
        call()
    return ledger


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 8, 48))
    parser.add_argument("--tokens", type=int, default=48, help="of a row of stage 1, caption and vokens")
    args = parser.parse_args(argv)
    if min(args.batch_sizes) < 1 or args.tokens < VOKENS + 4:
        raise ValueError(f"--batch-sizes must be at least 1, --tokens at least {VOKENS + 4}")
    print("| what | batch | always there | a step's peak beside it | together | arithmetic of a sample |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")

    def line(what: str, batch: int, kept: int, call: Callable[[], None]) -> None:
        ledger = reckon(call)
        cells = [f"{size / 1e9:.1f} GB" for size in (kept, ledger.peak, kept + ledger.peak)]
        print(f"| {what} | {batch} | {' | '.join(cells)} | {ledger.operations / batch / 1e12:.2f} TFLOP |", flush=True)

    for stage, checkpointing in ((1, False), (1, True), (2, True)):
        model = published_stack()
        if stage == 2:
            model.add_adapters(lora={})
        if checkpointing:
            checkpoint_gradients(model)
        what = f"stage {stage}" + (f", rows of {STORY:,} tokens" if stage == 2 else "")
        what += ", --gradient-checkpointing" if checkpointing else ""
        for batch in args.batch_sizes:
            step = step_of(model, batch, STORY if stage == 2 else args.tokens, captioned=stage == 1)
            line(what, batch, kept_of(model, model.llama, model.unet), step)
    model = published_stack().requires_grad_(False)
    line("a picture, 50 guided steps", 1, size_of(model.parameters()), picture_of(model))


if __name__ == "__main__":
    run(main)
