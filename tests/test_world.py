"""The miniature world: its rules, its pictures, its words and its tars."""

import io
import json
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import run
from miniature import facts, world
from miniature.facts import COLOURS, KINDS, PLACES, SCENES, SIZES, TIMES, Picture, Thing
from miniature.paint import PAINTS, draw
from miniature.words import agrees, facts_in
from prompts import pictures_of

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = 4000


def facts_of(picture, with_place=True, with_size=True):
    """(scene, time, things), the things in any order."""
    things = sorted(
        (t.kind, t.colour, t.size if with_size else "", t.place if with_place else "") for t in picture.things
    )
    return picture.scene, picture.time, things


def triples_of(picture):
    return [(thing.kind, thing.colour, picture.scene) for thing in picture.things]


# ---- rules


def test_held_out_rule():
    every = [(k, c, s) for k in KINDS for c in COLOURS for s in SCENES if facts.home(k, s)]
    out = [t for t in every if facts.held_out(*t)]
    print(f"{len(out)} of {len(every)} combinations are held out")
    at_sea = {("ball", "red"), ("fish", "yellow"), ("bird", "white"), ("balloon", "red"), ("kite", "green")}
    assert {(k, c) for k, c, s in out if s == "sea"} == at_sea  # shipped weights were trained by this very rule
    in_city = {k: c for k, c, s in out if s == "city"}
    assert in_city["house"] == "pink" and in_city["boat"] == "yellow" and in_city["cat"] == "white"
    assert 0.08 < len(out) / len(every) < 0.12
    trained = set(every) - set(out)
    assert {(k, c) for k, c, _ in trained} == {(k, c) for k in KINDS for c in COLOURS}
    assert {(k, s) for k, _, s in trained} == {(k, s) for k, _, s in every}
    assert {(c, s) for _, c, s in trained} == {(c, s) for _, c, s in every}
    assert {k for k, _, _ in out} == set(KINDS) and {s for _, _, s in out} == set(SCENES)


def test_splits():
    for i in range(800):
        picture = facts.sample_picture(facts.random_stream(0, i))
        assert not any(facts.held_out(*t) for t in triples_of(picture))
        tested = facts.sample_picture(facts.random_stream(0, i), "held-out", 1 + i % 2)
        assert facts.held_out(*triples_of(tested)[0]) and len(tested.things) == 1 + i % 2
        for drawn in (picture, tested):
            assert facts.fits(drawn.things, drawn.scene)
            assert len({thing.place for thing in drawn.things}) == len(drawn.things)
            assert Picture.from_label(json.loads(json.dumps(drawn.label()))) == drawn
        for sample in (world.sample_story, world.sample_dialogue):
            turns, _ = sample(0, i)
            assert not any(facts.held_out(*t) for picture in pictures_of(turns) for t in triples_of(picture))
            tested = pictures_of(sample(0, i, "held-out")[0])
            assert all(facts.held_out(*triples_of(picture)[0]) for picture in tested[:1])
    with pytest.raises(ValueError, match="no split 'test'"):
        facts.sample_picture(facts.random_stream(0, 0), "test")


def test_random_streams():
    one, *others = (facts.random_stream(*key).random() for key in ((0, 1, 3), (0, 1, 4), (0, 2, 3), (1, 1, 3)))
    assert one not in others and one == facts.random_stream(0, 1, 3).random()


def test_fits():
    boat, fish = Thing("boat", "red", "big", "left"), Thing("fish", "blue", "big", "middle")
    assert not facts.fits((boat, fish), "sea") and not facts.fits((boat, replace(fish, place="left")), "sea")
    for other in (replace(fish, size="small"), replace(fish, place="right"), replace(fish, kind="kite")):
        assert facts.fits((boat, other), "sea") and not facts.fits((boat, other), "desert")


def test_every_fact_is_drawn():
    pictures = [facts.sample_picture(facts.random_stream(1, i)) for i in range(4000)]
    things = [thing for picture in pictures for thing in picture.things]
    assert {p.scene for p in pictures} == set(SCENES) and {p.time for p in pictures} == set(TIMES)
    for name, values in (("kind", KINDS), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
        assert {getattr(thing, name) for thing in things} == set(values)
    pairs = [p.things for p in pictures if len(p.things) == 2]
    twins = [p for p in pairs if (p[0].kind, p[0].colour, p[0].size) == (p[1].kind, p[1].colour, p[1].size)]
    assert 0.35 < len(pairs) / len(pictures) < 0.45 and 0.08 < len(twins) / len(pairs) < 0.20


# ---- pictures


def test_pictures_are_deterministic_and_vary_by_jitter():
    picture = Picture("sea", "night", (Thing("boat", "red", "small", "left"),))
    one, again, other = (np.asarray(draw(picture, seed)) for seed in (7, 7, 8))
    assert one.shape == (64, 64, 3) and (one == again).all() and (one != other).any()
    assert draw(picture, 7, 128).size == (128, 128)
    large = np.asarray(draw(picture, 7, 128).reduce(2), float)
    assert np.abs(large - one).mean() < 6  # the same picture


def changed(picture, jitter):
    """Rows and columns of the pixels that the things of a picture change, and these pixels."""
    page = np.asarray(draw(picture, jitter), float)
    bare = np.asarray(draw(Picture(picture.scene, picture.time, ()), jitter), float)
    mask = np.abs(page - bare).max(2) > 40
    return np.nonzero(mask), page[mask]


def test_every_kind_shows_its_size_place_and_colour():
    """Each thing, in each scene, at each time: where it is, how big it is, and that no other colour explains it."""
    for kind in KINDS:
        for i, scene in enumerate(s for s in SCENES if facts.home(kind, s)):
            for j, moment in enumerate(TIMES):
                for place, colour in zip((*PLACES, *PLACES, *PLACES), COLOURS, strict=False):
                    widths = []
                    for size in SIZES:
                        thing = Thing(kind, colour, size, place)
                        (rows, columns), pixels = changed(Picture(scene, moment, (thing,)), (i + j) % 2)
                        middle = (columns.min() + columns.max()) / 2
                        assert abs(middle - {"left": 14, "middle": 32, "right": 50}[place]) < 6, (kind, scene, place)
                        widths.append(max(np.ptp(rows), np.ptp(columns)) + 1)
                        if facts.home(kind, scene) == "sky":
                            assert rows.max() < 36
                        else:
                            assert rows.max() > 42
                    assert widths[0] >= 13 and widths[1] >= 1.25 * widths[0], (kind, scene, moment, widths)
                    near = {c: (np.abs(pixels - PAINTS[c]).max(1) < 44).sum() for c in COLOURS}
                    assert near[colour] >= 0.9 * max(near.values()), (kind, colour, scene, moment, near)


def test_things_keep_their_colour_at_night():
    ball = (Thing("ball", "orange", "big", "middle"),)
    by_day, at_night = (np.asarray(draw(Picture("meadow", t, ball), 3), int) for t in ("day", "night"))
    centre = np.abs(by_day - at_night)[42:50, 28:36]
    assert centre.max() == 0
    assert by_day[:8].mean() > 2 * at_night[:8].mean()


def test_drawing_is_fast_enough():
    samples = [(world.sample_pair(0, i)[0], "", i % 2) for i in range(300)]
    for picture, _, jitter in samples:  # backgrounds are drawn once
        draw(picture, jitter)
    start = time.process_time()
    for picture, _, jitter in samples:
        draw(picture, jitter)
    speed = len(samples) / (time.process_time() - start)
    print(f"{speed:.0f} pictures/s on one core")
    assert speed > 100  # far below what an idle machine does


# ---- words


def test_captions_say_what_is_in_the_picture():
    placed = measured = dated = days = 0
    words, texts = set(), set()
    for i in range(CAPTIONS):
        picture, text, _ = world.sample_pair(0, i)
        told = facts_in(text)
        named = any(thing.place for thing in told.things)
        sized = all(thing.size for thing in told.things)
        assert facts_of(told, named, sized)[2] == facts_of(picture, named, sized)[2], text
        assert told.scene == picture.scene and (told.time or "day") == picture.time, text
        assert agrees(told, picture)
        assert re.fullmatch(r"[a-z ]+", text) and "  " not in text and text == text.strip(), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        placed += named
        measured += sized
        days += picture.time == "day"
        dated += picture.time == "day" and told.time is not None
        words |= set(text.split())
        texts.add(text)
    print(f"{len(words)} words, {len(texts)} different captions of {CAPTIONS}, {placed / CAPTIONS:.0%} with places")
    assert 0.67 < placed / CAPTIONS < 0.73 and 0.75 < measured / CAPTIONS < 0.88 and 0.4 < dated / days < 0.6
    assert len(words) > 200 and len(texts) > 0.99 * CAPTIONS


@pytest.mark.parametrize(
    "text, scene, moment, things",
    [
        ("a red boat on the sea at night", "sea", "night", [Thing("boat", "red")]),
        ("two small red balls in the snow", "snow", None, [Thing("ball", "red", "small")] * 2),
        ("two huge fish on the lake", "mountains", None, [Thing("fish", None, "big")] * 2),
        ("it drifts to the right.", None, None, [Thing(None, place="right")]),
        ("a star that is big and white under the stars", None, "night", [Thing("star", "white", "big")]),
        (
            "on the left is a tiny cat and on the right is a kite in town",
            "city",
            None,
            [Thing("cat", None, "small", "left"), Thing("kite", place="right")],
        ),
        ("at sea, not in the city, by day, not at night", "sea", "day", []),
        ("a painter makes the cat golden.", None, None, [Thing("cat", "yellow")]),
        ("hello, how are you?", None, None, []),
    ],
)
def test_reader(text, scene, moment, things):
    assert facts_in(text) == Picture(scene, moment, tuple(things))


def test_a_wrong_caption_does_not_agree():
    picture = Picture("sea", "night", (Thing("boat", "red", "small", "left"),))
    assert agrees(facts_in("a small red boat at sea at night"), picture)
    for wrong in ("a blue boat", "a big boat", "a red fish", "a boat on the right", "in the city", "at noon"):
        assert not agrees(facts_in(wrong), picture), wrong
    assert not agrees(facts_in("two red boats"), picture)


# ---- stories and dialogues


def test_stories():
    words, bare = set(), 0
    for i in range(2000):
        turns, _ = world.sample_story(0, i)
        assert len(turns) in (4, 5)
        assert facts_of(facts_in(turns[0].text)) == facts_of(turns[0].pictures[0]), turns[0].text
        for (_, (before,)), (text, (now,)) in pairwise(turns):
            assert before != now and before.scene == now.scene
            assert before.things[0].kind == now.things[0].kind
            told = facts_in(text)
            if len(now.things) >= len(before.things):  # else it names what has gone
                assert agrees(told, now), text
            bare += not any(thing.kind for thing in told.things)
            for changed_fact in ("colour", "place"):  # a change of the hero is told, or it cannot be drawn
                value = getattr(now.things[0], changed_fact)
                if value != getattr(before.things[0], changed_fact):
                    assert value in [getattr(thing, changed_fact) for thing in told.things], text
            words |= set(re.findall(r"[a-z]+", text))
    print(f"{len(words)} words in stories; {bare} later steps do not name the hero")
    assert bare > 1000


def test_dialogues():
    drawn = silent = 0
    for i in range(2000):
        turns, _ = world.sample_dialogue(0, i)
        assert len(turns) in (4, 6, 8)
        picture = None
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            assert asked.text and answer.text
            assert not (asked.pictures and answer.pictures)
            if "take the" in asked.text:
                assert facts_in(asked.text).things[0].kind == picture.things[1].kind
                assert answer.pictures[0].things == picture.things[:1]
            elif answer.pictures:
                assert agrees(facts_in(asked.text), *answer.pictures), asked.text
            if asked.pictures:
                assert agrees(facts_in(answer.text), *asked.pictures), answer.text
            if asked.text.startswith("what colour is the"):
                (meant,), (told,) = (facts_in(turn.text).things for turn in (asked, answer))
                assert [told.colour] == [thing.colour for thing in picture.things if thing.kind == meant.kind]
            picture = next(iter(asked.pictures + answer.pictures), picture)
            drawn += bool(answer.pictures)
            silent += not answer.pictures
    print(f"answers with a picture {drawn}, in words {silent}")
    assert drawn > 1000 and silent > 1000


# ---- tars and the command line


def members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def test_pairs_tar(tmp_path):
    world.write_pairs(tmp_path / "a.tar", 5, 3)
    world.write_pairs(tmp_path / "b.tar", 4, 3)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.tar", "b.tar"]  # no temporary file stays
    content = members(tmp_path / "a.tar")
    assert members(tmp_path / "b.tar") == content[:12]  # sample i does not depend on n
    for i in range(5):
        (image, pixels), (text, words), (label, described) = content[3 * i : 3 * i + 3]
        assert [image, text, label] == [f"{i:09d}.png", f"{i:09d}.txt", f"{i:09d}.json"]
        described = json.loads(described)
        assert described["caption"] == words.decode()
        picture = Picture.from_label(described["label"])
        assert agrees(facts_in(described["caption"]), picture)
        stored = np.asarray(Image.open(io.BytesIO(pixels)).convert("RGB"))
        assert (stored == np.asarray(draw(picture, described["jitter"]))).all()


@pytest.mark.parametrize("write, kind", [(world.write_stories, "story"), (world.write_dialogues, "dialog")])
def test_interleaved_tar(tmp_path, write, kind):
    write(tmp_path / "x.tar", 6, 1, "held-out", 32)
    content = dict(members(tmp_path / "x.tar"))
    labels = {name: json.loads(data) for name, data in content.items() if name.endswith(".json")}
    assert len(labels) == 6
    for label in labels.values():
        assert label["kind"] == kind
        for turn in label["turns"]:
            assert (turn["image"] is None) == (turn["label"] is None)
            if turn["image"]:
                stored = np.asarray(Image.open(io.BytesIO(content.pop(turn["image"]))).convert("RGB"))
                drawn = draw(Picture.from_label(turn["label"]), label["jitter"], 32)
                assert stored.shape == (32, 32, 3) and (stored == np.asarray(drawn)).all()
    assert set(content) == set(labels)  # no picture that no turn names


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no split"):
        world.write_pairs(tmp_path / "x.tar", 2, 0, "test")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "miniature" / "world.py")]
    words = ["pairs", "--n", "2", "--seed", "5", "--out", "x.tar"]
    assert subprocess.run(command + words, capture_output=True, cwd=tmp_path).returncode == 0
    assert len(members(tmp_path / "x.tar")) == 6
    wrong = subprocess.run([*command, "pairs", "--n", "many"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "many" in wrong.stderr


@pytest.mark.parametrize(
    "words",
    ["", "poems", "pairs --n 0", "pairs --seed -1", "pairs --split test"],
)
def test_wrong_arguments(words, capsys):
    with pytest.raises(SystemExit) as stop:
        world.main(words.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "no/folder.tar", "there"])
def test_unwritable_output(tmp_path, capsys, name):
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(lambda: world.main(["pairs", "--n", "1", "--out", str(tmp_path / name)]))
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error:" in error[-1] and str(tmp_path) in error[-1]
