"""What stands in for bfloat16's slow kernels on a CPU: the same values and gradients, and where it does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from published import cpu


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
    monkeypatch.setattr(cpu, "WITHOUT_BF16", without)
    monkeypatch.setattr(cpu.InFloat32, "apply", lambda *inputs: calls.append(inputs) or F.linear(*inputs))
    x, weight = random(1, tokens, 8).to(dtype), random(4, 8).to(dtype)
    cpu.linear(x.requires_grad_(x_trains), weight.requires_grad_(weight_trains))
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
        (cpu.FEW_KEYS, "qkv", torch.bfloat16, False),
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
