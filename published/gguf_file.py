"""A GGUF file of a Llama, llama.cpp's format -> what Hugging Face publishes: config.json, tokenizer.json and tensors.

The package gguf reads and dequantises; its float32 values are kept. llama.cpp turns neighbouring channels of a query or
key together, where Hugging Face's files (llama.py, `rotate`) turn channel i with i + Dh/2, so the rows of these two
matrices come in another order. Other architectures and tokenizers than SmolLM's are refused by name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from published.loading import WeightsError, our_name

NAMES = (  # llama.cpp -> transformers, applied one after the other
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)
SETTINGS = {  # of config.json, as GGUF names them
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
SUPPORTED = {  # None: left out
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": ("none", None),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
}
TOKENIZER, SPECIAL = ("tokens", "token_type", "merges"), 3  # names of its lists; the token_type of special tokens


@dataclass
class Quantised:
    """A tensor of the file. [:] dequantises it, and puts rows of queries and keys into Hugging Face's order."""

    stored: object
    heads: int  # of queries or keys, 0 of other tensors

    def __getitem__(self, _: slice) -> Tensor:
        from gguf import dequantize

        try:
            values = torch.from_numpy(dequantize(self.stored.data, self.stored.tensor_type).copy())
            if not self.heads:
                return values
            return values.view(self.heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
        except (NotImplementedError, RuntimeError) as error:  # another kind of quantisation; a matrix of other heads
            raise WeightsError(f"GGUF tensor {self.stored.name}: {str(error).splitlines()[0]}") from None


def is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: Path) -> tuple[dict, dict, dict[str, Quantised]]:
    """The contents of config.json and of tokenizer.json, and the tensors under Hugging Face's names. WeightsError for
    what is no Llama with SmolLM's tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError(f"{path}: reading it needs the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        tokens, types, merges = (list(values.get(f"tokenizer.ggml.{name}", ())) for name in TOKENIZER)
    except Exception as error:  # a damaged file can raise anything
        raise WeightsError(f"{path}: not a whole GGUF file ({' '.join(str(error).split())})") from None
    for name, allowed in SUPPORTED.items():
        if values.get(name) not in allowed:
            raise WeightsError(f"{path}: {name} {values.get(name)!r:.80} is not supported, only {allowed[0]!r}")
    config = {name: values[key] for name, key in SETTINGS.items() if key in values}
    heads = config.get("num_attention_heads", 0)
    heads = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    tensors = {
        our_name(tensor.name, NAMES): Quantised(tensor, heads.get(tensor.name.split(".")[-2], 0))
        for tensor in reader.tensors
    }
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"vocab_size": len(tokens), "tie_word_embeddings": "lm_head.weight" not in tensors}
    config["chat_form"] = chat_form(values.get("tokenizer.chat_template"))
    return config, smollm_tokenizer(tokens, types, merges), tensors


def chat_form(template: object) -> str:
    """The name in byte_pairs.CHAT_FORMS of a published chat template, a program in Jinja's language that is not run."""
    return "chatml" if re.search(r"<\|im_start\|>", str(template)) else "vicuna"


def smollm_tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> dict:
    """The tokenizer.json of SmolLM and SmolLM2: byte pairs as GPT-2's, of which none holds more than one digit."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    options = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    special = [i for i, kind in enumerate(types) if kind == SPECIAL]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **options} for i in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
