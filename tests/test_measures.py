"""The paper's measures that are not the usual ones: per story, MMDialog's, the released package's; and who wins."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from helpers import assert_close

from evaluation import __main__ as evaluate
from evaluation import cases, metrics, wins
from evaluation.comparisons import METRICS, MetricSetup, Outcome
from evaluation.scorers import Unavailable
from miniature import world
from miniature.facts import Picture, Thing
from miniature.judge import Judge
from miniature.pairing import Pairing
from prompts import Turn
from published.loading import save_safetensors


def outcome(group: str, wanted: list, came: list, words: str = "", segments: list | None = None) -> Outcome:
    task = "reply" if words else "image"
    case = cases.Case(f"{group}.0", group, task, [], Turn(words or "text", tuple(range(len(wanted)))), None, None)
    return Outcome(case, segments or list(range(len(came))), wanted, came)


# ---- pictures


@pytest.mark.parametrize("width", [4, 60])
def test_distance_per_story(width):
    """Stories of five steps, one picture each: the mean over stories of numpy's and scipy's distance. In one story a
    picture is missing, and a blank stands for it; one has a single picture and does not count."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    rng, outcomes, expected = np.random.default_rng(0), [], []
    blank = torch.from_numpy(rng.normal(size=width))
    for story in range(6):
        true, drawn = rng.normal(size=(2, 5 if story else 1, width)) + np.array([0.0, 0.3])[:, None, None]
        for step, (one, other) in enumerate(zip(true, drawn, strict=True)):
            missing = story == 3 and step == 2
            came = [] if missing else [{"inception": torch.from_numpy(other)}]
            outcomes.append(outcome(f"story {story}", [{"inception": torch.from_numpy(one)}], came))
            drawn[step] = blank.numpy() if missing else other
        if story:
            a, b = np.cov(true, rowvar=False), np.cov(drawn, rowvar=False)
            roots = np.sqrt(np.clip(linalg.eigvals(a @ b).real, 0, None)).sum()
            expected.append(np.square(true.mean(0) - drawn.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * roots)
    random.Random(0).shuffle(outcomes)
    ours = METRICS["fid-story"].compute(MetricSetup({}, {"inception": blank}), outcomes)
    print(f"FID, mean over stories: {ours:.6f}, scipy {np.mean(expected):.6f}")
    assert ours == pytest.approx(np.mean(expected), rel=1e-6)
    whole = METRICS["fid"].compute(MetricSetup({}, {"inception": blank}), outcomes)
    assert ours > 1.5 * whole  # of five pictures it is far larger than of all
    with pytest.raises(Unavailable, match="no story"):
        METRICS["fid-story"].compute(MetricSetup({}, {}), [o for o in outcomes if o.case.group == "story 0"])


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_in_parts(splits):
    """As many parts as asked for, however few the pictures; against scipy's entropy over the same parts."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    p = torch.randn(47, 7, generator=torch.Generator().manual_seed(1)).double().softmax(-1).numpy()
    order = torch.randperm(47, generator=torch.Generator().manual_seed(0)).numpy()
    parts = np.array_split(p[order], splits)
    theirs = np.mean([np.exp(stats.entropy(part, part.mean(0)[None], axis=1).mean()) for part in parts])
    assert metrics.inception_score(torch.from_numpy(p), splits) == pytest.approx(theirs, rel=1e-12)
    outcomes = [outcome("a", [], [{"inception classes": torch.from_numpy(row)} for row in p])]
    assert METRICS["is"].compute(MetricSetup({}, {}, splits), outcomes) == pytest.approx(theirs, rel=1e-12)
    with pytest.raises(ValueError, match="9 pictures for 10 parts"):
        metrics.inception_score(torch.from_numpy(p[:9]), 10)


# ---- words

TOLD = ("a", "The", "the", "boat", "red.", "sea", ".", "night", ".. ", "and", "x,", "it.", "Boat")


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(TOLD, k=rng.randint(1, 20))).strip() for _ in range(2 * count))
    return [text for text in texts if text.strip(". ")][:count]


def test_rouge_of_the_released_package():
    """Whose F1 has 1e-8 in its denominator."""
    rouge = pytest.importorskip("rouge", reason="rouge is not installed: pip install rouge==1.0.1").Rouge()
    largest, differs = 0, 0
    for answer, reference in zip(sentences(1, 500), sentences(2, 500), strict=True):
        theirs, ours = (
            rouge.get_scores(answer, reference)[0]["rouge-l"]["f"],
            metrics.rouge_l_released(answer, reference),
        )
        largest = max(largest, abs(theirs - ours))
        differs += abs(ours - metrics.rouge_l(metrics.words(answer), metrics.words(reference))) > 0.01
    print(f"ROUGE-L, released package: largest difference {largest:.1e}")
    assert largest < 1e-8 and differs > 250


def test_rouge_of_the_released_package_by_hand():
    """Words "The boat sails" and "night" against "The boat" and "sea": of 4 and 3 words 2 are shared."""
    assert metrics.rouge_l_released("The boat sails. night", "The boat. sea") == pytest.approx(2 * 2 / 7)
    assert metrics.rouge_l_released("the boat", "The Boat") == metrics.rouge_l_released("", "a") == 0
    outcomes = [outcome("a", [], [], "The boat. sea", ["The boat sails.", "night"]), outcome("b", [], [], "a", [""])]
    assert METRICS["rouge-l-released"].compute(MetricSetup({}, {}), outcomes) == pytest.approx(2 / 7)


@pytest.mark.parametrize("order", [1, 2])
def test_bleu_of_mmdialog(order):
    """The mean over replies of nltk's BLEU of single sentences: of the first text of each, 0 of one without text."""
    bleu = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed").sentence_bleu
    rng, outcomes, expected = random.Random(3), [], []
    for number in range(40):
        said, known = (rng.choices(["a", "red", "boat", "sea"], k=rng.randint(3, 9)) for _ in range(2))
        after = ["more words"] if number % 3 == 0 else []
        outcomes.append(outcome(f"dialogue {number // 4}", [], [], " ".join(known), [" ".join(said), *after]))
        expected.append(bleu([known], said, (1 / order,) * order))
    outcomes.append(outcome("silent", [], [], "a red boat", [0]))
    ours = METRICS[f"bleu-{order}-mmdialog"].compute(MetricSetup({}, {}), outcomes)
    assert ours == pytest.approx(sum(expected) / 41, abs=1e-9)
    assert abs(ours - METRICS[f"bleu-{order}"].compute(MetricSetup({}, {}), outcomes)) > 0.01


# ---- who wins


def test_wins():
    """By hand: the first case is A's, the second B's, the third shared by A and C, the fourth nobody's."""
    rows = [[(2, 0.1), (1, 0.9), (3, 0.5), ()], [(1, 0.9), (1, 0.95), (), ()], [(), (1, 0.2), (3, 0.5), ()]]
    assert wins.count_wins(rows) == pytest.approx([1.5 / 4, 1 / 4, 0.5 / 4])


def test_wins_are_a_count_of_maxima():
    """Without ties they are numpy's count of the largest in each column."""
    scores = np.random.default_rng(0).normal(size=(5, 200))
    rows = [[(value,) for value in row] for row in scores]
    assert wins.count_wins(rows) == pytest.approx(np.bincount(scores.argmax(0), minlength=5) / 200)


def test_right_facts_come_first():
    """More right facts before a higher score; a fact that the caption leaves open does not count."""
    facts = Picture("sea", None, (Thing("boat", "red"),))
    case = cases.Case("a", "a", "caption", [], Turn("a red boat at sea", (0,)), facts, None)
    text, near, far = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]), torch.tensor([0.0, 1.0])
    right, wrong = (
        Picture("sea", "day", (Thing("boat", "red", "big"),)),
        Picture("sea", "day", (Thing("boat", "blue"),)),
    )

    def told(seen: Picture, feature: torch.Tensor) -> tuple:
        return wins.preference(case, text, {"facts": seen, "pairing": feature})

    assert told(right, far)[0] == 4 and told(wrong, near)[0] == 3  # scene, number, kind, colour
    assert told(right, near) > told(right, far) > told(wrong, near)
    assert wins.preference(case, text, {"hps": far, "facts": right}) == (0.0,)


def test_wins_of_folders(monkeypatch, tmp_path, capsys):
    """Three systems over pairs: the true pictures, those of the next pair, and one that answers without pictures. The
    judge is made to see the true facts of each picture."""
    torch.manual_seed(0)
    save_safetensors(Judge().state_dict(), tmp_path / "judge.safetensors")
    save_safetensors(Pairing().state_dict(), tmp_path / "pairing.safetensors")
    tar = tmp_path / "pairs.tar"
    world.write_pairs(tar, 20, 1, "held-out")
    pairs, _ = cases.read_cases([str(tar)], "image", False)
    true = [cases.pictures_of(case, case.pictures)[0] for case in pairs]
    known = {picture.tobytes(): case.facts for picture, case in zip(true, pairs, strict=True)}
    for name, pictures in (("true", true), ("next", true[1:] + true[:1]), ("silent", [None] * 20)):
        cases.open_answers(tmp_path / name, {"task": "caption"}, [str(tar)])
        for case, picture in zip(pairs, pictures, strict=True):
            cases.write_answer(tmp_path / name, case.key, [picture] if picture else ["no"])

    def network_outputs(networks: dict, pictures: list) -> list[dict]:
        return [{"facts": known[picture.tobytes()], "pairing": torch.ones(128)} for picture in pictures]

    monkeypatch.setattr(wins, "network_outputs", network_outputs)
    folders = [str(tmp_path / name) for name in ("next", "true", "silent")]
    monkeypatch.setattr(
        sys, "argv", ["evaluation", "wins", *folders, "--weights", str(tmp_path), "--out", str(tmp_path / "wins.json")]
    )
    evaluate.main()
    record = json.loads((tmp_path / "wins.json").read_text())
    assert record["cases"] == 20 and list(record["wins"]) == folders and record["by"] == "facts"
    assert record["wins"][folders[1]] > 0.95 and record["wins"][folders[2]] == 0
    assert sum(record["wins"].values()) == pytest.approx(1)
    assert f"| {folders[1]} | " in capsys.readouterr().out


def test_hps_is_the_cosine_with_the_text():
    """Through a network that sees fixed directions: the same arithmetic as of CLIP-T."""
    directions = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    case = cases.Case("a", "a", "caption", [], Turn("text", (0,)), None, None)
    found = torch.tensor([wins.preference(case, directions[0], {"hps": d})[0] for d in directions])
    assert_close(found, directions @ directions[0], 1e-6, "cosines")
