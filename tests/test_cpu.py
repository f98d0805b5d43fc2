"""What stands in for bfloat16's slow kernels on a CPU: the same values and gradients, and where it does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from random_weights import write_random_weights
from torch import nn

from lora import add_lora
from published import cpu
from published.parts import load_int8_llama, load_llama


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# ---- products


def test_product_and_its_gradient():
    """Also of more rows than ROWS."""
    weight, x, results = random(cpu.ROWS + 64, 64), random(2, 5, 64, seed=1), []
    for product in (F.linear, cpu.InFloat32.apply):
        y = x.clone().requires_grad_(True)
        output = product(y, weight)
        output.square().sum().backward()
        results.append((output.detach().float(), y.grad.float()))
    for name, pair in zip(("product", "gradient"), zip(*results, strict=True), strict=True):
        assert_close(*pair, 1e-2, f"{name} in bfloat16")


@pytest.mark.parametrize(
    ("without", "tokens", "x_trains", "weight_trains", "dtype", "detour"),
    [
        (True, 3, False, False, torch.bfloat16, True),
        (True, 2, False, False, torch.bfloat16, False),  # quick as it is
        (True, 2, True, False, torch.bfloat16, True),  # not its gradient
        (True, 3, True, True, torch.bfloat16, False),  # that gradient is not written
        (True, 3, False, False, torch.float32, False),
        (False, 3, True, False, torch.bfloat16, False),
    ],
)
def test_which_products_are_in_float32(monkeypatch, without, tokens, x_trains, weight_trains, dtype, detour):
    calls = []
    monkeypatch.setattr(cpu, "HAS_NO_BF16", without)
    monkeypatch.setattr(cpu.InFloat32, "apply", lambda *inputs: calls.append(inputs) or F.linear(*inputs))
    x, layer = random(1, tokens, 8).to(dtype), nn.Sequential(nn.Linear(8, 4, bias=False)).to(dtype)
    cpu.use_float32_kernels(layer.requires_grad_(weight_trains))
    layer(x.requires_grad_(x_trains))
    assert bool(calls) == detour


# ---- attention


def attend(keys: int, trains: str, dtype: torch.dtype = torch.bfloat16, masked: bool = False, causal: bool = False):
    """Output and gradients of 8 queries; `trains`: which of q, k, v do."""
    inputs = [random(2, 3, n, 16, seed=n).to(dtype) for n in (8, keys, keys)]
    for name, x in zip("qkv", inputs, strict=True):
        x.requires_grad_(name in trains)
    mask = torch.where(torch.arange(keys) < keys - 3, 0.0, -torch.inf).to(dtype).expand(8, -1) if masked else None
    output = cpu.attention(*inputs, mask, is_causal=causal)
    if trains:
        output.square().sum().backward()
    return [output.detach(), *(x.grad for x in inputs if x.requires_grad)]


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True)])
def test_attention_in_bfloat16_with_gradients(masked, causal):
    ours = attend(8, "qkv", torch.bfloat16, masked, causal)
    exact = attend(8, "qkv", torch.float32, masked, causal)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    for a, b in zip(ours, exact, strict=True):
        assert_close(a.float(), b, 1e-2)


@pytest.mark.parametrize(
    ("keys", "trains", "dtype", "detour"),
    [
        (8, "qkv", torch.bfloat16, True),
        (8, "q", torch.bfloat16, True),
        (8, "kv", torch.bfloat16, True),  # the UNet's first layer: noise reads what is trained
        (8, "", torch.bfloat16, False),
        (cpu.MIN_KEYS, "qkv", torch.bfloat16, False),
        (8, "qkv", torch.float16, False),
    ],
)
def test_which_attention_is_in_float32(monkeypatch, keys, trains, dtype, detour):
    seen, kernel = [], F.scaled_dot_product_attention

    def spy(q, *more, **options):
        seen.append(q.dtype)
        return kernel(q, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(keys, trains, dtype)
    assert seen == [torch.float32 if detour else dtype]


# ---- swapped in from outside


def test_kernels_are_swapped_in_for_bfloat16_alone(tmp_path, monkeypatch):
    """Also under LoRA and beside 8-bit matrices; the same hidden states and gradients but for rounding."""
    monkeypatch.setattr(cpu, "HAS_NO_BF16", True)
    weights = write_random_weights(tmp_path, small=True)
    exact = load_llama(weights / "vicuna", torch.float32)
    assert "attend" not in vars(exact.model.layers[0].self_attn) and "forward" not in vars(exact.lm_head)
    results = []
    for load in (load_llama, load_int8_llama):
        llama = load(weights / "vicuna", torch.bfloat16)
        assert vars(llama.model.layers[0].self_attn)["attend"] is cpu.attention and "forward" in vars(llama.lm_head)
        assert ("forward" in vars(llama.model.layers[0].mlp.up_proj)) == (load is load_llama)
        plain = load(weights / "vicuna", torch.float32)
        embeddings = random(2, 9, 64)
        for model in (llama, plain):
            torch.manual_seed(0)
            for layer in add_lora(model, dropout=0.0):
                nn.init.normal_(layer.lora_B.weight, std=0.1)
            x = embeddings.to(model.lm_head.weight.dtype, copy=True).requires_grad_(True)
            hidden = model(x)
            (hidden.float() * random(2, 9, 64, seed=1).float()).sum().backward()
            results.append((hidden.detach().float(), x.grad.float()))
        for ours, expected in zip(*results[-2:], strict=True):
            assert_close(ours, expected, 3e-2, "8 bits" if load is load_int8_llama else "bfloat16")
