"""The language model's tokenizer with the tokens that MiniGPT-5 adds: [IMG0]..[IMGn-1] and the image placeholder.

text -> encode -> ids, vokens and placeholder above the base vocabulary -> decode -> text

`Tokenizer` is Vicuna's, a sentencepiece model. `BytePairTokenizer` is that of SmolLM2 or Llama 3, a tokenizer.json.
"""

import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece


class Tokenizer:
    """Vicuna's sentencepiece model with the vokens and the image placeholder added, as the released code adds them.

    Text is cut at special tokens and every piece between them is encoded on its own, so that each gets sentencepiece's
    leading space (transformers calls this legacy). The white space around added tokens is dropped, but not that around
    <s>, </s> and <unk>. No token is added at either end. ValueError for a file that is no sentencepiece model.
    """

    unk_id, bos_id, eos_id = 0, 1, 2
    in_chat_form: Callable[[str], str] = str  # puts the language model's own marks in the place of prompts.py's

    def __init__(self, path: Path, vokens: int = 8):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: an error message that is not UTF-8
            raise ValueError(f"{path}: not a sentencepiece model ({' '.join(str(error).split())})") from None
        special = {"<unk>": self.unk_id, "<s>": self.bos_id, "</s>": self.eos_id}
        self.add_tokens(self.pieces.get_piece_size(), special, vokens)
        # An answer ends with </s> or "###", whose pieces differ at the start of a text and after a word.
        after_word = self.pieces.encode("a###")[len(self.pieces.encode("a")) :]
        self.stops = [[self.eos_id], self.pieces.encode("###"), after_word]

    def add_tokens(self, base_vocabulary: int, special: dict[str, int], vokens: int) -> None:
        """Put vokens and placeholder above a base vocabulary, of which `special` are the special tokens."""
        self.base_vocabulary = base_vocabulary
        self.voken_ids = list(range(self.base_vocabulary, self.base_vocabulary + vokens))
        self.image_id = self.base_vocabulary + vokens
        added = [f"[IMG{i}]" for i in range(vokens)] + ["<ImageHere>"]
        self.added = dict(zip(added, [*self.voken_ids, self.image_id], strict=True))
        self.special = {**special, **self.added}
        self.names = {i: name for name, i in self.special.items()}
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)))
        added_pattern = r"\s*(?:" + "|".join(map(re.escape, self.added)) + r")\s*"
        self.pattern = re.compile("|".join([f"({added_pattern}", *map(re.escape, special)]) + ")")

    def __len__(self) -> int:
        return self.image_id + 1

    def voken_text(self) -> str:
        """[IMG0][IMG1]... without spaces, which the model says where a picture belongs."""
        return "".join(self.names[i] for i in self.voken_ids)

    def ends(self, ids: list[int]) -> bool:
        """Whether `ids` end with a stop sequence."""
        return any(ids[-len(stop) :] == stop for stop in self.stops)

    def plain(self, text: str) -> str:
        """`text` from outside with a space put into whatever would be read as a special token."""
        return self.special_pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def encode(self, text: str, image_tokens: int = 1) -> list[int]:
        """Token ids of `text`. <ImageHere> is repeated `image_tokens` times: once for each of a picture's vectors."""
        ids = []
        for i, part in enumerate(self.pattern.split(self.in_chat_form(text))):
            if i % 2:  # the odd parts are the separators
                name = part.strip()
                ids += [self.special[name]] * (image_tokens if name == "<ImageHere>" else 1)
            elif part:
                ids += self._encode_run(part)
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of `ids`. Added tokens stand between single spaces; the spaces around <s>, </s>, <unk> follow the
        reference tokenizer's irregular rule."""
        parts, run = [], []
        for i in ids:
            if skip_special and i in self.names:
                continue
            if i >= self.base_vocabulary:
                parts += [self._decode_run(run)] if run else []
                parts.append(self.names[i])
                run = []
            else:
                run.append(i)
        parts += [self._decode_run(run)] if run else []
        return " ".join(parts)

    def _encode_run(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def _decode_run(self, ids: list[int]) -> str:
        text, run, after_special = "", [], False
        for n, i in enumerate(ids):
            if i in self.names:
                text += (" " if n and not after_special else "") + self.pieces.decode(run) + self.names[i]
                run = []
            else:
                run.append(i)
            after_special = i in self.names
        return text + self.pieces.decode(run)


class BytePairTokenizer(Tokenizer):
    """Byte pairs of a tokenizer.json, read by the package `tokenizers`, with the same tokens added.

    All tokens that the file calls special are special here. Which of them begins every sequence (`bos`) and which ones
    end an answer (`eos`) is said elsewhere: in the language model's config.json. `in_chat_form`: one of
    prompts.CHAT_FORMS. ValueError for another file.
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
        known = self.pieces.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in known if token.special}
        self.add_tokens(self.pieces.get_vocab_size(), special, vokens)
        if not {bos, *eos} <= set(special.values()):
            raise ValueError(f"{path}: bos_token_id {bos} and eos_token_id {eos} should be special tokens of it")
        self.stops = [[i] for i in eos] + [self.encode(end) for end in ("###", " ###")]

    def _encode_run(self, text: str) -> list[int]:
        return self.pieces.encode(text, add_special_tokens=False).ids

    def _decode_run(self, ids: list[int]) -> str:
        return self.pieces.decode(ids, skip_special_tokens=False)
