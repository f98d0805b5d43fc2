"""One run in several processes, as torchrun starts them, each with a GPU: other samples in each, one step in all.

    torchrun --nproc-per-node 2 train_uas.py --weights weights --data 'cc3m-train-{0000..0575}.tar'

    rank 0   samples 0..B-1    -> losses -> gradients --+
                                                        +-- mean, (trained parameters + 1,) -> the same step in both
    rank 1   samples B..2B-1   -> losses -> gradients --+

Each process reads the frozen weights itself and steps its own copy of what trains, which stays equal as all start and
step alike. A step sends one thing from GPU to GPU: the gradients of what trains, in one flat buffer. That buffer takes
the place of DistributedDataParallel, which would send them in pieces during the backward pass: of use between slow
machines, but harder to see through. The hosts exchange single numbers beside it.

With --shard no process holds all frozen weights: `shard` leaves each a part of every layer. A layer is put together
when its turn comes, forward and backward, and taken apart again, so all processes have to go through it together.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def one_line_peer_errors() -> Iterator[None]:
    """Where another process has ended, torch.distributed's RuntimeError becomes a ValueError of one line."""
    try:
        yield
    except RuntimeError as error:  # gloo's; NCCL does not return, and torchrun ends the process
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        sends = frame.f_globals.get("__name__", "").startswith("torch.distributed")
        if not sends or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the other processes of the run do not answer ({str(error).splitlines()[0]})") from None


class World:
    """This process as one of `size`: as torchrun's environment says, or alone. Only rank 0 prints and writes."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            with one_line_peer_errors():
                backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=timedelta(hours=2))  # to index many tars takes rank 0 a while
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends

    def end(self) -> None:
        """After the last exchange, in all ranks; not after an error in one, as NCCL would wait for the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def gather(self, value: object) -> list:
        """Every rank's small value, in all ranks. It goes from host to host and waits for no GPU."""
        values = [value] * self.size
        if self.size > 1:
            with one_line_peer_errors():
                dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true in any rank; from host to host, as `gather`, but quick enough for every step."""
        votes = torch.tensor(int(flag))
        if self.size > 1:
            with one_line_peer_errors():
                dist.all_reduce(votes)
        return bool(votes)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 does what is inside before all others, who then find the files that it wrote."""
        if self.rank > 0:
            self.any(True)
        yield
        if self.rank == 0:
            self.any(True)


class Gradients:
    """The gradients of `parameters` in one flat buffer, each `.grad` a view of it, with the loss behind them. One call
    adds up the ranks', one tells whether all is finite, one clears them. What a step does not reach has gradient 0.

    Where something is not finite the optimisers step with `found_inf` 1, which makes them leave everything as it was.
    No host looks at that number before a line of the log is due, so none waits for its GPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizers: list[torch.optim.Optimizer], world: World):
        parameters = list(parameters)
        self.optimizers, self.world = optimizers, world
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
        for parameter, part in zip(parameters, self.flat[:-1].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, device=self.flat.device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.flat[-1] += loss.detach()

    def step(self) -> None:
        """One step of the optimisers along the mean over the ranks, or none."""
        if self.world.size > 1:
            self.flat /= self.world.size
            with one_line_peer_errors():
                dist.all_reduce(self.flat)
        # The norm is infinite too where a square is, which AdamW's second moment would never recover from.
        finite = torch.linalg.vector_norm(self.flat).isfinite()
        found_inf = 1.0 - finite.float()
        self.flat.masked_fill_(~finite, 0.0)
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        self.flat.zero_()
        self.skipped = self.skipped + found_inf
        self.in_a_row = (self.in_a_row + 1) * found_inf
        self.longest = torch.maximum(self.longest, self.in_a_row)


# ---- frozen weights in parts


class Layers(nn.Module):
    """FSDP2 wants a module above the layers and would share out all that it finds under it: these, and nothing else."""

    def __init__(self, layers: Iterable[nn.Module], forward: Callable):
        super().__init__()
        self.layers, self.forward = nn.ModuleList(layers), forward


def shard(module: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process its part of the frozen `layers` of `module`, on `device`, and put all else of it there whole.

    Each layer must be used by calling it. One inside another comes before it. They are moved to the device one by one,
    so that a GPU need not hold them all at once. What is added to a layer later, such as LoRA's matrices, stays whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # which take longer to import than the rest of torch
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    root = Layers(layers, module.forward)
    for layer in root.layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 cuts no channels-last convolution
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    module.to(device)
    module.forward = partial(nn.Module.__call__, root)  # not `root`, which would become a part of the module


def weights_held(*modules: nn.Module) -> tuple[int, int]:
    """Bytes of the modules' frozen weights on this process, and of all of them."""
    frozen = [p for module in modules for p in module.parameters() if not p.requires_grad]
    own = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)  # a DTensor has it
    return own, sum(p.numel() * p.element_size() for p in frozen)
