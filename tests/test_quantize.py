"""8-bit matrices of the language model: the error, the loss in perplexity, gradients, LoRA on top."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, difference

from llama import KVCache
from lora import add_lora
from published.int8 import Int8Linear, int8_rows
from published.loading import save_safetensors
from published.parts import load_int8_llama, load_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype):
    """No weight is off by more than half a step of its row; a row of zeros stays zero."""
    weight = torch.randn(70, 40) * torch.logspace(-3, 2, 70)[:, None]
    weight[7] = 0
    quantised, scale = int8_rows(weight, dtype, "cpu")
    assert quantised.dtype == torch.int8 and scale.dtype == dtype
    step = weight.abs().amax(1, keepdim=True) / 127
    slack = 1.01 if dtype == torch.float32 else 2.01  # a scale rounded down cuts the largest weight
    assert ((quantised * scale.float()[:, None] - weight).abs() <= slack * step / 2 + 1e-9).all()
    assert not quantised[7].any() and (scale > 0).all()


@torch.no_grad()
def perplexity(llama, ids):
    """Of ids (T,), each predicted from those before it in its piece of 128."""
    losses = []
    for piece in ids.split(128):
        logits = llama.lm_head(llama(llama.model.embed_tokens(piece[None, :-1])))[0]
        losses.append(F.cross_entropy(logits, piece[1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


@torch.no_grad()
def test_loss_is_small(weights):
    """Logits and perplexity of the small random model, sharpened so that it prefers some tokens; without the scales of
    rows it would be far worse."""
    stored, quantised = load_llama(weights / "vicuna"), load_int8_llama(weights / "vicuna", torch.float32)
    assert sum(isinstance(module, Int8Linear) for module in quantised.modules()) == 7 * stored.config.num_hidden_layers
    for llama in (stored, quantised):
        llama.lm_head.weight.data = 10 * llama.lm_head.weight
    embeddings = stored.model.embed_tokens.weight[:60].view(2, 30, -1)
    logits = [llama.lm_head(llama(embeddings)) for llama in (stored, quantised)]
    # The text is what the stored model says most readily, so that there is something to lose.
    ids, cache = [1], KVCache(stored, 1, 300)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        hidden = stored(stored.model.embed_tokens(torch.tensor([ids[-1:]])), cache=cache)
        ids.append(int(torch.multinomial(stored.lm_head(hidden)[0, -1].softmax(-1), 1, generator=generator)))
    before, after = (perplexity(llama, torch.tensor(ids)) for llama in (stored, quantised))
    print(f"logits differ by {difference(*logits[::-1]):.1e}; perplexity {before:.3f} as stored, {after:.3f} in 8 bits")
    assert difference(*logits[::-1]) <= 2e-2
    assert before < 300 and abs(after / before - 1) < 5e-3


def test_lora_and_gradients(weights):
    """LoRA goes on top, and gradients pass through the frozen 8-bit matrices as through their values."""
    quantised, plain = load_int8_llama(weights / "vicuna", torch.float32), load_llama(weights / "vicuna")
    for name, layer in quantised.named_modules():
        if isinstance(layer, Int8Linear):
            plain.get_submodule(name).weight.data = layer.weight.float() * layer.scale[:, None]
    embeddings, towards, gradients = torch.randn(1, 6, 64), torch.randn(1, 6, 64), []
    for llama in (quantised, plain):
        torch.manual_seed(0)
        for layer in add_lora(llama, dropout=0.0):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        x = embeddings.clone().requires_grad_(True)
        trained = [p for name, p in llama.named_parameters() if "lora_" in name]
        gradients.append(torch.autograd.grad((llama(x) * towards).sum(), [x, *trained]))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected, 1e-4, "gradient")


def test_stored_types(weights, tmp_path):
    """Files in 16 bits give the same whole numbers as their values do."""
    half = load_llama(weights / "vicuna", torch.float16)
    folder = tmp_path / "vicuna"
    folder.mkdir()
    save_safetensors(half.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text((weights / "vicuna" / "config.json").read_text())
    ours = load_int8_llama(folder, torch.bfloat16)
    for name, parameter in ours.named_parameters():
        wanted = torch.int8 if name.endswith("_proj.weight") else torch.bfloat16
        assert parameter.dtype == wanted and not parameter.requires_grad, name
    layer = "model.layers.0.mlp.up_proj"
    expected, _ = int8_rows(half.get_submodule(layer).weight.float(), torch.bfloat16, "cpu")
    assert torch.equal(ours.get_submodule(layer).weight, expected)
