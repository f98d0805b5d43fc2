"""What a process of a run notices of the system: that it should stop, how it was started."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import TO_END


@contextmanager
def stop_signals() -> Iterator[list]:
    """A list of the requests to stop that the process has received: SIGTERM, Ctrl-C, the end of its terminal (SIGHUP,
    unless nohup has it ignored). They do not end it."""
    requests = []
    always = (signal.SIGTERM, signal.SIGINT)
    numbers = [n for n in {*TO_END, *always} if n in always or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: requests.append(number)) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command() -> str:
    """The command that continues this run; on several machines it lacks torchrun's rendezvous endpoint."""
    start, local = [Path(sys.executable).name], int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if local:  # started by torchrun
        start = ["torchrun", "--nnodes", str(int(os.environ["WORLD_SIZE"]) // local), "--nproc-per-node", str(local)]
    return shlex.join([*start, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
