"""What is typed, printed and stopped: no result is lost to a terminal, and bad input gets one line."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import write_random_weights
from safetensors.torch import load_file, save_file
from test_commands import ask, fails, train

import sample
import train_mls
import train_uas
from common import terminal
from common.cli import Printed, open_streams, read_arguments, run
from common.images import ImageError, read_image
from generation import Sampling, prompt_ids, say
from published import convert
from published.loading import WeightsError, tensor_files
from published.parts import load_minigpt5

ROOT = Path(__file__).resolve().parents[1]


# ---- what is printed


def printed(text: str, encoding: str) -> bytes:
    file = io.BytesIO()
    stream = Printed(file, encoding, "replace", line_buffering=True)
    stream.write(text)
    stream.flush()
    return file.getvalue()


def test_what_a_terminal_obeys_is_not_printed():
    assert printed("a \x1b]0;title\x07\x1b[2J\x9b31m\x00b\t\r\n", "utf-8") == b"a ?]0;title??[2J?31m?b\t\r\n"
    assert printed("\n\x1b[A\x1b[A", "utf-8") == b"\n\x1b[A\x1b[A"  # a progress bar's own
    assert printed("é 船 \udcff", "ascii") == b"? ? ?" and printed("é \udcff", "utf-8") == "é ?".encode()


def test_what_nobody_reads_costs_nothing():
    """Neither a pipe without a reader nor a full disk is an error; closed streams are empty ones."""
    reading, writing = os.pipe()
    os.close(reading)
    for file in (open(writing, "wb"), open("/dev/full", "wb")):  # noqa: SIM115
        stream = Printed(file, "utf-8", "replace", line_buffering=True)
        for _ in range(3):
            print("x" * 10_000, file=stream, flush=True)
        stream.detach()


def test_streams_that_are_closed_or_strict(monkeypatch):
    """In en_US.UTF-8, Python's input raises an error at bytes that are not UTF-8."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    open_streams()
    print("x", file=sys.stdout)
    print("x", file=sys.stderr)
    assert terminal.read_line() == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red \xff boat\n"), "utf-8", "strict"))
    open_streams()
    assert terminal.read_line() == "a red \ufffd boat"


def test_only_words_that_were_streamed_are_not_printed_again(tmp_path, capsys, monkeypatch):
    """With --count a terminal streams the first answer; two seeds may say the same."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = "a boat (red)"
    model = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: said[: ids[0]]))
    shown = terminal.Terminal(session := SimpleNamespace(model=model), tmp_path)
    for length in (3, len(said)):
        session.watch(ids=[length])
    red = Image.new("RGB", (2, 2))
    red.info["description"] = "red"
    shown.show("a boat", red, "a boat", red, "a house", red)
    printed = capsys.readouterr().out
    assert [printed.count(words) for words in ("a boat", "(red)", "a house", ".png]")] == [2, 3, 1, 3]


def test_a_picture_outlives_its_terminal(weights, tmp_path):
    """Standard output takes ASCII alone, standard error is closed, and the prompt is not UTF-8."""
    given = ["--weights", weights, "--out", tmp_path, "--force-image", "--max-new-tokens", "2", "--steps", "2"]
    command = [sys.executable, ROOT / "sample.py", "--prompt", b"a r\xc3\xa9d boat \xff", "--turns", "1", *given]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", *command], env=environment, capture_output=True)
    assert done.returncode == 0 and b"a r?d boat ?\n" in done.stdout
    assert (tmp_path / "0.png").exists() and (tmp_path / "answer.json").exists()


# ---- errors of one line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nframe 0"),
        RuntimeError("Caught RuntimeError in worker\n  File x\nRuntimeError: unable to allocate shared memory(shm)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_shortages_in_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search("memory|thread", said)
    assert ("--workers 0" in said) == ("shared" in str(error))


def test_faults_of_the_program_keep_their_traceback():
    def main():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(main)


def test_extreme_options(weights, tar, tmp_path, monkeypatch, capsys):
    common = ("--weights", weights, "--out", tmp_path / "out")

    def training_fails(pattern, *arguments, main=train_uas.main):
        fails(main, monkeypatch, capsys, pattern, *common, "--data", tar, *arguments)

    training_fails("--min-snr-gamma must be a finite number, of at most 1e", "--min-snr-gamma", "1e300")
    training_fails("--steps must be below", "--steps", 10**30)
    training_fails("--batch-size: must be from 1 to 65,536", "--batch-size", 10**9)
    training_fails("--workers: must be from 0 to", "--workers", 10**6)
    training_fails("--workers: must be from 0 to", "--workers", -1)
    training_fails("--lora-rank: must be from 1 to 1,024", "--lora-rank", 10**9, main=train_mls.main)
    training_fails("--tasks needs a value", "--tasks=--", main=train_mls.main)
    fails(sample.main, monkeypatch, capsys, "--guidance must be", *common, "--prompt", "x", "--guidance", "1e300")
    log = train(monkeypatch, weights, tar, tmp_path / "run", "--steps", 1, "--start-as", "[IMG0]</s>")
    assert len(log) == 1
    assert ask(monkeypatch, weights, tmp_path / "long", "--prompt", "x", "--max-new-tokens", 2_000_000_000)


def test_help_says_defaults_of_zero(capsys):
    parser = argparse.ArgumentParser()
    for name, default in (("--zero", 0), ("--share", 0.0), ("--flag", False), ("--none", None)):
        parser.add_argument(name, default=default, help="a value")
    with pytest.raises(SystemExit):
        read_arguments(parser, ["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "a value" in line]
    assert [line[-1] for line in lines] == ["0)", "0.0)", "value", "value"]


def test_loaded_sampling_can_be_changed(weights):
    """Fields beside a whole Sampling are not dropped."""
    session = sample.load(weights, sampling=Sampling(steps=9, top_k=7), steps=3, read_pictures=False)
    assert (session.sampling.steps, session.sampling.top_k) == (3, 7)


def test_the_longest_answer_takes_no_memory(weights):
    model = load_minigpt5(weights, read_pictures=False).eval()
    sizes, rand = [], torch.rand
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda n, **options: sizes.append(n) or rand(n, **options))
        say(model, [prompt_ids(model, "a")], None, Sampling(max_new_tokens=10**9), [generator])
    assert sizes == [model.llama.config.max_position_embeddings]


@pytest.mark.parametrize("option", ["image", "out", "checkpoint"])
def test_a_config_of_weights_names_no_path(option, tmp_path, monkeypatch, capsys):
    (tmp_path / "minigpt5").mkdir()
    (tmp_path / "minigpt5" / "config.json").write_text(json.dumps({"sample": {option: "x"}}))
    fails(sample.main, monkeypatch, capsys, f"{option} 'x', which is no value", "--weights", tmp_path, "--prompt", "x")


# ---- pictures


def test_a_picture_that_is_not_finite(weights, tmp_path, monkeypatch, capsys):
    """It was black."""
    arguments = ("--weights", weights, "--prompt", "x", "--force-image", "--steps", 2, "--out", tmp_path)
    fails(sample.main, monkeypatch, capsys, "picture is not finite", *arguments, "--guidance", "1e30")
    folder = write_random_weights(tmp_path / "weights", small=True)
    path = folder / "stable-diffusion/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    fails(sample.main, monkeypatch, capsys, "picture is not finite", "--weights", folder, *arguments[2:])
    assert not (tmp_path / "0.png").exists()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_of_floating_point_numbers():
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 255):
        read = np.asarray(read_image(encoded(Image.fromarray(grey * scale), "TIFF")))
        assert np.abs(read[..., 0] - 255 * grey).max() <= 1


def test_odd_exif_data():
    """Of which only the orientation is needed: a resolution of -1 / 0, and a tag of another type."""
    image = Image.new("RGB", (8, 4))
    entries = b"\x12\x01\3\0\1\0\0\0\6\0\0\0" + b"\x1a\x01\x0a\0\1\0\0\0\x26\0\0\0"
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + b"\0\0\0\0" + b"\xff\xff\xff\xff\0\0\0\0"
    assert read_image(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_a_picture_with_a_long_note():
    from PIL import PngImagePlugin

    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "x" * 3_000_000, zip=True)
    assert read_image(encoded(Image.new("RGB", (8, 4)), "PNG", pnginfo=note)).size == (8, 4)


def test_files_without_an_end(tmp_path):
    """A pipe would block for ever, /dev/zero fill the memory."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image(path)
        with pytest.raises(WeightsError, match="not a regular file"):
            convert.read_tensors(path)


# ---- weights


def test_sidecars_and_variants_of_weights(tmp_path):
    for name in ("._model.safetensors", "._model.safetensors.index.json", "model.non_ema.safetensors"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    with pytest.raises(WeightsError, match=r"no \.safetensors file"):
        tensor_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert tensor_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_files_of_prompts_from_windows(tmp_path, encoding):
    """Its shell writes UTF-16 with a byte order mark, its editors UTF-8 with one."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "x.txt").write_bytes(f"{mark}a boat by the quay\r\n\r\n ein Häuschen\r\n".encode(encoding))
    assert terminal.read_prompts(tmp_path / "x.txt") == ["a boat by the quay", "ein Häuschen"]
