"""Pre-training of the miniature: every part trains, stops, goes on exactly, and is written in the published layout."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.tokenizer import Tokenizer
from experiments import pretrain
from experiments.decoder import DecoderRecipe
from experiments.recipes import documents, painter, speaker
from experiments.recipes import judge as judging
from experiments.recipes.painter import TEXT_SIZES, UNET_SIZES, VAE_SIZES
from experiments.recipes.recipe import Setup, cached, to_pixels
from experiments.recipes.speaker import LANGUAGE_SIZES, QFORMER_SIZES, VISION_SIZES
from llama import Llama
from mapper import VokenMapper
from miniature import judge, world
from miniature.facts import COLOURS, KINDS, PLACES, SCENES, SIZES, TIMES, Picture, Thing, random_stream
from miniature.words import agrees, facts_in
from minigpt5 import Vokens
from prompts import WORDS_FIRST_SYSTEM
from published.clip_tokenizer import ClipTokenizer
from published.loading import WeightsError
from published.parts import load_image_encoder, load_llama, load_schedule, load_text_encoder, load_unet, load_vae
from qformer import ImageEncoder
from text_encoder import TextEncoder
from trainer.muon import Muon, orthogonal
from unet import UNet
from vae import VAE

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
VAE_FILE = "diffusion_pytorch_model.safetensors"
SMALLER = [
    (painter, "VAE_SIZES", {"block_out_channels": (8, 8, 16, 16)}),
    (painter, "UNET_SIZES", {"block_out_channels": (32, 32), "attention_head_dim": (2, 2)}),
    (painter, "TEXT_SIZES", {"num_hidden_layers": 1}),
    (speaker, "LANGUAGE_SIZES", {"num_hidden_layers": 1}),
    (speaker, "VISION_SIZES", {"num_hidden_layers": 1}),
    (speaker, "QFORMER_SIZES", {"num_hidden_layers": 2}),
]


def make(part, shop):
    """A part's recipe as the command makes it, with batches of four."""
    torch.manual_seed(shop.seed)
    recipe = pretrain.PARTS[part](shop)
    recipe.batch_size = 4
    return recipe


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Every part, in a still smaller size, trained for two steps and written."""
    patch = pytest.MonkeyPatch()
    for module, name, changes in SMALLER:
        patch.setattr(module, name, replace(getattr(module, name), **changes))
    folder = tmp_path_factory.mktemp("miniature")
    shop = Setup(folder / "runs", folder / "weights", CPU, seed=3, pictures=24, tested=4)
    for part in pretrain.PARTS:
        recipe = make(part, shop)
        recipe.export(pretrain.train(recipe, shop, 1, last_step=2), shop.weights)
    yield shop
    patch.undo()


def states(recipe, averaged):
    return {**{f"now.{k}": v for k, v in recipe.model.state_dict().items()}, **averaged.state_dict()}


# ---- training


@pytest.mark.parametrize("part", pretrain.PARTS)
def test_goes_on_exactly(shop, tmp_path, part):
    """Two steps after the one of a stopped run equal three in one go, bit for bit."""
    whole, pieces = (Setup(tmp_path / name, shop.weights, CPU, 3, 24, tested=4) for name in ("whole", "pieces"))
    for other in (whole, pieces):
        shutil.copytree(shop.sets, other.sets)
    one = make(part, whole)
    expected = states(one, pretrain.train(one, whole, 1, last_step=3))
    pretrain.train(make(part, pieces), pieces, 1, last_step=1)
    torch.manual_seed(99)  # nothing may depend on it
    again = make(part, pieces)
    found = states(again, pretrain.train(again, pieces, 1, last_step=3))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (pieces.runs / part / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 3]
    assert not list(pieces.runs.rglob("*.tmp"))


@pytest.mark.parametrize("part", pretrain.PARTS)
def test_learns_one_batch(shop, tmp_path, part):
    recipe = make(part, Setup(tmp_path, shop.weights, CPU, 3, 24, tested=4))
    optimizers = pretrain.optimizers_of(recipe)
    batch, losses = recipe.batch(torch.Generator().manual_seed(0)), []
    for _ in range(16):
        loss = recipe.losses(recipe.model, *batch)["loss"]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{part}: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.9 * losses[0]


def test_stop_signal_saves(shop, tmp_path, monkeypatch):
    recipe = make("judge", shop := Setup(tmp_path, shop.weights, CPU, 3, 24, tested=4))
    batch = recipe.batch

    def stop_in_second_step(generator):
        import os
        import signal

        if (tmp_path / "judge" / "second").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "judge" / "second").touch()
        return batch(generator)

    monkeypatch.setattr(recipe, "batch", stop_in_second_step)
    assert pretrain.train(recipe, shop, 1, last_step=9) is None
    state = torch.load(tmp_path / "judge" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and state["seconds"] > 0


def test_budget_counts_over_runs(shop):
    """No time left: nothing is trained, and the averaged weights are what was saved."""
    recipe = make("judge", shop)
    averaged = pretrain.train(recipe, shop, 0.0)
    state = torch.load(shop.runs / "judge" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.equal(tensor, state["averaged"][name]) for name, tensor in averaged.state_dict().items())


def test_foreign_checkpoint_is_refused(shop, tmp_path):
    other = Setup(tmp_path, shop.weights, CPU, 3, 24, tested=4)
    (tmp_path / "judge").mkdir()
    shutil.copyfile(shop.runs / "vae" / "checkpoint.pt", tmp_path / "judge" / "checkpoint.pt")
    with pytest.raises(ValueError, match="does not fit this part") as error:
        pretrain.train(make("judge", other), other, 1)
    assert "\n" not in str(error.value)


def test_muon_makes_singular_values_equal():
    matrices = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    print(f"singular values from {values.min():.2f} to {values.max():.2f}")
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.allclose(orthogonal(matrices.mT), orthogonal(matrices).mT, atol=1e-5)


def test_muon_looks_ahead():
    """Nesterov's momentum, 0.9; a matrix of 8 x 2 moves by (8 / 2)^0.5 times the rate."""
    matrix = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer, average, expected = Muon([matrix], 0.1), torch.zeros(8, 2), torch.zeros(8, 2)
    for gradient in torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0)):
        matrix.grad = gradient.clone()
        optimizer.step()
        average = 0.9 * average + gradient
        expected -= 0.2 * orthogonal((gradient + 0.9 * average)[None])[0]
    assert torch.allclose(matrix, expected, atol=1e-6)


def test_rate_and_average():
    factors = [pretrain.rate_factor(step, 1000) for step in (0, 49, 99, 999, 3999)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5])
    modules, averaged = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step in range(2000):  # of 0, 1, 2, ... the mean over about the last MEMORY-th of the steps
        torch.nn.init.constant_(modules.weight, step)
        pretrain.average(averaged, modules, step)
    assert 0.88 < averaged.weight.item() / 2000 < 0.93


# ---- sets


def test_sets_do_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.recipes.recipe.CHUNK", 4)
    shops = [Setup(tmp_path / name, tmp_path, CPU, 1, 6, workers) for name, workers in (("a", 1), ("b", 2))]
    one, two = map(Setup.training_pictures, shops)
    assert torch.equal(one, two) and one.shape == (6, 64, 64, 3)
    assert (one[4].numpy() == np.asarray(world.draw(*world.sample_pair(1, 4)[::2]))).all()

    def fails(rows):
        raise RuntimeError("no")

    assert torch.equal(cached(shops[0].sets / "pictures-train-1-6.npy", 6, fails, 1), one)  # made once
    with pytest.raises(RuntimeError):
        cached(tmp_path / "x.npy", 6, fails, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_documents_fit_their_rows(shop):
    path = speaker.TOKENIZER
    tokenizer = Tokenizer(path)
    for i in range(300):
        row = documents.document(0, i, "train")
        shown = row.inputs + row.outputs
        assert row.source.count("<ImageHere>") == len(row.inputs) and row.target.count("<ImageHere>") == len(
            row.outputs
        )
        assert row.target.endswith(" ###") and not row.source.endswith(" ")
        for picture in shown:
            assert len(tokenizer.pieces.encode(documents.picture_words(picture))) == documents.WORDS
        rng = np.random.default_rng(i)
        for picture in row.outputs:
            words = documents.shuffled_words(picture, rng).split()
            assert sorted(words) == sorted(documents.picture_words(picture).replace("nothing", "").split())
            together = [sorted(words[k : k + 4]) for k in range(len(words) - 3)]
            things = [sorted([t.size, t.colour, t.kind, t.place]) for t in picture.things]
            assert len(things) == 1 or all(thing in together for thing in things), words
        ids, weights = map(list, zip(*documents.encode(tokenizer, row, rng), strict=True))
        if row.outputs:  # what counts most is the words of the answer's picture
            heavy = [i for i, weight in zip(ids, weights, strict=True) if weight == documents.PICTURE_WEIGHT]
            assert set(tokenizer.decode(heavy).split()) <= {*SCENES, *TIMES, *KINDS, *COLOURS, *SIZES, *PLACES}
        elif row.source.startswith(WORDS_FIRST_SYSTEM.text):  # the whole answer, or what is told of a picture
            assert weights[-1] == (documents.TOLD_WEIGHT if row.inputs else documents.ANSWER_WEIGHT)
        assert tokenizer.unk_id not in ids and tokenizer.image_id not in ids and len(ids) < documents.LENGTH
        assert tokenizer.ends(ids)
    rows = [documents.language_ids(path, 0, "train", i) for i in range(20)]
    for ids, weights in rows:
        assert len(ids) == len(weights) == documents.LENGTH
        assert ids[0] == tokenizer.bos_id and ids.max() < LANGUAGE_SIZES.vocab_size
    weights = {*np.concatenate(rows, axis=1)[1]}
    assert weights == {1, documents.TOLD_WEIGHT, documents.ANSWER_WEIGHT, documents.PICTURE_WEIGHT}


def test_answers_to_questions(shop):
    path = speaker.TOKENIZER
    tokenizer = Tokenizer(path)
    for i in range(50):
        row, picture = documents.answer_ids(path, 0, i), world.sample_pair(0, i)[0]
        (start, end), words, ids = row[:2], row[2:12], row[12:].tolist()
        assert tokenizer.decode(words.tolist()) == documents.picture_words(picture)
        assert ids[:start].count(tokenizer.image_id) == documents.WORDS
        assert tokenizer.decode(ids[:start]).endswith("###Assistant:") and ids[end - 1] == tokenizer.eos_id
        answer = speaker.answer_text(tokenizer, ids[start:end])
        assert speaker.described([answer], [picture]) == 1.0, answer
        other = world.sample_pair(0, i + 1)[0]
        assert speaker.described([answer], [other]) == 0.0 or other == picture


def test_captions_fit_the_text_encoder(shop):
    tokenizer = ClipTokenizer(shop.weights / "stable-diffusion" / "tokenizer")
    whole = 0
    for i in range(500):
        picture, text, _ = world.sample_pair(9, i)
        ids = tokenizer.encode(text)
        whole += len(ids) == len(text.split()) <= tokenizer.length - 2
        named = facts_in(painter.full_caption(picture, random_stream(0, i)))
        assert all(thing.place and thing.size for thing in named.things) and agrees(named, picture)
    print(f"{whole} of 500 captions have a token a word and are not cut")
    assert whole > 490


def test_the_unet_reads_with_its_text_encoders_tokenizer(shop):
    """With another seed, too, whose captions would make another one."""
    recipe = painter.DiffusionRecipe(replace(shop, seed=4))
    folder = shop.weights / "stable-diffusion" / "tokenizer"
    assert recipe.texts[0].tolist() == painter.caption_ids(folder, 4, 0).tolist()
    assert recipe.texts.max() < recipe.text_encoder.text_model.embeddings.token_embedding.num_embeddings


# ---- what is written


def test_shipped_size():
    """All that ships in 16 bit, with mapper and voken rows, on the meta device."""
    with torch.device("meta"):
        width, context = LANGUAGE_SIZES.hidden_size, UNET_SIZES.cross_attention_dim
        llama = Llama(LANGUAGE_SIZES)
        parts = [
            *(VAE(VAE_SIZES), UNet(UNET_SIZES), TextEncoder(replace(TEXT_SIZES, vocab_size=1100))),
            *(llama, ImageEncoder(VISION_SIZES, QFORMER_SIZES, width)),
            *(judge.Judge(), VokenMapper(width, context, TEXT_SIZES.max_position_embeddings)),
            Vokens(llama, 8, LANGUAGE_SIZES.vocab_size),
        ]
    sizes = {type(part).__name__: sum(p.numel() for p in part.parameters()) for part in parts}
    print(f"{sizes}: {2e-6 * sum(sizes.values()):.1f} MB")
    assert 2 * sum(sizes.values()) < 30e6


def test_exports_load(shop):
    weights = shop.weights
    sd = weights / "stable-diffusion"
    vae, unet, schedule = load_vae(sd / "vae"), load_unet(sd / "unet"), load_schedule(sd / "scheduler")
    text, tokenizer = load_text_encoder(sd / "text_encoder"), ClipTokenizer(sd / "tokenizer")
    llama, encoder = load_llama(weights / "vicuna"), load_image_encoder(weights)
    assert asdict(vae.config) | {"scaling_factor": 1.0} == asdict(painter.VAE_SIZES) and vae.config.scaling_factor != 1
    assert unet.config == painter.UNET_SIZES and schedule.config == painter.SCHEDULE
    assert llama.config == speaker.LANGUAGE_SIZES
    for module in (unet, text, llama, encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert {p.dtype for p in vae.parameters()} == {torch.float32}  # never in float16
    judge.load_judge(weights / "judge.safetensors")
    ids, mask = tokenizer(["a small red boat"])
    assert ids.shape == (1, 32) and mask.sum() == 6
    assert not [p for p in weights.rglob("*") if p.name.endswith(".tmp")]


@torch.no_grad()
def test_latents_of_the_export(shop):
    """Their means deviate by about one, as the UNet's noise does; beside them is the posterior's deviation."""
    vae = load_vae(shop.weights / "stable-diffusion" / "vae", torch.float32)
    drawn = shop.training_pictures()
    mean, deviation = torch.from_numpy(painter.latent_block(vae, drawn, range(8))).float().unbind(1)
    print(f"deviation of the means {mean.std():.3f}")
    assert 0.9 < mean.std() < 1.1
    expected, logvar = vae.encode(to_pixels(drawn[:8]))
    scale = vae.config.scaling_factor
    assert torch.allclose(mean, scale * expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(deviation, scale * logvar.exp().sqrt(), rtol=1e-3, atol=1e-3)


def test_the_decoder_trains_alone(shop, tmp_path):
    """Latents stay as they are; pictures that are decoded from noisy ones come closer to what was drawn."""
    weights = tmp_path / "weights"
    shutil.copytree(shop.weights, weights)
    recipe = DecoderRecipe(setup := Setup(tmp_path / "runs", weights, CPU, 3, 24, tested=4))
    recipe.batch_size = 4
    batch = recipe.batch(torch.Generator().manual_seed(0))
    before = recipe.losses(recipe.model, *batch)["loss"].item()
    recipe.export(pretrain.train(recipe, setup, 60, last_step=30), weights)
    assert recipe.losses(recipe.model, *batch)["loss"] < 0.95 * before
    old, new = (load_file(folder / "stable-diffusion/vae" / VAE_FILE) for folder in (shop.weights, weights))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and changed == {"decoder", "post_quant_conv"}


def test_transformers_and_diffusers_load_the_exports(shop):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    sd = shop.weights / "stable-diffusion"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd, torch_dtype=torch.float32)
    picture = pipeline("a small red boat", num_inference_steps=2, height=64, width=64).images[0]
    assert picture.size == (64, 64)
    ours, theirs = ClipTokenizer(sd / "tokenizer"), pipeline.tokenizer
    texts = ["a small red boat on the left at sea by moonlight", "", "an unknownword!"]
    padded = theirs(texts, padding="max_length", truncation=True)
    assert padded["input_ids"] == ours(texts)[0].tolist()
    llama = transformers.LlamaForCausalLM.from_pretrained(shop.weights / "vicuna", torch_dtype=torch.float32)
    mine = load_llama(shop.weights / "vicuna", torch.float32)
    ids = torch.arange(20)[None]
    hidden = mine(mine.model.embed_tokens(ids))
    difference = (llama(ids).logits - mine.lm_head(hidden)).abs().max().item()
    blip2 = transformers.Blip2Config.from_pretrained(shop.weights / "blip2")
    assert blip2.vision_config.hidden_size == speaker.VISION_SIZES.hidden_size and blip2.num_query_tokens == 10
    print(f"language model: largest difference {difference:.1e}")
    assert difference < 1e-4


# ---- the judge


BOAT, KITE = Thing("boat", "red", "small", "left"), Thing("kite", "blue", "big", "right")


@pytest.mark.parametrize(
    "things, wrong",
    [
        ((BOAT, KITE), ""),
        ((KITE, BOAT), ""),
        ((BOAT,), "count kind colour size place all"),
        ((BOAT, KITE, KITE), "count kind colour size place all"),
        ((BOAT, Thing(None)), "kind colour size place all"),
        ((BOAT, Thing("kite", "blue", "small", "middle")), "size place all"),
        ((Thing("boat", "blue", "small", "left"), Thing("kite", "red", "big", "right")), "colour all"),
    ],
)
def test_right(things, wrong):
    wanted = Picture("sea", "night", (BOAT, KITE))
    found = judge.right(Picture("sea", "night", things), wanted)
    assert {name for name, fine in found.items() if not fine} == set(wrong.split())
    assert not judge.right(Picture("city", "night", things), wanted)["all"]


def test_right_asks_only_for_what_is_named():
    wanted = Picture(None, "night", (Thing("boat", "red"),))
    assert judge.right(Picture("sea", "night", (BOAT,)), wanted)["all"]
    assert not judge.right(Picture("sea", "day", (BOAT,)), wanted)["all"]


def test_labels_and_reading_agree():
    """Scores that are certain of the labels are read as the picture that the labels were made of."""
    pictures = [judging.any_picture(np.random.default_rng(i)) for i in range(300)]
    counts = [len(picture.things) for picture in pictures]
    assert set(counts) == {0, 1, 2, 3}

    def sure(labels):
        slots, whole = labels[:-3].reshape(6, 3), labels[-3:]
        parts = [np.eye(n)[np.maximum(slots[:, k], 0)] for k, n in enumerate(judge.SLOT_SIZES)]
        return np.concatenate(parts, 1), np.concatenate(
            [np.eye(n)[w] for n, w in zip(judge.WHOLE_SIZES, whole, strict=True)]
        )

    def seen(known):
        scores = tuple(torch.tensor(np.stack(x)) for x in zip(*map(sure, known), strict=True))
        return judge.read(lambda rows: scores, torch.zeros(len(known), 3, 64, 64))

    found = seen([judging.labels(picture) for picture in pictures[:200]])
    assert all(judge.right(a, b)["all"] for a, b in zip(found, pictures, strict=False))
    known = judging.labels(Picture("sea", "night", (BOAT,)))
    known[-1] = 2  # one thing in the slots, two by their number
    assert seen([known])[0].things == (BOAT, Thing(None))


def test_missing_judge_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"judge\.safetensors: no such file"):
        judge.load_judge(tmp_path / "judge.safetensors")


def test_blur_and_noise_keep_the_picture():
    rows = torch.from_numpy(np.stack([np.asarray(world.draw(*world.sample_pair(0, i)[::2])) for i in range(2)]))
    pixels = to_pixels(rows)
    assert torch.allclose(judging.worsen(pixels, 0.0, torch.zeros(())), pixels, atol=1e-5)
    blurred = judging.worsen(pixels, 1.0, torch.zeros(()))
    assert blurred.shape == pixels.shape and 0.01 < (blurred - pixels).abs().mean() < 0.2


# ---- command line


@pytest.mark.parametrize(
    "words, says",
    [
        ("--parts poems", "poems"),
        ("--minutes long", "invalid float"),
        ("--minutes nan", "finite"),
        ("--pictures 0", "at least 1"),
    ],
)
def test_wrong_arguments(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(words.split())
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_command_line(shop, tmp_path):
    """Nothing left to train: the checkpoint is exported. A later part without its earlier one says what is missing."""
    command = [sys.executable, str(ROOT / "experiments" / "pretrain.py"), "--device", "cpu", "--pictures", "24"]
    words = ["--seed", "3", "--parts", "judge", "--minutes", "0", "--out", str(shop.runs)]
    done = subprocess.run([*command, *words, "--weights", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "step 2" in done.stdout, done.stderr
    assert json.loads((tmp_path / "minigpt5" / "config.json").read_text())["train_uas"]["start_as"] == "<Img>"
    one, two = (folder / "judge.safetensors" for folder in (shop.weights, tmp_path))
    assert one.read_bytes() == two.read_bytes()
    untrained = ["--parts", "judge", "--minutes", "0", "--out", str(tmp_path / "new")]
    done = subprocess.run([*command, *untrained, "--weights", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "nothing is trained yet" in done.stderr
    assert one.read_bytes() == two.read_bytes()  # nor is anything written over
    words = ["--parts", "captioner", "--out", str(tmp_path / "runs")]
    done = subprocess.run([*command, *words, "--weights", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "config.json: no such file" in done.stderr and "Traceback" not in done.stderr
