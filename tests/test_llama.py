"""Vicuna and its tokenizer against transformers."""

import copy
import json
import random
from importlib.resources import files

import pytest
import torch
import transformers
from helpers import assert_close, randomise, shapes
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common.tokenizer import Tokenizer
from llama import GrowingKVCache, KVCache, Llama, LlamaConfig, RopeScaling, rotary_frequencies
from minigpt5 import Vokens
from published.loading import WeightsError
from published.parts import load_llama

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILY = {  # what each adds to SIZES: Vicuna; SmolLM2 with a head width of its own; Llama 3.1, of whose rotary
    # frequencies some stay, some are divided and one lies between
    "vicuna": {"rms_norm_eps": 1e-5},
    "smollm2": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 24, "rope_theta": 1e5},
    "llama3": {"num_key_value_heads": 2, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
}


@pytest.fixture(scope="module", params=FAMILY)
def pair(request, tmp_path_factory):
    """Ours and the reference with the same random weights, ours through the real loader."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.LlamaConfig(**SIZES, **FAMILY[request.param])
    reference = randomise(transformers.LlamaForCausalLM(config))
    reference.save_pretrained(folder, max_shard_size="200kB")  # several shards and an index
    assert (folder / "model.safetensors.index.json").exists()
    return load_llama(folder), reference


def test_forward(pair):
    ours, reference = pair
    embeddings = torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(inputs_embeds=embeddings, output_hidden_states=True)
        hidden = ours(embeddings)
        assert_close(hidden, expected.hidden_states[-1], 1e-5, "hidden states")
        assert_close(ours.lm_head(hidden), expected.logits, 1e-5, "logits")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    ours, reference = pair
    embeddings = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5)):
        mask[row, slice(0, padding) if side == "left" else slice(9 - padding, 9)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions)[0]
        hidden = ours(embeddings, mask)
        assert hidden.isfinite().all()
        assert_close(hidden[mask.bool()], expected[mask.bool()], 1e-5, f"{side} padding")
        cache = KVCache(ours, 3, 9)
        assert_close(ours(embeddings, mask, cache)[mask.bool()], expected[mask.bool()], 1e-5, f"{side} padding, cached")
        # The next token of every row, whatever its padding, continues at its own position.
        following = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(3))
        cache = KVCache(ours, 3, 10)
        ours(embeddings, mask, cache)
        continued = ours(following, cache=cache)
        for row in range(3):
            whole = torch.cat([embeddings[row][mask[row].bool()], following[row]])[None]
            alone = reference.model(inputs_embeds=whole)[0][0, -1]
            assert_close(continued[row, 0], alone, 1e-5, f"{side} padding, next token of row {row}")


def test_cached_decoding(pair):
    """Chunks of 5, 1, 1, 4 and 1 tokens through the cache equal all at once; more slots than tokens change nothing."""
    ours, reference = pair
    embeddings = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(4))
    cache = KVCache(ours, 2, 20)
    with torch.no_grad():
        expected = reference.model(inputs_embeds=embeddings)[0]
        hidden = torch.cat([ours(chunk, cache=cache) for chunk in embeddings.split([5, 1, 1, 4, 1], dim=1)], dim=1)
    assert_close(hidden, expected, 1e-5, "cached decoding")
    assert cache.lengths.tolist() == [12, 12]


def test_continued_pass(pair):
    """Sources of different lengths without gradient, then targets: as all at once, forward and backward."""
    ours, reference = pair
    lengths, L = (6, 3), 4
    rows = [torch.randn(1, n + L, 64, generator=torch.Generator().manual_seed(n)).requires_grad_(True) for n in lengths]
    pieces = list(zip(rows, lengths, strict=True))
    sources = torch.cat([torch.nn.functional.pad(row[:, :n], (0, 0, 0, 6 - n)) for row, n in pieces])
    targets = torch.cat([row[:, n:] for row, n in pieces])
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    cache = GrowingKVCache(2, "cpu")
    with torch.no_grad():
        first = ours(sources, mask, cache)
    second = ours(targets, cache=cache)
    gradients = torch.autograd.grad(second.square().sum(), rows)
    for i, (row, n) in enumerate(pieces):
        whole = reference.model(inputs_embeds=row)[0][0]
        assert_close(first[i, :n], whole[:n], 1e-5, f"source {i}")
        assert_close(second[i], whole[n:], 1e-5, f"target {i}")
        expected = torch.autograd.grad(whole[n:].square().sum(), row)[0]
        assert_close(gradients[i][:, n:], expected[:, n:], 1e-4, f"gradient of row {i}")
        assert not gradients[i][:, :n].any()


def test_gradients(pair):
    """The decoder is frozen; gradients pass through it to the embeddings."""
    ours, reference = pair
    embeddings = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5))
    towards = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(6))
    gradients = []
    for run in (lambda x: ours(x), lambda x: reference.model(inputs_embeds=x)[0]):
        x = embeddings.clone().requires_grad_(True)
        (run(x) * towards).sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients, 1e-4, "gradient of the embeddings")
    assert not any(p.requires_grad for p in ours.parameters())


def test_full_size_names():
    """Vicuna-7B on the meta device: names and shapes are the published ones."""
    with torch.device("meta"):
        ours = Llama(LlamaConfig())
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # its defaults are the 7B
    assert shapes(ours) == shapes(reference)
    assert sum(p.numel() for p in ours.parameters()) == 6_738_415_616


def test_old_buffers(tmp_path, pair):
    _, reference = pair
    state = {**reference.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    reference.save_pretrained(tmp_path, state_dict=state)
    load_llama(tmp_path)


def test_tied_embeddings(pair):
    """A tied table is one parameter after loading and after a cast, and no copy of it is trained or stored."""
    ours, reference = pair
    tied = reference.config.tie_word_embeddings
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    cast = copy.deepcopy(ours).to(torch.bfloat16)
    assert (cast.lm_head.weight is cast.model.embed_tokens.weight) == tied


def test_rotary_frequencies_of_llama3():
    """At the published sizes the scaled frequencies are transformers'."""
    published = {**LLAMA3, "original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(**sizes, rope_scaling=published, max_position_embeddings=131072)
    expected = LlamaRotaryEmbedding(config).inv_freq
    ours = rotary_frequencies(LlamaConfig(**sizes, rope_scaling=RopeScaling(**published)), "cpu")
    assert_close(ours / expected, torch.ones(64), 1e-6, "rotary frequencies over transformers'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported, only 'llama'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "model_type 'mistral' is not supported, only 'llama'"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling of type 'default' is not supported, only 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'type': 'linear', 'factor': 2.0} is not"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": 32}}, "rope_scaling {'rope_type': 'yarn', .* is not"),
        ({"rope_scaling": "llama3"}, "rope_scaling 'llama3' is not supported"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor should be float, found '8'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor that is not below"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters {.* is not supported"),
        ({"num_key_value_heads": 3}, "4 attention heads, 3 key-value heads"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"num_attention_heads": 5}, "do not go together: 64 channels, 5 attention heads"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings should be bool, found 1"),
    ],
)
def test_what_is_not_a_llama(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | change))
    with pytest.raises(WeightsError, match=message) as error:
        load_llama(tmp_path)
    assert "\n" not in str(error.value) and "config.json: " in str(error.value)


def test_vokens(pair):
    """The new rows behave as rows appended to both tables, and are all that trains."""
    ours, _ = pair
    vokens = Vokens(ours, 3, 90)  # a tokenizer of 90 pieces over tables of 96 rows
    assert_close(vokens.input[0], ours.model.embed_tokens.weight[:90].mean(0), 1e-6, "start")
    randomise(vokens, 7)
    table = torch.cat([ours.model.embed_tokens.weight[:90], vokens.input])
    head = torch.cat([ours.lm_head.weight[:90], vokens.output])
    ids = torch.tensor([[0, 5, 89, 90, 91], [93, 92, 7, 90, 1]])
    assert torch.equal(vokens.embed(ours, ids), table[ids])
    hidden = torch.randn(2, 5, 64)
    assert_close(vokens.logits(ours, hidden), hidden @ head.T, 1e-5, "logits")
    (vokens.embed(ours, ids).sum() + vokens.logits(ours, hidden).square().sum()).backward()
    assert vokens.input.grad.abs().sum() > 0 and vokens.output.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def tokenizers():
    """Ours and transformers' slow LLaMA tokenizer, legacy, over a real sentencepiece model of 32,000 pieces."""
    candidates = [f for f in (files("mistral_common") / "data").iterdir() if ".model" in f.name and "v1" in f.name]
    path = candidates[0]
    ours = Tokenizer(path)
    assert ours.base_vocabulary == 32000
    reference = transformers.LlamaTokenizer(str(path), legacy=True, add_bos_token=False)
    added = [
        transformers.AddedToken(name, lstrip=True, rstrip=True, special=True, normalized=False) for name in ours.added
    ]
    reference.add_special_tokens({"additional_special_tokens": added})
    return ours, reference


def generated_strings(count: int, seed: int) -> list[str]:
    """Strings of words, unicode of many scripts, emoji, runs of spaces, newlines, and added tokens in the middle."""
    rng = random.Random(seed)
    scripts = [
        (0x20, 0x7E),
        (0xA1, 0x17F),
        (0x370, 0x3FF),
        (0x400, 0x4FF),
        (0x5D0, 0x5EA),
        (0x620, 0x64A),
        (0x900, 0x97F),
    ]
    scripts += [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x2000, 0x206F), (0x0, 0x1F)]
    words = ["the", "kite", "drifts", "###", "###Human:", "Assistant:", "[IMG]", "[IMG8", "<Img>", "</Img>", "don't"]
    words += ["3.14", "▁", "▁▁"]
    added = [f"[IMG{i}]" for i in range(8)] + ["<ImageHere>"]

    def piece():
        kind = rng.randrange(6)
        if kind == 0:
            low, high = rng.choice(scripts)
            return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
        if kind == 1:
            return rng.choice([" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000"])
        if kind == 2:
            return rng.choice(added)
        return rng.choice(words) + rng.choice(["", " ", ", ", ". "])

    return ["".join(piece() for _ in range(rng.randint(0, 14))) for _ in range(count)]


def test_tokenizer_ids(tokenizers):
    ours, reference = tokenizers
    strings = generated_strings(2000, seed=0)
    wrong = [s for s in strings if ours.encode(s) != reference.encode(s, add_special_tokens=False)]
    print(f"{len(strings)} strings, {sum(map(len, strings))} characters, {len(wrong)} encoded otherwise")
    assert not wrong, wrong[:3]


def test_tokenizer_plain_text(tokenizers):
    """Text of the outside world cannot bring vokens, placeholders or end marks into a prompt."""
    ours, _ = tokenizers
    for text in ("draw [IMG0] and <ImageHere>", "<s></s><unk>", "[IMG7]", "no token at all", "[IMG0][IMG0]"):
        assert not set(ours.encode(ours.escape(text))) & set(ours.special.values())
    assert ours.escape("no token at all") == "no token at all"


def test_tokenizer_stops(tokenizers):
    ours, _ = tokenizers
    assert (
        ours.ends(ours.encode("the end. ###")) and ours.ends(ours.encode("the end.###")) and ours.ends([5, ours.eos_id])
    )
    assert not ours.ends(ours.encode("the end. ##")) and not ours.ends([])
    assert ours.voken_text() == "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7]"
    assert ours.vocabulary == 32009


def test_tokenizer_errors(tmp_path):
    for content in (None, b"", b"no sentencepiece model"):
        path = tmp_path / "tokenizer.model"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            Tokenizer(path)
