"""One run in several processes, as torchrun starts them, each with a GPU: different samples in each, one step in all.

    torchrun --nproc-per-node 2 train_uas.py --weights weights --data 'cc3m-train-{0000..0575}.tar'

    rank 0   samples 0..B-1    -> losses -> gradients --+
                                                        +-- mean, (trained parameters + 1,) -> the same step in both
    rank 1   samples B..2B-1   -> losses -> gradients --+

Each process reads all frozen weights and steps its own copy of the trained parameters. The copies stay equal, as all
of them start from the same values and take the same steps. A step sends one tensor from GPU to GPU: the gradients of
the trained parameters in one flat buffer (`Gradients` in run.py). DistributedDataParallel would send them in pieces
during the backward pass, which helps between slow machines but is harder to see through. The hosts exchange single
numbers beside it.
"""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def one_line_peer_errors() -> Iterator[None]:
    """Where another process has ended, torch.distributed's RuntimeError becomes a ValueError of one line."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it; NCCL does not return, and torchrun ends the process
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        sends = frame.f_globals.get("__name__", "").startswith("torch.distributed")
        if not sends or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the other processes of the run do not answer ({str(error).splitlines()[0]})") from None


class World:
    """This process as one of `size`, as torchrun's environment says, or alone. Only rank 0 prints and writes."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with one_line_peer_errors():
                dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may take long to index many tars
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends

    def end(self) -> None:
        """To be called by all ranks after the last exchange, but not after an error: NCCL would wait for the others."""
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
        """Whether the flag is true in any rank: from host to host like `gather`, but quick enough for every step."""
        votes = torch.tensor(int(flag))
        if self.size > 1:
            with one_line_peer_errors():
                dist.all_reduce(votes)
        return bool(votes)

    def average(self, values: Tensor) -> None:
        """Replace `values` by their mean over the ranks: from GPU to GPU."""
        if self.size > 1:
            values /= self.size
            with one_line_peer_errors():
                dist.all_reduce(values)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Rank 0 runs the block before all others, which then find the files that it wrote."""
        if self.rank > 0:
            self.any(True)
        yield
        if self.rank == 0:
            self.any(True)


# ---- stopping


@contextmanager
def stop_signals() -> Iterator[list]:
    """A list of the requests to stop (SIGTERM, Ctrl-C) that the process has received; they do not end it."""
    received = []
    numbers = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command() -> str:
    """The command that continues this run; of several machines, without the address at which they meet."""
    start, local = [Path(sys.executable).name], int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if local:  # started by torchrun
        start = ["torchrun", "--nnodes", str(int(os.environ["WORLD_SIZE"]) // local), "--nproc-per-node", str(local)]
    return shlex.join([*start, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
