"""One loader for each part of the stack, and for all of MiniGPT-5. All parts are frozen and in eval mode.

    weights/vicuna                     load_llama           config.json *.safetensors
    weights/blip2, weights/minigpt4    load_image_encoder   the names of Salesforce/blip2-flan-t5-xxl, and llama_proj
    weights/stable-diffusion/unet      load_unet            as published for 2.1-base and 2.1, and so the others:
    weights/stable-diffusion/vae       load_vae             with the attention's old or new names
    .../text_encoder, .../scheduler    load_text_encoder, load_schedule

A setting that would be computed wrongly without being noticed is refused. dtype None keeps the stored one.
All errors are WeightsError or, from the parts, ValueError: one line that names the file.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from llama import Llama, LlamaConfig
from minigpt5 import MiniGPT5
from published.checkpoints import checkpoint_adapters, checkpoint_contents, load_trained
from published.clip_tokenizer import ClipTokenizer
from published.cpu import HAS_AMX, use_float32_kernels
from published.int8 import to_int8
from published.loading import (
    Uninitialised,
    WeightsError,
    check_settings,
    fill,
    read_config,
    shapes_only,
    stored,
    tensor_files,
)
from qformer import ImageEncoder, QFormerConfig, VisionConfig
from scheduler import NoiseSchedule, ScheduleConfig
from text_encoder import ACTIVATIONS, TextConfig, TextEncoder
from tokenizer import Tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

Device = str | torch.device
Rename = Callable[[str], str | None]


def load(
    config: Path,
    build: Callable[[], nn.Module],
    files: list[Path],
    dtype: torch.dtype | None,
    device: Device,
    rename: Rename | None = None,
    channels_last: bool = False,
) -> nn.Module:
    """What `build` makes, with the tensors of `files` for parameters. `config` is the file that its sizes are from."""
    with shapes_only(config):
        part = build()
    return with_fast_kernels(fill(part, files, rename, dtype, device, channels_last))


def with_fast_kernels(part: nn.Module) -> nn.Module:
    if any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in part.parameters()):
        use_float32_kernels(part)
    return part


# ---- Vicuna


def llama_name(key: str) -> str | None:
    """Old files carry the rotary frequencies as buffers; they follow from the configuration."""
    return None if key.endswith("rotary_emb.inv_freq") else key


def load_llama(folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> Llama:
    path = folder / "config.json"
    check_settings(path, {"rope_scaling": (None,)})
    config = read_config(LlamaConfig, path)
    if config.hidden_size // config.num_attention_heads % 2:
        raise WeightsError(f"{path}: rotary positions need heads of even width")
    return load(path, lambda: Llama(config), tensor_files(folder), dtype, device, llama_name)


def load_int8_llama(folder: Path, dtype: torch.dtype, device: Device = "cpu") -> Llama:
    """`load_llama` with the blocks' matrices in 8 bits, which are made of the mapped file row by row."""
    return with_fast_kernels(to_int8(load_llama(folder), dtype, device))


# ---- EVA-ViT, Q-Former and their projection

# Parts of published files that MiniGPT-4 does not use.
BLIP2_UNUSED = re.compile(
    r"qformer\.(embeddings|cls|pooler)\."  # words: MiniGPT-4 gives the Q-Former queries only
    r"|qformer\.encoder\.layer\.\d+\.(intermediate|output)\."  # the words' feed-forward
    r"|(t5|opt|llm|vision|text)_proj\.|itm_head\.|temp$|language_(model|projection)\."  # other models' heads
    r"|(norm|fc_norm|head|lm_head)\.|mask_token$"  # EVA's own end; BLIP-2 takes the last block's output
)


def load_image_encoder(weights: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> ImageEncoder:
    """From weights/blip2 and weights/minigpt4."""
    blip2, projection = Path(weights) / "blip2", Path(weights) / "minigpt4" / "llama_proj.safetensors"
    path = blip2 / "config.json"
    vision = read_config(VisionConfig, path, "vision_config")
    queries = read_config(QFormerConfig, path).num_query_tokens  # the one field at the file's top level
    qformer = replace(read_config(QFormerConfig, path, "qformer_config"), num_query_tokens=queries)
    shapes = {key: tensor.get_shape() for _, key, _, tensor in stored([projection])}
    llm_width = (shapes.get("llama_proj.weight") or [4096])[0]
    files = [*tensor_files(blip2, ("vision_model.", "qformer.", "query_tokens")), projection]

    def rename(key: str) -> str | None:
        return None if BLIP2_UNUSED.match(key) else key

    return load(path, lambda: ImageEncoder(vision, qformer, llm_width), files, dtype, device, rename)


# ---- Stable Diffusion

# Published settings that change the result without changing a tensor's name or shape, so that `fill` would not notice,
# and the values that are computed here; None: left out. A file without use_linear_projection means false (SD 1).
UNET_SETTINGS = {
    "use_linear_projection": (True,),
    "act_fn": ("silu", None),
    "center_input_sample": (False, None),
    "downsample_padding": (1, None),
    "freq_shift": (0, 1, None),
    "mid_block_scale_factor": (1, None),
    "only_cross_attention": (False, None),
    "dual_cross_attention": (False, None),
    "resnet_skip_time_act": (False, None),
    "resnet_out_scale_factor": (1, None),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
VAE_SETTINGS = {"act_fn": ("silu", None), "shift_factor": (None,), "latents_mean": (None,)}
VAE_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
TEXT_SETTINGS = {"hidden_act": (*ACTIVATIONS, None)}
SCHEDULE_SETTINGS = {
    "beta_schedule": ("scaled_linear", "linear", None),
    "prediction_type": ("epsilon", "v_prediction", None),
    "timestep_spacing": ("leading", None),
    "steps_offset": (0, 1, None),
    "skip_prk_steps": (True, None),
    "trained_betas": (None,),
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "rescale_betas_zero_snr": (False, None),
}


def read_unet_config(path: Path) -> UNetConfig:
    check_settings(path, UNET_SETTINGS)
    config = read_config(UNetConfig, path)
    levels = len(config.block_out_channels)
    if len(config.attention_head_dim) == 1:  # published with one number for all levels, or with a number for each
        config = replace(config, attention_head_dim=config.attention_head_dim * levels)
    for name in ("down_block_types", "up_block_types", "attention_head_dim"):
        if len(getattr(config, name)) != levels:
            raise WeightsError(f"{path}: {name} should have {levels} entries, as block_out_channels has")
    if config.sample_size % 2 ** (levels - 1) or config.sample_size > 1024:
        raise WeightsError(f"{path}: sample_size {config.sample_size} cannot be halved {levels - 1} times")
    heads = config.attention_head_dim
    if any(channels % number for channels, number in zip(config.block_out_channels, heads, strict=True)):
        raise WeightsError(f"{path}: attention_head_dim should divide block_out_channels, found {heads}")
    if unknown := {*config.down_block_types, *config.up_block_types} - UNET_BLOCKS:
        raise WeightsError(f"{path}: block type {min(unknown)} is not supported")
    return config


def load_unet(folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> UNet:
    folder = Path(folder)
    config = read_unet_config(folder / "config.json")
    files = tensor_files(folder)
    return load(folder / "config.json", lambda: UNet(config), files, dtype, device, channels_last=True)


def read_vae_config(path: Path) -> VAEConfig:
    check_settings(path, VAE_SETTINGS)
    return read_config(VAEConfig, path)


def vae_name(key: str) -> str:
    """The published file was written when the attention's layers had other names."""
    for old, new in VAE_OLD_NAMES.items():
        key = key.replace(old, new)
    return key


def load_vae(folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> VAE:
    """Never in float16: feature maps may pass its 65504, and the picture would be black. Such weights become float32;
    bfloat16 has the range."""
    folder = Path(folder)
    config, files = read_vae_config(folder / "config.json"), tensor_files(folder)
    tensors = {name: tensor for name, _, _, tensor in stored(files, vae_name)}
    if dtype == torch.float16 or (dtype is None and any(tensor.get_dtype() == "F16" for tensor in tensors.values())):
        dtype = torch.float32

    def build() -> VAE:
        """Some files hold the attention's linear layers as 1x1 convolutions. Here such layers have that shape."""
        vae = VAE(config)
        for name, module in vae.named_modules():
            stored_as = tensors.get(f"{name}.weight")
            if isinstance(module, nn.Linear) and stored_as is not None and len(stored_as.get_shape()) == 4:
                module.weight = nn.Parameter(module.weight[:, :, None, None])
        return vae

    vae = load(folder / "config.json", build, files, dtype, device, vae_name, channels_last=True)
    for module in vae.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.flatten(1), requires_grad=False)
    return vae


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> TextEncoder:
    path = Path(folder) / "config.json"
    check_settings(path, TEXT_SETTINGS)
    config = read_config(TextConfig, path)

    def rename(key: str) -> str | None:
        return None if key == "text_model.embeddings.position_ids" else key  # 0, 1, 2, ...: a buffer of older files

    return load(path, lambda: TextEncoder(config), tensor_files(folder), dtype, device, rename)


def load_schedule(folder: Path) -> NoiseSchedule:
    path = Path(folder) / "scheduler_config.json"
    check_settings(path, SCHEDULE_SETTINGS)
    schedule = NoiseSchedule(read_config(ScheduleConfig, path))
    if not schedule.alphas_cumprod.min() > 0:
        raise WeightsError(f"{path}: beta_start, beta_end and num_train_timesteps leave no signal at the last timestep")
    return schedule


# ---- the whole stack


def picture_size(weights: Path) -> int:
    """Side of an output picture in pixels."""
    if not weights.is_dir():
        raise WeightsError(f"{weights}: no such folder")
    unet, vae = (weights / "stable-diffusion" / part / "config.json" for part in ("unet", "vae"))
    return read_unet_config(unet).sample_size * read_vae_config(vae).downsampling


def frozen_dtypes(weights: Path, dtype: torch.dtype | None, device: Device) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the frozen parts that read (language model, image and text encoder), and of those that paint (UNet,
    autoencoder): `dtype`, where it is given.

    The default on a GPU is bfloat16. On a CPU it is float32 for small weights. At the published size the parts that
    read would take too much memory in float32, and those that paint are faster in bfloat16 only with AMX.
    """
    if not weights.is_dir():
        raise WeightsError(f"{weights}: no such folder")
    width = read_config(LlamaConfig, weights / "vicuna" / "config.json").hidden_size
    on_gpu, is_big = torch.device(device).type != "cpu", width >= 2048
    reading = torch.bfloat16 if on_gpu or is_big else torch.float32
    painting = torch.bfloat16 if on_gpu or (is_big and HAS_AMX) else torch.float32
    return dtype or reading, dtype or painting


def check_sizes(tokenizer: Tokenizer, llama: Llama, image_encoder: ImageEncoder | None) -> None:
    """WeightsError for parts that do not go together, which nothing else would notice."""
    width, size = llama.config.hidden_size, llama.config.vocab_size
    if image_encoder and image_encoder.llama_proj.out_features != width:
        found = image_encoder.llama_proj.out_features
        raise WeightsError(f"llama_proj makes vectors {found} wide, but the language model reads {width}")
    if tokenizer.base_vocabulary > size:
        raise WeightsError(
            f"the tokenizer has {tokenizer.base_vocabulary} pieces, but the language model {size} embeddings"
        )


def load_minigpt5(
    weights: Path,
    checkpoint: Path | None = None,
    vokens: int = 8,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    read_pictures: bool = True,
    read_captions: bool = False,
    int8: bool = False,
) -> MiniGPT5:
    """The stack in the folder `weights`, with the trained parts of `checkpoint` or untrained ones.

    dtype: see `frozen_dtypes`. The image encoder is left out without read_pictures, the text encoder without
    read_captions. int8: the language model's matrices in 8 bits.
    """
    weights = Path(weights)
    diffusion = weights / "stable-diffusion"
    reading, painting = frozen_dtypes(weights, dtype, device)
    if checkpoint:
        vokens = checkpoint_contents(checkpoint)[1]["vokens.input"].get_shape()[0] - 1
    parts = (
        Tokenizer(weights / "vicuna" / "tokenizer.model", vokens),
        (load_int8_llama if int8 else load_llama)(weights / "vicuna", reading, device),
        load_unet(diffusion / "unet", painting, device),
        load_vae(diffusion / "vae", painting, device),
        load_schedule(diffusion / "scheduler").to(device),
        read_config(TextConfig, diffusion / "text_encoder" / "config.json").max_position_embeddings,
        load_image_encoder(weights, reading, device) if read_pictures else None,
        load_text_encoder(diffusion / "text_encoder", reading, device) if read_captions else None,
        ClipTokenizer(diffusion / "tokenizer") if read_captions else None,
    )
    check_sizes(*parts[:2], parts[6])
    with Uninitialised() if checkpoint else nullcontext():  # random values for the mapper would take seconds
        model = MiniGPT5(*parts)
    model.vokens.to(device)
    model.mapper.to(device)
    if checkpoint:
        adapters = checkpoint_adapters(checkpoint)
        try:
            model.add_adapters(**adapters)
        except ValueError as error:  # a layer that Vicuna does not have
            raise WeightsError(f"{checkpoint}: {error}") from None
        load_trained(model, checkpoint)
    return model
