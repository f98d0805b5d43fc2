"""One loader for each part of the stack, and for all of MiniGPT-5: sizes from config.json, tensors as loading.py has
them. All loaded parts are frozen and in eval mode.

    weights/vicuna                     load_llama           config.json *.safetensors, of any Llama
                                       load_tokenizer       tokenizer.model, or tokenizer.json and config.json
    weights/blip2, weights/minigpt4    load_image_encoder   the names of Salesforce/blip2-flan-t5-xxl, and llama_proj
    weights/stable-diffusion/unet      load_unet            as published for 2.1-base and 2.1; so are the next
    weights/stable-diffusion/vae       load_vae             with the attention's old or new names
    .../text_encoder, .../scheduler    load_text_encoder, load_schedule

dtype None keeps the stored one. All errors are WeightsError or, from the tokenizer, ValueError: one line that names the
file.
"""

import dataclasses
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.files import read_json
from common.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from minigpt5 import MiniGPT5
from published import loading
from published.byte_pairs import CHAT_FORMS, BytePairTokenizer
from published.clip_tokenizer import ClipTokenizer
from published.cpu import HAS_AMX, use_float32_kernels
from published.int8 import to_int8
from published.loading import Names, WeightsError, open_checkpoint, rows_of, tensor_files, tensor_slices
from qformer import ImageEncoder, QFormerConfig, VisionConfig
from scheduler import NoiseSchedule, ScheduleConfig
from text_encoder import ACTIVATIONS, TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

MAX_SIZE, MAX_LAYERS = 1 << 24, 1000  # of any number in a config.json, of a number of layers: building has to end
UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
DType = torch.dtype | None
Device = str | torch.device


class Part(NamedTuple):
    """How a part is published. `supported` are settings that change the result without changing a tensor's name or
    shape, so that loading would not notice, and the values that are computed here; None: left out."""

    module: type
    config: type
    supported: dict[str, tuple]
    names: Names = ()
    channels_last: bool = False


PARTS = {
    "llama": Part(
        Llama,
        LlamaConfig,
        {
            "model_type": ("llama", None),
            "hidden_act": ("silu", None),
            **dict.fromkeys(("attention_bias", "mlp_bias"), (False, None)),
            **dict.fromkeys(("sliding_window", "rope_parameters"), (None,)),
        },
        names=((r"rotary_emb\.inv_freq$", None),),  # a buffer of old files; it follows from the configuration
    ),
    "unet": Part(
        UNet,
        UNetConfig,
        {
            "use_linear_projection": (True,),  # SD 1 has False, which a file without it means
            "act_fn": ("silu", None),
            "freq_shift": (0, 1, None),
            **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"), (1, None)),
            **dict.fromkeys(("center_input_sample", "resnet_skip_time_act"), (False, None)),
            **dict.fromkeys(("only_cross_attention", "dual_cross_attention"), (False, None)),
            **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act"), (None,)),
        },
        channels_last=True,
    ),
    "vae": Part(
        VAE,
        VAEConfig,
        {"act_fn": ("silu", None), "shift_factor": (None,), "latents_mean": (None,)},
        names=(  # the published file was written when the attention's layers had other names
            (r"\.query\.", ".to_q."),
            (r"\.key\.", ".to_k."),
            (r"\.value\.", ".to_v."),
            (r"\.proj_attn\.", ".to_out.0."),
        ),
        channels_last=True,
    ),
    "text encoder": Part(
        TextEncoder,
        TextConfig,
        {"hidden_act": (*ACTIVATIONS, None)},
        names=((r"^text_model\.embeddings\.position_ids$", None),),  # 0, 1, 2, ...: a buffer of older files
    ),
    "schedule": Part(
        NoiseSchedule,
        ScheduleConfig,
        {
            "beta_schedule": ("scaled_linear", "linear", None),
            "prediction_type": ("epsilon", "v_prediction", None),
            "timestep_spacing": ("leading", None),
            "steps_offset": (0, 1, None),
            "skip_prk_steps": (True, None),
            "trained_betas": (None,),
            **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr"), (False, None)),
        },
    ),
}
BLIP2_UNUSED = (  # parts of published files that MiniGPT-4 does not use
    (r"^qformer\.(embeddings|cls|pooler)\.", None),  # words: MiniGPT-4 gives the Q-Former queries only
    (r"^qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", None),  # the words' feed-forward
    (r"^((t5|opt|llm|vision|text)_proj\.|itm_head\.|temp$|language_(model|projection)\.)", None),  # other models' heads
    (r"^((norm|fc_norm|head|lm_head)\.|mask_token$)", None),  # EVA's own end; BLIP-2 takes the last block's output
)


# ---- config.json


def checked(value: object, default: object, name: str):
    """`value` of a config.json as the type of `default`. ValueError for another type or a size that no model has."""
    if dataclasses.is_dataclass(default):
        defaults = {field.name: field.default for field in dataclasses.fields(default)}
        if not isinstance(value, dict) or not value.keys() <= defaults.keys():
            raise ValueError(f"{name} {value!r:.200} is not supported")
        return type(default)(**{key: checked(entry, defaults[key], f"{name}.{key}") for key, entry in value.items()})
    if isinstance(default, tuple):
        values = value if isinstance(value, list) else [value]  # one value stands for all levels
        if not 1 <= len(values) <= 16:
            raise ValueError(f"{name} should have 1 to 16 entries")
        return tuple(checked(entry, default[0], name) for entry in values)
    if type(default) is float and type(value) is int and abs(value) <= MAX_SIZE:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} should be {type(default).__name__}, found {value!r:.80}")
    largest = MAX_LAYERS if "layers" in name else MAX_SIZE
    smallest = {int: 0 if default in (0, 1) else 1, float: 1e-13}  # with a default of 0 or 1 it is no size
    if type(value) in smallest and not smallest[type(value)] <= value <= largest:
        raise ValueError(f"{name} cannot be {value!r:.80}")
    return value


def read_config(cls, path: Path, *nested: str, supported: dict[str, tuple] | None = None):
    """Fill the dataclass `cls` from a published config.json, or from the object `nested` inside it.

    Keys that `cls` does not name are ignored. A missing or null key takes the field's default, which is the published
    model's value: published files leave defaults out. WeightsError for another type, an impossible size, and a setting
    that has none of its `supported` values, among which None stands for one that is left out.
    """
    values = read_json(path, WeightsError)
    try:
        for name, allowed in (supported or {}).items():
            if values.get(name) not in allowed:
                choices = " or ".join(repr(value) for value in allowed if value is not None) or "null"
                raise ValueError(f"{name} {values.get(name)!r:.80} is not supported, only {choices}")
        for key in nested:
            values = values.get(key) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{key} should be an object, found {values!r:.80}")
        fields = [field for field in dataclasses.fields(cls) if values.get(field.name) is not None]
        config = cls(**{field.name: checked(values[field.name], field.default, field.name) for field in fields})
        if isinstance(config, UNetConfig):
            check_levels(config)
        if hasattr(config, "num_attention_heads"):
            check_heads(config)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    return config


def check_heads(config: LlamaConfig | QFormerConfig | TextConfig | VisionConfig) -> None:
    """ValueError for widths and heads that do not go together."""
    channels, heads, width = config.hidden_size, config.num_attention_heads, getattr(config, "head_dim", 0)
    groups = getattr(config, "num_key_value_heads", 0) or heads
    is_odd = isinstance(config, LlamaConfig) and (width or channels // heads) % 2  # a head's channels turn in pairs
    if (not width and channels % heads) or heads % groups or is_odd:
        sizes = f"{channels} channels, {heads} attention heads, {groups} key-value heads, head_dim {width}"
        raise ValueError(f"hidden_size and heads do not go together: {sizes}")


def check_levels(config: UNetConfig) -> None:
    """Give every level its number of heads, where the file has one for all. ValueError for what no UNet here has."""
    widths, levels = config.block_out_channels, len(config.block_out_channels)
    if len(config.attention_head_dim) == 1:
        config.attention_head_dim *= levels
    heads, blocks = config.attention_head_dim, config.down_block_types + config.up_block_types
    if unknown := {*blocks} - UNET_BLOCKS:
        raise ValueError(f"block type {min(unknown)} is not supported")
    lengths = {len(config.down_block_types), len(config.up_block_types), len(heads)}
    if lengths != {levels} or any(width % count for width, count in zip(widths, heads, strict=True)):
        raise ValueError(f"block_out_channels {widths} does not go with attention_head_dim {heads} or the block types")
    if config.sample_size % 2 ** (levels - 1) or config.sample_size > 1024:
        raise ValueError(f"sample_size {config.sample_size} cannot be halved {levels - 1} times")


def config_of(part: str, path: Path):
    """The configuration of a part in the published file `path`."""
    return read_config(PARTS[part].config, Path(path), supported=PARTS[part].supported)


# ---- a part


def load(part: str, folder: Path, dtype: DType = None, device: Device = "cpu") -> nn.Module:
    """A part from its folder of config.json and *.safetensors."""
    published, folder = PARTS[part], Path(folder)
    build = partial(published.module, config_of(part, folder / "config.json"))
    return with_fast_kernels(loading.load(build, folder, published.names, dtype, device, published.channels_last))


def with_fast_kernels(part: nn.Module) -> nn.Module:
    if any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in part.parameters()):
        use_float32_kernels(part)
    return part


load_llama, load_unet, load_text_encoder = (partial(load, part) for part in ("llama", "unet", "text encoder"))


def load_int8_llama(folder: Path, dtype: torch.dtype, device: Device = "cpu") -> Llama:
    """`load_llama` with the blocks' matrices in 8 bits, which are made of the mapped file one by one."""
    return with_fast_kernels(to_int8(load_llama(folder), dtype, device))


def tokenizer_file(folder: Path) -> Path:
    """The language model's tokenizer: tokenizer.model, unless there is only a tokenizer.json."""
    pieces, pairs = folder / "tokenizer.model", folder / "tokenizer.json"
    return pairs if pairs.is_file() and not pieces.is_file() else pieces


def load_tokenizer(folder: Path, vokens: int = 8) -> Tokenizer:
    """The language model's tokenizer. For a tokenizer.json, config.json names the tokens that begin and end a text, and
    as `chat_form` the chat template that the model knows."""
    file, path = tokenizer_file(folder), folder / "config.json"
    if file.suffix == ".model":
        return Tokenizer(file, vokens)
    values = read_json(path, WeightsError)
    bos, eos, form = values.get("bos_token_id"), values.get("eos_token_id"), values.get("chat_form", "vicuna")
    if form not in CHAT_FORMS:
        raise WeightsError(f"{path}: chat_form {form!r:.80} is not supported, only {' or '.join(CHAT_FORMS)}")
    return BytePairTokenizer(file, bos, eos if eos and isinstance(eos, list) else [eos], CHAT_FORMS[form], vokens)


def load_image_encoder(weights: Path, dtype: DType = None, device: Device = "cpu") -> ImageEncoder:
    """EVA-ViT, Q-Former and their projection, from weights/blip2 and weights/minigpt4."""
    blip2, projection = Path(weights) / "blip2", Path(weights) / "minigpt4" / "llama_proj.safetensors"
    path = blip2 / "config.json"
    vision = read_config(VisionConfig, path, "vision_config")
    queries = read_config(QFormerConfig, path).num_query_tokens  # the one field at the file's top level
    qformer = replace(read_config(QFormerConfig, path, "qformer_config"), num_query_tokens=queries)
    llm_width = rows_of(tensor_slices(projection), "llama_proj.weight", range(1, MAX_SIZE), projection)
    files = [*tensor_files(blip2, ("vision_model.", "qformer.", "query_tokens")), projection]
    build = partial(ImageEncoder, vision, qformer, llm_width)
    return with_fast_kernels(loading.load(build, files, BLIP2_UNUSED, dtype, device))


def load_vae(folder: Path, dtype: DType = None, device: Device = "cpu") -> VAE:
    """The autoencoder, in float32 where `dtype` or its file has float16: feature maps may pass 65504, the largest
    float16, and the picture would be black. bfloat16 has the range."""
    vae = load("vae", folder, torch.float32 if dtype == torch.float16 else dtype, device)
    return vae.float() if any(p.dtype == torch.float16 for p in vae.parameters()) else vae


def load_schedule(folder: Path, device: Device = "cpu") -> NoiseSchedule:
    path = Path(folder) / "scheduler_config.json"
    config = config_of("schedule", path)
    if not NoiseSchedule(config).alphas_cumprod.min() > 0:  # on the CPU: `device` may be meta
        raise WeightsError(f"{path}: beta_start, beta_end and num_train_timesteps leave no signal at the last timestep")
    return NoiseSchedule(config, device)


@torch.no_grad()
def encode_empty_caption(diffusion: Path, dtype: DType, device: Device) -> Tensor:
    """(1, S, Dc) float32: the encoding that Stable Diffusion is guided against, without a mask; L_CAP's has one."""
    ids, _ = ClipTokenizer(diffusion / "tokenizer")([""])
    return load_text_encoder(diffusion / "text_encoder", dtype, device)(ids.to(device)).float()


# ---- the whole stack


def picture_size(weights: Path) -> int:
    """Side of an output picture in pixels."""
    unet, vae = (config_of(part, weights / "stable-diffusion" / part / "config.json") for part in ("unet", "vae"))
    return unet.sample_size * 2 ** (len(vae.block_out_channels) - 1)


def frozen_dtypes(weights: Path, dtype: DType, device: Device) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the frozen parts that read (language model, image and text encoder), and of those that paint (UNet,
    autoencoder): `dtype`, where it is given.

    On a CPU at the published size the parts that read would take too much memory in float32, and those that paint are
    faster in bfloat16 only with AMX.
    """
    width = config_of("llama", weights / "vicuna" / "config.json").hidden_size
    on_gpu, is_big = torch.device(device).type != "cpu", width >= 2048
    reading = torch.bfloat16 if on_gpu or is_big else torch.float32
    painting = torch.bfloat16 if on_gpu or (is_big and HAS_AMX) else torch.float32
    return dtype or reading, dtype or painting


TEXT_WIDTH = "text_model.embeddings.token_embedding.embedding_dim"
SIZES = (  # name, one part, where it has it, another part, where that has it
    ("width", "image encoder", "llama_proj.out_features", "vicuna", "config.hidden_size"),
    ("width", "unet", "config.cross_attention_dim", "text encoder", TEXT_WIDTH),
    ("channels", "unet", "config.in_channels", "vae", "config.latent_channels"),
    ("vocabulary", "vicuna tokenizer", "base_vocabulary", "vicuna", "config.vocab_size"),
)


def size_mismatches(loaded: dict) -> list[str]:
    """What is wrong with parts that are each right but do not go together."""
    problems = []
    for size, one, place, other, other_place in SIZES:
        if loaded.get(one) is None or loaded.get(other) is None:
            continue
        a, b = attrgetter(place)(loaded[one]), attrgetter(other_place)(loaded[other])
        if a != b and not (size == "vocabulary" and a < b):  # a table may have more rows than there are pieces
            problems.append(f"{one} and {other} do not go together: {size} {a} and {b}")
    return problems


def load_minigpt5(
    weights: Path,
    checkpoint: Path | None = None,
    vokens: int = 8,
    dtype: DType = None,
    device: Device = "cpu",
    read_pictures: bool = True,
    read_captions: bool = False,
    int8: bool = False,
    start_as: str | None = None,
) -> MiniGPT5:
    """The stack in the folder `weights`, with the trained parts of `checkpoint` or untrained ones.

    dtype: see `frozen_dtypes`. The image encoder is left out without read_pictures, the text encoder without
    read_captions. int8: the language model's matrices in 8 bits. start_as: what untrained vokens start as.
    """
    weights = Path(weights)
    diffusion = weights / "stable-diffusion"
    reading, painting = frozen_dtypes(weights, dtype, device)
    trained = open_checkpoint(checkpoint) if checkpoint else None
    tokenizer = load_tokenizer(weights / "vicuna", trained.vokens if trained else vokens)
    llama = (load_int8_llama if int8 else load_llama)(weights / "vicuna", reading, device)
    unet = load_unet(diffusion / "unet", painting, device)
    vae = load_vae(diffusion / "vae", painting, device)
    schedule = load_schedule(diffusion / "scheduler", device)
    tokens = config_of("text encoder", diffusion / "text_encoder" / "config.json").max_position_embeddings
    image_encoder = load_image_encoder(weights, reading, device) if read_pictures else None
    text_encoder = load_text_encoder(diffusion / "text_encoder", reading, device) if read_captions else None
    clip_tokenizer = ClipTokenizer(diffusion / "tokenizer") if read_captions else None
    loaded = {"vicuna tokenizer": tokenizer, "vicuna": llama, "unet": unet, "vae": vae}
    loaded |= {"image encoder": image_encoder, "text encoder": text_encoder}
    if problems := size_mismatches(loaded):
        raise WeightsError(f"{weights}: {problems[0]}", problems)
    encoders = (image_encoder, text_encoder, clip_tokenizer)
    adapters = trained and trained.adapters
    try:
        with loading.Uninitialised() if trained else nullcontext():  # random values for the mapper would take seconds
            model = MiniGPT5(tokenizer, llama, unet, vae, schedule, tokens, *encoders, start_as, adapters)
    except ValueError as error:  # an adapter of a layer that Vicuna does not have
        raise WeightsError(f"{checkpoint}: {error}") from None
    model.mapper.to(device)
    model.empty_caption = cache(partial(encode_empty_caption, diffusion, reading, device))
    model.guides_against_empty_caption = bool(trained) and trained.metadata.get("guidance") == "empty caption"
    if trained:
        loading.load_trained(model, checkpoint)
    return model
