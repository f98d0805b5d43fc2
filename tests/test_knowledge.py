"""The exam on what a language model knows: its prompts, its figures, and a run that goes on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import MINIATURE
from common.files import read_json
from common.texts import clean_prompt, words_in
from common.tokenizer import Tokenizer
from experiments import knowledge, vocabulary
from experiments.words import (
    WIDE_MIXTURE,
    counted_tokens,
    plain_wish,
    sequence,
    slip_document,
    wide_document,
    with_open_facts,
)
from miniature import words
from miniature.exam import Answer
from miniature.facts import COLOURS, KINDS, PLACES, SCENES, SIZES, TIMES, Picture, Thing, chance, home, random_stream
from miniature.judge import NOTHING
from miniature.score import FOLDER, Wish, read_lines, read_prompts
from miniature.wishes import wish, wish_from_sentence
from miniature.world import sample_pair

PROMPTS = Path(__file__).resolve().parents[1] / "experiments" / "knowledge.jsonl"
ENTRIES = read_lines(PROMPTS, dict)


def test_there_are_a_hundred_prompts_of_people():
    wishes = read_prompts(PROMPTS)
    assert len({clean_prompt(wish.text) for wish in wishes}) == 100
    assert 70 <= sum(len(wish.expected.things) == 1 for wish in wishes) <= 80
    assert not {wish.text for wish in wishes} & {wish.text for wish in read_prompts(FOLDER / "prompts.jsonl")}


def test_their_facts_are_those_of_a_picture_that_can_be_drawn():
    for entry in ENTRIES:
        assert set(entry) == {"prompt", "scene", "time", "things", "needs"}
        assert entry["scene"] in (None, *SCENES) and entry["time"] in (None, *TIMES)
        assert len(entry["things"]) in (1, 2)
        for thing in entry["things"]:
            assert set(thing) == {"kind", "colour", "size", "place"} and thing["kind"] in KINDS
            assert thing["colour"] in (None, *COLOURS) and thing["size"] in (None, *SIZES)
            assert thing["place"] in (None, *PLACES)
        scenes = [entry["scene"]] if entry["scene"] else SCENES
        assert any(all(home(thing["kind"], scene) for thing in entry["things"]) for scene in scenes), entry


def test_the_words_that_they_need_are_in_no_text_of_the_miniature():
    """Neither in its list of known words, nor in its grammar, nor in what SmolLM2's LoRA reads, nor in 30,000
    captions and wishes. Every prompt needs such words; those that a list has carry the fewest of the facts."""
    met = set(read_json(MINIATURE / "minigpt5" / "words.json")["known"])
    pages = [Path(page.__file__) for page in (words, vocabulary)]
    lists = [pages[0].with_name(name) for name in ("captions.txt", "phrases.txt", "sentences.txt", "ordinary.txt")]
    for page in [*pages, pages[-1].with_suffix(".json"), *lists]:
        met |= {*words_in(page.read_text("utf-8").lower())}
    for i in range(10_000):
        met |= {*words_in(sample_pair(7, i, "train")[1]), *words_in(wish(random_stream(7, i))[0])}
        met |= {*words_in(vocabulary.wide_wish(random_stream(8, i), "train")[0].lower())}
    assert len(met) > 1000 and {"automobile", "vessel", "feline", "meadow"} <= met
    for entry in ENTRIES:
        assert entry["needs"] and set(entry["needs"]) <= set(words_in(clean_prompt(entry["prompt"]))), entry
        assert not met & set(entry["needs"]), entry
        facts = [entry["scene"], entry["time"], *(fact for thing in entry["things"] for fact in thing.values())]
        given = met & set(words_in(clean_prompt(entry["prompt"]))) & {fact for fact in facts if fact}
        assert len(given) <= 1 and not given & {*KINDS, *COLOURS, *SCENES}, entry


def test_documents_with_a_word_of_the_exam_are_left_out(monkeypatch):
    """Slips of the fingers and the miniature's chats make some. The word "draw" stands for them here."""
    assert {word for entry in ENTRIES for word in entry["needs"]} == vocabulary.EXAM
    tokenizer = Tokenizer(MINIATURE / "vicuna" / "tokenizer.model")

    def sources() -> str:
        texts = [tokenizer.decode(sequence(tokenizer, WIDE_MIXTURE, 3, i)[0].tolist()) for i in range(20)]
        return " ".join(part.partition("Assistant")[0] for text in texts for part in text.split("###Human:")[1:])

    assert "draw" in words_in(sources())
    monkeypatch.setattr("experiments.words.EXAM", {"draw"})
    assert "draw" not in words_in(sources())


def test_what_a_wish_leaves_open_does_not_count():
    """The words of a description that count name all facts that the wish names, and none that it leaves open."""
    tokenizer, open_facts = Tokenizer(MINIATURE / "vicuna" / "tokenizer.model"), 0
    for i in range(200):
        _, picture, named = vocabulary.wide_wish(random_stream(6, i), "train")
        assert words.agrees(named, picture)
        example = wide_document(random_stream(6, i), 6, i, "train")
        tokens = counted_tokens(tokenizer, example, random_stream(6, i))
        assert words.describe(picture) in tokenizer.decode([token for token, _ in tokens])
        counted = words_in(tokenizer.decode([token for token, count in tokens if count]))
        for fact in ("scene", "time"):
            assert (getattr(picture, fact) in counted) == (getattr(named, fact) is not None)
        facts = [fact for thing in named.things for fact in (thing.kind, thing.size, thing.colour) if fact]
        assert [word for word in counted if word in (*KINDS, *SIZES, *COLOURS)] == facts
        open_facts += sum(thing.colour is None for thing in named.things)
    assert open_facts > 40


def test_a_plain_wish_names_the_facts_that_count():
    for i in range(100):
        text, picture, named = plain_wish(random_stream(3, i), "train")
        assert words.agrees(named, picture) and words.facts_in(text) == named


def test_slips_are_in_words_that_name_facts():
    changed = 0
    for i in range(200):
        example = slip_document(random_stream(5, i), 5, i, "train")
        assert "(" in example.target and not example.inputs
        known = [word for word in words_in(example.source) if word in words.LEXICON]
        rng = random_stream(5, i)
        text, picture, named = (plain_wish if chance(rng, 0.6) else wish_from_sentence)(rng, "train")
        assert words.agrees(named, picture) and example.target.startswith(with_open_facts(picture, named))
        plain = words_in(text)
        changed += len(known) < sum(word in words.LEXICON for word in plain)
    assert 120 < changed < 200  # the others name few facts


# ---- the run


@pytest.fixture
def systems(monkeypatch):
    """Pictures carry what they show. The right system draws what is wished; the other forgets the first prompt in every
    seed, and the colour of the second in seed 1. It stops while `broken` is set."""
    asked, broken = [], []

    def drawn(exam, way, texts):
        asked.append((way, exam.seed))
        if broken and way == "vokens":
            raise KeyboardInterrupt
        pictures = []
        for number, (text, wished) in enumerate(zip(texts, read_prompts(PROMPTS), strict=False)):
            assert text == wished.text
            picture = Image.new("RGB", (64, 64), "blue")
            picture.info["seen"] = wished.expected
            if way == "vokens" and number == 2 and exam.seed == 1:
                things = tuple(replace(thing, colour="white") for thing in wished.expected.things)
                picture.info["seen"] = replace(wished.expected, things=things)
            pictures.append(None if way == "vokens" and number == 0 else picture)
        return [Answer("", picture) for picture in pictures]

    def picture_facts(exam, pictures):
        return [picture.info["seen"] if picture else NOTHING for picture in pictures]

    monkeypatch.setattr(knowledge, "drawn", drawn)
    monkeypatch.setattr(knowledge, "picture_facts", picture_facts)
    return asked, broken


def command(out: Path) -> list[str]:
    options = ["--n", "4", "--seeds", "0,1", "--out", str(out)]
    for name, way in (("right", "words"), ("one, that forgets", "vokens")):
        options += ["--system", name, way, str(MINIATURE)]
    return options


def test_an_interrupted_run_goes_on(systems, tmp_path, capsys):
    asked, broken = systems
    broken.append(True)
    with pytest.raises(KeyboardInterrupt):
        knowledge.main(command(tmp_path))
    assert list(read_json(tmp_path / "results.json")["systems"]) == ["right"]
    broken.clear(), asked.clear()
    knowledge.main(command(tmp_path))
    assert asked == [("vokens", 0), ("vokens", 1)]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| right | 100.0 (100.0 to 100.0) | 100.0 (100.0 to 100.0) | - |  |"
    assert lines[3].startswith("| one, that forgets | 62.5 (") and lines[3].split(" | ")[4].startswith("-37.5 (")
    assert lines[4].startswith("| a random picture | ")
    answers = read_json(tmp_path / "results.json")["systems"]["one, that forgets"]["answers"]
    wrong = {(answer["prompt"], answer["seed"]): answer["wrong"] for answer in answers}
    assert wrong["the animal that says miaow", 1] == ["count", "kind"]
    assert [facts for (text, _), facts in wrong.items() if "marmalade" in text] == [[], ["colour"]]
    with Image.open(tmp_path / "sheet.png") as page:
        pixels = page.convert("RGB")
    framed = [[pixels.getpixel((430 + 104 * c, 54 + 104 * r)) == (50, 205, 50) for c in (0, 1)] for r in range(4)]
    assert framed == [[True, False], [True, True], [True, True], [True, True]]  # in seed 0
    with pytest.raises(ValueError, match=r"results.json has other prompts or seeds"):
        knowledge.main([*command(tmp_path), "--seeds", "0"])


def test_intervals_are_those_of_a_mean():
    half = np.array([0.0, 1.0] * 50)
    low, high = knowledge.interval(half)
    assert abs(low - (0.5 - 1.96 * 0.05)) < 0.015 and abs(high - (0.5 + 1.96 * 0.05)) < 0.015
    assert knowledge.interval(np.ones(5)) == (1.0, 1.0)
    assert knowledge.with_interval(np.array([])) == "-"
    (chance,) = knowledge.right_by_chance(read_prompts(FOLDER / "prompts.jsonl")[2:3])  # "a house"
    assert 0 < chance < 1 / 12  # of twelve kinds; it fits in five of six scenes, and there may be a second thing


@pytest.mark.parametrize("system", [["a"], ["a", "dream", "weights"], ["a", "text", "weights", "x", "y"]])
def test_a_system_has_a_name_a_way_and_weights(system, capsys):
    with pytest.raises(SystemExit) as stop:
        knowledge.main(["--system", *system])
    assert stop.value.code == 2 and "NAME WAY WEIGHTS" in capsys.readouterr().err


def test_weights_that_read_no_pictures_are_drawn_with(tmp_path):
    """SmolLM2's folder has no image encoder, no judge and no list of words; the options are then the miniature's."""
    for part in ("vicuna", "stable-diffusion"):
        (tmp_path / part).symlink_to(MINIATURE / part)
    checkpoint = MINIATURE / "minigpt5" / "uas.safetensors"
    with pytest.raises(ValueError, match="no checkpoint of MiniGPT-5's trained parts"):
        knowledge.exam_of("vokens", tmp_path, None, "cpu")
    picture = Picture("sea", "night", (Thing("boat", "red", "big", "left"),))
    wished = Wish(words.describe(picture), picture)  # which names all facts
    for way, given in (("vokens", checkpoint), ("text", None)):
        exam = knowledge.exam_of(way, tmp_path, given, "cpu")
        assert (exam.sampling.sampler, exam.sampling.guidance) == ("dpm", 2.0 if given else 3.0)
        answers, shown = knowledge.examine(exam, way, [wished], [0])
        assert answers == [{"prompt": wished.text, "seed": 0, "wrong": [], "description": ""}]
        assert shown[0].size == (64, 64)
