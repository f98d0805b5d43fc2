"""The text encoder and its tokenizer against transformers' CLIP: id by id, the encoder through saved folders."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from helpers import assert_close, difference, randomise, sample_file, shapes
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast

from published.clip_tokenizer import ClipTokenizer, fix_text
from published.loading import WeightsError
from published.parts import load_text_encoder
from text_encoder import TextConfig, TextEncoder

GOLDEN = Path(__file__).resolve().parent / "golden"
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
# text_encoder/config.json of Stable Diffusion 2.1
FULL = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}

# Tokenizer


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory):
    if not (GOLDEN / "text.json").exists():
        pytest.skip("tests/golden is not there")
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(GOLDEN / "tokenizer" / "clip_vocab.json", folder / "vocab.json")
    shutil.copy(GOLDEN / "tokenizer" / "clip_merges.txt", folder / "merges.txt")
    return folder


@pytest.fixture(scope="module")
def real():
    files = sample_file("clip", "vocab.json"), sample_file("clip", "merges.txt")
    slow, fast = (
        kind(*map(str, files), pad_token="!", model_max_length=77) for kind in (CLIPTokenizer, CLIPTokenizerFast)
    )
    # Without ftfy, transformers falls back on BERT's cleaning, which is not CLIP's. fix_text is tested by itself below;
    # here both sides clean alike, and what follows the cleaning is compared.
    slow.fix_text = fix_text
    return ClipTokenizer(files[0].parent), slow, fast


def test_recorded_cases(golden_folder):
    """Recorded from transformers' slow tokenizer with ftfy: curly quotes are straight, &amp; is &."""
    tokenizer = ClipTokenizer(golden_folder)
    cases = json.loads((GOLDEN / "text.json").read_text())["clip"]["cases"]
    ids, mask = tokenizer([case["text"] for case in cases])
    assert ids.shape == mask.shape == (len(cases), 77) and ids.dtype == mask.dtype == torch.int64
    for case, row, mask_row in zip(cases, ids.tolist(), mask.tolist(), strict=True):
        assert row == case["input_ids"], case["text"]
        assert mask_row == case["attention_mask"], case["text"]


SCRIPTS = [
    range(0x20, 0x7F), range(0x20, 0x7F), range(0xA1, 0x345), range(0x370, 0x3FF), range(0x400, 0x500),
    range(0x5D0, 0x5EB), range(0x620, 0x64B), range(0x904, 0x93A), range(0xE01, 0xE3B), range(0x1E00, 0x2000),
    range(0x2000, 0x2190), range(0x2460, 0x2500), range(0x3000, 0x30FF), range(0x4E00, 0x5000), range(0xAC00, 0xAE00),
    range(0xFB00, 0xFB07), range(0xFF01, 0xFFE7), range(0x1D400, 0x1D7FF), range(0x1F300, 0x1F650),
]  # fmt: skip
SNIPPETS = [
    *(
        "'s",
        "'T",
        "'re",
        "'ve",
        "'m",
        "'LL",
        "'d",
        "don't",
        "'",
        "''",
        "''s",
        "!!'s",
        "'\u017f",
        "\u2019",
        "won\u2019t",
    ),
    *(
        "_",
        "__init__",
        "1234",
        "1.5m",
        "\u00bd",
        "x\u00b2",
        "\u2167",
        "!",
        "?!?",
        "!!!",
        "\u201cquoted\u201d",
        "ab" * 60,
    ),
    *(
        "Stra\u00dfe",
        "caf\u00e9",
        "cafe\u0301",
        "\u0130stanbul",
        "\u03a3\u0391\u03a3",
        "\u4e2d\u6587",
        "\ud55c\uad6d\uc5b4",
    ),
    *("&amp;", "&lt;b&gt;", "<", "&eacute;", "&EACUTE;", "&#233;", "&#x1F600;", "&nosuch;", "&amp;amp;"),
    *("\ufb01ne", "\u0149", "\uff26\uff55\uff4c\uff4c", "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ud83d"),
    *("<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|endoftext", "<|endoftext<|endoftext|>"),
    *("", " ", "  ", "\n", "\r\n", " \t ", "\u3000", "\u00a0", "\x00", "\x0b", "\x1b[31m", "\x85", "\u2028"),
]


def generated(number: int) -> list[str]:
    draw = random.Random(0)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(SNIPPETS)
        if kind < 0.7:
            return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ABC,.'-!?09") for _ in range(draw.randint(1, 12)))
        script = draw.choice(SCRIPTS)
        return "".join(c for c in (chr(draw.choice(script)) for _ in range(4)) if unicodedata.category(c) != "Cn")

    return ["".join(piece() for _ in range(draw.randint(0, 14))) for _ in range(number)]


def test_generated_strings_equal_transformers(real):
    tokenizer, slow, fast = real
    texts = generated(2000)
    ids, mask = tokenizer(texts)
    wanted = slow(texts, padding="max_length", truncation=True)
    different = [t for t, a, b in zip(texts, ids.tolist(), wanted["input_ids"], strict=True) if a != b]
    print(f"{len(texts)} strings, {len(different)} with other ids than the slow tokenizer")
    assert not different, different[:3]
    assert mask.tolist() == wanted["attention_mask"]

    # The fast tokenizer cleans nothing but spaces, lower-cases the last sigma of a word as any other, and has no
    # special tokens in capitals; the slow one is the reference. Elsewhere the two agree, and so do we.
    plain = [
        (text, row)
        for text, row in zip(texts, ids.tolist(), strict=True)
        if unicodedata.normalize("NFC", text) == fix_text(text)
        and not any(part in text for part in ("&", "\u03a3", "'\u017f", "<|END"))
    ]
    assert len(plain) > 200
    wanted = fast([text for text, _ in plain], padding="max_length", truncation=True)["input_ids"]
    different = [text for (text, row), other in zip(plain, wanted, strict=True) if row != other]
    print(f"{len(plain)} plain strings, {len(different)} with other ids than the fast tokenizer")
    assert not different, different[:3]


# (text, ftfy 6.3.1's fix_text)
FIXED = [
    ("\u2018a\u2019 \u201cb\u201d \u201ec\u201f \u02bcd", "'a' \"b\" \"c\" 'd"),
    ("fix &amp; html &lt;b&gt;", "fix & html <b>"),
    ("<b>fix &amp; html</b>\n&amp;", "<b>fix &amp; html</b>\n&amp;"),
    ("&amp;eacute; P&EACUTE;REZ &#233; &#xe9; &#59; &nosuch; &ampx; &amp &LTIMES;",
     "\u00e9 P\u00c9REZ \u00e9 \u00e9 &#59; &nosuch; &ampx; &amp &LTIMES;"),
    ("\ufb01\ufb03\ufb05 \u0149 \u01c4", "fiffi\u017ft 'n D\u017d"),
    ("\uff2c\uff2f\uff35\uff24\u3000\uff76\uff9e \uff06amp;", "LOUD \u30ac &"),
    ("a\x00b\x1b[31mc\x1b[0m\x7f\ufeff\u206a\ufff9", "abc"),
    ("\x85\x93\x9d", "\u2026\"\x9d"),
    ("\ud83d\ude00 \ud83d \ude00", "\U0001f600 \ufffd \ufffd"),
    ("e\u0301\u0345 \u212b", "\u00e9\u0345 \u00c5"),
    *(2 * (same,) for same in ("nothing to do", "\u00fcber \u4e2d\u6587 \u00bd", "\U0001f469\u200d\U0001f467", "")),
]  # fmt: skip


@pytest.mark.parametrize("text, fixed", FIXED)
def test_fix_text(text, fixed):
    assert fix_text(text) == fixed


def test_fix_text_equals_ftfy_but_for_mojibake():
    ftfy = pytest.importorskip("ftfy", reason="ftfy is not installed")
    for text, fixed in FIXED:
        assert ftfy.fix_text(text) == fixed
    for text in (text.replace("\n", " ") for text in generated(2000)):  # white space is folded on both sides
        assert fix_text(text).split() == ftfy.fix_text(text, fix_encoding=False).split(), text
    assert ftfy.fix_text("sch\u00c3\u00b6n") == "sch\u00f6n" and fix_text("sch\u00c3\u00b6n") == "sch\u00c3\u00b6n"


def test_padding_token_and_length_from_the_folder(golden_folder, tmp_path):
    """Stable Diffusion 2.1's two files contradict each other; the special tokens map wins, as in transformers."""
    folder = shutil.copytree(golden_folder, tmp_path / "tokenizer")
    config = {"pad_token": "<|endoftext|>", "model_max_length": 9, "tokenizer_class": "CLIPTokenizer"}
    for special in ({}, {"pad_token": "!"}, {"pad_token": {"content": "!", "lstrip": False, "rstrip": False}}):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        reference = CLIPTokenizer.from_pretrained(folder)
        reference.fix_text = fix_text
        texts = ["a man!", "!", "two small dogs playing in the snow", "on <|endoftext|> and!"]
        ids, mask = ClipTokenizer(folder)(texts)
        wanted = reference(texts, padding="max_length", truncation=True)
        assert ids.tolist() == wanted["input_ids"] and mask.tolist() == wanted["attention_mask"]
        assert ids.shape == (4, 9)
        assert ids[0, -1] == (0 if special else reference.eos_token_id)


def test_bad_tokenizer_folder_is_one_line(golden_folder, tmp_path):
    with pytest.raises(WeightsError, match=r"vocab\.json: no such file$"):
        ClipTokenizer(tmp_path)
    shutil.copy(golden_folder / "vocab.json", tmp_path)
    with pytest.raises(WeightsError, match=r"merges\.txt: not readable"):
        ClipTokenizer(tmp_path)
    shutil.copy(golden_folder / "merges.txt", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(WeightsError, match=r"special token '\[PAD\]' is missing$"):
        ClipTokenizer(tmp_path)


# Encoder


def clip(**settings) -> CLIPTextModel:
    """transformers' encoder with every parameter random; small embeddings, so that a wrong epsilon shows."""
    model = randomise(CLIPTextModel(CLIPTextConfig(**{**TINY, **settings})), scale=0.3)
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.mul_(0.02)
        model.text_model.embeddings.position_embedding.weight.mul_(0.02)
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_equals_transformers(tmp_path, act):
    reference = clip(hidden_act=act)
    reference.save_pretrained(tmp_path, safe_serialization=True)
    model = load_text_encoder(tmp_path)
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [2]])).long()
    with torch.no_grad():
        wanted = [reference(ids).last_hidden_state, reference(ids, attention_mask=mask).last_hidden_state]
    for name, found, want in zip(("no mask", "mask"), (model(ids), model(ids, mask)), wanted, strict=True):
        assert_close(found, want, 1e-5, f"{act}, {name}")
    assert difference(wanted[0][1:, 7:], wanted[1][1:, 7:]) > 0.05  # the mask matters, on the padded rows only
    torch.testing.assert_close(model(ids)[1, :7], model(ids, mask)[1, :7])


def test_old_position_ids_are_left_out_and_anything_else_stops(tmp_path):
    clip().save_pretrained(tmp_path, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("text_model.embeddings.position_ids", None)
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(12)[None]}, file)
    load_text_encoder(tmp_path, torch.bfloat16)
    save_file({**tensors, "text_projection.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(WeightsError, match=r"unexpected tensor text_projection\.weight$"):
        load_text_encoder(tmp_path)


def test_other_activations_are_refused(tmp_path):
    clip(hidden_act="gelu_new").save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(WeightsError, match=r"hidden_act 'gelu_new' is not supported, only 'gelu' or 'quick_gelu'$"):
        load_text_encoder(tmp_path)


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(**FULL))
        model = TextEncoder(TextConfig())
    wanted = {name: shape for name, shape in shapes(theirs).items() if not name.endswith("position_ids")}
    assert shapes(model) == wanted
    assert vars(TextConfig()) == FULL
    ids = torch.zeros(2, 77, dtype=torch.int64, device="meta")
    assert model(ids, ids).shape == (2, 77, 1024)


def test_bfloat16_and_gradients():
    torch.manual_seed(0)
    model = TextEncoder(TextConfig(**{k: v for k, v in TINY.items() if not k.endswith("token_id")}))
    ids = torch.randint(50, (2, 12))
    out = model(ids)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert_close(model.bfloat16()(ids, torch.ones_like(ids)), out, 0.05, "bfloat16")
