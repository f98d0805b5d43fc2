"""Every benchmark runs at its smallest and writes whole results. What they measure here means nothing."""

import json
import math
import time
from functools import partial

import pytest
import torch
from random_weights import SMALL

import bench.common
import bench.components
import bench.data
import bench.reckon
import bench.sample
import bench.uas
from bench.common import agree, alternate, rows_of, seconds_of
from llama import LlamaConfig
from unet import UNetConfig
from vae import VAEConfig


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
