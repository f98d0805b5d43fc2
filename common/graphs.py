"""torch.compile for answers. A GPU may be given all kernels of a step at once, which is called a CUDA graph."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@cache
def compiled(function: Callable, replayed: bool = False, **options: bool) -> Callable:
    """`function` by torch.compile, one graph for each shape. `replayed`: a GPU is given all kernels at once (a CUDA
    graph), and the next call overwrites what this one returned."""
    return torch.compile(function, dynamic=False, options={"triton.cudagraphs": replayed, **options})


def compiled_step(function: Callable[..., tuple[Tensor, ...]], *inputs: object) -> tuple[Tensor, ...]:
    """What `function` returns, compiled. Its attention is compiled, too: for one query, a fused kernel would leave most
    of a GPU idle."""
    torch.compiler.cudagraph_mark_step_begin()
    with sdpa_kernel(SDPBackend.MATH):
        outputs = compiled(function, replayed=True, coordinate_descent_tuning=True)(*inputs)
    return tuple(output.clone() for output in outputs)


@lru_cache(maxsize=1)
def lasting_cache(build: Callable, *sizes: object):
    """The `llama.KVCache` that `build` makes. It stays where it is in memory: a CUDA graph reads and writes the
    addresses that it was recorded with."""
    cache = build(*sizes)
    for tensor in (*cache.keys, *cache.values, cache.lengths):
        torch._dynamo.mark_static_address(tensor, guard=False)
    return cache
