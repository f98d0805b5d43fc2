"""CLIP's byte-pair tokenizer, as Stable Diffusion 2.1 uses it, with its cleaning of the text.

texts -> fix_text, split_words, merge -> input_ids, attention_mask  (B, 77) each
"""

import html
import re
import unicodedata
from html.entities import html5
from itertools import chain, pairwise
from pathlib import Path

import torch

from common.files import read_json
from published.loading import WeightsError

LONG_S = "\u017f"


def _unescape(match: re.Match) -> str:
    """One HTML entity with its semicolon -> its character. &EACUTE; is read too, although only &eacute; is HTML."""
    entity, name = match[0], match[0][1:]
    if name.startswith("#"):
        character = html.unescape(entity)
        return entity if ";" in character else character
    if name in html5:
        return html5[name]
    if name.isupper() and name.lower() in html5 and html.unescape(entity) == entity:
        return html5[name.lower()].upper()
    return entity


# Characters with a plainer equivalent: curly quotes, Latin ligatures, full and half widths, C1 controls.
REPLACED = dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'")
REPLACED |= dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
LIGATURES = chain([0x132, 0x133, 0x149], range(0x1C4, 0x1CD), range(0x1F1, 0x1F4), range(0xFB00, 0xFB07))
WIDTHS = chain([0x3000], range(0xFF01, 0xFFF0))
REPLACED |= {code: unicodedata.normalize("NFKC", chr(code)) for code in chain(LIGATURES, WIDTHS)}
REPLACED[0xFB05] = LONG_S + "t"  # NFKC would replace the long s too
# Browsers read the C1 controls as Windows-1252, where that has a character.
REPLACED |= {code: bytes([code]).decode("cp1252", errors="ignore") or chr(code) for code in range(0x80, 0xA0)}
REMOVED = dict.fromkeys(
    chain(range(0x09), [0x0B], range(0x0E, 0x20), [0x7F], range(0x206A, 0x2070), [0xFEFF], range(0xFFF9, 0xFFFD))
)
MAX_PASSES = 20  # "&amp;amp;amp; ..." could ask for thousands
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
TERMINAL_CODE = re.compile("\033\\[[\\d;]*[a-zA-Z]")


def fix_text(text: str) -> str:
    """CLIP cleans its text with the package ftfy. This is ftfy.fix_text, rewritten for one line, without its repair of
    mojibake.

    It treats HTML entities (unless the text holds "<"), curly quotes, ligatures, widths, control characters, surrogates
    and NFC as ftfy does. Text that was decoded with the wrong encoding ("schÃ¶n") stays, where ftfy guesses "schön".
    """
    is_markup, before = "<" in text, None
    for _ in range(MAX_PASSES):  # one pass may produce what the next one replaces: "&amp;eacute;"
        if text == before:
            break
        before = text
        text = text if is_markup else ENTITY.sub(_unescape, text)
        text = text.translate(REPLACED)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = TERMINAL_CODE.sub("", text).translate(REMOVED)
        text = unicodedata.normalize("NFC", text)
    return text


# CLIP's pattern is written with \p{L} and \p{N}, which Python's re does not know. So the pattern below is matched with
# a copy of the text in which every letter beyond ASCII is "é", every number "²" and every other sign "§". The long s
# stays, because it equals "s" when case is ignored, also in "'s".
WORD = re.compile(
    r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|[a-zé\u017f]+|[0-9²]|[^\sa-z0-9é\u017f²]+"
)


def _stand_in(character: str) -> str:
    if character.isascii() or character == LONG_S:
        return character
    kind = unicodedata.category(character)[0]
    return {"L": "é", "N": "²"}.get(kind, " " if character.isspace() else "§")


def split_words(text: str) -> list[str]:
    """Lower-case text -> runs of letters, single digits, runs of other signs; spaces are dropped."""
    return [text[m.start() : m.end()] for m in WORD.finditer("".join(map(_stand_in, text)))]


# One printable character a byte, as GPT-2 spells bytes in its vocabulary.
PRINTABLE, OTHERS = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
BYTE_LETTERS = [chr(byte if byte in PRINTABLE else next(OTHERS)) for byte in range(256)]
MAX_WORD_LENGTH = 2000  # characters; 77 tokens hold fewer, and the time to merge them grows with their square


class ClipTokenizer:
    """vocab.json and merges.txt of `folder` -> a function from texts to ids. Follows transformers' CLIPTokenizer.

    The padding token and the length are read from the folder's special_tokens_map.json and tokenizer_config.json; the
    defaults are Stable Diffusion 2.1's "!" and 77. Special tokens in the text are recognised as such, the padding
    token too: a "!" in a caption becomes the padding id. Raises WeightsError.
    """

    START, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, folder: Path):
        folder = Path(folder)
        self.vocabulary: dict[str, int] = read_json(folder / "vocab.json", WeightsError)
        if not all(type(i) is int and 0 <= i < 1 << 24 for i in self.vocabulary.values()):
            raise WeightsError(f"{folder / 'vocab.json'}: should map every token to its id")
        try:
            merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]  # line 0 is a version
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder / 'merges.txt'}: not readable ({error})") from None
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges) if merge}
        settings = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second wins
            if (folder / name).exists():
                settings |= read_json(folder / name, WeightsError)
        pad = settings.get("pad_token") or "!"
        self.pad = pad.get("content") if isinstance(pad, dict) else pad
        longest = settings.get("model_max_length") or 77  # some files hold 1e30 for "no limit"
        if type(longest) not in (int, float) or not longest >= 3 or not isinstance(self.pad, str):
            values = f"pad_token {pad!r:.80} and model_max_length {longest!r:.80}"
            raise WeightsError(f"{folder}: its settings cannot be {values}")
        self.length = int(min(longest, 77))
        for token in (self.START, self.END, self.pad):
            if token not in self.vocabulary:
                raise WeightsError(f"{folder / 'vocab.json'}: special token {token!r} is missing")
        self.special = re.compile("(" + "|".join(map(re.escape, (self.START, self.END, self.pad))) + ")")
        self.word_ids = {token: (self.vocabulary[token],) for token in (self.START, self.END)}  # a cache

    def merge(self, word: str) -> tuple[int, ...]:
        """One word -> ids: from single bytes on, join the pair that training merged first, until no pair is known."""
        parts = [BYTE_LETTERS[byte] for byte in word[:MAX_WORD_LENGTH].encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
            first = ranks.index(min(ranks))
            if ranks[first] == len(self.ranks):
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return tuple(self.vocabulary.get(part, self.vocabulary[self.END]) for part in parts)

    def encode(self, text: str) -> list[int]:
        """Ids without start, end, padding or truncation."""
        ids = []
        for piece in self.special.split(text):  # every piece is cleaned by itself
            if self.special.fullmatch(piece):
                ids.append(self.vocabulary[piece])
            else:
                for word in split_words(" ".join(fix_text(piece).split()).lower()):
                    if word not in self.word_ids:
                        self.word_ids[word] = self.merge(word)
                    ids.extend(self.word_ids[word])
        return ids

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> input_ids and attention_mask, both (B, length) int64; the mask is 1 up to the end token."""
        start, end, pad = (self.vocabulary[token] for token in (self.START, self.END, self.pad))
        sequences = [[start, *self.encode(text)[: self.length - 2], end] for text in texts]
        ids = torch.tensor([sequence + [pad] * (self.length - len(sequence)) for sequence in sequences])
        mask = torch.arange(self.length) < torch.tensor([[len(sequence)] for sequence in sequences])
        return ids, mask.long()
