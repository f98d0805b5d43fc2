"""train_mls.py, and sample.py's stories and talks, on small random weights and stories of the drawn world."""

import io
import json
import shutil
import sys

import pytest
import torch
from helpers import pairs, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file
from test_commands import call, fails, noting
from test_commands import train as train_uas

import generation
import prompts
import published.__main__ as weights_command
import sample
import train_mls
from common.collate import collate
from miniature.world import write_dialogues, write_stories
from minigpt5 import MiniGPT5
from prompts import Turn
from published.convert import RELEASED_FORMS
from published.loading import WeightsError, checkpoint_folders, load_trained, save_trained
from published.parts import load_minigpt5
from trainer import run as trainer_run
from trainer.log import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_stories(folder / "stories.tar", 6, 0, "train")
    write_dialogues(folder / "dialogues.tar", 4, 0, "train")
    return folder


@pytest.fixture(scope="module")
def uas(weights, tmp_path_factory):
    """A run of stage 1."""
    folder = tmp_path_factory.mktemp("uas")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_uas(monkeypatch, weights, write_tar(folder / "pairs.tar", pairs(4)), folder / "run", "--steps", 2)
    return folder / "run"


def call_weights(*arguments) -> None:
    assert weights_command.main([str(argument) for argument in arguments]) == 0


def train(monkeypatch, weights, data, out, *arguments) -> list[dict]:
    fixed = ("--warmup", 5, "--lr", 1e-3, "--workers", 0, "--log-every", 1, "--sample-every", 0, "--batch-size", 3)
    call(train_mls.main, monkeypatch, "--weights", weights, "--data", data, "--out", out, *fixed, *arguments)
    return read_log(out / "log.jsonl")


def test_what_trains(monkeypatch, weights, data, uas, tmp_path):
    """LoRA, voken rows and the mapper's transformer move; its MLP and queries stay stage 1's."""
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 3, "--uas", uas)
    before = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    after = load_file(checkpoint_folders(tmp_path / "run")[0] / "trained.safetensors")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith(("fc.", "t2i_decoder_prompt"))}
    lora = after.keys() - before.keys()
    assert len(lora) == 2 * 2 * 3 and all("lora_" in name for name in lora)
    assert all(after[name].abs().sum() > 0 for name in lora if "lora_B" in name)


def test_what_trains_without_stage_1(monkeypatch, weights, data, tmp_path, capsys):
    """All of the mapper, its matrices with Muon if asked; the vokens start as the text that is named."""
    made, options = noting(monkeypatch, train_mls, "Muon"), ("--no-uas", "--start-as", "a", "--save-every", 1)
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 2, "--muon", 0.02, *options)
    after, before = (load_file(path / "trained.safetensors") for path in checkpoint_folders(tmp_path / "run"))
    names = [name for name in before if name.startswith(("fc.", "t2i_decoder_prompt", "llm_to_t2i_mapping"))]
    assert {"fc.0.weight", "t2i_decoder_prompt"} <= {*names}
    assert not any(torch.equal(before[name], after[name]) for name in names)
    training = ("--weights", weights, "--data", data / "stories.tar", "--out", tmp_path / "no", "--start-as", "a")
    fails(train_mls.main, monkeypatch, capsys, "--start-as is for --no-uas", *training)
    ((matrices, rate), _) = made[0]
    assert rate == 0.02 and len(matrices) == sum(before[name].dim() == 2 for name in names)
    model = load_minigpt5(weights, read_pictures=False)
    row = model.llama.model.embed_tokens.weight[model.tokenizer.encode_plain("a")[-1]].float()
    assert (after["vokens.input"][0] - row).abs().max() < 0.01 < (row - before["vokens.input"][-1]).abs().max()


def test_lora_options(monkeypatch, weights, data, uas, tmp_path):
    options = ("--uas", uas, "--lora-rank", 3, "--lora-targets", "o_proj,up_proj", "--steps", 1)
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", *options)
    checkpoint = checkpoint_folders(tmp_path / "run")[0] / "trained.safetensors"
    ranks = {name.split(".")[-3]: t.shape[0] for name, t in load_file(checkpoint).items() if "lora_A" in name}
    assert ranks == {"o_proj": 3, "up_proj": 3}
    layers = load_minigpt5(weights, checkpoint).lora
    assert layers and all(layer.scale == 2 and layer.lora_A.out_features == 3 for layer in layers)


def test_checkpoints_keep_the_scale_of_lora(weights, tmp_path):
    model = load_minigpt5(weights, read_pictures=False)
    model.add_adapters(lora={"rank": 4, "alpha": 12})
    save_trained(model, model.trained_parameters(), tmp_path / "x.safetensors", "mls")
    layers = load_minigpt5(weights, tmp_path / "x.safetensors", read_pictures=False).lora
    assert layers and all(layer.scale == 3 for layer in layers)


def test_held_out_losses(monkeypatch, weights, data, uas, tmp_path):
    """Without dropout and gradients; the training, whose dropout goes on, does not notice them."""
    val, modes, losses_of = ("--val", data / "stories.tar", "--val-every", 1, "--val-batches", 2), [], MiniGPT5.losses

    def losses(model, *inputs, **options):
        modes.append((model.training, torch.is_grad_enabled()))
        return losses_of(model, *inputs, **options)

    monkeypatch.setattr(MiniGPT5, "losses", losses)
    logs = [
        train(monkeypatch, weights, data, tmp_path / f"{i}", "--uas", uas, "--steps", 3, *(val if i else ()))
        for i in range(2)
    ]
    assert modes == [(True, True)] * 3 + [(True, True), (False, False), (False, False)] * 3
    numbers = [[(r["step"], r["loss"], r["text_loss"]) for r in log if "loss" in r] for log in logs]
    assert numbers[0] == numbers[1] and sum("val_loss" in r for r in logs[1]) == 3


def test_adapter_has_a_rate_of_its_own(monkeypatch, weights, data, uas, tmp_path):
    rates = ("--uas", uas, "--adapter-lr", 0)
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 2, *rates)
    after = load_file(checkpoint_folders(tmp_path / "run")[0] / "trained.safetensors")
    before = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    assert all(after[name].abs().sum() == 0 for name in after if "lora_B" in name)
    assert not torch.equal(after["vokens.output"], before["vokens.output"])


def test_packed_goes_over_stage_1(monkeypatch, weights, data, uas, tmp_path, capsys):
    """With the mapper frozen, stage 2's packed file holds rows and LoRA alone, and loads as if it held everything."""
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 2, "--uas", uas, "--freeze-mapper")
    checkpoint, folder = checkpoint_folders(tmp_path / "run")[0] / "trained.safetensors", tmp_path / "w" / "minigpt5"
    shutil.copytree(weights, tmp_path / "w")
    folder.mkdir(exist_ok=True)
    for source, name in ((checkpoint_folders(uas)[0] / "trained.safetensors", "uas"), (checkpoint, "mls-story")):
        call_weights("pack", source, "--out", folder / f"{name}.safetensors")
    before = (folder / "uas.safetensors").read_bytes()
    for source, target in ((checkpoint, folder / "uas.safetensors"), (checkpoint, checkpoint)):
        with pytest.raises(WeightsError, match="the source itself, or stage 1's name for a file of stage 2"):
            call_weights("pack", source, "--out", target)
    assert (folder / "uas.safetensors").read_bytes() == before and load_file(checkpoint)
    held = load_file(folder / "mls-story.safetensors")
    assert set(held) == {name for name in load_file(checkpoint) if "lora_" in name or name.startswith("vokens.")}
    model = load_minigpt5(tmp_path / "w", folder / "mls-story.safetensors")
    expected = load_file(checkpoint)
    assert all(torch.equal(p, expected[n].half().float()) for n, p in model.trained_parameters().items())
    call_weights("check", tmp_path / "w")
    (folder / "uas.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"uas\.safetensors: no such file"):
        load_minigpt5(tmp_path / "w", folder / "mls-story.safetensors")


@pytest.mark.parametrize("adapter", [(), ("--prefix",)])
def test_resume_is_exact(monkeypatch, weights, data, uas, tmp_path, capsys, adapter):
    """Stopped after 2 of 4 steps, with LoRA's dropout, accumulation and a worker: the same as without the stop."""
    arguments = ("--uas", uas, "--steps", 4, "--accumulate", 2, "--save-every", 2, *adapter)
    whole = train(monkeypatch, weights, data, tmp_path / "whole", *arguments)
    save = trainer_run.save_checkpoint

    def save_then_stop(out, *rest):
        save(out, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_run, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, weights, data, tmp_path / "parts", *arguments)
    monkeypatch.setattr(trainer_run, "save_checkpoint", save)
    parts = train(monkeypatch, weights, data, tmp_path / "parts", *arguments, "--resume", "--workers", 1)
    assert "resumed from step 2" in capsys.readouterr().out
    losses = [[(r["step"], r["loss"], r["text_loss"], r.get("ldm_loss")) for r in log] for log in (whole, parts)]
    assert losses[0] == losses[1] and len(whole) == 4
    ours, expected = (
        load_file(checkpoint_folders(tmp_path / run)[0] / "trained.safetensors") for run in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert any(name.startswith("prefix_encoder.") for name in ours) == bool(adapter)
    model = load_minigpt5(weights, checkpoint_folders(tmp_path / "parts")[0] / "trained.safetensors")
    assert bool(model.prefix) == bool(adapter) and bool(model.lora) != bool(adapter)
    assert all(torch.equal(p, expected[name]) for name, p in model.trained_parameters().items())


def test_tasks_and_switches(monkeypatch, weights, data, tmp_path):
    """Without stage 1; a text task has no picture loss; the switches of stage 1."""
    only_text = ("--tasks", "text", "--text-weight", 0.5)
    text = train(monkeypatch, weights, data / "stories.tar", tmp_path / "text", "--steps", 2, *only_text)
    assert all("ldm_loss" not in r and r["loss"] == pytest.approx(0.5 * r["text_loss"]) for r in text)
    switches = ("--no-cfg", "--min-snr-gamma", 0, "--vokens", 4, "--tasks", "text+image", "image")
    both = train(monkeypatch, weights, data / "stories.tar", tmp_path / "both", "--steps", 2, *switches)
    assert all(r["loss"] == pytest.approx(0.01 * r["text_loss"] + r["ldm_loss"]) for r in both)
    bare = train(monkeypatch, weights, data / "stories.tar", tmp_path / "bare", "--steps", 1, "--no-ldm")
    assert "ldm_loss" not in bare[0]


def test_words_only(monkeypatch, weights, data, tmp_path, capsys):
    """The paper's fine-tuned MiniGPT-4: it learns the words of the step that it is asked for, whose picture is neither
    answered nor read; those before it are read. Nothing of the mapper trains."""
    batches, losses = noting(monkeypatch, train_mls.StoryData, "collate"), noting(monkeypatch, MiniGPT5, "losses")
    options = ("--words-only", "--tasks", "text+image", "--no-uas", "--lora-rank", 2)
    for name in ("stories", "dialogues"):
        log = train(monkeypatch, weights, data / f"{name}.tar", tmp_path / name, "--steps", 2, *options)
        assert all("ldm_loss" not in record and record["text_loss"] > 0 for record in log)
    stories, dialogues = (
        [(sample["source"], sample["target"]) for (_, samples), _ in part for sample in samples]
        for part in (batches[:2], batches[2:])
    )
    assert dialogues and not any("[IMG" in target for _, target in stories + dialogues)
    assert all(len(target) > 8 and target.endswith(" ###") and target[:-4] not in source for source, target in stories)
    assert all(inputs["inputs"] is not None for _, inputs in losses[:2])
    places = sum(source.count("<ImageHere>") for source, _ in stories)
    assert places == sum(len(inputs["inputs"]) for _, inputs in losses[:2])
    trained = load_file(checkpoint_folders(tmp_path / "stories")[0] / "trained.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    training = ("--weights", weights, "--data", data / "stories.tar", "--out", tmp_path / "no", "--words-only")
    fails(train_mls.main, monkeypatch, capsys, "--words-only leaves nothing of the task image", *training)


def test_words_first(monkeypatch, weights, uas, tmp_path, capsys):
    """LoRA learns to describe; vokens and mapper stay stage 1's, and what is described is drawn without LoRA."""
    turns = [{"text": "a boat"}, {"text": "(a boat that is small)"}]
    (tmp_path / "wishes.jsonl").write_text(json.dumps({"kind": "dialog", "turns": turns}) + "\n")
    batches, options = noting(monkeypatch, train_mls.StoryData, "collate"), ("--words-first", "--adapter-lr", 1)
    train(monkeypatch, weights, tmp_path / "wishes.jsonl", tmp_path / "run", "--steps", 2, "--uas", uas, *options)
    ((_, (read, *_)), _) = batches[0]
    assert read["source"] == prompts.dialog_source([Turn("a boat")], 1, prompts.WORDS_FIRST_SYSTEM)
    assert read["target"] == "(a boat that is small) ###"
    checkpoint = checkpoint_folders(tmp_path / "run")[0] / "trained.safetensors"
    before, after = load_file(checkpoint_folders(uas)[0] / "trained.safetensors"), load_file(checkpoint)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(tensor.abs().max() > 0.1 for name, tensor in after.items() if "lora_B" in name)
    tuned, plain = (load_minigpt5(weights, path, read_pictures=False).eval() for path in (checkpoint, None))
    load_trained(plain, checkpoint_folders(uas)[0] / "trained.safetensors")
    assert tuned.lora_for_words and not plain.lora_for_words
    ids = [generation.prompt_ids(plain, "a boat that is small")]
    said, alone = [["(a boat that is small)"]], generation.Sampling(steps=2, sampler="ddim")
    forced = generation.Sampling(steps=2, sampler="ddim", force_image=True, temperature=0, max_new_tokens=1)
    ((expected,),) = generation.answer(plain, ids, [[]], forced, [torch.Generator().manual_seed(0)])
    ((with_lora,),) = generation.answer(tuned, ids, [[]], forced, [torch.Generator().manual_seed(0)])
    ((drawn,),) = generation.paint_described(tuned, said, alone, [torch.Generator().manual_seed(0)], None)
    assert drawn.tobytes() == expected.tobytes() != with_lora.tobytes()
    training = ("--weights", weights, "--data", tmp_path / "wishes.jsonl", "--out", tmp_path / "no", "--words-first")
    fails(train_mls.main, monkeypatch, capsys, "--words-first trains LoRA, not a prefix", *training, "--prefix")


def test_words_first_reads_pictures(monkeypatch, weights, tmp_path, capsys):
    """A picture that somebody shows is read; without an image encoder, as beside SmolLM2, that is an error."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    turns = [{"text": "what is this?", "images": ["a.png"]}, {"text": "(a boat that is small)"}]
    (tmp_path / "wishes.jsonl").write_text(json.dumps({"kind": "dialog", "turns": turns}) + "\n")
    read, options = noting(monkeypatch, MiniGPT5, "losses"), ("--words-first", "--no-uas", "--steps", 1)
    train(monkeypatch, weights, tmp_path / "wishes.jsonl", tmp_path / "run", *options)
    assert all(len(inputs["inputs"]) == len(batch.ids) for (_, batch, *_), inputs in read)
    blind = shutil.copytree(weights, tmp_path / "blind", ignore=shutil.ignore_patterns("blip2"))
    training = ("--weights", blind, "--data", tmp_path / "wishes.jsonl", "--out", tmp_path / "no", "--workers", 0)
    reason = "no usable sample in .*: .* picture to be read, and no image encoder"
    fails(train_mls.main, monkeypatch, capsys, reason, *training, *options, "--batch-size", 2)


def test_switches_reach_data_and_losses(monkeypatch, weights, data, tmp_path):
    opened, losses = noting(monkeypatch, train_mls, "StoryData"), noting(monkeypatch, MiniGPT5, "losses")
    noise = noting(monkeypatch, MiniGPT5, "sample_noise")
    switches = ("--no-cfg", "--min-snr-gamma", 0, "--blind-history", 0.25, "--tasks", "image")
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 1, *switches)
    assert [options["blind"] for _, options in opened] == [0.25]
    assert [drop_rate for (_, _, _, drop_rate), _ in noise] == [0]
    assert [options["min_snr_gamma"] for _, options in losses] == [0]


def test_mapper_rests_without_a_picture_loss(monkeypatch, weights, data, tmp_path):
    """No loss reaches it; weight decay alone would move it."""
    options = ("--steps", 2, "--save-every", 1, "--tasks", "image", "--no-ldm")
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", *options)
    after, before = (load_file(path / "trained.safetensors") for path in checkpoint_folders(tmp_path / "run"))
    mapper = {name for name in before if not name.startswith("vokens.") and "lora_" not in name}
    assert mapper and all(torch.equal(before[name], after[name]) for name in mapper)


def test_overfits_a_story(monkeypatch, weights, tmp_path):
    write_stories(tmp_path / "one.tar", 1, 3, "train")
    steps = ("--steps", 150, "--sample-every", 150, "--log-every", 10)
    arguments = ("--tasks", "text", "text+image", "--lr", 1e-2)
    log = train(monkeypatch, weights, tmp_path / "one.tar", tmp_path / "run", *steps, *arguments)
    print(f"text_loss {log[0]['text_loss']:.3f} over steps 1-10, {log[-1]['text_loss']:.3f} over steps 141-150")
    assert log[-1]["text_loss"] < 0.92 * log[0]["text_loss"]
    for name in ("losses.png", "samples.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert len(image.getcolors(1 << 20)) > 10


def ask(monkeypatch, weights, out, *arguments) -> list[dict]:
    call(sample.main, monkeypatch, "--weights", weights, "--out", out, "--steps", 2, "--max-new-tokens", 6, *arguments)
    return json.loads((out / "answer.json").read_text())["segments"]


def test_story(monkeypatch, weights, data, uas, tmp_path):
    """Three answers: a picture for the first sentence, then twice text and picture, each step reading those before."""
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "run", "--steps", 1, "--uas", uas)
    arguments = ("--checkpoint", tmp_path / "run", "--prompt", "a kite [IMG0]", "--turns", 3, "--force-image")
    segments = ask(monkeypatch, weights, tmp_path / "out", *arguments)
    assert segments[0] == {"text": "a kite [IMG0]", "from": "you"} and segments[1] == {"image": "0.png"}
    assert sum("image" in segment for segment in segments) >= 3
    with Image.open(tmp_path / "out/storyboard.png") as image:
        assert image.width > 3 * 192
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("data:image/png;base64,") == sum("image" in segment for segment in segments)
    assert "a kite [IMG0]" in page and "http" not in page
    again = ask(monkeypatch, weights, tmp_path / "again", *arguments)
    assert again == segments


def test_requests_of_a_story(monkeypatch, weights, tmp_path):
    """A picture for its first sentence, whatever the model would say, then what happens next."""
    heard, forced, picture = [], [], Image.new("RGB", (32, 32))

    def answer(model, prompts, pictures, sampling, generators, watch):
        heard.append(prompts[0])
        forced.append(sampling.force_image)
        return [["so", picture]]

    for module in (generation, sample):
        monkeypatch.setattr(module, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", answer)
    ask(monkeypatch, weights, tmp_path, "--prompt", "a kite", "--turns", 2)
    first, second = heard
    assert "scene description: a kite" in first and "What should happen then?" in second
    assert forced == [True, False]


def test_long_story(monkeypatch, weights, tmp_path):
    """The oldest steps are left out where the positions would end, and what was told is kept after every step."""
    monkeypatch.setattr(sample, "room_after", lambda model, prompt: 100 - 20 * prompt.count("<ImageHere>"))
    heard, told = [], []

    def answer(model, prompts, pictures, *rest, watch):
        heard.append(len(pictures[0]))
        if len(heard) == 7:
            raise KeyboardInterrupt
        told.append(Image.new("RGB", (32, 32)))
        return [["it drifts.", told[-1]]]

    for module in (generation, sample):
        monkeypatch.setattr(module, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        ask(monkeypatch, weights, tmp_path, "--prompt", "a kite", "--turns", 9, "--max-new-tokens", 30)
    assert heard == [0, 1, 2, 3, 3, 3, 3]
    kept = json.loads((tmp_path / "answer.json").read_text())["segments"]
    assert sum("image" in segment for segment in kept) == 6


def test_adapters_of_unknown_layers_are_refused(weights, uas, tmp_path):
    tensors = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    tensors["model.layers.0.self_attn.z_proj.lora_A.weight"] = torch.zeros(2, 16)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors: no linear layer is named z_proj"):
        load_minigpt5(weights, tmp_path / "x.safetensors", read_pictures=False)


def test_checkpoints_of_stage_2_are_found(monkeypatch, weights, uas, tmp_path):
    shutil.copytree(weights, tmp_path / "w")
    (tmp_path / "w/minigpt5").mkdir(exist_ok=True)
    for name in ("uas", "mls-vist", "mls-mmdialog"):
        shutil.copy(checkpoint_folders(uas)[0] / "trained.safetensors", tmp_path / f"w/minigpt5/{name}.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    loaded, load = [], sample.load_minigpt5

    def note(weights, checkpoint, **options):
        loaded.append(checkpoint.stem)
        return load(weights, checkpoint, **options)

    monkeypatch.setattr(sample, "load_minigpt5", note)
    for options in ((), ("--image", tmp_path / "a.png"), ("--turns", 1)):
        ask(monkeypatch, tmp_path / "w", tmp_path / "out", "--prompt", "a kite", *options)
    shutil.copy(tmp_path / "w/minigpt5/uas.safetensors", tmp_path / "w/minigpt5/mls-story.safetensors")
    ask(monkeypatch, tmp_path / "w", tmp_path / "out", "--prompt", "a kite", "--turns", 1)
    assert loaded == ["uas", "mls-mmdialog", "mls-vist", "mls-story"]


def test_released_tables_are_kept(weights, uas, tmp_path):
    """Tables that a released checkpoint brings replace Vicuna's, and go on into checkpoints made from it."""
    first = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    metadata = {"format": "minigpt5", "stage": "uas", "vokens": "8"}
    plain = load_minigpt5(weights)
    head = torch.randn_like(plain.llama.lm_head.weight)
    save_file(first | {"lm_head.weight": head}, tmp_path / "uas.safetensors", metadata)
    model = load_minigpt5(weights, tmp_path / "uas.safetensors")
    model.add_adapters(lora={})
    save_trained(model, model.trained_parameters(), tmp_path / "run.safetensors", "mls")
    load_trained(model, tmp_path / "run.safetensors")  # as --resume does
    call_weights("pack", tmp_path / "run.safetensors", "--out", tmp_path / "mls-story.safetensors", "--dtype", "fp32")
    assert "lm_head.weight" not in load_file(tmp_path / "mls-story.safetensors")
    packed = load_minigpt5(weights, tmp_path / "mls-story.safetensors")
    for found in (model, load_minigpt5(weights, tmp_path / "run.safetensors"), packed):
        assert torch.equal(found.llama.model.embed_tokens.weight, plain.llama.model.embed_tokens.weight)
        assert torch.equal(found.llama.lm_head.weight, head) and list(found.tables) == ["lm_head.weight"]


def test_packed_keeps_tables_where_nothing_else_is_left_out(weights, uas, tmp_path):
    """Without them the file would still hold all that trains, and would not be laid over stage 1's."""
    first = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    head = torch.randn_like(load_minigpt5(weights).llama.lm_head.weight)
    save_file(first | {"lm_head.weight": head}, tmp_path / "uas.safetensors")
    changed = {name: tensor + 1 for name, tensor in first.items()}
    save_file(changed | {"lm_head.weight": head}, tmp_path / "run.safetensors")
    call_weights("pack", tmp_path / "run.safetensors", "--out", tmp_path / "mls-story.safetensors", "--dtype", "fp32")
    assert torch.equal(load_minigpt5(weights, tmp_path / "mls-story.safetensors").llama.lm_head.weight, head)


def test_long_rows_are_cut_where_the_model_ends(monkeypatch, weights, data, tmp_path):
    batches = noting(monkeypatch, train_mls, "collate")
    for most in (300, 100_000):
        train(monkeypatch, weights, data / "stories.tar", tmp_path / str(most), "--steps", 1, "--max-tokens", most)
    positions = load_minigpt5(weights, read_pictures=False).llama.config.max_position_embeddings
    assert [options["limit"] for _, options in batches] == [300, positions]


def test_chat(monkeypatch, weights, data, tmp_path, capsys):
    picture = tmp_path / "in.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(picture)
    lines = f"hello <script>\n/image nowhere.png\n{3000 * 'long '}\n/image {picture}\nwhat is this?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    segments = ask(monkeypatch, weights, tmp_path / "out", "--chat", "--force-image")
    assert [segment["text"] for segment in segments if "from" in segment and "text" in segment] == [
        "hello <script>",
        "what is this?",
    ]
    assert sum("image" in segment for segment in segments) >= 3  # the two answers' and the given one
    assert "&lt;script&gt;" in (tmp_path / "out/index.html").read_text()
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 2 and "nowhere.png: no such file" in complaints[0] and "the prompt has" in complaints[1]


def test_chat_forgets_what_has_no_answer(monkeypatch, weights, tmp_path):
    heard = []

    def answer(model, prompts, *rest, watch):
        heard.append(prompts[0])
        if "bad" in prompts[0]:
            raise ValueError("no room")
        return [["so it is"]]

    for module in (generation, sample):
        monkeypatch.setattr(module, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nbad\nbye\n"))
    ask(monkeypatch, weights, tmp_path, "--chat")
    assert ["bad" in prompt for prompt in heard] == [False, True, False]
    assert "hello" in heard[2] and heard[2].endswith("bye\n###Assistant:")


def test_chat_forgets_what_leaves_no_room(monkeypatch, weights, tmp_path):
    """A line that fills the positions is answered as far as they go; the next one is heard without it."""
    monkeypatch.setattr(sample, "room_after", lambda model, prompt: 100 - 50 * prompt.count("long"))
    heard = []
    for module in (generation, sample):
        monkeypatch.setattr(module, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", lambda _, asked, *rest, watch: [[heard.append(asked[0]) or "so it is"]])
    monkeypatch.setattr(sys, "stdin", io.StringIO("long long\nhello\nand now?\n"))
    ask(monkeypatch, weights, tmp_path, "--chat", "--max-new-tokens", 30)
    assert [(prompt.count("long"), prompt.count("so it is")) for prompt in heard] == [(2, 0), (0, 1), (0, 1)]
    assert "hello" in heard[2] and heard[1].endswith("###Assistant:")


def test_released_checkpoints_open_prompts_as_they_were_trained(monkeypatch, weights, uas, tmp_path):
    """By metadata, as `published convert` writes it; others have our own sentence."""
    tensors, heard = load_file(checkpoint_folders(uas)[0] / "trained.safetensors"), []
    metadata = {"format": "minigpt5", "stage": "mls", "vokens": "8"}
    save_file(tensors, tmp_path / "ours.safetensors", metadata)
    save_file(tensors, tmp_path / "released.safetensors", metadata | {"system": "Please go on."})
    for module in (generation, sample):
        monkeypatch.setattr(module, "prompt_ids", lambda model, prompt: prompt)
    monkeypatch.setattr(sample, "answer", lambda _, asked, *rest, watch: [[heard.append(asked[0]) or "on it goes"]])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for name, sentences in (
        ("ours", (prompts.STORY_SYSTEM.text, prompts.DIALOG_SYSTEM.text)),
        ("released", 2 * ("Please go on.",)),
    ):
        options = (
            "--prompt",
            "a kite",
            "--image",
            tmp_path / "a.png",
            "--checkpoint",
            tmp_path / f"{name}.safetensors",
        )
        ask(monkeypatch, weights, tmp_path / "out", *options, "--turns", 1)
        ask(monkeypatch, weights, tmp_path / "out", *options)
        for prompt, sentence in zip(heard[-2:], sentences, strict=True):
            assert prompt.startswith(f"{sentence}###Human:")


def test_form_of_the_released_chats(monkeypatch, weights, uas, tmp_path):
    """As the loader of March 2024 words a history: parts joined by single spaces, no line break, <s> first."""
    opening = "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    opening += "provide it to you. Please generate conversations with appropriate images."
    turns = [Turn("hi"), Turn("hello", (0,)), Turn("and now?")]
    parts = [opening, "###Human: hi", "###Assistant: hello", "<Img><ImageHere></Img>", "###Human: and now?"]
    parts += ["###Assistant:"]
    metadata = {"format": "minigpt5", "stage": "mls", "vokens": "8"}
    tensors = load_file(checkpoint_folders(uas)[0] / "trained.safetensors")
    save_file(tensors, tmp_path / "chat.safetensors", metadata | RELEASED_FORMS["mmdialog-2024"])
    model = load_minigpt5(weights, tmp_path / "chat.safetensors")
    assert prompts.dialog_source(turns, 3, model.system) == " ".join(parts)
    assert generation.prompt_ids(model, "a boat")[0] == 1

    save_file(tensors, tmp_path / "old.safetensors", metadata | RELEASED_FORMS["cc3m-2023"])
    model = load_minigpt5(weights, tmp_path / "old.safetensors")
    batch = collate(model.tokenizer, [("a boat", "[IMG0] ###")], 1)
    assert generation.prompt_ids(model, "a boat")[0] == batch.ids[0, 0] == model.tokenizer.eos_id == 2
    saved = tmp_path / "again.safetensors"
    save_trained(model, model.trained_parameters(), saved, "uas")  # what goes on from there has it, too
    assert load_minigpt5(weights, saved).tokenizer.bos_id == 2
    logits, picked = torch.zeros(1, model.tokenizer.vocabulary), []
    logits[0, 2] = 1.0  # says </s> at once: the first token is no word of the answer
    monkeypatch.setattr(type(model.vokens), "logits", lambda *_: logits)
    monkeypatch.setattr(
        generation, "pick_tokens", lambda _, said, *rest: picked.append(said.clone()) or logits.argmax(-1)
    )
    generation.say(model, [generation.prompt_ids(model, "a boat")], None, generation.Sampling(), [torch.Generator()])
    assert not picked[0].any()
    save_file(tensors, tmp_path / "bad.safetensors", metadata | {"first_token": "<b>"})
    with pytest.raises(ValueError, match="first_token '<b>' is no special token"):
        load_minigpt5(weights, tmp_path / "bad.safetensors")


def test_errors(monkeypatch, weights, data, uas, tmp_path, capsys):
    def training_fails(pattern, *arguments):
        base = ("--weights", weights, "--data", data / "stories.tar", "--out", tmp_path / "run", "--workers", 0)
        fails(train_mls.main, monkeypatch, capsys, pattern, *base, *arguments)

    training_fails("argument --tasks: invalid choice: 'song'", "--tasks", "song")
    assert not (tmp_path / "run").exists()  # refused before anything is drawn or written
    training_fails("neither a checkpoint nor", "--uas", tmp_path / "nothing")
    training_fails("--text-weight: must be at least 0", "--text-weight", -1)
    training_fails("no linear layer is named x_proj", "--lora-targets", "q_proj,x_proj")
    training_fails("no linear layer is named lm_head", "--lora-targets", "q_proj,lm_head")
    training_fails("--uas and --no-uas exclude each other", "--uas", uas, "--no-uas")
    training_fails("--lora-rank: must be from 1 to 1,024", "--lora-rank", 0)
    training_fails("--blind-history: must be from 0 to 1", "--blind-history", 1.5)
    training_fails("no such tar", "--data", tmp_path / "nothing.tar")
    training_fails("no usable", "--data", write_tar(tmp_path / "pairs.tar", pairs(3)))
    train(monkeypatch, weights, data / "stories.tar", tmp_path / "first", "--steps", 1)
    training_fails("has an adapter already", "--uas", tmp_path / "first")
    training_fails("holds a run already", "--out", tmp_path / "first")
