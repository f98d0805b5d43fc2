"""The folder of a run: one process at a time writes there, and what is damaged in it is passed over with a reason."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import DATA
from safetensors.torch import load_file, save_file
from test_commands import fails, train
from test_robust import load, open_tiny, save, stepped

import train_uas
from published.loading import checkpoint_folders
from trainer.log import cut_log, plot_losses, read_log
from trainer.processes import stop_signals
from trainer.run import FILES, Meter

ROOT = Path(__file__).resolve().parents[1]
HOLD = "import sys, time; from pathlib import Path; from common.files import lock_folder; "
HOLD += "held = lock_folder(Path(sys.argv[1]), ''); print('held', flush=True); time.sleep(60)"


def test_two_runs_in_one_folder(monkeypatch, weights, tar, tmp_path, capsys):
    """The second is refused and touches nothing; after the first, only remains of a run are removed."""
    remains, foreign = tmp_path / ".step-00000001.4242.tmp", tmp_path / ".notes.tmp"
    remains.mkdir()
    foreign.touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        pattern = re.escape(f"{tmp_path}: another process is writing there")
        fails(train_uas.main, monkeypatch, capsys, pattern, "--weights", weights, "--data", tar, "--out", tmp_path)
        assert remains.is_dir()
    finally:
        holder.kill()
        holder.wait()
    train(monkeypatch, weights, tar, tmp_path, "--steps", 1)
    assert not remains.exists() and foreign.exists()


def test_names_of_a_run_s_files():
    for name in (
        "step-00000001",
        "step-00000001.old",
        "log.jsonl",
        "samples.png",
        "drawn_pairs-20000-0.tar",
        "data-1234567890.tar.index.npz",
    ):
        assert re.fullmatch(FILES, name)
    assert not re.fullmatch(FILES, "notes") and not re.fullmatch(FILES, "step-1")


def test_passed_over_checkpoints_do_not_count(monkeypatch, weights, tar, tmp_path):
    """Two newer ones are damaged. They stay under another name, and the two newest intact ones are kept beside them."""
    train(monkeypatch, weights, tar, tmp_path, "--steps", 3, "--save-every", 1)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000007")
    for step in (6, 7):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / f"step-0000000{step}", dirs_exist_ok=True)
        (tmp_path / f"step-0000000{step}" / "trained.safetensors").write_bytes(b"half")
    for steps, expected in ((3, [3, 2]), (9, [9, 8])):
        train(monkeypatch, weights, tar, tmp_path, "--steps", steps, "--save-every", 1, "--resume")
        found = [folder.name for folder in checkpoint_folders(tmp_path)]
        assert found == [f"step-0000000{step}" for step in expected]
        damaged = sorted(folder.name for folder in tmp_path.glob("*.damaged"))
        assert damaged == ["step-00000006.damaged", "step-00000007.damaged"]
        assert (tmp_path / damaged[0] / "trained.safetensors").read_bytes() == b"half"


def test_a_damaged_checkpoint_is_written_anew(monkeypatch, weights, tar, tmp_path):
    """Then it counts again."""
    train(monkeypatch, weights, tar, tmp_path, "--steps", 4, "--save-every", 2)
    (tmp_path / "step-00000004" / "optimizer.safetensors").write_bytes(b"half")
    train(monkeypatch, weights, tar, tmp_path, "--steps", 5, "--save-every", 2, "--resume")
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000005", "step-00000004"]


def test_a_link_named_like_a_checkpoint(monkeypatch, weights, tar, tmp_path):
    """One that leads nowhere is no checkpoint, and gives way to one."""
    (tmp_path / "step-00000001").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".step-00000009.4242.tmp").symlink_to(tmp_path)
    train(monkeypatch, weights, tar, tmp_path, "--steps", 1)
    assert not (tmp_path / "step-00000001").is_symlink() and not list(tmp_path.glob(".*"))


BAD_MOMENTS = {  # a change of optimizer.safetensors, and what is said
    "scalar": (
        lambda t: t.update({"exp_avg.bias": torch.tensor(0.0)}),
        r"exp_avg\.bias has shape \(\), expected \(3,",
    ),
    "longer": (lambda t: t.update({"exp_avg_sq.bias": torch.ones(9)}), r"exp_avg_sq\.bias has shape \(9,\)"),
    "step": (lambda t: t.update({"step.bias": torch.ones(3)}), r"step\.bias has shape \(3,\), expected \(\)"),
    "dtype": (lambda t: t.update({"exp_avg.bias": torch.ones(3).half()}), r"exp_avg\.bias is not float32"),
    "integers": (lambda t: t.update({"average.matrix": torch.ones(3, 4).int()}), r"average\.matrix has dtype I32"),
    "missing": (lambda t: t.pop("exp_avg.bias"), r"tensor exp_avg\.bias \(3,\) is missing"),
    "all missing": (lambda t: t.clear(), r"tensor step\.bias \(\) is missing"),
    "extra": (lambda t: t.update({"exp_avg.matrix": torch.ones(3, 4)}), r"unexpected tensor exp_avg\.matrix"),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_moments_that_do_not_fit(tmp_path, capsys, case):
    """A fused optimiser would write beyond their end, or start from zero without a word."""
    change, pattern = BAD_MOMENTS[case]
    model, optimizers, gradients = open_tiny()
    for step in (1, 2):
        stepped(model, optimizers, gradients)
        save(tmp_path, step, model, optimizers, {"data": {}})
    path = tmp_path / "step-00000002" / "optimizer.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert load(tmp_path, model, optimizers)["step"] == 1
    assert re.fullmatch(rf"passed over: {re.escape(str(path))}: {pattern}.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": True},
        {"step": 2.0},
        {"nonfinite": -1},
        {"nonfinite": 10**30},
        {"arguments": []},
        {"data": []},
        {"data": {name: value for name, value in DATA.items() if name != "position"}},
        {"data": DATA | {"epoch": -1}},
        {"data": DATA | {"bad": {"broken image": "many"}}},
        {"data": DATA | {"sums": [1.0]}},
        {"data": DATA | {"sums": {"loss": float("nan")}}},
    ],
    ids=str,
)
def test_states_of_other_types(tmp_path, capsys, change):
    model, optimizers, gradients = open_tiny()
    stepped(model, optimizers, gradients)
    for step in (1, 2):
        save(tmp_path, step, model, optimizers, {"data": {}})
    path = tmp_path / "step-00000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load(tmp_path, model, optimizers)["step"] == 1
    assert capsys.readouterr().out.startswith(f"passed over: {path}: not the state of a run")


def test_log_lines_that_are_not_json(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1e30}]
    lines = [json.dumps(good[0]), "{", '{"step": 2, "lo', "[" * 100_000, "5", "[1]", json.dumps(good[1])]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    assert read_log(path) == good
    plot_losses(read_log(path), tmp_path / "losses.png")
    cut_log(path, 1)
    assert read_log(path) == good[:1]


def test_the_end_of_the_terminal_stops_a_run(monkeypatch):
    """As SIGTERM does, unless nohup has it ignored, under which the tests may run, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
    assert received == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
    signal.signal(signal.SIGHUP, before)
    assert received == []


def test_a_clock_that_stands_still(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    assert Meter().steps_per_second() == 0
