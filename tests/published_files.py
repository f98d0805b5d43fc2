"""Small files in the forms in which the real weights are published, made of the golden tensors."""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch

from published.loading import open_safetensors

GOLDEN = Path(__file__).parent / "golden"


def tensors_of(path):
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def change(path, edit):
    tensors = tensors_of(path)
    edit(tensors)
    safetensors.torch.save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)


def golden(name):
    return safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")


def eva_file(path, blocks=3):
    """The golden EVA-ViT as LAVIS publishes it: a flat dictionary, with blocks that are not used."""
    tensors = golden("eva_vit")
    for i in range(3, blocks):
        tensors |= {k.replace("blocks.0.", f"blocks.{i}."): v for k, v in tensors.items() if k.startswith("blocks.0.")}
    torch.save(tensors | {"norm.weight": torch.ones(48), "head.weight": torch.ones(2, 48)}, path)
    return path


def qformer_file(path):
    text = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(40, 32),
        "Qformer.bert.embeddings.position_embeddings.weight": torch.ones(16, 32),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(64, 32),
        "Qformer.bert.encoder.layer.0.output.dense.weight": torch.ones(32, 64),
        "t5_proj.weight": torch.ones(8, 32),
    }
    torch.save({"model": golden("blip2_qformer") | text, "optimizer": {"state": {}}}, path)
    return path


BLIP2 = {
    "num_query_tokens": 8,
    "vision_config": {
        "num_attention_heads": 4,
        "hidden_size": 48,
        "patch_size": 14,
        "image_size": 28,
        "intermediate_size": 209,
        "num_hidden_layers": 3,
    },
    "qformer_config": {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": 48,
        "cross_attention_frequency": 2,
    },
}


def blip2_config(path, **vision):
    path.write_text(json.dumps(BLIP2 | {"vision_config": BLIP2["vision_config"] | vision}))
    return path


def vicuna_shards(folder, rows=513):
    """The golden Vicuna as it is published: two pickles, an old padding row, wrong special ids."""
    folder.mkdir()
    tensors = golden("vicuna")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(1, 64, dtype=torch.float16)])[:rows]
    names = sorted(tensors)
    torch.save({k: tensors[k] for k in names[:15]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({k: tensors[k] for k in names[15:]}, folder / "pytorch_model-00002-of-00002.bin")
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1, "architectures": ["LLaMAForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(GOLDEN / "tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    return folder


# The released checkpoints' names -> ours: Lightning's and peft's wrappers off, the tables cut.
TABLES = {
    "uas": ("model.llama_model.model.embed_tokens.weight", "model.llama_model.lm_head.weight"),
    "mls": (
        "model.llama_model.base_model.model.model.embed_tokens.modules_to_save.default.weight",
        "model.llama_model.base_model.model.lm_head.modules_to_save.default.weight",
    ),
}


def state_of(name):
    return torch.load(GOLDEN / name, weights_only=True)["state_dict"]


def metadata_of(path):
    return open_safetensors(path).metadata()
