"""The exam on what a language model knows: its prompts, its figures, and a run that goes on."""

from pathlib import Path

from common.cli import MINIATURE
from common.files import read_json
from miniature import phrases, words
from miniature.facts import COLOURS, KINDS, PLACES, SCENES, SIZES, TIMES, home, random_stream
from miniature.score_people import FOLDER, read_lines, read_prompts
from miniature.wishes import wish
from miniature.world import sample_pair
from prompts import plain_words, words_in

PROMPTS = Path(__file__).resolve().parents[1] / "experiments" / "knowledge.jsonl"
ENTRIES = [entry for _, entry in read_lines(PROMPTS)]


def test_there_are_a_hundred_prompts_of_people():
    wishes = read_prompts(PROMPTS)
    assert len({plain_words(wish.text) for wish in wishes}) == 100
    assert 70 <= sum(len(wish.wanted.things) == 1 for wish in wishes) <= 80
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
    """Neither in its list of known words, nor in its grammar, nor in 20,000 captions and wishes. Every prompt needs
    such words; those that no list of the miniature has carry most of the facts."""
    met = set(read_json(MINIATURE / "minigpt5" / "words.json")["known"])
    met |= {word for page in (words, phrases) for word in words_in(Path(page.__file__).read_text("utf-8").lower())}
    for i in range(10_000):
        met |= {*words_in(sample_pair(7, i, "train")[1]), *words_in(wish(random_stream(7, i))[0])}
    assert len(met) > 1000 and {"automobile", "vessel", "feline", "meadow"} <= met
    for entry in ENTRIES:
        assert entry["needs"] and set(entry["needs"]) <= set(words_in(plain_words(entry["prompt"]))), entry
        assert not met & set(entry["needs"]), entry
        facts = [entry["scene"], entry["time"], *(fact for thing in entry["things"] for fact in thing.values())]
        given = met & set(words_in(plain_words(entry["prompt"]))) & {fact for fact in facts if fact}
        assert len(given) <= 1 and not given & {*KINDS, *COLOURS, *SCENES}, entry
