"""Training runs that are stopped, meet numbers that are not finite or a disk that is full: each goes on, or says why
not and leaves its last checkpoint whole."""

import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DATA
from safetensors.torch import load_file
from test_commands import fails, train
from test_mls_commands import train as train_stories
from test_steps import NoReading

import train_mls
import train_uas
from miniature.world import write_stories
from minigpt5 import MiniGPT5
from published.loading import checkpoint_folders, matching_tensors, save_safetensors
from trainer import run as trainer_run
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.log import read_log
from trainer.muon import Muon
from trainer.run import Gradients, World

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("stories") / "stories.tar"
    write_stories(path, 6, 0, "train")
    return path


def tensors(folder) -> dict:
    """All of a checkpoint's tensors."""
    files = (load_file(folder / f"{name}.safetensors") for name in ("trained", "optimizer"))
    return {name: tensor for file in files for name, tensor in file.items()}


def same(one, other) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(log) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("samples_per_s", "memory_gb")} for record in log]


def at_forward(monkeypatch, action) -> None:
    """action(number of the forward pass, its losses) -> the losses."""
    forward, count = MiniGPT5.losses, iter(range(10_000))
    monkeypatch.setattr(MiniGPT5, "losses", lambda *args, **options: action(next(count), forward(*args, **options)))


# ---- signals


def stop_at(monkeypatch, number: int, kind: int) -> None:
    """The signal goes to the process and its workers, as from a terminal or a scheduler, in the middle of a step."""

    def stop(at, losses):
        if at == number:
            for process in (*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())):
                os.kill(process.pid, kind)
        return losses

    at_forward(monkeypatch, stop)


@pytest.mark.parametrize("stage", ["uas", "mls"])
def test_stopped_twice(monkeypatch, weights, tar, stories, tmp_path, capsys, stage):
    """By each signal, in mid-epoch, between two lines of the log, with accumulation, a worker and LoRA's dropout. The
    printed command goes on; in the end log, weights and moments are those of a run without a stop, to the bit."""
    script, start, data = (train_uas, train, tar) if stage == "uas" else (train_mls, train_stories, stories)
    options = ("--steps", 6, "--accumulate", 2, "--workers", 1, "--log-every", 4)
    whole = start(monkeypatch, weights, data, tmp_path / "whole", *options)
    capsys.readouterr()
    with monkeypatch.context() as first:
        stop_at(first, 2, signal.SIGTERM)
        start(first, weights, data, tmp_path / "parts", *options)
    printed = capsys.readouterr().out
    assert "stopped after step 2 of 6" in printed and checkpoint_folders(tmp_path / "parts")[0].name == "step-00000002"
    command = shlex.split(printed.strip().splitlines()[-1].partition("to go on: ")[2])
    assert command[1] == f"{script.__name__}.py" and command[-1] == "--resume"
    with monkeypatch.context() as second:
        stop_at(second, 3, signal.SIGINT)
        second.setattr("sys.argv", command[1:])
        script.main()
    assert "stopped after step 4 of 6" in capsys.readouterr().out
    parts = start(monkeypatch, weights, data, tmp_path / "parts", *options, "--resume")
    assert losses(parts) == losses(whole) and [record["step"] for record in whole] == [4, 6]
    assert same(*(checkpoint_folders(tmp_path / run)[0] for run in ("parts", "whole")))


def test_an_error_in_a_step_ends_the_workers(monkeypatch, weights, tar, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    at_forward(monkeypatch, lambda at, losses: 1 / (1 - at) and losses)  # in the second step
    with pytest.raises(ZeroDivisionError):
        train(monkeypatch, weights, tar, tmp_path, "--steps", 3, "--workers", 2)
    for worker in multiprocessing.active_children():
        worker.join(5)
    assert not multiprocessing.active_children() and signal.getsignal(signal.SIGTERM) == handler


def test_the_last_step_has_its_held_out_losses(monkeypatch, weights, tar, tmp_path):
    """Even if the run was asked to stop: nothing would make up for them."""
    stop_at(monkeypatch, 1, signal.SIGINT)
    log = train(monkeypatch, weights, tar, tmp_path, "--steps", 2, "--val", tar, "--val-batches", 1)
    assert log[-1]["step"] == 2 and "val_loss" in log[-1]


def test_what_resumes_differently_is_told(monkeypatch, weights, tar, tmp_path, capsys):
    options = ("--save-every", 1, "--log-every", 1, "--batch-size", 2)
    train(monkeypatch, weights, tar, tmp_path, *options, "--steps", 1, "--lr", 0.5)
    train(monkeypatch, weights, tar, tmp_path, *options, "--steps", 2, "--lr", 0.25, "--resume")
    told = [line for line in capsys.readouterr().out.splitlines() if "from here on" in line]
    assert told == ["--lr is 0.25 from here on, before it was 0.5", "--steps is 2 from here on, before it was 1"]


# ---- numbers that are not finite


def spoil(monkeypatch, passes, value=float("nan")) -> None:
    def action(at, losses):
        return {name: loss * value if at in passes else loss for name, loss in losses.items()}

    at_forward(monkeypatch, action)


@pytest.mark.parametrize(("value", "muon"), [(float("nan"), ()), (1e30, ("--muon", 1e-3))])
def test_a_step_that_is_not_finite_is_skipped(monkeypatch, weights, tar, tmp_path, value, muon):
    """Step 2 of 3, by one of its two forward passes: weights and moments stay as they were; the run goes on."""
    spoil(monkeypatch, {2}, value)
    log = train(monkeypatch, weights, tar, tmp_path, "--steps", 2, "--save-every", 1, "--accumulate", 2, *muon)
    first, second = reversed(checkpoint_folders(tmp_path))
    assert same(first, second) and [record["nonfinite"] for record in log] == [0, 1]
    log = train(monkeypatch, weights, tar, tmp_path, "--steps", 3, "--accumulate", 2, "--resume", *muon)
    assert [record["nonfinite"] for record in log] == [0, 1, 1] and not same(*checkpoint_folders(tmp_path))
    assert all(0 < record["loss"] < 1e30 for record in log if record["step"] != 2 or value != 1e30)
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)  # no NaN in it


def test_too_many_in_a_row(monkeypatch, weights, tar, tmp_path, capsys):
    """Two and then three in a row, three being too many; the checkpoint before them is there to go on from."""
    arguments = ("--weights", weights, "--data", tar, "--out", tmp_path, "--workers", 0, "--batch-size", 2)
    more = ("--steps", 20, "--max-nonfinite", 3, "--save-every", 4, "--log-every", 1, "--sample-every", 0)
    with monkeypatch.context() as patch:
        spoil(patch, {1, 2, 4, 5, 6})
        pattern = r"3 steps in a row up to step 7 were not finite, --max-nonfinite is 3.*step-00000004"
        fails(train_uas.main, patch, capsys, pattern, *arguments, *more)
    assert read_log(tmp_path / "log.jsonl")[-1]["nonfinite"] == 5
    log = train(monkeypatch, weights, tar, tmp_path, "--steps", 5, "--resume")
    assert "resumed from step 4" in capsys.readouterr().out and log[-1]["nonfinite"] == 2


class Tiny(torch.nn.Module):
    """What checkpoints need of a model."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def save(self, path):
        save_safetensors(dict(self.named_parameters()), path, {})

    @torch.no_grad()
    def load(self, path):
        for name, tensor in matching_tensors(dict(self.named_parameters()), [path]).items():
            self.get_parameter(name).copy_(tensor)


def stepped(model: Tiny, optimizers: list, gradients: Gradients, value: float = 1.0) -> None:
    gradients.backward(value * (model.matrix.sum() + model.bias.square().sum()))
    gradients.step()


def open_tiny():
    model = Tiny()
    optimizers = [torch.optim.AdamW([model.bias], fused=True), Muon([model.matrix], 0.1)]
    return model, optimizers, Gradients(model.parameters(), optimizers, World(torch.device("cpu")))


def save(out, step, model, optimizers, state):
    state = {"step": step, **state, "data": DATA | state["data"]}
    return save_checkpoint(out, state, dict(model.named_parameters()), optimizers, model.save)


def load(out, model, optimizers):
    return load_checkpoint(out, dict(model.named_parameters()), optimizers, model.load)


def test_skipped_steps_leave_no_trace():
    """Steps with and without some skipped between them, for three kinds of bad numbers: the same to the bit."""
    runs = []
    for skipped in ((), (float("nan"), float("-inf"), 1e25)):
        model, optimizers, gradients = open_tiny()
        for value in (1.0, *skipped, 2.0, *skipped, 3.0):
            stepped(model, optimizers, gradients, value)
        runs.append([*model.parameters(), *(t for o in optimizers for s in o.state.values() for t in s.values())])
        assert (int(gradients.skipped), int(gradients.longest)) == (2 * len(skipped), len(skipped))
    assert len(runs[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_to_skip_a_step_reads_no_value():
    model, optimizers, gradients = open_tiny()
    with NoReading():
        stepped(model, optimizers, gradients, float("nan"))
        stepped(model, optimizers, gradients)
    assert (int(gradients.skipped), int(gradients.in_a_row)) == (1, 0)


def test_what_is_not_finite_is_not_saved(tmp_path):
    model, optimizers, gradients = open_tiny()
    stepped(model, optimizers, gradients)
    kept = save(tmp_path, 1, model, optimizers, {"data": {}})
    torch.nn.init.constant_(model.bias, float("inf"))
    with pytest.raises(ValueError, match=r"step-00000002: not written: bias is not finite"):
        save(tmp_path, 2, model, optimizers, {"data": {}})
    assert list(tmp_path.iterdir()) == [kept]


# ---- checkpoints


def test_cut_at_any_byte(tmp_path, capsys):
    """Each file of the newest checkpoint, cut everywhere: it is named and passed over, and the one before is whole."""
    model, optimizers, gradients = open_tiny()
    for step in (1, 2):
        stepped(model, optimizers, gradients)
        save(tmp_path, step, model, optimizers, {"data": {"epoch": 0}})
    newest, before = checkpoint_folders(tmp_path)
    expected, cuts = load_file(before / "trained.safetensors"), 0
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            assert load(tmp_path, model, optimizers)["step"] == 1, (file.name, size)
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
            printed = capsys.readouterr().out
            assert printed.startswith(f"passed over: {file}: ") and printed.count("\n") == 1
            cuts += 1
        file.write_bytes(whole)
    assert load(tmp_path, model, optimizers)["step"] == 2 and cuts > 500
    print(f"{cuts} cuts")
    for file in list(newest.iterdir()):  # a folder that lost a file
        content = file.read_bytes()
        file.unlink()
        assert load(tmp_path, model, optimizers)["step"] == 1
        file.write_bytes(content)


@contextmanager
def files_no_larger_than(size: int):
    """What a full disk does: writes end with an error in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 600])
def test_full_disk(tmp_path, room):
    """Whichever file of a checkpoint has no room: one line that says so, no remains, the last one as it was."""
    model, optimizers, gradients = open_tiny()
    stepped(model, optimizers, gradients)
    kept = save(tmp_path, 1, model, optimizers, {"data": {}})
    content = tensors(kept)
    pattern = r"step-00000002.*not written.* too large|not written: .* too large.*step-00000002"
    with pytest.raises((OSError, ValueError), match=pattern) as error, files_no_larger_than(room):
        save(tmp_path, 2, model, optimizers, {"data": {"long": "x" * 1000}})
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [kept]
    assert load(tmp_path, model, optimizers)["step"] == 1
    assert all(torch.equal(tensor, content[name]) for name, tensor in tensors(kept).items())


def test_runs_on_a_full_disk(monkeypatch, weights, tar, tmp_path, capsys):
    """A run that has no room for a checkpoint, then none for the log; with room again it goes on."""
    out = tmp_path / "run"
    arguments = ("--weights", weights, "--data", tar, "--out", out, "--workers", 0, "--batch-size", 2, "--steps", 4)
    arguments += ("--save-every", 2, "--log-every", 1, "--sample-every", 0, "--resume")
    train(monkeypatch, weights, tar, out, "--steps", 2)
    for room, what in ((100_000, r"step-00000004.*: not written"), (200, r"log\.jsonl: not written")):
        with files_no_larger_than(room):
            fails(train_uas.main, monkeypatch, capsys, what, *arguments)
        assert [folder.name for folder in checkpoint_folders(out)] == ["step-00000002"]
        assert not list(out.glob(".*.tmp"))
    log = train(monkeypatch, weights, tar, out, "--steps", 4, "--resume")
    assert [record["step"] for record in log] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["uas", "mls"])
def test_a_run_that_fails_ends_with_its_workers(weights, tar, stories, tmp_path, stage):
    command = [sys.executable, ROOT / f"train_{stage}.py", "--weights", weights, "--out", tmp_path]
    command += ["--data", tar if stage == "uas" else stories, "--workers", 2, "--batch-size", 2, "--steps", 2]
    with files_no_larger_than(100_000):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.search(r"step-00000002.*: not written.*$", done.stderr), done.stderr


def test_folders_that_cannot_be_written(monkeypatch, weights, tar, tmp_path, capsys):
    """A read-only place, and a folder that goes away during the run."""
    arguments = ("--weights", weights, "--data", tar, "--workers", 0, "--batch-size", 2, "--steps", 2)
    fails(train_uas.main, monkeypatch, capsys, r"/proc/run", *arguments, "--out", "/proc/run")
    at_forward(monkeypatch, lambda at, losses: shutil.rmtree(tmp_path / "run", ignore_errors=True) or losses)
    pattern = r"run/step-00000002: not written: No such file or directory"
    more = ("--log-every", 5, "--sample-every", 0, "--save-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_run, "append_log", lambda *_: None)
        fails(train_uas.main, patch, capsys, pattern, *arguments, *more, "--out", tmp_path / "run")


def test_checkpoints_are_removed_under_another_name(monkeypatch, tmp_path):
    """As if the process were killed before it removes a file of the old ones. One of the same step is written anew."""
    model, optimizers, gradients = open_tiny()
    stepped(model, optimizers, gradients)
    for step, left in ((1, "1"), (2, "21"), (2, "21"), (3, "32"), (4, "43")):
        if step > 2:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        save(tmp_path, step, model, optimizers, {"data": {}})
        assert [folder.name for folder in checkpoint_folders(tmp_path)] == [f"step-0000000{number}" for number in left]
        assert all(len(list(folder.iterdir())) == 3 for folder in tmp_path.iterdir())


def test_remains_of_a_killed_process(monkeypatch, weights, tar, tmp_path, capsys):
    left = tmp_path / ".step-00000001.4242.tmp"
    left.mkdir()
    (left / "trained.safetensors").write_bytes(b"half")
    train(monkeypatch, weights, tar, tmp_path, "--steps", 1)
    assert f"removed: {left}" in capsys.readouterr().out and not left.exists()
    with suppress(FileNotFoundError):
        left.rmdir()


# ---- the commands of tests/stress, for a short time


def stress(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tests" / "stress" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return done.stdout


def test_two_kills():
    """Both aimed at the saving of a checkpoint that is not the first of its process."""
    printed = stress("kill.py", "--count", "2", "--stage", "mls", "--steps", "6", "--seed", "23")
    assert re.search(r"\n2 kills, \d of them while saving, \d+ s: (\d) of \1 runs end bit-identical\n$", printed)


def test_two_ranks_stop_in_time():
    assert "\n1 of 1 runs end with status 0 on all 2 ranks, " in stress("stop.py", "--count", "1")
