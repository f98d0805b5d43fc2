"""A GGUF file of SmolLM, llama.cpp's format -> a folder as Hugging Face publishes it.

transformers undoes the quantisation and llama.cpp's order of the rows of queries and keys, but does not know this
tokenizer. Other architectures and tokenizers than SmolLM's are refused by name.
"""

from pathlib import Path

import torch

from common.files import write_json
from published.loading import WeightsError

SUPPORTED = {  # None: left out
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": ("none", None),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
}
TOKENIZER, SPECIAL = ("tokens", "token_type", "merges"), 3  # names of its lists; the token_type of special tokens


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write model.safetensors in float32, config.json, tokenizer.json and tokenizer_config.json. WeightsError for what
    is no Llama with SmolLM's tokenizer."""
    try:
        from gguf import GGUFReader
        from transformers import LlamaForCausalLM
    except ImportError:
        raise WeightsError(f"{path}: needs gguf, transformers and accelerate: pip install -e .[llama]") from None
    try:
        values = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
        for name, allowed in SUPPORTED.items():
            if values.get(name) not in allowed:
                raise ValueError(f"{name} {values.get(name)!r:.80} is not supported, only {allowed[0]!r}")
        tokenizer = smollm_tokenizer(*(list(values[f"tokenizer.ggml.{name}"]) for name in TOKENIZER))
        model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # a damaged file can raise anything
        raise WeightsError(f"{path}: no GGUF file that can be read ({' '.join(str(error).split())})") from None
    model.config.update({name: values.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")})
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"chat_template": values.get("tokenizer.chat_template")})


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
