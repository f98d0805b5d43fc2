"""The language model's tokenizer with the tokens that MiniGPT-5 adds: [IMG0]..[IMGn-1] and the image placeholder.

text -> encode -> ids, vokens and placeholder above the base vocabulary -> decode -> text

`Tokenizer` is Vicuna's, a sentencepiece model; published/byte_pairs.py has that of SmolLM2 or Llama 3.
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
        self.vocabulary = self.image_id + 1
        added = [f"[IMG{i}]" for i in range(vokens)] + ["<ImageHere>"]
        self.added = dict(zip(added, [*self.voken_ids, self.image_id], strict=True))
        self.special = {**special, **self.added}
        self.names = {i: name for name, i in self.special.items()}
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)))
        added_pattern = r"\s*(?:" + "|".join(map(re.escape, self.added)) + r")\s*"
        self.pattern = re.compile("|".join([f"({added_pattern}", *map(re.escape, special)]) + ")")

    def voken_text(self) -> str:
        """[IMG0][IMG1]... without spaces, which the model says where a picture belongs."""
        return "".join(self.names[i] for i in self.voken_ids)

    def ends(self, ids: list[int]) -> bool:
        """Whether `ids` end with a stop sequence."""
        return any(ids[-len(stop) :] == stop for stop in self.stops)

    def escape(self, text: str) -> str:
        """`text` from outside with a space put into whatever would be read as a special token."""
        return self.special_pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def encode(self, text: str, image_tokens: int = 1) -> list[int]:
        """Token ids of `text`. <ImageHere> is repeated `image_tokens` times, for the embeddings of a picture."""
        ids = []
        for i, part in enumerate(self.pattern.split(self.in_chat_form(text))):
            if i % 2:  # the odd parts are the separators
                name = part.strip()
                ids += [self.special[name]] * (image_tokens if name == "<ImageHere>" else 1)
            elif part:
                ids += self.encode_plain(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without the special tokens."""
        return self.pieces.decode([i for i in ids if i not in self.names])

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special."""
        return self.pieces.encode(text)
