"""The paper's baselines: Stable Diffusion alone, fine-tuned and as the second of two stages; Divter's dialogues."""

import json
import shutil
import sys

import pytest
import torch
from helpers import assert_close, randomise
from random_weights import write_random_weights
from safetensors.torch import load_file

from baselines import divter, gill, stable_diffusion, train_sd
from baselines.stable_diffusion import StableDiffusion, fitting_text, text_of
from common.cli import MINIATURE, run
from common.files import write_json
from common.images import to_image, to_tensor
from evaluation.cases import SETTINGS, check_settings, read_answer, read_cases, write_answer
from generation import Sampling
from miniature import exam, world
from miniature.facts import Picture
from miniature.words import facts_in
from prompts import Turn
from published.loading import open_safetensors
from tars.precomputed import NOTHING
from tars.writer import Sample, write_samples
from trainer import compiled

QUICK = ("--steps", 1, "--sampler", "dpm", "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_random_weights(tmp_path_factory.mktemp("weights"), small=True)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("pairs", "stories", "dialogues"):
        getattr(world, f"write_{name}")(folder / f"{name}.tar", 6, 1, size=32)
    return folder


def call(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def pictures(folder, keys) -> list[torch.Tensor]:
    return [to_tensor(read_answer(folder, key).segments[-1]) for key in keys]


def test_fitting_text(weights, tars):
    """As many sentences before the last as there is room for, none cut, the nearest first."""
    model = StableDiffusion(weights)
    tokenizer = model.tokenizer
    sentence = "a small red boat sails on the sea at night"
    most = next(n for n in range(1, 30) if len(tokenizer.encode(" ".join([sentence] * (n + 1)))) > tokenizer.length - 2)
    texts = [f"{sentence}" for _ in range(most + 5)]
    assert fitting_text(texts, tokenizer) == " ".join([sentence] * most)
    assert fitting_text(["no room for me " * 30, "one", "two"], tokenizer) == "one two"
    assert fitting_text(["alone " * 100], tokenizer) == "alone " * 100
    case = read_cases([str(tars / "stories.tar")], "image", True)[0][0]
    assert text_of(case, "none", model) == case.turn.text
    assert text_of(case, "texts", model).endswith(f"{case.before[-1].text} {case.turn.text}")


def test_draws_as_the_exam_does():
    """The same noise gives the pictures of miniature/exam.py, which score.py measures as "zero-shot"."""
    texts = ["a red boat on the sea at night", "a cat"]
    sampling = Sampling(sampler="dpm", steps=3, guidance=3.0)
    measured = exam.Exam(MINIATURE, None, torch.device("cpu"), sampling, 2, 0)
    model = StableDiffusion(MINIATURE, torch.float32).eval()
    latents = torch.cat([model.sample_latents(1, measured.generator(i)) for i in range(2)])
    ours = [to_tensor(to_image(p)) for p in model.paint(texts, latents, Sampling(sampler="dpm", steps=3, guidance=3.0))]
    theirs = [to_tensor(picture) for picture in exam.text_to_pictures(measured, texts)]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1 / 255
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_resumes_and_changes_the_pictures(monkeypatch, weights, tars, tmp_path):
    """Three steps in pieces are three in one go; the trained UNet draws something else than the published one."""
    options = ("--weights", weights, "--data", tars / "stories.tar", "--batch-size", 2, "--workers", 0, "--warmup", 1,
               "--lr", 1e-3, "--log-every", 1, "--save-every", 1, "--device", "cpu")  # fmt: skip
    call(monkeypatch, train_sd, *options, "--out", tmp_path / "one", "--steps", 3)
    call(monkeypatch, train_sd, *options, "--out", tmp_path / "two", "--steps", 3)
    for name in ("step-00000003", "step-00000002"):
        for file in (tmp_path / "two" / name).iterdir() if name.endswith("3") else ():
            file.unlink()
    (tmp_path / "two" / "step-00000003").rmdir()
    call(monkeypatch, train_sd, *options, "--out", tmp_path / "two", "--steps", 3, "--resume")
    files = [tmp_path / name / "step-00000003" / "trained.safetensors" for name in ("one", "two")]
    with open_safetensors(files[0]) as one, open_safetensors(files[1]) as two:
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    untrained = StableDiffusion(weights).trained_parameters()
    trained = StableDiffusion(weights)
    trained.load_trained(files[0])
    moved = [not torch.equal(p, untrained[name]) for name, p in trained.trained_parameters().items()]
    assert sum(moved) > 0.9 * len(moved)  # biases before a norm need not move

    keys = [case.key for case in read_cases([str(tars / "stories.tar")], "image", True)[0]]
    drawn = ("--weights", weights, "--data", tars / "stories.tar", "--last", *QUICK)
    call(monkeypatch, stable_diffusion, *drawn, "--answers", tmp_path / "a")
    call(monkeypatch, stable_diffusion, *drawn, "--answers", tmp_path / "b", "--checkpoint", tmp_path / "one")
    before, after = pictures(tmp_path / "a", keys), pictures(tmp_path / "b", keys)
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_trains_the_published_weights_unrounded(monkeypatch, weights, tars, tmp_path):
    """The UNet trains from its float32 weights where the frozen parts are in bfloat16, and is computed twice where
    memory is short. A step with several pictures trains its first."""
    recomputed, function = [], compiled.checkpoint
    monkeypatch.setattr(compiled, "checkpoint", lambda *given, **more: recomputed.append(1) or function(*given, **more))
    options = ("--weights", weights, "--data", tars / "stories.tar", "--batch-size", 2, "--workers", 0, "--lr", 0,
               "--steps", 1, "--device", "cpu", "--dtype", "bf16", "--out", tmp_path / "run")  # fmt: skip
    call(monkeypatch, train_sd, *options, "--gradient-checkpointing")
    trained = load_file(tmp_path / "run" / "step-00000001" / "trained.safetensors")
    for name, parameter in StableDiffusion(weights).trained_parameters().items():
        assert torch.equal(trained[name], parameter), name
    assert recomputed
    steps = train_sd.StorySteps([str(tars / "stories.tar")], StableDiffusion(weights).tokenizer, None, NOTHING)
    assert steps.fit("story", [Turn("one", (4,)), Turn("two", (5, 6))], "image", 1)[:4] == ("one two", "", (), (5,))


def test_overfits_one_step(monkeypatch, weights, tmp_path):
    world.write_stories(tmp_path / "one.tar", 1, 1, size=32)
    call(monkeypatch, train_sd, "--weights", weights, "--data", tmp_path / "one.tar", "--batch-size", 4, "--lr", 3e-3,
         "--workers", 0, "--warmup", 1, "--log-every", 5, "--steps", 40, "--out", tmp_path / "run",
         "--min-snr-gamma", 0, "--device", "cpu")  # fmt: skip
    losses = [json.loads(line)["ldm_loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    print(losses)
    assert losses[-1] < 0.7 * losses[0]


def test_context_and_resuming_answers(monkeypatch, weights, tars, tmp_path):
    """What is told is on record, so that evaluate.py compares like with like; what is answered stays."""
    drawn = ("--weights", weights, "--data", tars / "stories.tar", "--last", *QUICK, "--answers", tmp_path / "a")
    call(monkeypatch, stable_diffusion, *drawn, "--n", 2)
    first = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("0*")}
    call(monkeypatch, stable_diffusion, *drawn)
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("0*")}
    assert len(first) == 4 and len(now) == 12 and first.items() <= now.items()
    check_settings(tmp_path / "a", {"task": "image", "context": "texts"})
    with pytest.raises(ValueError, match="context texts, not both"):
        check_settings(tmp_path / "a", {"task": "image", "context": "both"})
    with pytest.raises(ValueError, match=r"guidance 7\.5, not 2"):
        call(monkeypatch, stable_diffusion, *drawn, "--guidance", 2)


def test_two_stages(monkeypatch, weights, tars, tmp_path):
    """The other system's words stay, and decide what is drawn; where it said nothing nothing is drawn."""
    cases = read_cases([str(tars / "stories.tar")], "text+image", True)[0]
    for case, words in zip(cases, ("a red boat", "a cat", ""), strict=False):
        write_answer(tmp_path / "words", case.key, [words] if words else [])
    drawn = ("--weights", weights, "--data", tars / "stories.tar", "--last", "--task", "text+image", *QUICK, "--n", 3)
    call(monkeypatch, stable_diffusion, *drawn, "--words", tmp_path / "words", "--answers", tmp_path / "a")
    answers = [read_answer(tmp_path / "a", case.key).segments for case in cases[:3]]
    assert [answer[0] for answer in answers[:2]] == ["a red boat", "a cat"] and answers[2] == []
    write_answer(tmp_path / "words", cases[0].key, ["two kites"])
    write_json(tmp_path / "words" / SETTINGS, {"context": "none"})  # the words' own is what counts
    call(monkeypatch, stable_diffusion, *drawn, "--words", tmp_path / "words", "--answers", tmp_path / "b")
    other = [read_answer(tmp_path / "b", case.key).segments for case in cases[:2]]
    assert not torch.equal(to_tensor(answers[0][1]), to_tensor(other[0][1]))
    assert torch.equal(to_tensor(answers[1][1]), to_tensor(other[1][1]))
    check_settings(tmp_path / "a", {"context": "both"})
    check_settings(tmp_path / "b", {"context": "none"})


def test_split_description():
    assert divter.split_description("here it is picture: a red boat") == ("here it is", "a red boat")
    assert divter.split_description("picture: a cat picture: a dog") == ("", "a cat")
    assert divter.split_description("no more") == ("no more", None)
    assert divter.split_description("oh picture:") == ("oh", None)


def test_described_dialogues(monkeypatch, tars, tmp_path):
    """Every picture becomes words that are true of it; nothing else changes, and it is the same every time."""
    for name in ("a.tar", "b.tar"):
        call(monkeypatch, divter, tars / "dialogues.tar", "--out", tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    before, after = (read_cases([str(tar)], "image", False)[0] for tar in (tars / "dialogues.tar", tmp_path / "a.tar"))
    assert [case.key for case in before] == [case.key for case in after]
    described = 0
    for one, other in zip(before, after, strict=True):
        assert not other.turn.pictures
        words, description = divter.split_description(other.turn.text)
        assert words == one.turn.text and (description is not None) == bool(one.turn.pictures)
        if description:
            described += 1
            told = facts_in(description)
            assert told.scene in (None, one.facts.scene) and len(told.things) == len(one.facts.things)
    assert described > 3


def test_captions_of_real_pictures(monkeypatch, tmp_path):
    """Dialogues without labels, with two pictures in a turn: captions come from a file."""
    turns = [{"text": "a picture: look", "image": None}, {"text": "two", "image": ["7.0.jpg", "7.1.jpg"]}]
    turns += [{"text": "", "image": "7.2.jpg"}]
    told = json.dumps({"kind": "dialog", "turns": turns}).encode()
    shown = [(f"7.{k}.jpg", b"a picture is not read") for k in range(3)]
    write_samples([Sample([("7.json", told), *shown], {"dialogues": 1})], tmp_path / "real.tar")
    captions = {"7.0.jpg": "Two dogs, a cat", "7.1.jpg": 'A  "house"\non a hill', "7.2.jpg": "one picture: a boat"}
    lines = [json.dumps({"file": name, "caption": text}) for name, text in captions.items()]
    (tmp_path / "c.jsonl").write_text("\n\n".join(lines))
    call(monkeypatch, divter, tmp_path / "real.tar", "--captions", tmp_path / "c.jsonl", "--out", tmp_path / "told.tar")
    cases = read_cases([str(tmp_path / "told.tar")], "image", False)[0]
    assert [case.turn.text for case in cases] == [
        'two picture: Two dogs, a cat picture: A "house" on a hill',
        "picture: one picture : a boat",
    ]
    assert cases[0].before[0].text == "a picture : look"
    assert divter.split_description(cases[1].turn.text) == ("", "one picture : a boat")
    (tmp_path / "c.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(ValueError, match=r"7: 7\.2\.jpg is a picture without a caption"):
        call(monkeypatch, divter, tmp_path / "real.tar", "--captions", tmp_path / "c.jsonl", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match=r"7\.0\.jpg is a picture without a label of the drawn world: give --captions"):
        call(monkeypatch, divter, tmp_path / "real.tar", "--out", tmp_path / "x")
    for text in ("file,caption", '{"file": "x"}', "[]"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"a\.jsonl: no file and its caption in"):
            divter.read_captions(tmp_path / "a.jsonl")
    assert not (tmp_path / "x").exists()


def test_gill_mapper():
    """GILL's own: torch.nn.Transformer with 4 heads between two linear layers, under the names of its checkpoints."""
    ours = randomise(gill.GillMapper(24, 12, 7, width=32))
    theirs = torch.nn.Transformer(
        32, nhead=4, num_encoder_layers=4, num_decoder_layers=4, dim_feedforward=128, dropout=0.0, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    theirs.load_state_dict(ours.tfm.state_dict(), strict=True)
    features = torch.randn(3, 5, 24)
    expected = ours.model(theirs(ours.fc(features), ours.query_embs.repeat(3, 1, 1)))
    assert_close(ours(features), expected, 1e-5, "GILL's mapper")
    published = gill.GillMapper(4096, 1024, 77)
    assert published.query_embs.shape == (1, 77, 512) and len(published.tfm.encoder.layers) == 4


def test_gill_reads_the_states_of_its_vokens(weights):
    """Each voken's own state, of a whole pass through the language model, and its embedding."""
    model = gill.Gill(weights, None, torch.device("cpu"), vokens=3, width=16)
    texts, expected = ["a boat", "two dogs in the [IMG0] snow"], []
    assert not [p for p in model.llama.parameters() if p.requires_grad]
    randomise(model.vokens)
    for text in texts:
        ids = [1, *model.tokenizer.encode(model.tokenizer.escape(text)), *model.tokenizer.voken_ids]
        embeddings = model.vokens.embed(model.llama, torch.tensor([ids]))
        expected.append((model.llama(embeddings) + embeddings)[0, -3:])
    text_loss, conditioning = model.text_loss_and_conditioning(texts)
    assert_close(conditioning, model.mapper(torch.stack(expected)), 1e-5, "conditioning")
    assert conditioning.shape == (2, 77, 32) and text_loss > 0
    (conditioning.square().sum() + text_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trained_parameters().values())


def test_gill_learns_and_paints(monkeypatch, weights, tars, tmp_path):
    """It comes nearer to Stable Diffusion's encodings, resumes exactly, and paints against the empty caption."""
    options = ("--weights", weights, "--data", tars / "pairs.tar", "--batch-size", 2, "--workers", 0, "--warmup", 1,
               "--log-every", 1, "--width", 16, "--vokens", 4, "--device", "cpu",
               "--gradient-checkpointing")  # fmt: skip
    call(monkeypatch, gill, *options, "--out", tmp_path / "one", "--steps", 30, "--save-every", 29)
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    print([record["cap_loss"] for record in log])
    assert log[-1]["cap_loss"] < 0.7 * log[0]["cap_loss"] and log[-1]["text_loss"] < log[0]["text_loss"]
    assert log[0]["loss"] == pytest.approx(log[0]["cap_loss"] + 0.01 * log[0]["text_loss"], rel=1e-5)
    shutil.copytree(tmp_path / "one" / "step-00000029", tmp_path / "two" / "step-00000029")
    call(monkeypatch, gill, *options, "--out", tmp_path / "two", "--steps", 30, "--resume")
    files = [tmp_path / name / "step-00000030" / "trained.safetensors" for name in ("one", "two")]
    one, two = map(load_file, files)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    asked, denoise = [], stable_diffusion.denoise
    monkeypatch.setattr(stable_diffusion, "denoise", lambda *given: asked.append(given[3]) or denoise(*given))
    drawn = ("--weights", weights, "--data", tars / "pairs.tar", *QUICK, "--n", 2, "--batch-size", 2)
    call(monkeypatch, stable_diffusion, *drawn, "--answers", tmp_path / "a", "--checkpoint", tmp_path / "one")
    call(monkeypatch, stable_diffusion, *drawn, "--answers", tmp_path / "b")
    model, cases = StableDiffusion(weights), read_cases([str(tars / "pairs.tar")], "image", False)[0][:2]
    texts = [case.turn.text for case in cases]
    ours = gill.load_gill(weights, files[0], None, torch.device("cpu")).encode(texts)
    assert_close(asked[0], torch.cat([model.encode(["", ""]), ours]), 1e-6, "GILL's conditioning")
    assert_close(asked[1], model.encode(["", "", *texts]), 1e-6, "Stable Diffusion's")
    assert (pictures(tmp_path / "a", [cases[0].key])[0] - pictures(tmp_path / "b", [cases[0].key])[0]).abs().max() > 0


def test_errors(monkeypatch, capsys, weights, tars, tmp_path):
    def fails(module, pattern, *arguments):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(module.main)
        assert caught.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert pattern in line, line

    given = ("--weights", weights, "--answers", tmp_path / "a", *QUICK)
    fails(stable_diffusion, "words are wanted", "--data", tars / "dialogues.tar", *given)
    fails(
        stable_diffusion, "no such folder of answers", "--data", tars / "pairs.tar", *given, "--words", tmp_path / "w"
    )
    fails(stable_diffusion, "neither a checkpoint", "--data", tars / "pairs.tar", *given, "--checkpoint", tmp_path)
    fails(divter, "is no dialogue", tars / "stories.tar", "--out", tmp_path / "x.tar")
    fails(train_sd, "not for this baseline", "--no-ldm", "--out", tmp_path / "run")
    fails(gill, "--no-cfg is not for this baseline", "--no-cfg", "--out", tmp_path / "run")
    fails(gill, "--width must be a multiple of the mapper's 4 heads", "--width", 10, "--out", tmp_path / "run")
    with pytest.raises(ValueError, match="without a label"):
        divter.describe_pictures([{"text": "look", "image": "1.0.png", "label": None}], "1")
    label = Picture.label(world.sample_pair(0, 0)[0])
    assert "picture: " in divter.describe_pictures([{"text": "", "image": "1.0.png", "label": label}], "1")[0]["text"]
