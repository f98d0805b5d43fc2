"""python -m tars precompute: training on its tars is training on the pictures, but none is decoded or encoded."""

import json
import shutil
import tarfile

import pytest
import safetensors.torch
import torch
from helpers import assert_close, pairs, picture_bytes, write_tar
from random_weights import write_random_weights
from safetensors.torch import load_file, save_file
from test_commands import call, fails
from test_commands import train as train_uas
from test_mls_commands import train as train_mls

import vae
from common.files import fingerprint
from common.images import preprocess_output, read_image
from miniature.world import write_dialogues, write_stories
from published import parts
from tars import __main__ as command
from tars import batches as tars_batches
from tars import precompute
from tars import stories as tars_stories
from tars.precomputed import MARKER, find_precomputed, identity, read_marker
from train_uas import main as train_stage1

ALONE = ("--workers", 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones, in which latents and query embeddings are of the size of trained ones: losses depend on them."""
    weights = write_random_weights(tmp_path_factory.mktemp("weights"), small=True)
    for file, name, factor in (
        ("stable-diffusion/vae/diffusion_pytorch_model", "quant_conv.weight", 1000),
        ("minigpt4/llama_proj", "llama_proj.weight", 10),
    ):
        path = weights / f"{file}.safetensors"
        tensors = load_file(path)
        save_file({**tensors, name: factor * tensors[name]}, path)
    return weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_tar(folder / "pairs.tar", pairs(6))
    write_stories(folder / "stories.tar", 3, 0, "train")
    write_dialogues(folder / "dialogues.tar", 3, 0, "train")
    return folder


def made(monkeypatch, weights, source, out, *arguments):
    """`python -m tars precompute`."""
    call(command.main, monkeypatch, "precompute", source, "--weights", weights, "--out", out, *ALONE, *arguments)
    return out


def forbid(monkeypatch, *places) -> None:
    def never(*_, **__):
        raise AssertionError("a picture or a caption was looked at")

    for module, name in places:
        monkeypatch.setattr(module, name, never)


def members(tar) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}


def same_losses(log, expected, tolerance: float) -> None:
    names = {"loss", "text_loss", "ldm_loss", "cap_loss"}
    assert len(log) == len(expected)
    worst = 0.0
    for ours, reference in zip(log, expected, strict=True):
        assert names & ours.keys() == names & reference.keys()
        worst = max(worst, *(abs(ours[name] / reference[name] - 1) for name in names & ours.keys()))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst <= tolerance


# ---- the same training


@pytest.mark.parametrize(("store", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_stage1_is_the_same(monkeypatch, weights, sources, tmp_path, store, tolerance):
    steps = ("--steps", 4, "--sample-every", 4)
    expected = train_uas(monkeypatch, weights, sources / "pairs.tar", tmp_path / "a", *steps)
    tar = made(monkeypatch, weights, sources / "pairs.tar", tmp_path / "x.tar", "--store", store, "--batch-size", 4)
    encoder = vae.VAE.encode
    forbid(monkeypatch, (tars_batches, "decode"), (vae.VAE, "encode"), (parts, "load_text_encoder"))
    same_losses(train_uas(monkeypatch, weights, tar, tmp_path / "b", *steps), expected, tolerance)
    assert (tmp_path / "b" / "samples.png").stat().st_size > 0
    monkeypatch.setattr(vae.VAE, "encode", encoder)
    with pytest.raises(AssertionError, match="looked at"):  # the check can fail
        train_uas(monkeypatch, weights, sources / "pairs.tar", tmp_path / "c", *steps)


@pytest.mark.parametrize(("store", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_stage2_is_the_same(monkeypatch, weights, sources, tmp_path, store, tolerance):
    steps = ("--steps", 3, "--sample-every", 3, "--no-uas")
    both, out = (sources / "stories.tar", sources / "dialogues.tar"), tmp_path / "made"
    out.mkdir()
    expected = train_mls(monkeypatch, weights, both[0], tmp_path / "a", *steps, "--data", *both)
    for source in both:
        made(monkeypatch, weights, source, out, "--store", store)
    forbid(monkeypatch, (tars_stories, "decode"), (vae.VAE, "encode"), (parts, "load_image_encoder"))
    inside = sorted(out.glob("*.tar"), reverse=True)  # in the order of `both`
    log = train_mls(monkeypatch, weights, out, tmp_path / "b", *steps, "--data", *inside)
    same_losses(log, expected, tolerance)
    assert (tmp_path / "b" / "samples.png").stat().st_size > 0


def test_captions_may_be_left_out(monkeypatch, weights, sources, tmp_path):
    tar = made(monkeypatch, weights, sources / "pairs.tar", tmp_path / "x.tar", "--no-captions", "--store", "fp32")
    assert "encoding" not in find_precomputed([str(tar)], weights).shapes
    expected = train_uas(monkeypatch, weights, sources / "pairs.tar", tmp_path / "a", "--steps", 2)
    same_losses(train_uas(monkeypatch, weights, tar, tmp_path / "b", "--steps", 2), expected, 1e-6)


# ---- what is in a tar


def test_a_tar_of_pairs(monkeypatch, weights, tmp_path, capsys):
    broken = {"x.png": picture_bytes(1)[:100], "x.txt": b"cut", "y.txt": b"no picture", "z.png": picture_bytes(2)}
    source = write_tar(tmp_path / "source.tar", pairs(3) | broken | {"w.png": picture_bytes(3), "w.json": b"[]"})
    tar = made(monkeypatch, weights, source, tmp_path / "x.tar")
    printed = capsys.readouterr().out
    assert "kept: 3 pairs" in printed and "dropped: 2 no caption, 1 broken image, 1 no picture" in printed
    inside = members(tar)
    assert next(iter(inside)) == MARKER and len(inside) == 7 and inside["00000.txt"] == b"a red boat"
    tensors = safetensors.torch.load(inside["00000.safetensors"])
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "moments": ((2, 4, 16, 16), torch.float16),
        "encoding": ((77, 32), torch.float16),
    }
    pixels = vae.to_pixels(preprocess_output(read_image(pairs(1)["00000.png"]), 32))
    mean, logvar = parts.load_vae(weights / "stable-diffusion/vae").encode(pixels[None])
    assert_close(tensors["moments"].float(), torch.cat([mean, logvar]), 1e-3, "moments")
    marker = read_marker(str(tar))
    assert set(marker.made_with) == {"moments", "encoding"} and marker.empty_caption.shape == (1, 77, 32)
    again = made(monkeypatch, weights, source, tmp_path / "y.tar", "--batch-size", 16)
    assert [p.name for p in tmp_path.glob(".*")] == [] and len(members(again)) == 7


def test_a_story_without_one_of_its_pictures_is_left_out(monkeypatch, weights, sources, tmp_path, capsys):
    inside = members(sources / "stories.tar")
    name = "000000001.2.png"
    source = write_tar(tmp_path / "source.tar", inside | {name: inside[name][:60], "bad.json": b'{"turns": ['})
    tar = made(monkeypatch, weights, source, tmp_path / "x.tar")
    printed = capsys.readouterr().out
    assert "kept: 2 stories and dialogues" in printed
    assert "1 broken image" in printed and "1 neither story nor dialogue" in printed
    inside, turns = members(tar), len(json.loads(inside["000000000.json"])["turns"])
    tensors = safetensors.torch.load(inside["000000000.safetensors"])
    assert set(tensors) == {f"{k}.{feature}" for k in range(turns) for feature in ("queries", "moments")}
    assert inside["000000000.json"] == members(source)["000000000.json"] and "000000001.json" not in inside


def test_broken_tensors_are_counted(monkeypatch, weights, sources, tmp_path):
    inside = members(made(monkeypatch, weights, sources / "pairs.tar", tmp_path / "x.tar"))
    whole = safetensors.torch.load(inside["00000.safetensors"])
    inside["00000.safetensors"] = inside["00000.safetensors"][:-10]
    inside["00001.safetensors"] = safetensors.torch.save({**whole, "moments": torch.zeros(2, 4, 8, 8)})
    inside["00002.safetensors"] = safetensors.torch.save({"moments": whole["moments"]})
    inside["00003.safetensors"] = safetensors.torch.save({**whole, "encoding": whole["encoding"].int()})
    del inside["00004.safetensors"]
    epoch = ("--steps", 3)
    log = train_uas(monkeypatch, weights, write_tar(tmp_path / "y.tar", inside), tmp_path / "run", *epoch)
    assert log[-1]["bad"] == {"no tensors, or broken ones": 5}


def test_what_is_there_is_kept(monkeypatch, weights, sources, tmp_path, capsys):
    """So a stopped command goes on with the tars that are missing; what was made otherwise is made anew."""
    source, out = shutil.copy(sources / "pairs.tar", tmp_path / "source.tar"), tmp_path / "x.tar"

    def is_kept(*options) -> bool:
        """A second run with these options: does it leave the tar as it is?"""
        made(monkeypatch, weights, source, out, "--no-captions")
        capsys.readouterr()
        before = out.stat().st_ino
        made(monkeypatch, weights, source, out, *options)
        assert ("there already" in capsys.readouterr().out) == (out.stat().st_ino == before)
        return out.stat().st_ino == before

    assert is_kept("--no-captions")
    for options in ((), ("--no-captions", "--store", "fp32"), ("--no-captions", "--dtype", "bf16")):
        assert not is_kept(*options)
    made(monkeypatch, weights, source, out, "--no-captions")
    write_tar(source, pairs(5))  # another source of that name
    capsys.readouterr()
    made(monkeypatch, weights, source, out, "--no-captions")
    assert "kept: 5 pairs" in capsys.readouterr().out
    whole, inside = out.read_bytes(), members(out)
    write_tar(tmp_path / "marker.tar", {**inside, MARKER: b"damaged"})
    for damaged in ((tmp_path / "marker.tar").read_bytes(), whole[: len(whole) // 2], b""):
        out.write_bytes(damaged)
        made(monkeypatch, weights, source, out, "--no-captions")
        assert "kept: 5 pairs" in capsys.readouterr().out and members(out).keys() == inside.keys()


# ---- refused, in one line


def test_other_weights_are_refused(monkeypatch, weights, sources, tmp_path, capsys):
    tar = made(monkeypatch, weights, sources / "pairs.tar", tmp_path / "x.tar")
    other = tmp_path / "weights"
    shutil.copytree(weights, other)
    assert all(identity(weights, name) == identity(other, name) for name in ("moments", "encoding", "queries"))

    def training_fails(pattern, *arguments):
        base = ("--weights", other, "--data", tar, "--out", tmp_path / "run")
        fails(train_stage1, monkeypatch, capsys, pattern, *base, *ALONE, *arguments)

    for part, file in (("moments", "vae/diffusion_pytorch_model"), ("encoding", "text_encoder/model")):
        path = other / "stable-diffusion" / f"{file}.safetensors"
        content = path.read_bytes()
        save_file({name: tensor + 1e-4 for name, tensor in load_file(path).items()}, path)
        training_fails(rf"x\.tar: its {part} were precomputed with other weights")
        path.write_bytes(content)
    padding = other / "stable-diffusion" / "tokenizer" / "special_tokens_map.json"
    padding.write_text('{"pad_token": "!"}')
    training_fails(r"x\.tar: its encoding were precomputed with other weights")
    padding.unlink()
    training_fails("one is not precomputed", "--data", tar, sources / "pairs.tar")
    for options in (("--store", "fp32"), ("--dtype", "bf16")):
        otherwise = made(monkeypatch, weights, sources / "pairs.tar", tmp_path / "otherwise.tar", *options)
        training_fails("they differ in weights or options", "--data", tar, otherwise)
    inside = members(tar)
    for marker in (b"{}", inside[MARKER][:20], safetensors.torch.save({}, {"made_with": "[]", "shapes": "{}"})):
        damaged = write_tar(tmp_path / "damaged.tar", {**inside, MARKER: marker})
        training_fails("cannot be read", "--data", damaged)
    train_uas(monkeypatch, other, tar, tmp_path / "run", "--steps", 1)  # copies are the same weights


def test_identity_depends_on_every_file(weights, tmp_path):
    other, sd = tmp_path / "weights", "stable-diffusion"
    shutil.copytree(weights, other)
    for feature, file in (
        ("queries", "minigpt4/llama_proj.safetensors"),
        ("queries", "blip2/config.json"),
        ("encoding", f"{sd}/text_encoder/config.json"),
        ("moments", f"{sd}/vae/config.json"),
    ):
        path, before = other / file, identity(other, feature)
        path.write_bytes(path.read_bytes() + b" ")
        assert identity(other, feature) != before, file
    unet, before = other / sd / "unet" / "config.json", identity(other, "moments")
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "sample_size": 32}))  # larger pictures
    assert identity(other, "moments") != before


def test_bad_arguments(monkeypatch, weights, sources, tmp_path, capsys):
    source, out = sources / "pairs.tar", tmp_path / "x.tar"

    def precompute_fails(pattern, *arguments, source=source):
        base = ("precompute", source, "--weights", weights, "--out", out)
        fails(command.main, monkeypatch, capsys, pattern, *base, *ALONE, *arguments)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    precompute_fails("nowhere/.*config.json: no such file", "--weights", "nowhere")
    precompute_fails("is the source", "--out", source)
    precompute_fails("no folder", "--out", tmp_path / "no" / "x.tar")
    (tmp_path / "a").mkdir()
    same_name = shutil.copy(source, tmp_path / "a" / source.name)
    both = ("precompute", source, same_name, "--weights", weights, "--out", tmp_path / "a", *ALONE)
    fails(command.main, monkeypatch, capsys, "two sources have the same name", *both)
    assert same_name.read_bytes() == source.read_bytes()
    precompute_fails("at least 1", "--batch-size", 0)
    precompute_fails("nothing to keep.*1 no picture", source=write_tar(tmp_path / "words.tar", {"a.txt": b"words"}))
    done = made(monkeypatch, weights, source, tmp_path / "y.tar")
    precompute_fails("nothing to keep.*6 no picture", source=done)
    monkeypatch.setattr(precompute.Encoders, "moments", lambda self, pixels: self.stored(1e6 * pixels))
    precompute_fails("too large for 16 bit")


def test_fingerprints_see_small_changes(tmp_path):
    first = tmp_path / "a"
    first.write_bytes(bytes(300_000))
    names = {fingerprint([first]), fingerprint([first], 512)}
    for at in (0, 5000, 200_000, 299_999):
        content = bytearray(300_000)
        content[max(0, at - 2000) : at + 5000] = b"x" * len(content[max(0, at - 2000) : at + 5000])  # a trained tensor
        first.write_bytes(content)
        names.add(fingerprint([first]))
    assert len(names) == 6
