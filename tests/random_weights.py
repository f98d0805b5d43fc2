"""Random weights of every part in the published layout: for tests of the commands (small) and for speed (full size).

    python tests/random_weights.py DIR [--dtype bf16]     # published sizes, 18 GB in bf16
    python tests/random_weights.py DIR --small            # a few MB, for tests

Matrices have deviation 0.02, norms are one, biases zero, so that activations keep their size. There is no minigpt5/
folder: what MiniGPT-5 trains starts from its own random values. The full-size tokenizers only have the right sizes: any
32,000-piece sentencepiece model, and, for CLIP's vocabulary, byte pairs in no particular order.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from llama import Llama, LlamaConfig
from published.loading import save_safetensors
from qformer import ImageEncoder, QFormerConfig, VisionConfig
from scheduler import ScheduleConfig
from text_encoder import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

GOLDEN_TOKENIZERS = Path(__file__).parent / "golden" / "tokenizer"
SHARD = 2_400_000_000  # bytes; writing a file may need them twice

SMALL = {
    LlamaConfig: {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    VisionConfig: {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
    },
    QFormerConfig: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "encoder_hidden_size": 48,
        "num_query_tokens": 8,
    },
    UNetConfig: {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
    },
    VAEConfig: {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
    TextConfig: {
        "vocab_size": 614,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
# What published config.json files say besides the sizes, so that transformers and diffusers load the folders too.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
LLAMA |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "pad_token_id": 0}
UNET = {"_class_name": "UNet2DConditionModel", "use_linear_projection": True, "act_fn": "silu"}
VAE_SETTINGS = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "trained_betas": None,
    "timestep_spacing": "leading",
    "skip_prk_steps": True,
}


class RandomNumbers:
    """Tensors cut from one random buffer at changing places: as fast as copying."""

    def __init__(self, dtype: torch.dtype, size: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer = (0.02 * torch.randn(size, generator=self.generator)).to(dtype)

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=self.buffer.dtype)
        if name.endswith("weight") and len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=self.buffer.dtype)
        values, size = torch.empty(shape.numel(), dtype=self.buffer.dtype), len(self.buffer)
        at = int(torch.randint(size, (), generator=self.generator))
        for start in range(0, len(values), size):
            part = values[start : start + size]
            head = min(size - at, len(part))
            part[:head], part[head:] = self.buffer[at : at + head], self.buffer[: len(part) - head]
        return values.view(shape)


def write_random_weights(folder: Path, small: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Fill `folder`; returns it."""
    folder = Path(folder)
    configs = {cls: cls(**(values if small else {})) for cls, values in SMALL.items()}
    llama, vision, qformer, unet, vae, text = configs.values()
    numbers = RandomNumbers(dtype, 1 << (16 if small else 25), seed)
    with torch.device("meta"):
        language, unet_module, vae_module, text_module = Llama(llama), UNet(unet), VAE(vae), TextEncoder(text)
        picture = ImageEncoder(vision, qformer, llama.hidden_size)
    projection, picture.llama_proj = picture.llama_proj, nn.Identity()

    sd, values = folder / "stable-diffusion", dataclasses.asdict
    levels = len(vae.block_out_channels)
    vae_blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    blip2 = {"model_type": "blip-2", "num_query_tokens": qformer.num_query_tokens}
    blip2 |= {"vision_config": values(vision), "qformer_config": values(qformer)}
    write(folder / "vicuna" / "model", language, LLAMA | values(llama), numbers)
    write(folder / "blip2" / "model", picture, blip2, numbers)
    write(folder / "minigpt4" / "llama_proj", nn.ModuleDict({"llama_proj": projection}), None, numbers)
    write(sd / "unet" / "diffusion_pytorch_model", unet_module, UNET | values(unet), numbers)
    write(sd / "vae" / "diffusion_pytorch_model", vae_module, VAE_SETTINGS | vae_blocks | values(vae), numbers)
    write(sd / "text_encoder" / "model", text_module, TEXT | values(text), numbers)
    write_json(sd / "scheduler" / "scheduler_config.json", SCHEDULER | values(ScheduleConfig()))
    shutil.copyfile(sentencepiece_model(small), folder / "vicuna" / "tokenizer.model")
    write_clip_tokenizer(sd / "tokenizer", small)
    return folder


def write(path: Path, module: nn.Module, config: dict | None, numbers: RandomNumbers) -> None:
    """The tensors of a meta-device `module` into `path`.safetensors or into shards with an index."""
    folder, stem = path.parent, path.name
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(split({name: tensor.shape for name, tensor in module.state_dict().items()}, numbers.buffer.itemsize))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        save_safetensors({name: numbers.tensor(name, shape) for name, shape in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if config:
        write_json(folder / "config.json", config)


def split(shapes: dict[str, torch.Size], itemsize: int) -> Iterator[dict[str, torch.Size]]:
    shard, size = {}, 0
    for name, shape in shapes.items():
        if shard and size + shape.numel() * itemsize > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += shape.numel() * itemsize
    yield shard


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def sentencepiece_model(small: bool) -> Path:
    if small:
        return GOLDEN_TOKENIZERS / "tokenizer.model"
    import mistral_common  # carries a 32,000-piece model; Vicuna's own may not be redistributed

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def write_clip_tokenizer(folder: Path, small: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if small:
        shutil.copyfile(GOLDEN_TOKENIZERS / "clip_vocab.json", folder / "vocab.json")
        shutil.copyfile(GOLDEN_TOKENIZERS / "clip_merges.txt", folder / "merges.txt")
        return
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # from "!", the padding token, on
    letters = [
        chr(code) for code in [*printable, *range(256, 512 - len(printable))]
    ]  # CLIP's spelling of the 256 bytes
    pairs = [(a, b) for a in letters for b in letters][: TextConfig().vocab_size - 2 * len(letters) - 2]
    tokens = [*letters, *(f"{a}</w>" for a in letters), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs)]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write random weights in the published layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="bf16")
    parser.add_argument("--small", action="store_true", help="tiny sizes instead of the published ones")
    options = parser.parse_args()
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    write_random_weights(options.folder, options.small, dtypes[options.dtype])
