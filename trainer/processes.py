"""What a process of a run notices of the others and of the system: that they have ended, that it should stop, how it
was started, how much memory it takes."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.files import TO_END


@contextmanager
def one_line_peer_errors() -> Iterator[None]:
    """Around an exchange: where another process has ended, the RuntimeError becomes a ValueError of one line."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it; NCCL does not return, and torchrun ends the process
        raise ValueError(f"the other processes of the run do not answer ({str(error).splitlines()[0]})") from None


@contextmanager
def stop_signals() -> Iterator[list]:
    """A list of the requests to stop that the process has received: SIGTERM, Ctrl-C, the end of its terminal (SIGHUP,
    unless nohup has it ignored). They do not end it."""
    received = []
    always = (signal.SIGTERM, signal.SIGINT)
    numbers = [n for n in {*TO_END, *always} if n in always or signal.getsignal(n) != signal.SIG_IGN]
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


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of the process; 0 on Windows, which does not tell it this way."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0
