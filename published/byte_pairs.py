"""The tokenizer of a language model other than Vicuna, such as SmolLM2, and its chat template."""

import re
from collections.abc import Callable
from pathlib import Path

from common.tokenizer import Tokenizer


def chatml(text: str) -> str:
    """A prompt or an answer in ChatML, without the first <|im_start|>, which is the <s> of every sequence:
    "S###Human: a ###Assistant:" -> system, S<|im_end|>, <|im_start|>user, a<|im_end|>, <|im_start|>assistant."""
    speakers = r"\s*###(Human|Assistant): ?"
    if not text.startswith("###") and re.search(speakers, text):
        text = "system\n" + text
    roles = {"Human": "user", "Assistant": "assistant"}
    text = re.sub(speakers, lambda match: f"<|im_end|>\n<|im_start|>{roles[match[1]]}\n", text)
    return re.sub(" ?###$", "<|im_end|>", text.removeprefix("<|im_end|>\n<|im_start|>"))


CHAT_FORMS = {"vicuna": str, "chatml": chatml}  # by the name that config.json has as chat_form


class BytePairTokenizer(Tokenizer):
    """Byte pairs of a tokenizer.json, read by the package `tokenizers`, with the same tokens added.

    All tokens that the file calls special are special here. The language model's config.json says which of them
    begins every sequence (`bos`) and which ones end an answer (`eos`). `in_chat_form`: one of CHAT_FORMS.
    ValueError for another file.
    """

    def __init__(self, path: Path, bos: int, eos: list[int], in_chat_form: Callable[[str], str] = str, vokens: int = 8):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path}: reading it needs the package tokenizers: pip install tokenizers") from None
        try:
            self.pieces = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # of the class Exception itself
            raise ValueError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from None
        if not isinstance(self.pieces.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(f"{path}: only tokenizers of byte pairs are supported as tokenizer.json")
        self.pieces.no_truncation()
        self.bos_id, self.eos_id, self.in_chat_form = bos, eos[0], in_chat_form
        added = self.pieces.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in added if token.special}
        self.add_tokens(self.pieces.get_vocab_size(), special, vokens)
        if not all(i in special.values() for i in (bos, *eos)):
            raise ValueError(f"{path}: bos_token_id {bos} and eos_token_id {eos} should be special tokens of it")
        self.stops = [[i] for i in eos] + [self.encode(end) for end in ("###", " ###")]

    def encode_plain(self, text: str) -> list[int]:
        return self.pieces.encode(text, add_special_tokens=False).ids
