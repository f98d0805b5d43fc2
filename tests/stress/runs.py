"""Small training runs of both stages for kill.py and stop.py, in processes forked from one that has torch loaded."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from random_weights import write_random_weights
from tqdm import tqdm

import train_mls
import train_uas
from common.cli import run
from miniature.world import write_pairs, write_stories
from trainer import run as trainer_run

SCRIPTS = {"uas": train_uas, "mls": train_mls}


def prepare(folder: Path) -> dict[str, list[str]]:
    """Random weights and drawn data in `folder`; the arguments of each stage: accumulation, two optimisers,
    LoRA's dropout, and lines of the log that checkpoints come between."""
    torch.set_num_threads(1)  # none is running yet that a fork would lose
    weights = write_random_weights(folder / "weights", small=True)
    write_pairs(folder / "pairs.tar", 10, 0, size=32)
    write_stories(folder / "stories.tar", 6, 0, "train", size=32)
    common = ["--weights", str(weights), "--accumulate", "2", "--warmup", "5", "--lr", "1e-3"]
    common += ["--device", "cpu", "--sample-every", "0", "--batch-size", "2"]
    uas = [*common, "--data", str(folder / "pairs.tar"), "--muon", "1e-3"]
    return {"uas": uas, "mls": [*common, "--data", str(folder / "stories.tar")]}


class Run:
    """A training in a process group of its own. What rank N prints is added to `out`/printed-N; `saves` tells of its
    saving: b where it begins to write a checkpoint, e where that is done."""

    def __init__(self, stage: str, out: Path, arguments: list[str], environment: dict[str, str] | None = None):
        out.mkdir(exist_ok=True)
        self.saves, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            child(SCRIPTS[stage], out, arguments, environment or {}, told)
        os.close(told)
        os.set_blocking(self.saves, False)
        with contextlib.suppress(PermissionError):
            os.setpgid(self.pid, self.pid)  # here and there: whichever comes first

    def saved(self) -> str:
        """What it has told since the last call."""
        try:
            return os.read(self.saves, 1000).decode()
        except BlockingIOError:
            return ""

    def status(self) -> int | None:
        """The exit status, that of a signal negative; None while it runs. Once it is known it is gone."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> int:
        """Kill it with the processes that it started; the exit status, another one where it had just ended."""
        os.killpg(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.saves)


def child(script, out: Path, arguments: list[str], environment: dict[str, str], told: int) -> None:
    """Be the process of a run, to its end; write to the pipe `told`."""
    save = trainer_run.save_checkpoint

    def save_and_tell(*inputs):
        os.write(told, b"b")
        save(*inputs)
        os.write(told, b"e")

    code = 1
    atexit._clear()  # the parent's: its folder is not ours to remove
    tqdm.set_lock(threading.RLock())  # its own is shared by all forked runs, and one that is killed may hold it
    try:
        trainer_run.save_checkpoint = save_and_tell
        os.environ |= environment
        with open(out / f"printed-{environment.get('RANK', 0)}", "a", encoding="utf-8") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        sys.argv = [f"{script.__name__}.py", "--out", str(out), *arguments]
        run(script.main)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # the end of the process group
        sys.stdout.flush()
        os._exit(code)


def ranks(count: int) -> list[dict[str, str]]:
    """The environment that torchrun would give each of `count` processes of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{n: str(v) for n, v in {**common, "RANK": i, "LOCAL_RANK": i}.items()} for i in range(count)]
