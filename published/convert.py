"""Published checkpoints -> the layout that the loaders read (`python -m published convert`).

A file is recognised by the names of its tensors, not by its own name, and is one of

    Vicuna-7B, or another Llama   .bin or .safetensors shards, or GGUF    -> vicuna/
    EVA-ViT-g, BLIP-2's Q-Former  LAVIS .pth, or transformers' BLIP-2     -> blip2/vision_model, qformer
    MiniGPT-4                     .pth, the projection llama_proj         -> minigpt4/llama_proj
    MiniGPT-5 stage 1, stage 2    Lightning .ckpt                         -> minigpt5/uas, mls-*

Pickles are read through torch.load(weights_only=True) alone. Nothing is left half-written: a file gets its name when it
is whole, and the file that makes a part complete (index, config.json) is written last.

Our checkpoints (loading.py) hold the new rows of the two embedding tables alone. The released ones hold whole tables,
which are written under Vicuna's names: weight decay made their other rows smaller than Vicuna's.
"""

import hashlib
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from common.cli import make_folder
from common.files import read_json, write_json
from prompts import MLS_SYSTEM
from published import loading
from published.gguf_file import unpack_gguf
from published.loading import STAGE_1, TABLES, WeightsError, our_name, tensor_files, tensor_slices
from published.parts import BLIP2_UNUSED, PARTS, config_of, load_tokenizer, read_config, tokenizer_file
from qformer import VisionConfig

# Published files: bytes, SHA-256, name in the repository.
PUBLISHED_FILES = """
98362432 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 SmolLM2-135M-Instruct.Q4_1.gguf
499723 9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347 tokenizer.model
37907201 017a9ed588a11ed383711003cf50cf675191420a04689f682fb56fa9bbb8dcbb prerained_minigpt4_7b.pth
1540697487 ef5959949ffacaf371d05316a07e728511b8f2dd8280b19a421e5104076a8b34 stage1_cc3m.ckpt
1536289349 d8242c68d07df8f247491032630a388ee0289b16a46b2fc40c3cfac8f15f54e1 stage2_vist.ckpt
1536290373 68e9dc76b9dec11c6d38dc6be3b8e54cc04645776b3095868ee7e90e8e341734 stage2_mmdialog.ckpt
3463726498 6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214 unet/diffusion_pytorch_model.safetensors
334643276 a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815 vae/diffusion_pytorch_model.safetensors
1361597018 cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c text_encoder/model.safetensors
"""
PUBLISHED = {name: (int(size), digest) for size, digest, name in map(str.split, PUBLISHED_FILES.strip().splitlines())}


def read_tensors(path: Path) -> dict:
    """Names -> lazy tensors (`[:]` gives the tensor) of a safetensors file or a pickled state dict."""
    if not path.is_file():  # a pipe would block, a device have no end
        raise WeightsError(f"{path}: no such file, or not a regular file")
    if path.suffix == ".safetensors":
        return tensor_slices(path)
    try:
        members = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        # torch.save makes a zip without compression, which is mapped. A zip that was packed anew is read whole.
        is_mapped = bool(members) and all(member.compress_type == zipfile.ZIP_STORED for member in members)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save(tensors: dict, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None = None) -> int:
    """Write the file, print its size, return the number of bytes of its tensors."""
    make_folder(path.parent)
    tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    loading.save_safetensors(tensors, path, metadata)
    print(f"wrote {path}: {len(tensors)} tensors, {path.stat().st_size / 1e6:,.2f} MB")
    return sum(tensor.nbytes for tensor in tensors.values())


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
TRAINED_NAMES = (  # without the wrappers of Lightning and peft: Vicuna's
    (r"^model\.llama_model\.", ""),
    (r"^base_model\.model\.", ""),
    (r"\.modules_to_save\.default\.", "."),
    (r"\.default\.weight", ".weight"),
)
# How the released code worded the prompts of a training, by its data and year: a released checkpoint does not say it,
# ours do. The tokenizer began every sequence with </s> until March 2024, when the dialogues' form changed, too.
OLD_VIST = {"system": MLS_SYSTEM + "Please understanding images and generate story.", "first_token": "</s>"}
OLD_CHAT = {"system": MLS_SYSTEM + "Please generate conversation with appropriate image.", "first_token": "</s>"}
NEW_CHAT = {"system": MLS_SYSTEM + "Please generate conversations with appropriate images. ", "separator": " "}
RELEASED_FORMS = {
    "cc3m-2023": {"first_token": "</s>"},
    "vist-2023": OLD_VIST,
    "vist-2024": OLD_VIST | {"first_token": "<s>"},
    "mmdialog-2023": OLD_CHAT | {"separator": "\n"},
    "mmdialog-2024": NEW_CHAT | {"first_token": "<s>"},
}
FORMS = {  # SHA-256 of the released checkpoints: how their prompts were worded
    PUBLISHED["stage1_cc3m.ckpt"][1]: "cc3m-2023",
    PUBLISHED["stage2_vist.ckpt"][1]: "vist-2023",
    PUBLISHED["stage2_mmdialog.ckpt"][1]: "mmdialog-2024",
}  # the download link of the last one changed with the code of March 2024, those of the others never did
NEW_ROWS = 9  # of a released checkpoint's tables: [IMG0]..[IMG7] and the image placeholder


def convert(files: list[Path], out: Path, dtype: torch.dtype | None = None, form: str | None = None) -> None:
    """Convert `files` (folders stand for the weight files in them) into `out`. `form`: of RELEASED_FORMS; None: as the
    files' hashes say."""
    groups: dict[str, list[Path]] = {}
    for path in weight_files(files):
        if path.suffix == ".gguf":
            with TemporaryDirectory(dir=make_folder(out)) as folder:
                unpack_gguf(path, Path(folder))
                convert_llama([Path(folder) / "model.safetensors"], out, dtype)
            continue
        names = read_tensors(path)
        kind = next((pattern for pattern in KINDS if any(re.fullmatch(pattern, name) for name in names)), None)
        if kind is None:
            some = ", ".join(sorted(names)[:3]) or "no tensor"
            raise WeightsError(f"{path}: not a file that MiniGPT-5 is made of (it holds {some})")
        groups.setdefault(kind, []).append(path)
    for kind, convert_files in KINDS.items():
        options = {"form": form} if convert_files is convert_trained else {}
        try:
            if kind in groups:
                convert_files(groups[kind], out, dtype, **options)
        except KeyError as error:
            raise WeightsError(f"{groups[kind][0]}: tensor {error.args[0]} is missing") from None


def weight_files(files: list[Path]) -> Iterator[Path]:
    for path in files:
        if path.is_dir():
            pickles = sorted(f for f in path.glob("[!.]*") if f.suffix in (".bin", ".pth", ".pt", ".ckpt"))
            yield from tensor_files(path) if any(path.glob("*.safetensors")) or not pickles else pickles
        else:
            yield path


def convert_llama(paths: list[Path], out: Path, dtype: torch.dtype | None) -> None:
    """Shards -> as many safetensors files and an index. One shard is in memory at a time; all are given together, and
    whether any tensor is missing shows when they are loaded."""
    source, folder, names = paths[0].parent, out / "vicuna", PARTS["llama"].names
    tokenizer, values = tokenizer_file(source), read_json(source / "config.json", WeightsError)
    config_of("llama", source / "config.json")  # refuses other architectures
    pieces = load_tokenizer(source).base_vocabulary
    weight_map, size = {}, 0
    for i, path in enumerate(paths, 1):
        file = f"model-{i:05}-of-{len(paths):05}.safetensors"
        tensors = {key: value[:] for key, value in read_tensors(path).items() if our_name(key, names)}
        for name in tensors.keys() & set(TABLES):
            tensors[name] = tensors[name][:pieces]  # v0 has one row more, an old padding token
        size += save(tensors, folder / file, dtype)
        weight_map |= dict.fromkeys(tensors, file)
    values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": pieces}
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    if tokenizer.suffix == ".model":  # v0's config.json has other ids, all wrong
        values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    else:
        values["chat_form"] = chat_form(source)
        (folder / "tokenizer.model").unlink(missing_ok=True)  # the loader would prefer another model's
    write_json(folder / "config.json", values)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def chat_form(folder: Path) -> str:
    """The name in byte_pairs.CHAT_FORMS of a published chat template: a program in Jinja's language, which is not run.
    It stands in a file of its own or in tokenizer_config.json."""
    alone, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        template = alone.read_text(encoding="utf-8", errors="replace")
    else:
        template = read_json(settings, WeightsError).get("chat_template") if settings.is_file() else None
    return "chatml" if "<|im_start|>" in str(template) else "vicuna"


def convert_blip2(paths: list[Path], out: Path, dtype: torch.dtype | None) -> None:
    """EVA-ViT, Q-Former or both, under LAVIS's or transformers' names -> transformers' names, and the config.json that
    lies in `out` or beside a file. Where there is none, the sizes are the published ones."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for key, value in read_tensors(path).items():
            name = our_name(key, (*BLIP2_NAMES, *BLIP2_UNUSED))
            if name is None:
                continue
            if not name.startswith(("vision_model.", "qformer.", "query_tokens")) or name in tensors:
                raise WeightsError(f"{path}: tensor {key} is {'there twice' if name in tensors else 'unexpected'}")
            tensors[name] = value[:]
    folder = out / "blip2"
    configs = [folder / "config.json", *(path.parent / "config.json" for path in paths)]
    usable = (file for file in configs if file.is_file() and "vision_config" in read_json(file, WeightsError))
    if config := next(usable, None):
        values, vision = read_json(config, WeightsError), read_config(VisionConfig, config, "vision_config")
    else:  # all that these leave out has the published value
        values, vision = {"model_type": "blip-2", "vision_config": {}, "qformer_config": {}}, VisionConfig()

    for name in list(tensors):
        layer = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= vision.num_hidden_layers:  # LAVIS's has one more, which is not used
            del tensors[name]
        elif name.endswith(".q_bias"):  # the key bias of EVA's fused projection is zero
            q, v = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"))
            tensors[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    vit = {k: v for k, v in tensors.items() if k.startswith(("vision_model.embeddings", "vision_model.encoder"))}
    rest = {k: v for k, v in tensors.items() if k not in vit}  # ln_vision is published with the Q-Former
    for part, file in ((vit, "vision_model.safetensors"), (rest, "qformer.safetensors")):
        if part:
            save(part, folder / file, dtype)
    write_json(folder / "config.json", values)


def convert_projection(paths: list[Path], out: Path, dtype: torch.dtype | None) -> None:
    """MiniGPT-4's .pth -> llama_proj.safetensors; the buffers of frozen parts in it are left out."""
    stored = read_tensors(paths[-1])
    tensors = {key: stored[key][:] for key in ("llama_proj.weight", "llama_proj.bias")}
    save(tensors, out / "minigpt4" / "llama_proj.safetensors", dtype)


def convert_trained(paths: list[Path], out: Path, dtype: torch.dtype | None, form: str | None) -> None:
    """Released Lightning checkpoints of MiniGPT-5 -> minigpt5/uas.safetensors (stage 1) or mls-*.safetensors (stage 2).

    In stage 2 `fc` and `t2i_decoder_prompt` were frozen and not stored. They are taken from stage 1's file.
    """
    for path in paths:
        tensors = {our_name(key, TRAINED_NAMES): value[:] for key, value in read_tensors(path).items()}
        metadata, target = {"format": "minigpt5", "source": path.name, "stage": "uas"}, out / "minigpt5" / STAGE_1
        wording = form or FORMS.get(sha256(path))
        if wording is None:
            print(f"{path}: by its SHA-256 no released file; without --form its prompts are worded as ours")
        metadata |= RELEASED_FORMS.get(wording, {})
        if "t2i_decoder_prompt" not in tensors:
            if not target.is_file():
                raise WeightsError(f"{path}: stage 2 continues stage 1, whose checkpoint must be converted first")
            frozen = ("fc.", "t2i_decoder_prompt")
            tensors |= {name: value[:] for name, value in tensor_slices(target).items() if name.startswith(frozen)}
            metadata |= {"stage": "mls", "lora_alpha": "16"}
            target = target.with_name(f"mls-{path.stem.removeprefix('stage2_')}.safetensors")
        for name, vokens in zip(TABLES, ("vokens.input", "vokens.output"), strict=True):
            table, published = tensors.pop(name), vicuna_table(out, name)
            rows = len(table) - NEW_ROWS if published is None else len(published)
            if len(table) != rows + NEW_ROWS:
                added = f"{name} has {len(table) - rows} rows more than Vicuna, not {NEW_ROWS}"
                raise WeightsError(f"{path}: {added}: [PAD] row in between? It is unclear which rows are the vokens'")
            tensors[vokens], table = table[rows:].clone(), table[:rows]  # a file may not hold two views of a table
            metadata["vokens"] = str(len(tensors[vokens]) - 1)
            if published is None or not torch.equal(table, published.to(table.dtype)):
                tensors[name] = table
        save(tensors, target, dtype, metadata)


def pack(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """A checkpoint to be handed on, cast to `dtype`. Where uas.safetensors lies beside `out`, tensors that it holds
    already are left out: the loader takes them from there (loading.py)."""
    opened = loading.open_checkpoint(checkpoint)
    if out.resolve() == checkpoint.resolve() or (out.name == STAGE_1 and opened.metadata.get("stage") == "mls"):
        raise WeightsError(f"--out {out}: the source itself, or stage 1's name for a file of stage 2")
    tensors = {name: tensor[:].to(dtype) for name, tensor in opened.tensors.items()}
    stage_1 = out.with_name(STAGE_1)
    if out.name != STAGE_1 and stage_1.is_file():
        base = tensor_slices(stage_1)
        same = {name for name in tensors if name in base and torch.equal(tensors[name], base[name][:].to(dtype))}
        same -= {"vokens.input", "vokens.output"}
        if same - set(TABLES):  # the loader reads stage 1's file only where a trained tensor is missing
            tensors = {name: tensor for name, tensor in tensors.items() if name not in same}
    save(tensors, out, None, opened.metadata)


def vicuna_table(out: Path, name: str) -> Tensor | None:
    """Vicuna's rows for the tokenizer's pieces: a table of v0 may have one row more."""
    folder = out / "vicuna"
    files = tensor_files(folder, (name,)) if (folder / "config.json").is_file() else []
    table = next((tensors[name][:] for tensors in map(read_tensors, files) if name in tensors), None)
    return None if table is None else table[: load_tokenizer(folder).base_vocabulary]


KINDS = {  # a tensor that only such a file holds: what converts it. Stage 1 comes before stage 2, which continues it
    r"model\.(embed_tokens|layers\.\d+\.self_attn\.q_proj|norm)\.weight": convert_llama,
    r"llama_proj\.weight": convert_projection,
    r".*blocks\.\d+\.attn\.qkv\.weight|query_tokens|([qQ]former|vision_model|language_model)\..*": convert_blip2,
    r"model\.llama_model\.model\.embed_tokens\.weight": convert_trained,
    r"model\.llama_model\.base_model\..*\.lora_A\..*": convert_trained,
}
