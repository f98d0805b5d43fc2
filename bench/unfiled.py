"""The stack with random weights that are made on the device: no files of many gigabytes have to be written and read.

    model = random_stack(folder, "full", device, dtype)      the folder gets config.json files and tokenizers, 3 MB
    with shared_with_libraries(model):                       transformers' and diffusers' models hold the same tensors
        libraries = bench.sample.Libraries(folder, ...)

Matrices have deviation 0.02, norms are one, biases zero, as in tests/random_weights.py. The tokenizer is the tests'
small one, with pieces added up to the vocabulary's size: all words of the benchmarks' prompts, so that these are as
long as with a real one, and pieces that no text contains.
"""

import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import random_weights as files
import sentencepiece

from common.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from minigpt5 import MiniGPT5
from published.clip_tokenizer import ClipTokenizer
from published.loading import Uninitialised
from scheduler import NoiseSchedule, ScheduleConfig
from text_encoder import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

VOKENS, TIMES = 8, "stable-diffusion/scheduler/scheduler_config.json"
SIZES = LlamaConfig, UNetConfig, VAEConfig, TextConfig


def sizes(size: str) -> list:
    """The configurations of language model, UNet, autoencoder and text encoder: "full" or the tests' "tiny"."""
    return [cls(**(files.SMALL[cls] if size == "tiny" else {})) for cls in SIZES]


# ---- settings and tokenizers


def piece(text: str, score: float) -> bytes:
    """An entry of a sentencepiece model's field 1, in the format of protobuf: its text (1) and its score (2)."""
    content = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(content)]) + content


def widened(model: bytes, size: int, words: Iterable[str]) -> bytes:
    """A sentencepiece model with pieces added, up to `size`. Repeated fields of protobuf may simply be appended. Byte
    pairs are merged one after the other, so a word needs all its beginnings."""
    known = sentencepiece.SentencePieceProcessor(model_proto=model)
    present = {known.id_to_piece(i) for i in range(len(known))}
    begun = dict.fromkeys(f"▁{word[:n]}" for word in words for n in range(1, len(word) + 1))
    added = [text for text in begun if text not in present][: size - len(known)]
    unused = [f"\ue000{i}" for i in range(size - len(known) - len(added))]  # of a private character
    return model + b"".join([*(piece(text, 0.0) for text in added), *(piece(text, -1e9) for text in unused)])


def write_settings(folder: Path, size: str, words: Iterable[str]) -> None:
    """The published layout without tensors: what the libraries need beside these."""
    llama, unet, vae, text = sizes(size)
    levels = len(vae.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    settings = {
        "vicuna/config.json": files.LLAMA | {name: size for name, size in asdict(llama).items() if size},
        "stable-diffusion/unet/config.json": files.UNET | asdict(unet),
        "stable-diffusion/vae/config.json": files.VAE_SETTINGS | blocks | asdict(vae),
        "stable-diffusion/text_encoder/config.json": files.TEXT | asdict(text),
        TIMES: files.SCHEDULER | asdict(ScheduleConfig()),
    }
    for name, content in settings.items():
        files.write_json(folder / name, content)
    model = files.sentencepiece_model(small=True).read_bytes()
    (folder / "vicuna" / "tokenizer.model").write_bytes(widened(model, llama.vocab_size, words))
    files.write_clip_tokenizer(folder / "stable-diffusion" / "tokenizer", small=size == "tiny")


# ---- our stack


@torch.no_grad()
def random_part(module: type[nn.Module], config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen part whose random numbers come from the device's own generator."""
    with torch.device("meta"), Uninitialised():
        part = module(config)
    part = part.to(dtype).to_empty(device=device)
    if module in (UNet, VAE):  # as published/parts.py has them
        part.to(memory_format=torch.channels_last)
    for name, tensor in part.state_dict().items():
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() == 1:  # of a norm
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=0.02)
    return part.eval().requires_grad_(False)


def random_stack(
    folder: Path, size: str, device: torch.device, dtype: torch.dtype, captions: bool = False, words: Iterable[str] = ()
) -> MiniGPT5:
    """All parts but the image encoder, and the text encoder only with `captions`. Vokens and mapper are untrained."""
    torch.manual_seed(0)
    write_settings(folder, size, words)
    *painters, text = zip((Llama, UNet, VAE, TextEncoder), sizes(size), strict=True)
    llama, unet, vae = (random_part(module, config, device, dtype) for module, config in painters)
    text_encoder = random_part(*text, device, dtype) if captions else None
    clip_tokenizer = ClipTokenizer(folder / "stable-diffusion" / "tokenizer") if captions else None
    tokenizer = Tokenizer(folder / "vicuna" / "tokenizer.model", VOKENS)
    schedule, tokens = NoiseSchedule(ScheduleConfig(), device), text[1].max_position_embeddings
    with device:
        return MiniGPT5(tokenizer, llama, unet, vae, schedule, tokens, None, text_encoder, clip_tokenizer)


# ---- the libraries' models


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are made inside have no memory; buffers, which no file holds, have their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        parameter = parameter if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", register_on_meta), Uninitialised():
        yield


def with_tensors_of(part: nn.Module, peer: nn.Module, device: torch.device) -> nn.Module:
    """A library's model around our tensors. Their memory layout is the plain one, as when it is loaded from files."""
    state: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in part.state_dict().items()}
    if not set(state) & set(peer.state_dict()):  # transformers 5 has names of its own for the text encoder
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    peer.load_state_dict(state, strict=True, assign=True)
    return peer.to(device).eval().requires_grad_(False)


def maker_of_peers(model: MiniGPT5) -> Callable:
    """What takes the place of `bench.peers.published`: (class, folder, dtype, device) -> that class's model."""
    parts = {"vicuna": model.llama, "unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}

    def make(cls: type[nn.Module], folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        with parameters_on_meta():
            if hasattr(cls, "load_config"):  # of diffusers
                peer = cls.from_config(cls.load_config(folder))
            else:
                peer = cls(cls.config_class.from_pretrained(folder))
        return with_tensors_of(parts[folder.name], peer, device)

    return make


@contextmanager
def shared_with_libraries(model: MiniGPT5) -> Iterator[None]:
    """Inside, the peers of `bench.peers` hold the model's own tensors. ImportError where a library is missing."""
    from bench import peers

    with patch.object(peers, "published", maker_of_peers(model)):
        yield
