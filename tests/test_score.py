"""score.py: what counts as right, the parts on tiny untrained weights, and the command."""

import json
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.cli import run
from experiments import pretrain
from experiments.recipes import painter, speaker
from experiments.recipes.recipe import Setup
from generation import Sampling
from miniature import exam as examining
from miniature import score, score_stories, world
from miniature.exam import Answer, Exam
from miniature.facts import Picture, Thing, random_stream
from miniature.judge import NOTHING, asks_for, right, right_shares
from miniature.words import description, facts_in
from prompts import pictures_of
from published.loading import save_trained
from published.parts import load_minigpt5

CPU = torch.device("cpu")
SMALLER = [
    (painter, "VAE_SIZES", {"block_out_channels": (8, 8, 16, 16)}),
    (painter, "UNET_SIZES", {"block_out_channels": (32, 32), "attention_head_dim": (2, 2)}),
    (painter, "TEXT_SIZES", {"num_hidden_layers": 1}),
    (speaker, "LANGUAGE_SIZES", {"num_hidden_layers": 1}),
    (speaker, "VISION_SIZES", {"num_hidden_layers": 1}),
    (speaker, "QFORMER_SIZES", {"num_hidden_layers": 2}),
]
WORDS = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=4, sampler="dpm", steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every part in a small size, untrained, and checkpoints of both stages."""
    patch = pytest.MonkeyPatch()
    for module, name, changes in SMALLER:
        patch.setattr(module, name, replace(getattr(module, name), **changes))
    folder = tmp_path_factory.mktemp("miniature")
    shop = Setup(folder / "runs", folder / "weights", CPU, seed=3, pictures=8, tested=2)
    torch.manual_seed(0)
    for recipe_class in pretrain.PARTS.values():
        recipe = recipe_class(shop)
        if isinstance(recipe, painter.DiffusionRecipe):
            torch.nn.init.normal_(recipe.model.conv_out.weight)  # zeros would hide the condition
        with torch.no_grad():
            recipe.export(recipe.model.eval(), shop.weights)
    patch.undo()
    (shop.weights / "minigpt5").mkdir(exist_ok=True)
    model = load_minigpt5(shop.weights, None, read_pictures=False)
    save_trained(model, model.trained_parameters(), shop.weights / "minigpt5" / "uas.safetensors", "uas")
    model.add_adapters(lora={})
    save_trained(model, model.trained_parameters(), shop.weights / "minigpt5" / "mls-story.safetensors", "mls")
    return shop.weights


@pytest.fixture
def exam(weights):
    return Exam(weights, weights / "minigpt5" / "uas.safetensors", CPU, WORDS, 3, 0)


# ---- what counts as right

BOAT, KITE = Thing("boat", "red", "small", "left"), Thing("kite", "blue", "big", "right")
SEEN = Picture("sea", "night", (BOAT,))


def test_only_named_facts_are_asked_for():
    bare, full = (
        Picture("sea", None, (Thing("boat", "red"),)),
        Picture("city", "night", (replace(BOAT, place="middle"),)),
    )
    assert [asks_for(facts, fact) for fact in ("size", "time") for facts in (bare, full)] == [False, True] * 2
    shares = right_shares([SEEN, SEEN], [bare, full])
    assert shares == {
        **{"scene": 0.5, "time": 1.0, "count": 1.0, "kind": 1.0, "colour": 1.0, "size": 1.0, "place": 0.0},
        "all": 0.5,
    }


def test_no_picture_is_wrong_in_everything():
    shares = right_shares([NOTHING, SEEN], [SEEN, SEEN])
    assert set(shares.values()) == {0.5}
    assert set(right_shares([NOTHING], [Picture("sea", None, (Thing("boat", "red"),))]).values()) == {0.0}


def test_story_texts_are_read():
    """Every sentence of the world's stories is true of its picture, not of the one before; hero colours are told."""
    colours = 0
    for i in range(400):
        for (_, (before,)), (text, (after,)) in pairwise(world.sample_story(5, i, "held-out")[0]):
            assert score_stories.true_of(text, after), (text, after)
            assert not score_stories.true_of(text, before), (before, text)
            assert not score_stories.tells_again(text, before), (before, text)
            one, two = (picture.things[0].colour for picture in (before, after))
            assert score_stories.hero_colour(text, one) == two, (before, text)
            colours += one != two
    assert colours > 100


@pytest.mark.parametrize(
    "text, again",
    [
        ("The boat drifts to the left.", False),
        ("A big yellow star comes along on the right.", False),
        ("The sun rises.", False),
        ("The stars come out.", True),  # it is night already
        ("A tiny scarlet ship drifts to the left.", True),
        ("The boat drifts over the ocean.", True),
        ("A painter comes and makes the boat blue.", False),
    ],
)
def test_tells_again(text, again):
    assert score_stories.tells_again(text, SEEN) == again


@pytest.mark.parametrize(
    "text, true",
    [
        ("The small boat drifts to the left.", True),
        ("it is night.", True),
        ("the boat turns blue.", False),
        ("the kite goes away and the boat is alone again.", True),
        ("the boat goes away.", False),
        ("a kite appears.", False),
        ("once more.", False),  # says nothing
        ("", False),
    ],
)
def test_true_of(text, true):
    assert score_stories.true_of(text, SEEN) == true


def test_kept_facts():
    story = Picture("sea", "day", (BOAT, KITE))
    assert all(score_stories.kept_facts(SEEN, story, "red").values())
    assert score_stories.kept_facts(SEEN, story, "blue") == {"scene": True, "kind": True, "colour": False, "all": False}
    assert not any(score_stories.kept_facts(NOTHING, story, "red").values())
    assert not score_stories.kept_facts(replace(SEEN, scene="city"), story, "red")["all"]


# ---- the parts, with answers whose worth is known


@pytest.fixture
def draw(monkeypatch):
    """Pictures carry their facts, and the judge reads them there."""

    def draw(facts, jitter=0, size=64):
        picture = Image.new("RGB", (64, 64))
        picture.info["facts"] = facts
        return picture

    def picture_facts(exam, pictures):
        return [picture.info["facts"] if picture else NOTHING for picture in pictures]

    for module in (score, score_stories):
        monkeypatch.setattr(module, "picture_facts", picture_facts)
    for module in (score, examining):
        monkeypatch.setattr(module, "draw", draw)
    return draw


def test_vokens_beside_the_text_encoder(exam, draw, monkeypatch):
    """Every other prompt gets no picture, the others the right one: half of what the text encoder gets right."""
    exam = replace(exam, n=8)
    facts = {}
    for i, things in product(range(exam.n), (1, 2)):
        picture, caption, _ = world.sample_pair(exam.seed, i, "held-out", things)
        facts[caption] = picture

    def draw_prompts(exam, prompts):
        return [Answer("", draw(facts[prompt]) if i % 2 else None) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(score, "text_to_pictures", lambda exam, prompts: [draw(facts[prompt]) for prompt in prompts])
    monkeypatch.setattr(score, "draw_prompts", draw_prompts)
    through_text, through_vokens = score.prompts(exam), score.vokens(exam)
    for name in score.COUNTS:
        assert set(through_text[f"{name}, right"].values()) == {1.0}
        assert through_text[f"{name}, named"]["colour"] == 1.0 > through_text[f"{name}, named"]["place"] > 0.3
        found = through_vokens[f"{name}, right"]
        assert found["drawn"] == found["scene"] == found["all"] == 0.5


@pytest.mark.parametrize("shift", [0, 1])
def test_captions(exam, draw, monkeypatch, shift):
    """Each answer tells the facts of the picture beside the question, or those of the next question's."""

    def ask(exam, sources, pictures):
        shown = [picture.info["facts"] for (picture,) in pictures[shift:] + pictures[:shift]]
        return [Answer(description(facts, random_stream(0, i), True, True), None) for i, facts in enumerate(shown)]

    monkeypatch.setattr(score, "ask", ask)
    figures = score.captions(replace(exam, n=40))["described, right"]
    assert set(figures.values()) == {1.0} if shift == 0 else figures["all"] == figures["no error"] == 0.0


def test_answers_in_words():
    told = facts_in("a red boat")
    assert right(Picture("sea", "day", (BOAT,)), told)["all"]
    assert not right(Picture("sea", "day", (BOAT, KITE)), told)["all"]
    assert score.same_answer("no, there is not any star.", "no, there is no star.")
    assert not score.same_answer("yes, there is a star.", "no, there is no star.")


def test_replies(exam, draw, monkeypatch):
    monkeypatch.setattr(score, "ask", lambda exam, sources, *_, **options: [Answer("", draw(None)) for _ in sources])
    assert [row["right"] for row in score.replies(exam).values()] == [1.0, 1.0, 0.0]
    monkeypatch.setattr(score, "ask", lambda exam, sources, *_, **options: [Answer("", None) for _ in sources])
    assert [row["right"] for row in score.replies(exam).values()] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("shift", [0, 1])
def test_dialogues(exam, draw, monkeypatch, shift):
    """The dialogues' own answers are right; those of other turns are not."""
    exam = replace(exam, n=60)

    def key(source, pictures):
        return source, tuple(picture.info["facts"] for picture in pictures)

    own = {key(*row[:2]): row.reply for rows in score.sample_exchanges(exam).values() for row in rows}

    def say(exam, sources, pictures, **options):
        said = [own[key(*pair)] for pair in zip(sources, pictures, strict=True)]
        return [Answer(text, draw(*pictures) if pictures else None) for text, pictures in said[shift:] + said[:shift]]

    monkeypatch.setattr(score, "ask", say)
    figures = score.dialogues(exam)
    assert list(figures) == ["asked for, right", "changed, right", "described", "answered"]
    assert all(0 < row["samples"] < 1 for row in figures.values())
    shares = [row.get("all", row.get("right")) for row in figures.values()]
    assert set(shares) == {1.0} if shift == 0 else max(shares) < 0.3


@pytest.mark.parametrize("shift, least, most", [(0, 1.0, 1.0), (1, 0.0, 0.5)])
def test_story_figures(exam, draw, shift, least, most):
    steps = score_stories.story_steps(replace(exam, n=60))
    said = [Answer(step.turn.text, draw(step.expected)) for step in steps]
    said = said[shift:] + said[:shift]
    for figures_of in score_stories.FIGURES.values():
        figures = figures_of(exam, said, steps)
        print(figures)
        about_story = {name: value for name, value in figures.items() if name not in ("count", "text true", "true")}
        assert all(least <= value <= most for value in about_story.values())


def test_repeating_the_last_step_tells_nothing(exam, draw):
    steps = score_stories.story_steps(replace(exam, n=60))
    said = [Answer(step.before[-1].text, draw(step.last)) for step in steps]
    figures = score_stories.mixed_figures(exam, said, steps)
    assert figures["both"] == 1.0
    assert score_stories.text_figures(exam, said, steps)["tells the change"] == 0.0
    said = [Answer(f"{step.turn.text} {step.last.scene}", None) for step in steps]
    figures = score_stories.text_figures(exam, said, steps)
    assert figures["tells the change"] > 0.9 and figures["goes on"] == 0.0


@pytest.mark.parametrize("shift", [0, 1])
def test_own_stories(exam, draw, monkeypatch, shift):
    """The world's own stories keep all; their own pictures and texts are what the next step reads."""
    exam, asked = replace(exam, n=40), []
    tales = [world.sample_story(exam.seed, (i + shift) % exam.n, "held-out")[0] for i in range(exam.n)]

    def ask(exam, sources, pictures):
        asked.append((sources, pictures))
        return [Answer(tale[len(asked) - 1].text, draw(*tale[len(asked) - 1].pictures)) for tale in tales]

    monkeypatch.setattr(score_stories, "ask", ask)
    figures = score_stories.own_story_figures(exam)
    print(figures)
    values = [value for row in figures.values() for name, value in row.items() if name != "drawn"]
    assert len(figures) == 4 and (all(v == 1.0 for v in values) if shift == 0 else max(values) < 0.5)
    sources, pictures = asked[3]
    first = world.sample_story(exam.seed, 0, "held-out")[0][0].text
    told = [first, tales[0][1].text, tales[0][2].text]
    assert [picture.info["facts"] for picture in pictures[0]] == [*pictures_of(tales[0][:3])]
    assert f"###Human:{''.join(text + '<Img><ImageHere></Img>' for text in told)}" in sources[0]


def test_contexts(exam):
    steps = score_stories.story_steps(replace(exam, n=40))
    assert {len(step.before) for step in steps} == {1, 2, 3, 4}
    for i, step in enumerate(steps):
        assert step.before[0].text == world.sample_story(exam.seed, i, "held-out")[0][0].text
    step = max(steps, key=lambda step: len(step.before))
    none, texts, both = (context(step.before) for context in score_stories.CONTEXTS.values())
    assert none == [] and both == step.before and all(turn.pictures for turn in both)
    assert [turn.text for turn in texts] == [turn.text for turn in both] and not any(turn.pictures for turn in texts)


# ---- ways to pictures and words


def test_one_noise_on_both_ways(exam):
    """With the text encoding in the mapper's place, the vokens' way draws the very pictures of the text encoder's."""
    assert exam.generator(0).initial_seed() != exam.generator(1).initial_seed()
    prompts = score.held_out_prompts(exam, 1)[0]
    through_text = examining.text_to_pictures(exam, prompts)
    model = load_minigpt5(exam.weights, None, read_pictures=False, read_captions=True)
    texts = [""] * len(prompts) + prompts
    with torch.no_grad():
        condition = model.text_encoder(model.clip_tokenizer(texts)[0])

    class Mapper(torch.nn.Module):
        def forward(self, features):
            return condition

    exam.model.mapper = Mapper()
    said = examining.ask(exam, prompts, force_image=True)
    assert [a.tobytes() for a in through_text] == [answer.picture.tobytes() for answer in said]
    other = examining.text_to_pictures(replace(exam, seed=1), prompts)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(through_text, other, strict=True))
    condition = condition.flip(0)
    changed = examining.ask(exam, prompts, force_image=True)
    assert all(a.picture.tobytes() != b.picture.tobytes() for a, b in zip(said, changed, strict=True))


def test_batches_do_not_matter(exam, monkeypatch):
    prompts = score.held_out_prompts(exam, 1)[0]
    whole = examining.text_to_pictures(exam, prompts), examining.ask(exam, prompts, force_image=True)
    monkeypatch.setattr(examining, "BATCH", 2)
    parts = examining.text_to_pictures(exam, prompts), examining.ask(exam, prompts, force_image=True)
    assert [said.text for said in whole[1]] == [said.text for said in parts[1]]
    for a, b in zip(whole[0] + [s.picture for s in whole[1]], parts[0] + [s.picture for s in parts[1]], strict=True):
        assert (torch.tensor(list(a.tobytes())) - torch.tensor(list(b.tobytes()))).abs().max() <= 1


def test_words_for_a_picture_are_no_text(exam, monkeypatch):
    answers = [["it drifts. <Img>sea day small", "red</Img>"], ["hello.", Image.new("RGB", (64, 64)), "look."], []]
    monkeypatch.setattr(examining, "answer", lambda *_: answers)
    monkeypatch.setattr(Exam, "model", None)
    monkeypatch.setattr(examining, "prompt_ids", lambda *_: [])
    said = examining.ask(exam, ["", "", ""])
    assert [answer.text for answer in said] == ["it drifts.", "hello. look.", ""]
    assert [answer.picture is None for answer in said] == [True, False, True]


def test_sample_exchanges(exam):
    turns = score.sample_exchanges(replace(exam, n=40))
    held_out = {turn.text for i in range(100) for turn in world.sample_dialogue(exam.seed, i, "held-out")[0]}
    for wish, rows in turns.items():
        assert len(rows) == 40 and all(row.source.count("<ImageHere>") == len(row.pictures) for row in rows)
        assert all(row.source.endswith("###Assistant:") for row in rows)
        assert all(row.request.text in row.source.rpartition("###Human: ")[2] for row in rows)
        assert all(row.request.text in held_out for row in rows)
        assert any("draw" in row.request.text for row in rows) == wish
        assert all(bool(row.reply.pictures) == wish for row in rows)
    assert any(row.pictures for row in turns[False])


def test_wrong_picture_size(exam):
    with pytest.raises(ValueError, match="64x64, these are 32x32"):
        examining.picture_facts(exam, [None, Image.new("RGB", (32, 32))])


# ---- the command


def test_all_parts(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "MAX_ANSWER_TOKENS", 12)
    out = tmp_path / "scores" / "scores.json"
    words = f"--weights {weights} --n 2 --steps 2 --device cpu --sheets {tmp_path / 'sheets'} --out {out}"
    score.main(words.split())
    record, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(record["figures"]) == list(score.PARTS)
    assert record["samples"] == dict.fromkeys((part for part in score.PARTS if part != "people"), 2)
    assert set(record["checkpoints"].values()) == {"uas.safetensors"}  # words first
    for part, figures in record["figures"].items():
        assert ("## people, in per cent" if part == "people" else f"## {part}, 2 samples") in printed
        for row, columns in figures.items():
            assert f"| {row} | " in printed
            assert all(0 <= value <= 1 for value in columns.values()), row
    pictures = {path.stem for path in (tmp_path / "sheets").iterdir()}
    drawn = [f"{part}-{count}" for part in ("prompts", "vokens") for count in ("one-thing", "two-things")]
    assert pictures == {*drawn, "people-0", "people-1", "people-2"}
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(record["figures"]["stories"]) == 13


def test_one_part_and_its_checkpoint(weights, tmp_path, capsys):
    words = f"replies --weights {weights} --n 1 --device cpu --out {tmp_path / 'a.json'} --checkpoint mls-story"
    score.main(words.split())
    record = json.loads((tmp_path / "a.json").read_text())
    assert list(record["figures"]) == ["replies"] and record["checkpoints"] == {"replies": "mls-story.safetensors"}
    for row in record["figures"]["replies"].values():
        assert set(row) == {"a picture came", "right"}


def test_settings(tmp_path, monkeypatch):
    """Words are decoded greedily; seed, sampler, steps and guidance are the command's."""
    exams = []
    monkeypatch.setitem(score.PARTS, "prompts", lambda exam: exams.append(exam) or {})
    score.main(f"prompts --weights {tmp_path} --seed 5 --sampler ddim --steps 3 --guidance 2 --device cpu".split())
    assert exams[0].seed == 5
    assert exams[0].sampling == replace(
        WORDS, max_new_tokens=score.MAX_ANSWER_TOKENS, sampler="ddim", steps=3, guidance=2.0, words_first=True
    )


def test_checkpoints(weights, tmp_path):
    trained = weights / "minigpt5"
    uas, mls = trained / "uas.safetensors", trained / "mls-story.safetensors"
    assert score.checkpoint_for("vokens", weights, None, False) == uas
    assert score.checkpoint_for("stories", weights, None, False) == mls
    assert score.checkpoint_for("stories", weights, None, True) == uas
    assert score.checkpoint_for("stories", weights, Path("uas"), False) == uas
    assert score.checkpoint_for("vokens", weights, mls, True) == mls
    assert score.checkpoint_for("prompts", tmp_path, None, True) is None
    for part, wanted in (("stories", None), ("prompts", Path("poems"))):
        with pytest.raises(ValueError, match="no checkpoint"):
            score.checkpoint_for(part, tmp_path, wanted, True)


def test_people(exam, draw, monkeypatch, tmp_path, capsys):
    """Everything is drawn as the first seed's prompt wishes but for the balls, which come twice."""
    lines = [
        {"prompt": "a boat", "scene": None, "time": None, "things": [vars(Thing("boat"))]},
        {"prompt": "a ball", "scene": "sea", "time": None, "things": [vars(Thing("ball"))]},
        {"prompt": "a boat, a kite", "scene": None, "time": None, "things": [vars(Thing("boat")), vars(Thing("kite"))]},
    ]
    turns = [
        {"say": "hello", "picture": False},
        {"say": "a boat", "picture": True, **lines[0]},
        {"say": "stop", "picture": True, **lines[0]},
    ]
    for name, rows in (("prompts", lines), ("chats", [{"turns": turns}, {"turns": turns[:1]}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    heard = []

    def ask(exam, sources, pictures=None):
        heard.extend(sources)
        said = []
        for source in sources:
            text = source.rpartition("###Human:")[2]
            things = (
                [Thing("boat")] * ("boat" in text)
                + [Thing("kite")] * ("kite" in text)
                + [Thing("ball")] * 2 * ("ball" in text)
            )
            picture = draw(Picture("sea", "day", tuple(things))) if things else None
            if picture:
                picture.info["description"] = "a thing"
            said.append(Answer("" if picture else "hi", picture))
        return said

    for module in (examining, score):
        monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr(score, "sampling_of_sample", lambda weights: Sampling(words_first=True))
    figures = score.people(exam, tmp_path / "prompts", tmp_path / "chats", [0, 1])
    assert {name: row["all right"] for name, row in figures.items()} == pytest.approx(
        {
            "prompts, 6": 2 / 3,
            "one thing, 4": 0.5,
            "two things, 2": 1.0,
            "chat turns, 8": 0.75,
            "of them pictures, 4": 0.5,
        }
    )
    assert "seed 1: 'a ball': wrong count" in capsys.readouterr().out
    assert any("(a thing)" in source and "stop" in source for source in heard)


def test_people_reads_other_files(monkeypatch):
    """The options reach the part, and no other part."""
    asked = []
    for part in ("people", "captions"):
        monkeypatch.setitem(score.PARTS, part, lambda exam, *options: asked.append(options) or {})
    score.main(["people", "captions", "--prompts", "a.jsonl", "--chats", "b.jsonl", "--seeds", "3,5"])
    assert asked == [(Path("a.jsonl"), Path("b.jsonl"), [3, 5]), ()]


def test_tables():
    figures = {"a": {"kind": 0.3125, "all": 0.5}, "b": {"kind": 0.3, "all": 1.0}, "c": {"drawn": 0.125}}
    assert score.tables(figures).splitlines() == [
        "| | kind | all |",
        "| --- | ---: | ---: |",
        "| a | 31.2 | 50.0 |",
        "| b | 30.0 | 100.0 |",
        "",
        "| | drawn |",
        "| --- | ---: |",
        "| c | 12.5 |",
    ]


@pytest.mark.parametrize("words, says", [("poems", "invalid choice: 'poems'"), ("prompts --n 0", "at least 1")])
def test_wrong_arguments(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        score.main(words.split())
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_missing_weights_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: score.main(f"prompts --weights {tmp_path} --n 1 --device cpu".split()))
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'vicuna' / 'config.json'}: no such file\n")
