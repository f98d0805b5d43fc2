"""Stable Diffusion 2.1's text side: OpenCLIP ViT-H's text tower without its last block, and its byte-pair tokenizer.

MiniGPT-5 needs it in training only: its encoding of the caption is the target of the caption loss L_CAP
(section 3.3), whose other side is the mapper's output. The Stable Diffusion baselines sample with it.

    texts                    -> input_ids, attention_mask  (B, 77), (B, 77)    ClipTokenizer
    input_ids (B, 77)        -> token + position           (B, 77, 1024)       text_model.embeddings
                             -> 23 causal blocks           (B, 77, 1024)       text_model.encoder
                             -> last hidden state, normed  (B, 77, 1024)       TextEncoder

Loads the folders text_encoder/ and tokenizer/ of a published Stable Diffusion. Left out: CLIP's pooled and projected
vector, which Stable Diffusion does not use.

Letters: B batch, T tokens, D width, H heads, Dh head width.
"""

import html
import re
import unicodedata
from dataclasses import dataclass
from html.entities import html5
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from published.loading import MOST, WeightsError, fill, read_config, read_json, shapes_only, tensor_files

# Tokenizer

LONG_S = "\u017f"


def _unescape(match: re.Match) -> str:
    """One HTML entity, ended by its semicolon -> its character; also &EACUTE; where only &eacute; is HTML."""
    entity, name = match[0], match[0][1:]
    if name.startswith("#"):
        character = html.unescape(entity)
        return entity if ";" in character else character
    if name in html5:
        return html5[name]
    if name.isupper() and name.lower() in html5 and html.unescape(entity) == entity:
        return html5[name.lower()].upper()
    return entity


def _replacements() -> dict[int, str]:
    """Characters with a plainer equivalent: curly quotes, Latin ligatures, full and half widths, C1 controls."""
    table = dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'")
    table |= dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
    compatible = chain([0x3000, 0x132, 0x133, 0x149], range(0x1C4, 0x1CD), range(0x1F1, 0x1F4), range(0xFB00, 0xFB07))
    table |= {code: unicodedata.normalize("NFKC", chr(code)) for code in chain(compatible, range(0xFF01, 0xFFF0))}
    table[0xFB05] = LONG_S + "t"  # NFKC would replace the long s too
    for code in range(0x80, 0xA0):  # what browsers make of them: Windows-1252, where it has a character
        table[code] = bytes([code]).decode("cp1252", errors="ignore") or chr(code)
    return table


REPLACED = _replacements()
REMOVED = dict.fromkeys(
    chain(range(0x09), [0x0B], range(0x0E, 0x20), [0x7F], range(0x206A, 0x2070), [0xFEFF], range(0xFFF9, 0xFFFD))
)
MOST_STEPS = 20  # "&amp;amp;amp; ..." could ask for thousands
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
TERMINAL_CODE = re.compile("\033\\[[\\d;]*[a-zA-Z]")


def fix_text(text: str) -> str:
    """CLIP cleans its text with the package ftfy. This is ftfy.fix_text, rewritten, without its repair of mojibake.

    The same: HTML entities (until a line holds "<"), curly quotes, ligatures, widths, control characters, surrogates,
    NFC. Missing: text that was decoded with the wrong encoding ("schÃ¶n") stays, where ftfy guesses "schön".
    """
    lines, markup = [], False
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        markup, before = markup or "<" in line, None
        for _ in range(MOST_STEPS):  # what one step brings out may be work for another: "&amp;eacute;"
            if line == before:
                break
            before = line
            line = line if markup else ENTITY.sub(_unescape, line)
            line = line.translate(REPLACED)
            line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            line = TERMINAL_CODE.sub("", line).translate(REMOVED)
            line = unicodedata.normalize("NFC", line)
        lines.append(line)
    return "".join(lines)


# CLIP's pattern is written with \p{L} and \p{N}, which Python's re lacks and \w is not. So it runs over a stand-in text
# in which every letter beyond ASCII is "é", every number "²" and every other sign "§". Long s stays: ignoring case,
# it is an "s", also in "'s".
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


def _byte_letters() -> list[str]:
    """One printable character a byte, as GPT-2 spells bytes in its vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LONGEST_WORD = 2000  # characters; 77 tokens hold fewer, and the time to merge them grows with their square


class ClipTokenizer:
    """vocab.json and merges.txt of `folder` -> a function from texts to ids. Follows transformers' CLIPTokenizer.

    The padding token and the length are read from the folder's special_tokens_map.json and tokenizer_config.json;
    where they say nothing, Stable Diffusion 2.1's "!" and 77. Special tokens in the text are recognised as such,
    the padding token too: a "!" in a caption becomes the padding id. Raises WeightsError.
    """

    START, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, folder: Path):
        folder = Path(folder)
        self.vocabulary: dict[str, int] = read_json(folder / "vocab.json")
        if not all(type(i) is int and 0 <= i < MOST for i in self.vocabulary.values()):
            raise WeightsError(f"{folder / 'vocab.json'}: should give every token its number")
        try:
            merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]  # line 0 is a version
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder / 'merges.txt'}: not readable ({error})") from None
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges) if merge}
        settings = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second wins
            if (folder / name).exists():
                settings |= read_json(folder / name)
        pad = settings.get("pad_token") or "!"
        self.pad = pad.get("content") if isinstance(pad, dict) else pad
        longest = settings.get("model_max_length") or 77  # some files hold 1e30 for "no limit"
        if type(longest) not in (int, float) or not longest >= 3 or not isinstance(self.pad, str):
            found = f"pad_token {pad!r:.80} and model_max_length {longest!r:.80}"
            raise WeightsError(f"{folder}: its settings cannot be {found}")
        self.length = int(min(longest, 77))
        for token in (self.START, self.END, self.pad):
            if token not in self.vocabulary:
                raise WeightsError(f"{folder / 'vocab.json'}: special token {token!r} is missing")
        self.special = re.compile("(" + "|".join(map(re.escape, (self.START, self.END, self.pad))) + ")")
        self.byte_letters = _byte_letters()
        self.known = {token: (self.vocabulary[token],) for token in (self.START, self.END)}  # word -> ids

    def merge(self, word: str) -> tuple[int, ...]:
        """One word -> ids: from single bytes on, join the pair that training merged first, until no pair is known."""
        parts = [self.byte_letters[byte] for byte in word[:LONGEST_WORD].encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            joined = []
            for part in parts:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return tuple(self.vocabulary.get(part, self.vocabulary[self.END]) for part in parts)

    def encode(self, text: str) -> list[int]:
        """Ids without start, end, padding or truncation."""
        ids = []
        for piece in self.special.split(text):  # every piece is cleaned by itself
            if self.special.fullmatch(piece):
                ids.append(self.vocabulary[piece])
            else:
                for word in split_words(" ".join(fix_text(piece).split()).lower()):
                    if word not in self.known:
                        self.known[word] = self.merge(word)
                    ids.extend(self.known[word])
        return ids

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> input_ids and attention_mask, both (B, length) int64; the mask is 1 up to the end token."""
        start, end, pad = (self.vocabulary[token] for token in (self.START, self.END, self.pad))
        rows = [[start, *self.encode(text)[: self.length - 2], end] for text in texts]
        ids = torch.tensor([row + [pad] * (self.length - len(row)) for row in rows])
        mask = torch.arange(self.length) < torch.tensor([[len(row)] for row in rows])
        return ids, mask.long()


# Encoder


@dataclass
class TextConfig:
    """text_encoder/config.json of Stable Diffusion 2.1."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's CLIP, and so Stable Diffusion 1, was trained with this; OpenCLIP and Stable Diffusion 2 are exact."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, Dh)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), allowed)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, allowed)
        return x


class TextTransformer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), allowed))


class TextEncoder(nn.Module):
    """input_ids (B, T), attention_mask (B, T) of 0 and 1, or None -> last hidden state after the final norm (B, T, D).

    Stable Diffusion passes no mask: padding is read like text. MiniGPT-5's released training code passes the
    tokenizer's, which changes the padded rows a great deal. A mask's first column must be 1, as the tokenizer's is.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise WeightsError(f"text encoder: hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        self.text_model = TextTransformer(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        allowed = None
        if attention_mask is not None:
            T = input_ids.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            allowed = causal & attention_mask.bool()[:, None, None, :]  # (B, 1, T, T): query reads key
        return self.text_model(input_ids, allowed)


def load_text_encoder(
    folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> TextEncoder:
    """The frozen encoder from Stable Diffusion's text_encoder/; None keeps the stored type. Raises WeightsError."""
    config = read_config(TextConfig, Path(folder) / "config.json")
    with shapes_only(Path(folder) / "config.json"):
        model = TextEncoder(config)
    positions = "text_model.embeddings.position_ids"  # 0, 1, 2, ...: a buffer that older files carry
    return fill(model, tensor_files(folder), lambda key: None if key == positions else key, dtype, device)
