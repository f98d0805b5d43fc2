"""The files of a run that are for its reader: losses.png and, with --tensorboard, TensorBoard's events."""

import sys
from importlib import util

import pytest
from helpers import pairs, write_tar
from PIL import Image
from random_weights import write_random_weights

import train_uas
from trainer import options
from trainer.log import PANEL, append_log, open_board, plot_losses, read_log, smoothed


def test_running_mean():
    """Over two neighbours on each side where there are forty points; a straight line stays one."""
    line = [(step, 2.0 * step) for step in range(40)]
    assert smoothed(line)[2:-2] == line[2:-2] and smoothed(line)[0] == (0, 2.0)
    spike = [(step, float(step == 20)) for step in range(40)]
    assert [value for _, value in smoothed(spike)[17:24]] == [0, 0.2, 0.2, 0.2, 0.2, 0.2, 0]
    assert smoothed(line[:3]) == line[:3]


def test_chart_of_every_loss_and_of_the_learning_rate(tmp_path):
    records = [{"step": s, "loss": 1 / s, "ldm_loss": 0.3, "lr": 1e-3 * s, "bad": {}} for s in range(1, 100)]
    records.append({"step": 99, "val_loss": 0.4, "val_ldm_loss": 0.2})
    plot_losses(records, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as chart:
        assert chart.size == (3 * PANEL[0] // 2, PANEL[1] // 2)
        inked = chart.convert("L").point(lambda level: 255 * (level < 250)).getbbox()
    assert inked[0] >= 10 and inked[2] <= 3 * PANEL[0] // 2 - 10 and inked[3] <= PANEL[1] // 2 - 5  # nothing is cut off


def test_one_point_is_drawn_and_no_loss_is_no_chart(tmp_path):
    plot_losses([{"step": 1, "lr": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    plot_losses([{"step": 1, "loss": 0.5}], tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as chart:
        assert (31, 119, 180) in {colour for _, colour in chart.getcolors(1 << 16)}


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train_uas.py", "--tensorboard", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        train_uas.main()
    assert "--tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_has_the_numbers_of_the_log(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    weights = write_random_weights(tmp_path / "weights", small=True)
    tar = write_tar(tmp_path / "pairs.tar", pairs(10))
    fixed = ["--workers", "0", "--log-every", "1", "--sample-every", "0", "--batch-size", "2", "--tensorboard"]
    for steps in ("2", "4"):  # the second goes on where the first ended
        words = ["--weights", str(weights), "--data", str(tar), "--out", str(tmp_path / "run"), *fixed, "--resume"]
        monkeypatch.setattr(sys, "argv", ["train_uas.py", *words, "--steps", steps, "--val", str(tar)])
        train_uas.main()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path / "run" / "log.jsonl")
    for name in ("loss", "ldm_loss", "lr", "val_loss"):
        wanted = {record["step"]: record[name] for record in log if name in record}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.skipif(util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_forgets_the_steps_that_are_repeated(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, value in ((0, 1.0), (2, 2.0)):
        board = open_board(tmp_path, done)
        for step in range(done + 1, 5):
            append_log(tmp_path / "log.jsonl", {"step": step, "loss": value}, board)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]
