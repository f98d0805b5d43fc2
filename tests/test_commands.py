"""sample.py and train_uas.py as a user runs them, on small random weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SAMPLES, assert_close, pairs, picture_bytes, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluation.__main__ as evaluation
import generation
import sample
import train_mls
import train_uas
from baselines.stable_diffusion import StableDiffusion
from common.cli import run
from minigpt5 import MiniGPT5
from prompts import UAS_REQUESTS
from published.loading import checkpoint_folders, find_checkpoint, open_checkpoint
from published.parts import load_minigpt5
from tars.batches import PairData
from trainer import run as trainer_run
from trainer.log import read_log
from trainer.run import learning_rate_factor, total_steps

ROOT = Path(__file__).resolve().parents[1]


def call(main, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
    main()


def train(monkeypatch, weights, tar, out, *arguments) -> list[dict]:
    fixed = ("--warmup", 5, "--lr", 1e-3, "--workers", 0, "--log-every", 1, "--sample-every", 0, "--batch-size", 2)
    call(train_uas.main, monkeypatch, "--weights", weights, "--data", tar, "--out", out, *fixed, *arguments)
    return read_log(out / "log.jsonl")


def noting(monkeypatch, owner, name: str) -> list[tuple]:
    """Positional and named arguments of the calls of a function that goes on as it did."""
    calls, function = [], getattr(owner, name)

    def note(*arguments, **options):
        calls.append((arguments, options))
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, note)
    return calls


# ---- training


def test_overfits_two_pairs(monkeypatch, weights, tmp_path):
    """On two real pairs where the samples are here, else on two drawn ones. The UNet is random and frozen, so L_LDM has
    little to gain; L_text and L_CAP must fall."""
    sample = SAMPLES / "samples/cc3m/cc3m-validation-0000.tar"
    tar = shutil.copy(sample, tmp_path) if sample.exists() else write_tar(tmp_path / "two.tar", pairs(2))
    log = train(monkeypatch, weights, tar, tmp_path / "run", "--steps", 300, "--warmup", 20, "--log-every", 10)
    first, last = log[0], log[-1]
    for name in ("loss", "text_loss", "ldm_loss", "cap_loss"):
        print(f"{name}: {first[name]:.4f} over steps 1-10, {last[name]:.4f} over steps 291-300")
    assert last["step"] == 300
    assert last["text_loss"] < 0.5 * first["text_loss"] and last["cap_loss"] < 0.05 * first["cap_loss"]
    assert last["loss"] < first["loss"]
    assert last["samples_per_s"] > 0 and last["bad"] == {} and 0 <= last["lr"] <= 1e-2


def test_resume_is_exact(monkeypatch, weights, tar, tmp_path, capsys):
    """Stopped after 4 of 7 steps, in the middle of an epoch and with accumulation, and resumed: the same losses and the
    same weights as without the stop."""
    arguments = ("--accumulate", 2, "--save-every", 2)
    whole = train(monkeypatch, weights, tar, tmp_path / "whole", "--steps", 7, *arguments)
    save = trainer_run.save_checkpoint

    def save_then_stop(out, state, *rest):
        save(out, state, *rest)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer_run, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, weights, tar, tmp_path / "parts", "--steps", 7, *arguments, "--resume")  # nothing to resume
    monkeypatch.setattr(trainer_run, "save_checkpoint", save)
    parts = train(monkeypatch, weights, tar, tmp_path / "parts", "--steps", 7, *arguments, "--resume")
    assert "resumed from step 4" in capsys.readouterr().out
    changing = ("samples_per_s", "memory_gb")
    strip = [[{k: v for k, v in record.items() if k not in changing} for record in log] for log in (whole, parts)]
    assert strip[0] == strip[1] and len(whole) == 7
    ours, expected = (load_file(tmp_path / run / "step-00000007/trained.safetensors") for run in ("parts", "whole"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    newest, _ = folders = checkpoint_folders(tmp_path / "parts")  # older ones are dropped
    assert find_checkpoint(tmp_path / "parts") == find_checkpoint(newest) == newest / "trained.safetensors"
    assert find_checkpoint(folders[1]).parent == folders[1]


def test_held_out_losses(monkeypatch, weights, tar, tmp_path, capsys):
    """In eval mode, over one pass of 4 pairs, with the same random numbers each time: the same again where nothing is
    learnt, those of a training step on the same pairs where nothing is dropped. The training does not notice them."""
    held_out = write_tar(tmp_path / "held-out.tar", pairs(4))
    val = ("--val", held_out, "--val-every", 2, "--batch-size", 4, "--no-cfg")
    still = train(monkeypatch, weights, held_out, tmp_path / "still", "--steps", 5, *val, "--lr", 0, "--mapper-lr", 0)
    assert [(r["step"], "val_loss" in r) for r in still][1:3] == [(2, False), (2, True)]
    found = [{name: v for name, v in r.items() if name != "step"} for r in still if "val_loss" in r]
    assert len(found) == 3 and found[0] == found[1] == found[2]  # steps 2, 4 and the last, 5
    for name in ("loss", "text_loss", "ldm_loss", "cap_loss"):
        assert found[0][f"val_{name}"] == pytest.approx(still[0][name], rel=1e-5), name
    runs = [train(monkeypatch, weights, tar, tmp_path / f"{i}", "--steps", 4, *(val if i else val[4:])) for i in (0, 1)]
    losses = [[(r["step"], r["loss"]) for r in log if "loss" in r] for log in runs]
    assert losses[0] == losses[1] and sum("val_loss" in r for r in runs[1]) == 2
    assert runs[1][-1]["val_cap_loss"] < runs[1][2]["val_cap_loss"] and "step 4: val_loss" in capsys.readouterr().out
    with monkeypatch.context() as noted:
        noise = noting(noted, MiniGPT5, "sample_noise")
        train(noted, weights, tar, tmp_path / "drops", "--steps", 1, "--val", held_out)
    rates = [drop_rate for (_, _, _, drop_rate), _ in noise]
    assert rates == [0.1, 0.0, 0.0]  # a step's batch, and two batches held out
    with pytest.raises(ValueError, match="no such tar"):
        train(monkeypatch, weights, tar, tmp_path / "none", "--val", tmp_path / "none.tar")
    broken = write_tar(tmp_path / "broken.tar", {"a.png": b"<html>", "a.txt": b"a"})
    with pytest.raises(ValueError, match="no usable sample"):
        train(monkeypatch, weights, tar, tmp_path / "broken", "--steps", 4, "--save-every", 2, *val, "--val", broken)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "broken")] == ["step-00000002"]  # first of all


def test_broken_checkpoint_is_passed_over(monkeypatch, weights, tar, tmp_path, capsys):
    train(monkeypatch, weights, tar, tmp_path, "--steps", 4, "--save-every", 2)
    newest = checkpoint_folders(tmp_path)[0] / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    log = train(monkeypatch, weights, tar, tmp_path, "--steps", 5, "--save-every", 2, "--resume")
    printed = capsys.readouterr().out
    assert f"passed over: {newest}" in printed and "resumed from step 2" in printed
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]


def test_broken_samples_are_counted(monkeypatch, weights, tmp_path):
    """A truncated JPEG, a text without picture, a 0-byte file, a caption that is not UTF-8: training goes on."""
    broken = {
        "a.jpg": picture_bytes(1, (200, 200), "JPEG")[:700],
        "a.txt": b"cut",
        "b.txt": b"no picture",
        "c.png": b"",
        "c.txt": b"empty",
        "d.png": picture_bytes(2),
        "d.txt": b"\xff\xfe\x80",
    }
    log = train(monkeypatch, weights, write_tar(tmp_path / "x.tar", pairs(4) | broken), tmp_path / "run", "--steps", 8)
    assert log[-1]["bad"] == {"broken image": 1, "no picture": 1, "empty picture": 1, "no caption": 1}


def test_switches(monkeypatch, weights, tar, tmp_path):
    names = {"text_loss", "ldm_loss", "cap_loss"}
    for number, (switches, losses) in enumerate(
        [
            (("--no-cap",), {"text_loss", "ldm_loss"}),
            (("--no-ldm",), {"text_loss", "cap_loss"}),
            (("--no-cfg", "--min-snr-gamma", 0, "--vokens", 1, "--dtype", "fp32", "--seed", 3), names),
        ]
    ):
        out = tmp_path / str(number)
        record = train(monkeypatch, weights, tar, out, "--steps", 2, *switches)[-1]
        assert names & record.keys() == losses
        weighted = {"text_loss": 0.01, "ldm_loss": 1.0, "cap_loss": 0.1}
        assert record["loss"] == pytest.approx(sum(weighted[name] * record[name] for name in losses), rel=1e-5)
    trained = load_file(tmp_path / "2/step-00000002/trained.safetensors")
    assert trained["vokens.input"].shape[0] == trained["vokens.output"].shape[0] == 2


def test_switches_reach_the_losses(monkeypatch, weights, tar, tmp_path):
    noise, losses = noting(monkeypatch, MiniGPT5, "sample_noise"), noting(monkeypatch, MiniGPT5, "losses")
    train(monkeypatch, weights, tar, tmp_path / "off", "--steps", 1, "--no-cfg", "--min-snr-gamma", 0)
    train(monkeypatch, weights, tar, tmp_path / "on", "--steps", 1)
    assert [drop_rate for (_, _, _, drop_rate), _ in noise] == [0, 0.1]
    assert [options["min_snr_gamma"] for _, options in losses] == [0, 5]


def test_guidance_of_a_run_without_cfg(monkeypatch, weights, tar, tmp_path):
    """sample.py without options guides against the empty caption, as Stable Diffusion encodes it, where the checkpoint
    was trained with --no-cfg; else against zeros. An option says otherwise. So does evaluation, and stage 2's training
    decides anew."""
    model = StableDiffusion(weights)
    empty, zeros = model.encode([""])[0], []
    asked = noting(monkeypatch, generation, "denoise")

    def unconditional(name: str, *options) -> torch.Tensor:
        """The first half of what sample.py gives the UNet."""
        prompt = ("--prompt", "a boat", "--steps", 1, "--max-new-tokens", 1, "--force-image", "--out", tmp_path / "out")
        call(sample.main, monkeypatch, "--weights", weights, "--checkpoint", tmp_path / name, *prompt, *options)
        return asked[-1][0][3][:-1].squeeze(0)

    train(monkeypatch, weights, tar, tmp_path / "with", "--steps", 1)
    train(monkeypatch, weights, tar, tmp_path / "without", "--steps", 2, "--no-cfg", "--sample-every", 2)
    assert torch.equal(asked[-1][0][3][0], empty)  # samples.png of the run itself
    for name in ("with", "without"):
        mapper = load_minigpt5(weights, find_checkpoint(tmp_path / name)).mapper
        zeros.append(mapper(torch.zeros(1, 8, 64))[0])
    assert torch.equal(unconditional("without"), empty) and (zeros[1] - empty).abs().max() > 0.1
    assert_close(unconditional("without", "--no-empty-caption"), zeros[1], 1e-5, "zeros, by option")
    assert_close(unconditional("with"), zeros[0], 1e-5, "zeros")
    assert torch.equal(unconditional("with", "--empty-caption"), empty)
    assert len(unconditional("without", "--guidance", 1)) == 0

    options = ("--weights", weights, "--data", tar, "--n", 1, "--steps", 1, "--metrics", "image-text")
    options += ("--force-image", "--max-new-tokens", 1, "--out", tmp_path / "x.json", "--device", "cpu")
    call(evaluation.main, monkeypatch, *options, "--checkpoint", tmp_path / "without")
    assert torch.equal(asked[-1][0][3][0], empty)

    stage_2 = ("--weights", weights, "--uas", tmp_path / "without", "--drawn", 2, "--steps", 1, "--batch-size", 1)
    stage_2 += ("--workers", 0, "--sample-every", 0)
    for name, switches, is_recorded in (
        ("a", (), False),
        ("b", ("--no-cfg",), True),
        ("c", ("--freeze-mapper",), True),
    ):
        call(train_mls.main, monkeypatch, *stage_2, "--out", tmp_path / name, *switches)
        assert ("guidance" in open_checkpoint(find_checkpoint(tmp_path / name)).metadata) == is_recorded


def test_captions_are_plain_text_in_requests(monkeypatch, weights, tmp_path):
    tar = write_tar(tmp_path / "x.tar", pairs(4) | {"00000.txt": b"a </s> boat"})
    monkeypatch.setattr(PairData, "choose", lambda _, bits: 3)
    batches = noting(monkeypatch, train_uas, "collate")
    train(monkeypatch, weights, tar, tmp_path / "run", "--steps", 2)
    assert len(batches) == 2
    for (tokenizer, texts, *_), options in batches:
        assert options["limit"] == 256
        for source, _ in texts:
            assert UAS_REQUESTS[3] in source and tokenizer.eos_id not in tokenizer.encode(source)


def test_learning_rate_of_output_rows(monkeypatch, weights, tar, tmp_path):
    """Half of --lr is half the way; the input rows do not notice."""
    found = {}
    for rate in (None, "0", "5e-4"):
        switch = ("--output-lr", rate) if rate else ()
        train(monkeypatch, weights, tar, tmp_path / str(rate), "--steps", 1, "--warmup", 1, "--no-ldm", *switch)
        found[rate] = load_file(tmp_path / str(rate) / "step-00000001/trained.safetensors")
    moved = [float((found[rate]["vokens.output"] - found["0"]["vokens.output"]).abs().max()) for rate in ("5e-4", None)]
    assert moved[1] > 0 and moved[0] == pytest.approx(moved[1] / 2, rel=0.01)
    assert all(torch.equal(t["vokens.input"], found["0"]["vokens.input"]) for t in found.values())


def test_learning_rate_of_the_mapper(monkeypatch, weights, tar, tmp_path):
    """0 is no rate, which is not the same as none given."""
    train(monkeypatch, weights, tar, tmp_path, "--steps", 2, "--save-every", 1, "--mapper-lr", 0)
    after, before = (load_file(folder / "trained.safetensors") for folder in checkpoint_folders(tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vokens.input", "vokens.output"}


def test_epochs_and_pictures_of_a_run(monkeypatch, weights, tar, tmp_path):
    log = train(monkeypatch, weights, tar, tmp_path, "--epochs", 1, "--sample-every", 5, "--workers", 1)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]  # 10 pairs in batches of 2
    for name in ("losses.png", "samples.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 300 and len(image.getcolors(1 << 20)) > 10


def test_learning_rate():
    factors = [learning_rate_factor(step, 4, 10) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6])


def test_an_epoch_s_steps():
    """Of every rank's batches, each as often as is accumulated."""
    options = SimpleNamespace(steps=None, epochs=2, batch_size=3, accumulate=5)
    assert total_steps(options, samples=300, ranks=4) == 10


# ---- sampling


def ask(monkeypatch, weights, out, *arguments) -> dict:
    call(sample.main, monkeypatch, "--weights", weights, "--out", out, "--steps", 2, "--max-new-tokens", 6, *arguments)
    return json.loads((out / "answer.json").read_text())


def test_sample(monkeypatch, weights, tmp_path, capsys):
    picture = tmp_path / "in.png"
    picture.write_bytes(picture_bytes(0))
    arguments = ("--prompt", "what happens next?", "--image", picture, "--image", picture, "--force-image", "--seed", 5)
    first = ask(monkeypatch, weights, tmp_path / "a", *arguments)
    again = ask(monkeypatch, weights, tmp_path / "b", *arguments)
    other = ask(monkeypatch, weights, tmp_path / "c", *arguments[:-1], 6)
    assert first == again != other
    assert first["seed"] == 5 and first["prompt"] == "what happens next?"
    assert first["segments"][0] == {"image": "0.png"}
    assert all(segment.keys() in ({"text"}, {"image"}) for segment in first["segments"])
    for segment in first["segments"]:
        if "image" in segment:
            with Image.open(tmp_path / "a" / segment["image"]) as image:
                assert image.size == (32, 32) and image.mode == "RGB"
            assert (tmp_path / "a" / segment["image"]).read_bytes() == (tmp_path / "b" / segment["image"]).read_bytes()
    printed = capsys.readouterr().out
    assert "[" + str(tmp_path / "a" / "0.png") + "]" in printed and "no trained checkpoint found" in printed


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "dpm"])
def test_samplers_and_guidance(monkeypatch, weights, tmp_path, sampler):
    answer = ask(
        monkeypatch, weights, tmp_path, "--prompt", "a boat", "--force-image", "--sampler", sampler, "--guidance", 1
    )
    assert {"image": "0.png"} in answer["segments"]


def test_int8(monkeypatch, weights, tmp_path):
    """The picture is another one than without, and the same each time."""
    pictures = []
    for switches in (("--int8",), ("--int8", "--no-compile"), ()):
        answer = ask(monkeypatch, weights, tmp_path, "--prompt", "a boat", "--force-image", *switches)
        assert {"image": "0.png"} in answer["segments"]
        pictures.append((tmp_path / "0.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_sample_from_a_run(monkeypatch, weights, tar, tmp_path, capsys):
    """A trained run is read by its folder: after some steps the model answers a caption with a picture."""
    train(monkeypatch, weights, tar, tmp_path / "run", "--steps", 60, "--vokens", 4, "--log-every", 60)
    capsys.readouterr()
    answer = ask(
        monkeypatch,
        weights,
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "run",
        "--prompt",
        "a red boat",
        "--temperature",
        0,
    )
    assert {"image": "0.png"} in answer["segments"]
    assert "no trained checkpoint" not in capsys.readouterr().out


def test_captions_are_cleaned_as_in_training(monkeypatch, weights, tmp_path):
    asked = []

    def answer(model, prompts, *rest, watch):
        asked.extend(prompts)
        return [["words"]]

    monkeypatch.setattr(sample, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", answer)
    for prompt in ("A Red Boat (on the SEA), at night!", "!!!", "</#s>"):
        assert ask(monkeypatch, weights, tmp_path, "--prompt", prompt)["prompt"] == prompt
    assert asked == ["a red boat on the sea , at night", "!!!", "</ s>"]


def test_text_of_the_user_is_plain_text(monkeypatch, weights, tmp_path):
    answer = ask(monkeypatch, weights, tmp_path, "--prompt", "<ImageHere> [IMG0] </s> and so on")
    assert answer["prompt"] == "<ImageHere> [IMG0] </s> and so on"


# ---- errors: one line on standard error that says what and where, exit status 2


def broken(weights: Path, folder: Path, change) -> Path:
    copy = folder / "weights"
    shutil.copytree(weights, copy)
    change(copy)
    return copy


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


UNET, LLAMA = "stable-diffusion/unet/diffusion_pytorch_model.safetensors", "vicuna/model.safetensors"
BROKEN_WEIGHTS = {
    "missing file": (lambda w: (w / LLAMA).unlink(), r"vicuna: no \.safetensors file"),
    "missing config": (lambda w: (w / "vicuna/config.json").unlink(), r"vicuna/config\.json: no such file"),
    "missing part": (lambda w: shutil.rmtree(w / "stable-diffusion/vae"), r"vae/config\.json: no such file"),
    "truncated file": (lambda w: truncate(w / UNET), r"unet/.*not a whole safetensors file"),
    "no tokenizer": (lambda w: (w / "vicuna/tokenizer.model").unlink(), r"tokenizer\.model: not a sentencepiece model"),
    "bad JSON": (lambda w: (w / "vicuna/config.json").write_text("{"), r"config\.json: not readable as JSON"),
    "wrong shape": (
        lambda w: edit_tensors(w / LLAMA, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        r"model\.norm\.weight has shape \(7,\), expected \(64,\)",
    ),
    "wrong key": (
        lambda w: edit_tensors(w / UNET, lambda t: t.update({"conv_inn.weight": t.pop("conv_in.weight")})),
        r"unexpected tensor conv_inn\.weight \(and 1 more",
    ),
    "missing key": (
        lambda w: edit_tensors(w / UNET, lambda t: t.pop("conv_in.bias")),
        r"tensor conv_in\.bias \(32,\) is missing",
    ),
}


def fails(main, monkeypatch, capsys, pattern: str, *arguments) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: call(main, monkeypatch, *arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1 and re.search(pattern, lines[0]), error
    assert "Traceback" not in error


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights(case, weights, tar, tmp_path, monkeypatch, capsys):
    change, pattern = BROKEN_WEIGHTS[case]
    folder = broken(weights, tmp_path, change)
    fails(sample.main, monkeypatch, capsys, pattern, "--weights", folder, "--prompt", "x", "--out", tmp_path / "out")
    fails(train_uas.main, monkeypatch, capsys, pattern, "--weights", folder, "--data", tar, "--out", tmp_path / "run")


def test_bad_arguments(weights, tar, tmp_path, monkeypatch, capsys):
    out, nothing = tmp_path / "out", tmp_path / "nothing"
    not_a_picture, empty_tar, a_file = tmp_path / "text.png", tmp_path / "empty.tar", tmp_path / "file"
    not_a_picture.write_text("no picture")
    a_file.write_text("in the way")
    write_tar(empty_tar, {})

    def sample_fails(pattern, *arguments):
        fails(
            sample.main, monkeypatch, capsys, pattern, "--weights", weights, "--prompt", "x", "--out", out, *arguments
        )

    def training_fails(pattern, *arguments):
        fails(
            train_uas.main, monkeypatch, capsys, pattern, "--weights", weights, "--data", tar, "--out", out, *arguments
        )

    for name in ("--lr", "--mapper-lr", "--output-lr", "--muon"):
        training_fails(f"{name}: must be at least 0", name, -1)
    training_fails("--max-bad: must be from 0 to 1", "--max-bad", 7)
    training_fails("nothing to learn from", "--no-ldm", "--no-cap")
    sample_fails("config.json: no such file", "--weights", nothing)
    sample_fails("no such file", "--image", nothing)
    sample_fails("not an image", "--image", not_a_picture)
    sample_fails(r"file.*(exists|directory)", "--out", a_file)
    sample_fails("at least 1", "--steps", 0)
    sample_fails("5000 steps", "--steps", 5000, "--force-image")
    sample_fails("neither a checkpoint nor", "--checkpoint", nothing)
    sample_fails("invalid choice", "--sampler", "euler")
    sample_fails("top-p", "--top-p", 0)
    sample_fails("--guidance must be a finite number", "--guidance", "nan")
    sample_fails("--temperature must be a finite number", "--temperature", "inf")
    sample_fails("--seed must be at least 0", "--seed", 10**23)
    sample_fails("a PROMPT is needed", "--prompt", "  ")
    sample_fails("--turns: not allowed with argument --chat", "--chat", "--turns", 2)
    sample_fails("the prompt has", "--prompt", "word " * 3000)
    training_fails("config.json: no such file", "--weights", nothing)
    training_fails("no such tar", "--data", nothing)
    training_fails("empty.tar: no picture", "--data", empty_tar)
    training_fails("tar", "--data", not_a_picture)
    training_fails(r"file.*(exists|directory)", "--out", a_file)
    training_fails("--batch-size: must be from 1 to 65,536", "--batch-size", 0)
    training_fails("--steps: must be at least 1", "--steps", 0)
    training_fails("--vokens: must be from 1 to 128", "--vokens", 129)
    training_fails("--lr: must be at least 0", "--lr", "nan")
    training_fails("--epochs must be above 0", "--epochs", 0)
    training_fails("--warmup: must be at least 0", "--warmup", -3)
    train(monkeypatch, weights, tar, tmp_path / "run", "--steps", 1)
    training_fails("holds a run already", "--out", tmp_path / "run")
    training_fails("none of its 1 checkpoints fits", "--out", tmp_path / "run", "--resume", "--vokens", 4)
    training_fails("none of its 1 checkpoints fits", "--out", tmp_path / "run", "--resume", "--muon", 1e-3)


@pytest.mark.parametrize("script", ["sample.py", "train_uas.py", "train_mls.py", "published"])
def test_as_processes(script, tmp_path):
    """The same through a real process: help works, an error is one line and exit status 2."""
    command = [sys.executable, *([ROOT / script] if script.endswith(".py") else ["-m", script])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    shown = subprocess.run([*command, "--help"], **options)
    assert shown.returncode == 0 and "usage:" in shown.stdout
    arguments = {
        "sample.py": ["--prompt", "x", "--weights", "nowhere"],
        "train_uas.py": ["--data", "x.tar", "--weights", "nowhere"],
        "train_mls.py": ["--data", "x.tar", "--weights", "nowhere"],
        "published": ["check", "nowhere"],
    }[script]
    failed = subprocess.run([*command, *arguments], **options)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith(f"{script}: error: nowhere")
    assert "no such f" in failed.stderr  # file or folder
