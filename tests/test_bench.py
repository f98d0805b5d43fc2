"""Every benchmark runs at its smallest and writes whole results. What they measure here means nothing."""

import io
import json
import math
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_weights import SMALL

import bench.common
import bench.components
import bench.data
import bench.gpu
import bench.gpu_parts
import bench.gpu_rows
import bench.reckon
import bench.sample
import bench.scale
import bench.uas
from bench.common import agree, alternate, rows_of, seconds_of
from llama import LlamaConfig
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_repetitions(monkeypatch):
    monkeypatch.setattr(bench.common, "SHORTEST", 0.0)


def results(main, name: str, folder, *options: str) -> dict:
    main([*options, "--rounds", "1", "--device", "cpu", "--out", str(folder)])
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["bench"] == name and record["hardware"]["cpu"] and record["hardware"]["versions"]["torch"]
    for row in record["rows"]:
        assert {"what", "size", "ours", "peer", "ratio"} <= set(row) and row["rounds"] == 1
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "peer", "ratio")), row
    table = (folder / f"{name}.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(record["rows"])
    assert not list(folder.glob(".*"))
    return record


def test_components(tmp_path):
    record = results(bench.components.main, "components", tmp_path, "--sizes", "tiny")
    assert len(record["rows"]) == 11
    assert all(row["difference"] < 1e-3 for row in record["rows"])


def test_uas(tmp_path):
    record = results(bench.uas.main, "uas", tmp_path, "--sizes", "tiny")
    assert {row["peer_is"] for row in record["rows"]} == {"ours", "released recipe"}
    assert record["rows"][0]["difference"] < 1e-3  # losses and gradients


def test_sample(tmp_path):
    record = results(
        bench.sample.main, "sample", tmp_path, "--sizes", "tiny", "--steps", "2", "--tokens", "4", "--starts", "0"
    )
    assert [row["what"] for row in record["rows"]] == ["words", "picture", "prompt to picture"]


def test_data(tmp_path):
    record = results(bench.data.main, "data", tmp_path, "--pictures", "8", "--workers", "0")
    assert {row["what"] for row in record["rows"]} == {"decode", "decode and resize"}


def test_reckon(monkeypatch, capsys):
    """All rows of the table, at the tests' small sizes; and what is counted, where it is known."""
    for config in (LlamaConfig, UNetConfig, VAEConfig):
        monkeypatch.setattr(bench.reckon, config.__name__, partial(config, **SMALL[config]))
    monkeypatch.setattr(bench.reckon, "STORY", 24)
    bench.reckon.main(["--batch-sizes", "1", "3"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[1]) for row in rows] == [1, 3] * 3 + [1] and len({row[0] for row in rows}) == 4

    x, weight = (torch.zeros(5, 7, device="meta"), torch.zeros(11, 7, device="meta"))
    with bench.reckon.Ledger() as ledger:
        y = torch.relu(torch.nn.functional.linear(x, weight))  # the product is dropped when its relu is there
        assert (ledger.operations, ledger.alive, ledger.peak) == (2 * 5 * 7 * 11, 4 * 5 * 11, 2 * 4 * 5 * 11)
        with torch.inference_mode():
            z = torch.nn.functional.linear(y.view(5, 11), weight.T)
        assert ledger.operations == 2 * 2 * 5 * 7 * 11 and ledger.alive == 4 * (5 * 11 + 5 * 7) and z.shape == x.shape


def test_scale(tmp_path):
    """Every row, and the tars that are assembled without tarfile are those that it would read."""
    small = ["--tars", "3", "--pairs", "100", "--ranks", "2", "--workers", "1", "--read", "16"]
    bench.scale.main([*small, "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "scale.json").read_text())
    rows = {(row["what"], row["figure"]): row for row in record["rows"]}
    assert {what for what, _ in rows} == {"index", "open", "order", "resume", "reader", "ranks and workers"}
    assert all(row["measured"] >= 0 and row["met"] is None for row in rows.values())
    assert rows["reader", "samples/s"]["measured"] > 0 and not list(tmp_path.glob("scale-*"))
    (path,) = bench.scale.write_tars(tmp_path, 1, 12)
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 24 and members["000000011.txt"] == bench.scale.CAPTION
    assert Image.open(io.BytesIO(members["000000007.png"])).size == (8, 8)
    with pytest.raises(SystemExit):
        bench.scale.main(["--tars", "3", "--pairs", "2"])


def test_gpu_dry_run(tmp_path):
    """Each part of the one run on a GPU, on the CPU and at its smallest; in one of its own processes, too."""
    command = [sys.executable, "bench/gpu.py", "--dry-run", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["parts"]) == [*bench.gpu.SHARES, *bench.gpu.BESIDE] and all(record["parts"].values())
    figures = {row["what"]: row for rows in record["parts"].values() for row in rows}
    assert not [row for row in figures.values() if "error" in row]
    assert set(bench.gpu.TARGETS) | set(bench.gpu_parts.MEMORY) <= set(figures)
    verdicts = [row for what, row in figures.items() if what.startswith("test: ")]
    assert len(verdicts) >= 8 and {row["value"] for row in verdicts} == {1.0}
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {what} |" in table for what in figures) and not list(tmp_path.glob(".*"))


def test_gpu_report(tmp_path):
    """Targets stand beside the figures; a part that is cut off keeps what it has measured."""
    rows = bench.gpu_rows.Rows(tmp_path / "words.jsonl")
    rows.write({"machine": {"gpu": "NVIDIA H200", "versions": {"torch": "2"}}})
    rows.add("decoding, compiled", 150.0, "tokens/s", note="a | b")
    with rows.attempt("decoding, 8 bits, compiled"):
        raise torch.OutOfMemoryError("much\nmore")
    beside = bench.gpu_rows.Rows(tmp_path / "reckon.jsonl")
    beside.add(bench.gpu_parts.MEMORY_48, 40.0, "GB")
    bench.gpu_rows.Rows(tmp_path / "stage-1.jsonl").add(bench.gpu_parts.MEMORY_48, 49.0, "GB")
    record = {"dry_run": False, "machine": {}, "parts": {"words": [], "stage-1": [], "reckon": []}}
    bench.gpu.write_report(record, tmp_path, tmp_path, time.monotonic())
    speed, lost = record["parts"]["words"]
    assert (speed["target"], speed["met"]) == ("at least 200 tokens/s", False)
    assert lost["error"] == "OutOfMemoryError: much more"
    assert record["parts"]["stage-1"][0]["met"] and "target" not in record["parts"]["reckon"][0]
    assert "| not measured |" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.gpu.sys, "executable", "/bin/sleep")  # which refuses these words, and ends with 1
    process = bench.gpu.Process("words", tmp_path, tmp_path, 5, is_dry=True)
    process.finish(5)
    (row,) = bench.gpu.read_rows(tmp_path / "words.jsonl")
    assert row["error"].startswith("the process ended with 1")
    process.process, process.ended = subprocess.Popen(["sleep", "60"], start_new_session=True), False
    process.finish(0.2)
    assert bench.gpu.read_rows(tmp_path / "words.jsonl")[1]["error"] == "cut off after 5 s"
    assert process.process.returncode == -signal.SIGKILL


def test_gpu_wants_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--dry-run"):
        bench.gpu.main(["--out", str(tmp_path)])


def test_full_size_wants_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="--force"):
        bench.components.main(["--sizes", "full", "--device", "cpu", "--out", str(tmp_path)])


def test_harness():
    calls = []
    contenders = {"ours": lambda: calls.append("ours"), "peer": lambda: calls.append("peer")}
    times = alternate(contenders, 3, torch.device("cpu"))
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert calls[-6:] == ["ours", "peer", "peer", "ours", "ours", "peer"]  # after warming up, and measuring how long
    assert seconds_of(lambda: time.sleep(0.02), torch.device("cpu"), 5) < 0.06  # of one call
    (row,) = rows_of("what", "size", {"ours": [1.0, 2.0, 9.0], "peer": [2.0, 4.0, 4.5]}, work=8, unit="samples/s")
    assert (row["ours"], row["peer"], row["ratio"]) == (4.0, 2.0, 0.5) and row["quartiles"] == [0.5, 1.25]
    with pytest.raises(ValueError, match="differ"):
        agree("what", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), torch.float32)
    one = torch.ones(3)
    assert agree("what", [one, 1.15 * one], [one, one], torch.bfloat16, gradients=1) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="differ"):
        agree("what", [1.15 * one, one], [one, one], torch.bfloat16, gradients=1)
