"""What is measured: our stack's weights at a size, and the libraries' models from the same folder.

| size      | what                                                                                      |
| --------- | ----------------------------------------------------------------------------------------- |
| tiny      | the tests' small random weights: nothing to be timed                                      |
| miniature | miniature/weights, or random weights of those sizes                                       |
| half      | half the published widths, a quarter to a half of the depths, pictures of 256 pixels      |
| full      | the published sizes, random weights                                                       |

Every size is a folder of the published layout. The peers are what a user would otherwise run: transformers and
diffusers with their default settings, and torch.nn.Transformer.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import random_weights as files

from common.cli import MINIATURE
from common.files import read_json
from common.tokenizer import Tokenizer
from experiments.recipes.painter import SCHEDULE, TEXT_SIZES, UNET_SIZES, VAE_SIZES
from experiments.recipes.speaker import LANGUAGE_SIZES, QFORMER_SIZES, VISION_SIZES
from llama import Llama, LlamaConfig
from mapper import VokenMapper
from minigpt5 import Vokens
from published.loading import tensor_files
from published.parts import read_config
from qformer import LN_VISION_EPS, ImageEncoder, QFormerConfig, VisionConfig
from scheduler import ScheduleConfig
from text_encoder import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HALF = (
    LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16),
    VisionConfig(hidden_size=704, intermediate_size=3072, num_hidden_layers=20, num_attention_heads=8),
    QFormerConfig(384, 1536, 6, 6, encoder_hidden_size=704),
    UNetConfig(sample_size=32, block_out_channels=(160, 320, 640, 640), cross_attention_dim=512),
    VAEConfig(block_out_channels=(64, 128, 256, 256)),
    TextConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8),
    ScheduleConfig(),
)
SMALL_PIECES = 614  # the byte-pair vocabulary that goes with the tests' small tokenizer


def configs(size: str) -> tuple:
    """The stack's configurations, in HALF's order."""
    if size == "miniature":
        text = replace(TEXT_SIZES, vocab_size=SMALL_PIECES)
        return LANGUAGE_SIZES, VISION_SIZES, QFORMER_SIZES, UNET_SIZES, VAE_SIZES, text, SCHEDULE
    if size == "half":
        return HALF
    sizes = files.SMALL if size == "tiny" else {cls: {} for cls in files.SMALL}
    return *(cls(**values) for cls, values in sizes.items()), ScheduleConfig()


def write_weights(folder: Path, size: str) -> Path:
    """Random bfloat16 weights of a size, as tests/random_weights.py writes the full ones."""
    llama, vision, qformer, unet, vae, text, schedule = configs(size)
    small = size in ("tiny", "miniature")
    numbers = files.RandomNumbers(torch.bfloat16, 1 << (16 if small else 25), seed=0)
    with torch.device("meta"):
        pictures = ImageEncoder(vision, qformer, llama.hidden_size)
        parts = {"vicuna/model": Llama(llama), "blip2/model": pictures}
        parts |= {"minigpt4/llama_proj": nn.ModuleDict({"llama_proj": pictures.llama_proj})}
        parts |= {"stable-diffusion/unet/diffusion_pytorch_model": UNet(unet)}
        parts |= {"stable-diffusion/vae/diffusion_pytorch_model": VAE(vae)}
        parts |= {"stable-diffusion/text_encoder/model": TextEncoder(text)}
    pictures.llama_proj = nn.Identity()

    levels = len(vae.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    described = {"vision_config": asdict(vision), "qformer_config": asdict(qformer)}
    published = [
        files.LLAMA | {name: size for name, size in asdict(llama).items() if size},
        {"num_query_tokens": qformer.num_query_tokens} | described,
        None,
    ]
    published += [files.UNET | asdict(unet), files.VAE_SETTINGS | blocks | asdict(vae), files.TEXT | asdict(text)]
    for (path, module), config in zip(parts.items(), published, strict=True):
        files.write(folder / path, module, config, numbers)
    diffusion = folder / "stable-diffusion"
    files.write_json(diffusion / "scheduler" / "scheduler_config.json", files.SCHEDULER | asdict(schedule))
    (folder / "vicuna" / "tokenizer.model").write_bytes(files.sentencepiece_model(small).read_bytes())
    files.write_clip_tokenizer(diffusion / "tokenizer", small)
    length = {"model_max_length": text.max_position_embeddings}
    files.write_json(diffusion / "tokenizer" / "tokenizer_config.json", length)
    return folder


@contextmanager
def weights_of(size: str, args: argparse.Namespace) -> Iterator[Path]:
    """The folder of a size's weights: --weights are the miniature's; random ones are removed at the end, unless --keep
    names a folder for them."""
    trained = args.weights or MINIATURE
    if size == "miniature" and trained.is_dir():
        yield trained
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        whole = (args.keep or Path(folder)) / size
        if not whole.is_dir():
            write_weights(whole.with_suffix(".part"), size).rename(whole)
        yield whole


# ---- peers

transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message="enable_nested_tensor")  # of nn.Transformer


def peer_llama(weights: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return published(transformers.LlamaForCausalLM, weights / "vicuna", dtype, device)


def peer_llama_with_vokens(weights: Path, tokenizer: Tokenizer, vokens: Vokens, dtype: torch.dtype) -> nn.Module:
    """With the new rows at the end of both tables, as the released code has them."""
    llama, base = peer_llama(weights, dtype, vokens.input.device), tokenizer.base_vocabulary
    for layer, rows in ((llama.get_input_embeddings(), vokens.input), (llama.lm_head, vokens.output)):
        layer.weight = nn.Parameter(torch.cat([layer.weight[:base], rows.detach().to(dtype)]), requires_grad=False)
    llama.config.vocab_size = tokenizer.vocabulary
    return llama


def peer_text_encoder(weights: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return published(transformers.CLIPTextModel, weights / "stable-diffusion" / "text_encoder", dtype, device)


def peer_unet(weights: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return published(diffusers.UNet2DConditionModel, weights / "stable-diffusion" / "unet", dtype, device)


def peer_vae(weights: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return published(diffusers.AutoencoderKL, weights / "stable-diffusion" / "vae", dtype, device)


def published(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return cls.from_pretrained(folder, torch_dtype=dtype).to(device).eval().requires_grad_(False)


class PeerImageEncoder(nn.Module):
    """BLIP-2's vision tower and Q-Former as transformers has them, and MiniGPT-4's projection."""

    def __init__(self, weights: Path):
        super().__init__()
        sizes = read_json(weights / "blip2" / "config.json")
        tensors = {key: t for file in tensor_files(weights / "blip2") for key, t in load_file(file).items()}
        self.vision_model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**sizes["vision_config"]))
        self.vision_model.post_layernorm.eps = LN_VISION_EPS
        self.qformer = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**sizes["qformer_config"]))
        for name in ("vision_model", "qformer"):
            state = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            getattr(self, name).load_state_dict(state)
        self.query_tokens = nn.Parameter(tensors["query_tokens"])
        projection = load_file(weights / "minigpt4" / "llama_proj.safetensors")
        self.llama_proj = nn.Linear(*reversed(projection["llama_proj.weight"].shape))
        self.llama_proj.load_state_dict({key.removeprefix("llama_proj."): t for key, t in projection.items()})

    def forward(self, pixels: Tensor) -> Tensor:
        picture = self.vision_model(pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        return self.llama_proj(self.qformer(query_embeds=queries, encoder_hidden_states=picture).last_hidden_state)


class PeerMapper(nn.Module):
    """The feature mapper as the released code builds it, with torch.nn.Transformer; takes over ours' weights."""

    def __init__(self, ours: VokenMapper):
        super().__init__()
        width = ours.t2i_decoder_prompt.shape[-1]
        self.fc = nn.Sequential(nn.Linear(ours.fc[0].in_features, width), nn.GELU(), nn.Linear(width, width))
        self.llm_to_t2i_mapping = nn.Transformer(
            width, 8, 4, 4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.t2i_decoder_prompt = nn.Parameter(torch.empty_like(ours.t2i_decoder_prompt))
        self.load_state_dict(ours.state_dict())
        self.to(ours.t2i_decoder_prompt.device)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.t2i_decoder_prompt.expand(len(features), -1, -1)
        return self.llm_to_t2i_mapping(self.fc(features), queries)


def mapper_of(weights: Path, device: torch.device) -> VokenMapper:
    """An untrained mapper that fits the stack."""
    text = read_config(TextConfig, weights / "stable-diffusion" / "text_encoder" / "config.json")
    width = read_config(LlamaConfig, weights / "vicuna" / "config.json").hidden_size
    torch.manual_seed(0)
    return VokenMapper(width, text.hidden_size, text.max_position_embeddings).to(device)
