"""The language model's matrices in 8 bits: half of bfloat16's memory, and half of what a GPU reads for every token.

    python quantize.py --weights weights --text some.txt     # perplexity of a text before and after

Each row of a matrix becomes whole numbers from -127 to 127 and a scale, which the product gets: x (s Q)^T = s (x Q^T).
torch.compile joins the conversion of Q with the product, so that a compiled token reads 8-bit numbers only; without it
nothing gets faster. Embeddings and norms keep their type: they are small. LoRA may be added on top.

    weight (out, in) -> Q (out, in) int8, scale (out,)
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import DTYPES, add_weights_option, pick_device, run
from llama import Llama, Tokenizer, load_llama


class Int8Linear(nn.Linear):
    def __init__(self, weight: Tensor, scale: Tensor):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a matrix of floats
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def int8_rows(weight: Tensor, dtype: torch.dtype, device: str | torch.device, n: int = 1024) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> int8 (out, in) and scale (out,) in `dtype`, on `device`; n rows at a time, to save memory."""
    quantised, scales = torch.empty(weight.shape, dtype=torch.int8, device=device), []
    for start in range(0, len(weight), n):
        rows = weight[start : start + n].to(device).float()
        scales.append((rows.abs().amax(1) / 127).clamp(min=1e-8).to(dtype))  # rounded before it divides
        quantised[start : start + n] = (rows / scales[-1].float()[:, None]).round()
    return quantised, torch.cat(scales)


@torch.no_grad()
def load_int8_llama(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> Llama:
    """`load_llama` with the blocks' matrices in 8 bits, which are made from the mapped file row by row."""
    llama = load_llama(folder)
    for parent in list(llama.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(*int8_rows(child.weight, dtype, device)))
    return llama.to(device, dtype)


@torch.no_grad()
def perplexity(llama: Llama, ids: Tensor, length: int = 512) -> float:
    """Of ids (T,), each predicted from those before it in its piece of `length`."""
    losses = []
    for piece in (piece for piece in ids.split(length) if len(piece) > 1):
        logits = llama.lm_head(llama(llama.model.embed_tokens(piece[None, :-1])))[0].float()
        losses.append(F.cross_entropy(logits, piece[1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a text, as stored and in 8 bits.")
    add_weights_option(parser)
    parser.add_argument("--text", type=Path, required=True, help="plain text in UTF-8")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bf16 on a GPU, else fp32")
    args = parser.parse_args()
    folder, device = args.weights / "vicuna", pick_device(args.device)
    dtype = DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    try:
        text = args.text.read_text("utf-8")
    except UnicodeError:
        raise ValueError(f"{args.text}: not UTF-8") from None
    ids = torch.tensor(tokenizer.encode(tokenizer.plain(text)), device=device)
    if len(ids) < 2:
        raise ValueError(f"{args.text}: too short to predict a token of it")
    for name, load in (("as stored", load_llama), ("in 8 bits", load_int8_llama)):
        print(f"perplexity {name}: {perplexity(load(folder, dtype, device), ids):.4f}")


if __name__ == "__main__":
    run(main)
