"""Published checkpoints -> the layout that the loaders read (`python -m published convert`).

A file is known by its tensors' names, never by its own, and is one of

    Vicuna-7B                     .bin shards, transformers' names        -> vicuna/
    EVA-ViT-g, BLIP-2's Q-Former  LAVIS .pth, or transformers' BLIP-2     -> blip2/vision_model, qformer
    MiniGPT-4                     .pth, the projection llama_proj         -> minigpt4/llama_proj
    MiniGPT-5 stage 1, stage 2    Lightning .ckpt                         -> minigpt5/uas, mls-*

Pickles are read through torch.load(weights_only=True) alone. Tensors keep their type. Nothing is left half-written: a
file appears under its name when it is whole, and what says that a part is there (index, config.json) is written last.

Our checkpoint format holds the n + 1 new rows (n vokens, then the image placeholder) of the two embedding tables as
`vokens.input` and `vokens.output` (n + 1, D), and the mapper under its published names. The released checkpoints hold
whole tables whose old rows have shrunk, since weight decay acted on them. The released model runs with those rows, so
they are kept: as one factor in the metadata (embed_scale, head_scale) where that describes them, else whole under
Vicuna's names.
"""

import re
import shutil
import zipfile
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from common.files import write_json
from llama import Llama, LlamaConfig, Tokenizer, published_name
from prompts import RELEASED_SYSTEMS
from published.loading import WeightsError, open_safetensors, read_config, read_json, save_safetensors, tensor_files

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HALF_ROUNDING = 2.0**-11  # relative, of float16, in which Vicuna is published


def read_tensors(path: Path) -> dict:
    """Names -> lazy tensors (`[:]` gives the tensor, memory-mapped) of a safetensors file or a pickled state dict."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        file = open_safetensors(path)
        return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refused, unpickling would run {blocked[1]}" if blocked else "neither safetensors nor a PyTorch file"
        raise WeightsError(f"{path}: {reason}") from None
    for key in ("state_dict", "model"):  # Lightning's and LAVIS's containers
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds no state dict")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def save(tensors: dict, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None = None) -> int:
    """Write, say so, return the number of bytes of the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    save_safetensors(tensors, path, metadata)
    print(f"wrote {path}: {len(tensors)} tensors, {readable(path.stat().st_size)}")
    return sum(tensor.nbytes for tensor in tensors.values())


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


KINDS = (  # what a file is: a name that only such a file holds, in the order in which the kinds are converted
    ("vicuna", r"model\.(embed_tokens|layers\.\d+\.self_attn\.q_proj|norm)\.weight"),
    ("minigpt4", r"llama_proj\.weight"),
    ("blip2", r".*blocks\.\d+\.attn\.qkv\.weight|query_tokens|([qQ]former|vision_model|language_model)\..*"),
    ("uas", r"model\.llama_model\.model\.embed_tokens\.weight"),
    ("mls", r"model\.llama_model\.base_model\..*\.lora_A\..*"),
)

BLIP2_NAMES = (  # LAVIS -> transformers, applied one after the other; transformers' own names pass through
    (r"^visual_encoder\.", ""),
    (r"^cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^blocks\.", "vision_model.encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.(bert\.)?", "qformer."),
    (r"attention\.self\.", "attention.attention."),
)
BLIP2_UNUSED = re.compile(
    r"qformer\.(embeddings|cls|pooler)\."  # words: MiniGPT-4 gives the Q-Former queries only
    r"|qformer\.encoder\.layer\.\d+\.(intermediate|output)\."  # the words' feed-forward
    r"|(t5|opt|llm|vision|text)_proj\.|itm_head\.|temp$|language_(model|projection)\."  # other models' heads
    r"|(norm|fc_norm|head|lm_head)\.|mask_token$"  # EVA's own end; BLIP-2 takes the last block's output
)
EVA_BLOCKS = 39  # of the published file's 40: BLIP-2 uses the last but one's output


def convert(files: list[Path], out: Path, config: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Convert `files` (folders stand for the weight files in them) into `out`. `config` is the config.json of a model
    whose tensors do not tell everything, for files that have none beside them."""
    groups: dict[str, list[Path]] = {}
    for path in weight_files(files):
        names = read_tensors(path)
        kind = next((kind for kind, mark in KINDS if any(re.fullmatch(mark, name) for name in names)), None)
        if kind is None:
            some = ", ".join(sorted(names)[:3]) or "no tensor"
            raise WeightsError(f"{path}: not a file that MiniGPT-5 is made of (it holds {some})")
        groups.setdefault(kind, []).append(path)
    for kind, _ in KINDS:
        if kind in groups:
            try:
                CONVERTERS[kind](groups[kind], out, config, dtype)
            except KeyError as error:
                raise WeightsError(f"{groups[kind][0]}: tensor {error.args[0]} is missing") from None


def weight_files(files: list[Path]) -> Iterator[Path]:
    for path in files:
        if not path.is_dir():
            yield path
        elif any(path.glob("*.safetensors")):
            yield from tensor_files(path)
        elif found := sorted(f for f in path.iterdir() if f.suffix in (".bin", ".pth", ".pt", ".ckpt")):
            yield from found
        else:
            raise WeightsError(f"{path}: no weight file in this folder")


def convert_vicuna(paths: list[Path], out: Path, config: Path | None, dtype: torch.dtype | None) -> None:
    """Shards -> as many safetensors files and an index, one shard in memory at a time."""
    source, folder = paths[0].parent, out / "vicuna"
    config = config or source / "config.json"
    pieces = Tokenizer(source / "tokenizer.model").base_vocabulary
    with torch.device("meta"):
        expected = Llama(read_config(LlamaConfig, config)).state_dict()
    where = {name: path for path in paths for name in map(published_name, read_tensors(path)) if name}
    for name in sorted(expected.keys() ^ where.keys()):
        problem = "unexpected" if name in where else "missing: all shards are converted together"
        raise WeightsError(f"{where.get(name, source)}: tensor {name} is {problem}")

    weight_map, size = {}, 0
    for i, path in enumerate(paths, 1):
        file = f"model-{i:05}-of-{len(paths):05}.safetensors"
        tensors = {name: value[:] for name, value in read_tensors(path).items() if published_name(name)}
        for name in tensors.keys() & {EMBED, HEAD}:
            if len(tensors[name]) < pieces:
                raise WeightsError(f"{path}: {name} has {len(tensors[name])} rows for the tokenizer's {pieces} pieces")
            tensors[name] = tensors[name][:pieces]  # v0 has one row more, an old padding token
        size += save(tensors, folder / file, dtype)
        weight_map |= dict.fromkeys(tensors, file)
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    right = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": pieces}
    right |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # v0's file has others, all wrong
    write_json(folder / "config.json", read_json(config) | right)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def convert_blip2(paths: list[Path], out: Path, config: Path | None, dtype: torch.dtype | None) -> None:
    """EVA-ViT, Q-Former or both, under either library's names -> transformers' names, sizes into config.json."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for key, value in read_tensors(path).items():
            name = blip2_name(key)
            if BLIP2_UNUSED.match(name):
                continue
            if not name.startswith(("vision_model.", "qformer.", "query_tokens")) or name in tensors:
                raise WeightsError(f"{path}: tensor {key} is {'there twice' if name in tensors else 'unexpected'}")
            tensors[name] = value[:]
    folder = out / "blip2"
    candidates = [folder / "config.json", *([config] if config else [path.parent / "config.json" for path in paths])]
    values = next((found for c in candidates if c.is_file() and "vision_config" in (found := read_json(c))), {})

    blocks = values.get("vision_config", {}).get("num_hidden_layers") or EVA_BLOCKS
    for name in list(tensors):
        layer = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= blocks:
            del tensors[name]
        elif name.endswith(".q_bias"):  # the key bias of EVA's fused projection is zero
            q, v = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"))
            tensors[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    values = blip2_config(tensors, values)
    vision = {k: v for k, v in tensors.items() if k.startswith(("vision_model.embeddings", "vision_model.encoder"))}
    rest = {k: v for k, v in tensors.items() if k not in vision}  # ln_vision is published with the Q-Former
    for part, file in ((vision, "vision_model.safetensors"), (rest, "qformer.safetensors")):
        if part:
            save(part, folder / file, dtype)
    write_json(folder / "config.json", values)


def blip2_name(key: str) -> str:
    for pattern, replacement in BLIP2_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def blip2_config(tensors: dict[str, Tensor], values: dict) -> dict:
    """The published config.json's fields that follow from the tensors' shapes, over what `values` says already."""
    vision, qformer = dict(values.get("vision_config") or {}), dict(values.get("qformer_config") or {})
    values = {"model_type": "blip-2"} | values

    def layers(prefix: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.match(prefix + r"\.(\d+)\.", name) for name in tensors) if m})

    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        width, _, _, patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        tokens = tensors["vision_model.embeddings.position_embedding"].shape[1] - 1
        vision |= {"hidden_size": width, "patch_size": patch, "image_size": patch * isqrt(tokens)}
        vision["intermediate_size"] = len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"])
        vision["num_hidden_layers"] = len(layers(r"vision_model\.encoder\.layers"))
        vision["num_attention_heads"] = vision.get("num_attention_heads") or published_heads(width, 1408, 16)
    if "query_tokens" in tensors:
        _, values["num_query_tokens"], width = tensors["query_tokens"].shape
        crossing = layers(r"qformer\.encoder\.layer(?=\.\d+\.crossattention)")
        qformer |= {"hidden_size": width, "num_hidden_layers": len(layers(r"qformer\.encoder\.layer"))}
        qformer["intermediate_size"] = len(tensors["qformer.encoder.layer.0.intermediate_query.dense.weight"])
        qformer["encoder_hidden_size"] = len(tensors["vision_model.post_layernorm.weight"])
        qformer["cross_attention_frequency"] = crossing[1] - crossing[0] if len(crossing) > 1 else 1
        qformer["num_attention_heads"] = qformer.get("num_attention_heads") or published_heads(width, 768, 12)
    return values | {"vision_config": vision, "qformer_config": qformer}


def published_heads(width: int, published_width: int, heads: int) -> int:
    if width != published_width:
        raise WeightsError(f"tensors of width {width} do not tell the number of heads: give a --config that does")
    return heads


def convert_projection(paths: list[Path], out: Path, config: Path | None, dtype: torch.dtype | None) -> None:
    """MiniGPT-4's file holds what it trained and, as released, the buffers of its frozen parts."""
    buffers = re.compile(r"(Qformer|llama_model)\..*(position_ids|rotary_emb\.inv_freq)")
    tensors = {name: value[:] for name, value in read_tensors(paths[-1]).items() if not buffers.fullmatch(name)}
    if len(paths) > 1 or tensors.keys() != {"llama_proj.weight", "llama_proj.bias"}:
        raise WeightsError(f"{paths[-1]}: expected one file with llama_proj.weight and llama_proj.bias")
    save(tensors, out / "minigpt4" / "llama_proj.safetensors", dtype)


def convert_trained(paths: list[Path], out: Path, config: Path | None, dtype: torch.dtype | None) -> None:
    """Released Lightning checkpoints of MiniGPT-5 -> minigpt5/uas.safetensors (stage 1) or mls-*.safetensors (stage 2).

    Stage 2 kept `fc` and `t2i_decoder_prompt` frozen and did not store them: they are taken from stage 1's file.
    """
    for path in paths:
        tensors = {trained_name(key): value[:] for key, value in read_tensors(path).items()}
        stage = "uas" if "t2i_decoder_prompt" in tensors else "mls"
        first = out / "minigpt5" / "uas.safetensors"
        if stage == "mls":
            if not first.is_file():
                raise WeightsError(f"{path}: stage 2 continues stage 1, whose checkpoint must be converted first")
            wanted = ("fc.", "t2i_decoder_prompt")
            tensors |= {name: value[:] for name, value in read_tensors(first).items() if name.startswith(wanted)}
        metadata = {"format": "minigpt5", "stage": stage, "source": path.name}
        if stage == "mls":
            metadata["lora_alpha"] = "16"
            if path.stem in RELEASED_SYSTEMS:
                metadata["system"] = RELEASED_SYSTEMS[path.stem]
        for name, scale, vokens in ((EMBED, "embed_scale", "vokens.input"), (HEAD, "head_scale", "vokens.output")):
            table, published = tensors.pop(name), vicuna_table(out, name)
            rows = len(table) - 9 if published is None else len(published)  # [IMG0]..[IMG7], the placeholder
            if len(table) <= rows or (published is not None and table.shape[1] != published.shape[1]):
                raise WeightsError(f"{path}: {name} has shape {tuple(table.shape)}, which does not extend Vicuna's")
            tensors[vokens], table = table[rows:].clone(), table[:rows]  # a file may not hold two views of a table
            metadata["vokens"] = str(len(tensors[vokens]) - 1)
            factor, worst = (None, None) if published is None else common_factor(table, published)
            if worst is None or worst > HALF_ROUNDING:
                tensors[name] = table
            elif factor != 1:
                metadata[scale] = repr(factor)
                metadata[f"{scale}_check"] = f"largest relative difference {worst:.1e}, allowed {HALF_ROUNDING:.1e}"
        known = r"vokens\.|fc\.[02]\.|llm_to_t2i_mapping\.|t2i_decoder_prompt$|model\.layers\..*lora_[AB]\.weight$"
        for name in tensors:
            if not re.match(known, name) and name not in (EMBED, HEAD):
                raise WeightsError(f"{path}: tensor {name} is unexpected")
        name = "uas" if stage == "uas" else "mls-" + re.sub("^stage2_", "", path.stem)
        save(tensors, out / "minigpt5" / f"{name}.safetensors", dtype, metadata)


def trained_name(key: str) -> str:
    """Lightning's and peft's wrappers taken off: Vicuna's names remain."""
    key = key.removeprefix("model.llama_model.").removeprefix("base_model.model.")
    return key.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")


def common_factor(table: Tensor, published: Tensor) -> tuple[float, float]:
    """The factor by which `table` (V, D) is `published`, by least squares, and the largest relative difference left."""
    if torch.equal(table, published.to(table.dtype)):
        return 1.0, 0.0

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:  # in double precision, never the whole tables at once
        for i in range(0, len(table), 1024):
            yield table[i : i + 1024].double(), published[i : i + 1024].double()

    factor = sum((a * b).sum().item() for a, b in blocks()) / sum(b.square().sum().item() for _, b in blocks())
    smallest = 2.0**-14  # float16's least normal number: below it, differences are absolute
    return factor, max(((a - factor * b).abs() / b.abs().clamp(min=smallest)).max().item() for a, b in blocks())


def vicuna_table(out: Path, name: str) -> Tensor | None:
    """The rows of the tokenizer's pieces: a v0 table may have one more."""
    folder = out / "vicuna"
    files = tensor_files(folder, (name,)) if (folder / "config.json").is_file() else []
    table = next((found[name][:] for found in map(read_tensors, files) if name in found), None)
    return None if table is None else table[: Tokenizer(folder / "tokenizer.model").base_vocabulary]


CONVERTERS = {
    "vicuna": convert_vicuna,
    "blip2": convert_blip2,
    "minigpt4": convert_projection,
    "uas": convert_trained,
    "mls": convert_trained,
}
