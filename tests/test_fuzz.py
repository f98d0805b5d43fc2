"""A few hundred bad inputs of tests/stress/fuzz.py, some of every family, and faults that it has found, one by one."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "stress"))

import numpy as np
import pytest
import torch
from bad_tars import member, pair_members, pax, whole
from PIL import Image

from common.cli import add_device_option, pick_device
from common.images import ImageError, read_image
from llama import LlamaConfig
from published.clip_tokenizer import ClipTokenizer
from published.loading import WeightsError, tensor_files
from published.parts import read_config
from tars.batches import PairData
from tars.index import read_index

FUZZ = Path(__file__).resolve().parent / "stress" / "fuzz.py"
GOLDEN = Path(__file__).parent / "golden" / "tokenizer"


def test_a_few_hundred_bad_inputs():
    command = [sys.executable, str(FUZZ), "--count", "240", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and done.stdout.endswith("\n0 failures\n")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "x.tar"


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_index(str(path))


def test_a_tar_that_goes_on_after_its_end_is_named(path):
    members = pair_members()
    for content in (
        whole(members[:4]) + whole(members[4:]),
        whole(members) + bytes(2 << 20),  # zeros where a download stopped
        b"".join(members[:4]),
    ):
        path.write_bytes(content)
        refused(path, "no end mark, or more after it")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_extended_headers_are_bounded(path, kind):
    """tarfile would take as much time and memory as they say, and call itself for each of thousands in a row."""
    first = pair_members()[:2]
    path.write_bytes(whole([*first, member("h", bytes(1 << 20), kind), *pair_members()]))
    refused(path, "after 1 samples")
    path.write_bytes(whole([*first, *[member("h", pax({b"a": b"b"}), kind)] * 3000, *pair_members()]))
    refused(path, "after 1 samples")


@pytest.mark.parametrize("size", [2**40, 2**63, -512, -1024])
def test_sizes_are_bounded(path, size):
    path.write_bytes(whole([*pair_members()[:2], member("y.png", b"abc", size=size), *pair_members()]))
    refused(path, "damaged after 2 samples")


def test_a_foreign_index_is_checked(path):
    path.write_bytes(whole(pair_members()))
    good, place = read_index(str(path))._asdict(), Path(f"{path}.index.npz")
    for name, value in (
        ("table", good["table"][..., 0]),
        ("kinds", good["kinds"][1:]),
        ("keys", good["keys"].astype(np.str_)),
    ):
        np.savez(place, **{**good, name: value})
        assert all(np.array_equal(a, b) for a, b in zip(read_index(str(path)), good.values(), strict=True)), name
    np.savez_compressed(place, **{**good, "table": good["table"][:1]})  # could unpack to any size
    assert len(read_index(str(path)).table) == len(good["table"])
    np.savez(place, **{**good, "table": -good["table"]})  # a size of -9 would read the whole file
    assert PairData([str(path)], lambda image: image)[0] == "no picture"


def test_half_a_character_in_a_caption(path):
    """Two JSON escapes make an emoji; one alone would end a training at its tokenizer."""
    picture = pair_members()[0]
    for text, kept in ((r"a \ud83d\ude00", True), (r"a \ud83d", False), ("a" * 70_000, False)):
        path.write_bytes(whole([picture, member("00000.json", b'{"caption": "%s"}' % text.encode())]))
        sample = PairData([str(path)], lambda image: torch.zeros(1))[0]
        assert isinstance(sample, dict) == kept


def test_postscript_is_no_picture():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"  # which Pillow would hand to Ghostscript
    with pytest.raises(ImageError, match="not an image"):
        read_image(content)


@pytest.mark.parametrize("text", ["&" + "amp;" * 15_000, "abcdefghij" * 6_000, "a" + "\u0301\u0316" * 5_000])
def test_captions_that_are_hard_to_clean(tmp_path, text):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GOLDEN / f"clip_{name}").read_bytes())
    start = time.process_time()
    assert ClipTokenizer(tmp_path)([text])[0].shape == (1, 77)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["cuda:99", "cuda:x", "cuda:-1", "gpu", "meta", "", "cpu:3"])
def test_devices_that_are_not_there(name, capsys):
    parser = argparse.ArgumentParser()
    add_device_option(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--device={name}"])
    assert re.search(f"error: argument --device: {name}: (not auto|this torch sees)", capsys.readouterr().err)
    with pytest.raises(ValueError, match=f"^{name}: (not auto|this torch sees)"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"num_attention_heads": 3},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 1e300},
        {"vocab_size": True},
        {"max_position_embeddings": 10**30},
    ],
)
def test_absurd_configs(tmp_path, values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4} | values))
    with pytest.raises(WeightsError, match=r"config\.json: ") as error:
        read_config(LlamaConfig, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "", None, "a/b.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(WeightsError, match="of this folder"):
        tensor_files(tmp_path)


def test_the_fuzzer_writes_tars_as_tarfile_does():
    """Its own headers are right, so that what is refused is refused for what was made wrong."""
    with tarfile.open(fileobj=io.BytesIO(whole(pair_members()))) as tar:
        assert len(tar.getmembers()) == 12 and tar.extractfile("00003.txt").read() == b"Number 3."
