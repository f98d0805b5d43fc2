"""What people type: wishes, chats, descriptions, and the words of the miniature's world."""

import json
from dataclasses import replace

import pytest

from common.cli import MINIATURE
from common.files import read_json
from common.texts import Words, clean_prompt, words_in
from common.tokenizer import Tokenizer
from experiments.recipes.documents import chat_document, described_story_document, wish_document
from experiments.vocabulary import EXAM, VOCABULARY
from miniature import chats, wishes
from miniature.chats import (
    bracketed,
    change,
    chat,
    exchange,
    known_words,
    ordinary_words,
    recolour_both,
    unknown_words,
)
from miniature.facts import (
    COLOURS,
    KINDS,
    PLACES,
    SCENES,
    SIZES,
    TIMES,
    Picture,
    fits,
    held_out,
    pick,
    random_stream,
    sample_picture,
)
from miniature.phrases import SENTENCES, fill
from miniature.typos import typed, typo
from miniature.wishes import wish
from miniature.words import agrees, describe, facts_in, plural
from prompts import Turn, chat_history, description_in, model_turn, user_turn

WORDS = Words.of(MINIATURE)
TOKENIZER_FOLDER = MINIATURE / "vicuna"  # which has no words.json
TOKENIZER = Tokenizer(TOKENIZER_FOLDER / "tokenizer.model")


def pictures_of_training(n: int = 300):
    for i in range(n):
        yield wish(random_stream(1, i))[1]
        yield from (facts_in(turn.text[1:-1]) for turn in chat(random_stream(2, i))[1::2] if turn.text[0] == "(")


def same(one, two) -> bool:
    return (one.scene, one.time) == (two.scene, two.time) and sorted(map(str, one.things)) == sorted(
        map(str, two.things)
    )


def test_a_description_says_everything():
    for i in range(300):
        picture = sample_picture(random_stream(0, i), ("train", "held-out")[i % 2])
        assert same(facts_in(describe(picture)), picture)
        assert description_in(bracketed(picture)) == describe(picture)


def test_described_pictures_can_be_drawn_and_are_not_held_out():
    for picture in pictures_of_training():
        assert fits(picture.things, picture.scene), picture
        assert not any(held_out(thing.kind, thing.colour, picture.scene) for thing in picture.things), picture


def test_wishes_name_things_of_their_picture(monkeypatch):
    """Where a sentence names nothing that is not wanted. Of every kind, nouns that mean nothing else in any phrase: who
    reads one finds that kind in the picture."""
    nouns = {"sphere": "ball", "cottage": "house", "villa": "house", "oak": "tree", "willow": "tree", "yacht": "boat"}
    nouns |= {"goldfish": "fish", "trout": "fish", "sedan": "car", "taxi": "car", "tulip": "flower", "daisy": "flower"}
    nouns |= {"kitty": "cat", "tomcat": "cat", "sparrow": "bird", "robin": "bird", "balloon": "balloon", "kite": "kite"}
    wanted = {section: [line for line in lines if "{absent" not in line] for section, lines in SENTENCES.items()}
    monkeypatch.setattr(wishes, "sentence", lambda rng, section: pick(rng, wanted[section]))
    found = set()
    for i in range(4000):
        text, picture = wish(random_stream(3, i), typos=0.0)
        assert text == clean_prompt(text)
        named = {nouns[word] for word in text.split() if word in nouns}
        assert named <= {thing.kind for thing in picture.things}, (text, picture)
        found |= named
    assert len(found) == 11  # "star" has no such noun


@pytest.mark.parametrize("section", wishes.SECTIONS)
def test_every_sentence_of_a_wish_can_be_filled(section, monkeypatch):
    monkeypatch.setattr(wishes, "SECTIONS", {section: 1})
    for i, sentence in enumerate(SENTENCES[section] + SENTENCES[f"plain {section}"]):
        monkeypatch.setattr(wishes, "sentence", lambda rng, *_, sentence=sentence: sentence)
        text, picture, named_facts = wishes.wish_from_sentence(random_stream(10, i), "train")
        assert agrees(named_facts, picture)
        assert "{" not in text and " a a " not in text, text
        assert fits(picture.things, picture.scene), (text, picture)
        assert len(picture.things) == (1 if section == "one" else 2)
        assert (len({thing.kind for thing in picture.things}) == 1) == (section != "two")
        first = wishes.wish_from_sentence(random_stream(10, i), "held-out")[1]
        assert any(held_out(thing.kind, thing.colour, first.scene) for thing in first.things)


def test_sentences_say_the_facts_of_their_picture(monkeypatch):
    """Which colour, size and side belongs to which thing, and that a description begins with what is named first."""
    said = {
        "two": "{noun2} {colour2} {noun1} {colour1} {bigger1} {side}",
        "twins": "{noun} {colour1} {size1} {noun} {colour2} {size2}",
    }
    for words in (wishes.words.NOUNS, wishes.words.COLOUR_WORDS, wishes.words.SIZE_WORDS):
        for name in words:
            monkeypatch.setitem(words, name, name)
    for table in ("nouns", "colours", "sizes", "compared"):
        monkeypatch.setitem(wishes.PHRASES, table, {name: name for name in wishes.PHRASES[table]})
    for section, sentence in said.items():
        monkeypatch.setattr(wishes, "SECTIONS", {section: 1})
        monkeypatch.setattr(wishes, "PLAIN", 0)
        monkeypatch.setattr(wishes, "sentence", lambda rng, *_, sentence=sentence: sentence)
        for i in range(100):
            words, picture, named_facts = wishes.wish_from_sentence(random_stream(11, i), "train")
            one, two = picture.things
            if section == "two":
                expected = f"{one.kind} {one.colour} {two.kind} {two.colour} {two.size} {two.place}"
                assert one.size != two.size
                assert named_facts == Picture(None, None, picture.things)  # a side names both places
            else:
                expected = f"{one.kind} {one.colour} {one.size} {two.kind} {two.colour} {two.size}"
                assert one.colour != two.colour and one.size != two.size
                assert named_facts == Picture(None, None, tuple(replace(t, place=None) for t in picture.things))
            assert words == expected


def test_every_sentence_of_a_chat_can_be_filled(monkeypatch):
    """Each of its section's sentences is asked for in turn; an unknown slot raises KeyError."""
    asked = {}

    def next_sentence(rng, *sections):
        asked[sections[0]] = asked.get(sections[0], -1) + 1
        return SENTENCES[sections[0]][asked[sections[0]] % len(SENTENCES[sections[0]])]

    monkeypatch.setattr(chats, "sentence", next_sentence)
    for i in range(12_000):
        rng = random_stream(12, i)
        assert "{" not in change(rng, sample_picture(rng))[0]
    assert all(asked[section] >= len(SENTENCES[section]) for section in asked)
    others = {"talk", "talk forms", "anew", *wishes.SECTIONS, *(f"plain {section}" for section in wishes.SECTIONS)}
    assert asked.keys() | others == SENTENCES.keys()
    assert fill("A {noun}, the {scene}", {"noun": "oak", "scene": "the sea"}) == "an oak, the sea"


@pytest.mark.parametrize("kind", [wish_document, chat_document, described_story_document])
def test_documents_put_pictures_into_words(kind):
    rows = [kind(random_stream(4, i), 4, i, "train") for i in range(100)]
    described = [description_in(row.target) for row in rows]
    assert sum(map(bool, described)) >= 40
    for row, description in zip(rows, described, strict=True):
        assert not row.outputs and row.source.count("<ImageHere>") == len(row.inputs)
        assert row.target.endswith(" ###")
        assert description is None or describe(facts_in(description)) == description


def test_a_change_changes():
    kept = 0
    for i in range(500):
        rng = random_stream(5, i)
        before = sample_picture(rng)
        text, after = change(rng, before)
        assert text and fits(after.things, after.scene)
        kept += same(before, after)
    assert kept < 50  # "again", and "make it big" of what is big


def test_both_things_are_changed_and_one_is_exchanged_for_another():
    both = exchanged = 0
    for i in range(300):
        rng = random_stream(9, i)
        before = sample_picture(rng, count=2)
        if made := recolour_both(rng, before):
            assert made[1].things[0].colour == made[1].things[1].colour
            assert [t.kind for t in made[1].things] == [t.kind for t in before.things]
            both += 1
        if (made := exchange(rng, before)) and made[1]:
            kinds, new = {t.kind for t in before.things}, {t.kind for t in made[1].things}
            assert len(made[1].things) == 2 and len(new - kinds) == 1
            exchanged += 1
    assert recolour_both(random_stream(9, 0), sample_picture(random_stream(9, 0), count=1)) is None
    assert both > 100 and exchanged > 100


def test_typos_change_little():
    for i in range(200):
        text = "a purple flower in the mountains"
        slipped = typed(random_stream(6, i), text, 1.0)
        assert abs(len(slipped) - len(text)) <= 2 and len(slipped.split()) == len(text.split())


# ---- how they are read


@pytest.mark.parametrize(
    "typed_text, read",
    [
        ("A Red BOAT!!", "a red boat"),
        ("\u201cit\u2019s\u201d  a\tboat \u2013 at sea", "it's a boat at sea"),
        ("(hello) #1: ok?", "hello 1 ok?"),
        ("a cherry-red car", "a cherry red car"),
        (
            "cat & dog + red_kite \U0001f63b \u201enow\u201c; a/b = [IMG0] <s>",
            "cat and dog and red kite now a b img0 s",
        ),
    ],
)
def test_clean_prompt(typed_text, read):
    assert clean_prompt(typed_text) == read


def test_what_somebody_types_is_never_a_description():
    assert description_in(user_turn(TOKENIZER, Words().read("(a red boat)")[0]).text) is None
    assert user_turn(TOKENIZER, WORDS.read("!!!")[0]).text == "!!!"
    assert user_turn(TOKENIZER, "A Boat [IMG0]").text.startswith("A Boat [ IMG0]")


def test_the_last_picture_is_always_read():
    turns = [
        Turn("a boat"),
        Turn("(a small boat)"),
        Turn("hello"),
        Turn("hi"),
        Turn("how are you?"),
        Turn("fine"),
        Turn("red"),
    ]
    assert chat_history(turns, 7, True) == [*turns[0:2], *turns[4:7]]
    assert chat_history(turns[:5], 5, True) == [*turns[0:5]]
    assert chat_history(turns[:3], 3, True) == turns[:3]
    assert chat_history(turns[2:7], 5, True) == turns[4:7]
    shown = [Turn("look", ("picture",)), *turns[3:6], Turn("make it red")]
    assert chat_history(shown, 5, True) == shown


def test_own_pictures_are_remembered_by_their_words():
    class Drawn:
        def __init__(self, **info):
            self.info = info

    assert model_turn(TOKENIZER, "look", (Drawn(description="a boat"),)) == Turn("look (a boat)")
    plain = Drawn()
    assert model_turn(TOKENIZER, "look", (plain,)) == Turn("look", (plain,))


# ---- the world's words


def test_shipped_words_are_those_of_the_grammar():
    shipped = read_json(MINIATURE / "minigpt5" / "words.json")
    assert shipped == {"known": known_words(), "unknown": unknown_words(), "ordinary": ordinary_words()}


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("a bule boat on the see", []),
        ("A DOG and a horse in the snow!", ["dog", "horse"]),
        ("a xylophone", ["xylophone"]),
        ("", []),
    ],
)
def test_unknown_words(text, unknown):
    assert WORDS.read(text)[1] == unknown


def test_typos_are_mended():
    assert WORDS.read("a bule baot on teh see, a purpel kitee!")[0] == "a blue boat on the see, a purple kite"
    long = "ab" * 100_000  # the swaps of its letters would take 40 GB
    assert WORDS.read(f"a bule {long}") == (f"a blue {long}", [])
    assert WORDS.read("a horse and a xylophone")[0] == "a horse and a xylophone"
    mended = total = 0
    for i in range(400):
        text = wish(random_stream(7, i), typos=0.0)[0]
        slipped = typed(random_stream(8, i), text, 1.0)
        pairs = list(zip(text.split(), WORDS.read(slipped)[0].split(), slipped.split(), strict=True))
        wrong = [(a, b) for a, b, c in pairs if a != c and a in WORDS.known and c not in WORDS.known and len(c) > 2]
        mended, total = mended + sum(a == b for a, b in wrong), total + len(wrong)
    assert mended > 0.8 * total > 200
    assert Words.of(TOKENIZER_FOLDER).read("a bule boat") == ("a bule boat", [])


def test_for_smollm2_only_typos_of_facts_are_corrected():
    """It knows many more words than the miniature. One of them that looks like a fact ("coat") is no typo of it."""
    words, facts = Words(**read_json(MINIATURE / "smollm2" / "words.json")), {*KINDS, *map(plural, KINDS), "mountain"}
    facts |= {*COLOURS, *SIZES, *PLACES, *SCENES, *TIMES}
    assert {*words.known} == facts and not facts & words.ordinary
    assert words.read("a bule baot, a coat and a jeep") == ("a blue boat, a coat and a jeep", [])
    texts = [text for table in VOCABULARY.values() for entries in table.values() for text in entries]
    met = {word for text in texts for word in words_in(text.lower())} | EXAM
    changed, alone = ({w for w in met if by.correction(w) not in (None, w)} for by in (words, Words(facts)))
    assert len(changed) < 25 < 200 < len(alone) and not changed & EXAM
    slips = [(fact, typo(random_stream(3, i), fact)) for i in range(20) for fact in sorted(facts) if len(fact) > 3]
    mended = [words.correction(slip) == fact for fact, slip in slips if slip != fact]
    assert sum(mended) > 0.75 * len(mended) > 500  # others are words themselves, "boa"


def test_copies_of_the_peoples_files_can_be_read(tmp_path):
    from miniature.score import FOLDER, read_chats, read_prompts

    wishes, chats = read_prompts(FOLDER / "prompts.jsonl"), read_chats(FOLDER / "chats.jsonl")
    assert {len(wish.expected.things) for wish in wishes} == {1, 2} and len(chats) == 6
    (tmp_path / "x.jsonl").write_text(json.dumps({"scene": None}) + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: not in the form of .*'prompt'"):
        read_prompts(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: not in the form of .*'turns'"):
        read_chats(tmp_path / "x.jsonl")
    for text, error in (("\nno json\n", "JSON"), ("\n" + "[" * 100_000, "recursion")):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match=rf"x.jsonl, line 2: not in the form of .*{error}"):
            read_prompts(tmp_path / "x.jsonl")
