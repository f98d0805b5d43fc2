"""Measures the miniature's weights, with the judge for pictures and the reader of `words.py` for texts.

    python miniature/score.py                                   # everything
    python miniature/score.py prompts vokens --n 100 --sheets sheets --out scores.json
    python miniature/score.py stories --checkpoint uas          # stories before stage 2

| part      | measures                                                                             |
| --------- | ------------------------------------------------------------------------------------ |
| people    | prompts and chats as people write them, drawn as `sample.py` does by default         |
| prompts   | pictures drawn through the frozen text encoder: "zero-shot Stable Diffusion"         |
| vokens    | the same prompts and noise through the language model, its vokens and the mapper     |
| captions  | pictures that the language model describes                                           |
| replies   | whether a picture comes when one is asked for, and none when words are               |
| dialogues | whether what a dialogue draws and says is right                                      |
| stories   | the next step of a story, with and without its history; steps told one after another |

All samples are held out; in stories and dialogues, a change of colour may lead back to a combination that was trained.
Figures are shares. "named" is how many prompts name a fact, and the other figures count only these prompts. A prompt
that gets no picture is wrong in everything.

People's prompts and chats are files of a line each, with the facts that a right picture has:

    prompts  {"prompt", "scene", "time", "things": [{"kind", "colour", "size", "place"}, ...]}
    chats    {"turns": [{"say", "picture": true, "scene", "time", "things"} or {"say", "picture": false}, ...]}

A fact that is null is left open: anything is right. The number of things is never open. Other fields of a line are
ignored. A turn that calls for words is right if no picture comes. All are answered with the defaults of `sample.py`,
once with each seed; a chat goes on from the words and pictures that the model itself gave.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.files import write_json
from generation import Sampling
from miniature.chats import bracketed
from miniature.exam import Answer, Exam, Figures, ask, draw_prompts, draw_turns, picture_facts, text_to_pictures
from miniature.facts import Picture, random_stream
from miniature.judge import ATTRIBUTES, NOTHING, asks_for, right, right_shares, share
from miniature.paint import draw
from miniature.phrases import CAPTIONS, usual
from miniature.score_stories import stories
from miniature.tales import SMALL_TALK
from miniature.words import facts_in
from miniature.world import sample_dialogue, sample_pair
from prompts import UAS_REQUESTS, Turn, chat_history, dialog_source, model_turn, pictures_of, uas_texts
from published.loading import STORY_FILES, WORDS_FILES, find_checkpoint, shipped_checkpoint

QUESTIONS = 401  # purpose of the random streams
SAMPLES, STORIES = 500, 300  # of a part, of the part "stories"
MAX_ANSWER_TOKENS = 96
COUNTS = {"one thing": 1, "two things": 2}


# ---- people

FOLDER = Path(__file__).parent / "people"
PROMPTS, CHATS = FOLDER / "prompts.jsonl", FOLDER / "chats.jsonl"


class Wish(NamedTuple):
    """What somebody types, and the facts of a right picture; None: words are the right answer."""

    text: str
    expected: Picture | None


def read_lines(path: Path, read: Callable[[dict], Any]) -> list:
    """The value of `read` for each object of a JSONL file. ValueError that names the line if it has another form."""
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entries += [read(json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not in the form of {FOLDER} ({error!r})") from None
    return entries


def wish_of(entry: dict, text_name: str = "say") -> Wish:
    return Wish(str(entry[text_name]), Picture.from_label(entry) if entry.get("picture", True) else None)


def read_prompts(path: Path) -> list[Wish]:
    return read_lines(path, partial(wish_of, text_name="prompt"))


def read_chats(path: Path) -> list[list[Wish]]:
    return read_lines(path, lambda entry: [wish_of(turn) for turn in entry["turns"]])


def sampling_of_sample(weights: Path) -> Sampling:
    """The defaults of sample.py with these weights."""
    return Sampling.of(cli.suited_options(weights, "sample"))


def hold_chats(exam: Exam, chats: list[list[Wish]]) -> list[list[Answer]]:
    """The answers in each chat. All chats are held at the same time: their first turns are a batch, and so on."""
    turns, answers = [[] for _ in chats], [[] for _ in chats]
    for number in range(max(map(len, chats), default=0)):
        active = [i for i, chat in enumerate(chats) if number < len(chat)]
        for i in active:
            turns[i].append(exam.user_turn(chats[i][number].text))
        k = 2 * number + 1
        histories = [chat_history(turns[i], k, exam.sampling.words_first) for i in active]
        sources = [dialog_source(before, k, exam.system) for before in histories]
        for i, answer in zip(active, ask(exam, sources, [pictures_of(before) for before in histories]), strict=True):
            turns[i].append(model_turn(exam.model.tokenizer, answer.text, (answer.picture,) if answer.picture else ()))
            answers[i].append(answer)
    return answers


def print_verdicts(exam: Exam, wishes: list[Wish], answers: list[Answer]) -> list[bool]:
    """Whether each answer is right in everything; prints what is wrong."""
    verdicts = []
    for wish, answer, facts in zip(wishes, answers, picture_facts(exam, [a.picture for a in answers]), strict=True):
        if wish.expected is None:
            fine, mistake = answer.picture is None, "a picture came"
        else:
            checks = right(facts, wish.expected)
            fine = checks["all"] and answer.picture is not None
            mistake = "wrong " + ", ".join(name for name, value in checks.items() if not value and name != "all")
        verdicts.append(fine)
        if not fine:
            content = answer.picture.info.get("description", "") if answer.picture else f"no picture: {answer.text}"
            print(f"  seed {exam.seed}: {wish.text!r}: {mistake} ({content})")
    return verdicts


def people(exam: Exam, prompts: Path, chats: Path, seeds: list[int]) -> Figures:
    """The shares of prompts and of chats' turns that are all right; a row's name ends with their number."""
    exam = replace(exam, sampling=sampling_of_sample(exam.weights))
    wishes, conversations = read_prompts(prompts), read_chats(chats)
    turns, prompt_verdicts, turn_verdicts = [wish for chat in conversations for wish in chat], [], []
    for seed in seeds:
        exam.seed = seed
        answers = draw_prompts(exam, [wish.text for wish in wishes])
        prompt_verdicts += zip(wishes, print_verdicts(exam, wishes, answers), strict=True)
        exam.sheet(f"people {seed}", [wish.text for wish in wishes], [answer.picture for answer in answers])
        answers = [answer for chat in hold_chats(exam, conversations) for answer in chat]
        turn_verdicts += zip(turns, print_verdicts(exam, turns, answers), strict=True)
    rows = {"prompts": [fine for _, fine in prompt_verdicts]}
    for name, things in COUNTS.items():
        rows[name] = [fine for wish, fine in prompt_verdicts if wish.expected and len(wish.expected.things) == things]
    rows["chat turns"] = [fine for _, fine in turn_verdicts]
    rows["of them pictures"] = [fine for wish, fine in turn_verdicts if wish.expected]
    return {f"{name}, {len(values)}": {"all right": share(values)} for name, values in rows.items() if values}


# ---- samples


def held_out_prompts(exam: Exam, things: int) -> tuple[list[str], list[Picture]]:
    """Captions of held-out pictures with this number of things, and the facts that each caption names."""
    captions = [sample_pair(exam.seed, i, "held-out", things)[1] for i in range(exam.n)]
    return captions, [facts_in(caption) for caption in captions]


def chat_turns(exam: Exam, dialogue: list[Turn], jitter: int) -> list[Turn]:
    """The dialogue as the model reads it. Words first, descriptions stand in the place of the assistant's pictures."""
    turns = draw_turns(dialogue, jitter)
    if exam.sampling.words_first:
        turns[::2] = [exam.user_turn(text, pictures) for text, pictures in turns[::2]]
        turns[1::2] = [Turn(" ".join([text, *map(bracketed, pictures)])) for text, pictures in dialogue[1::2]]
    return turns


# ---- pictures


def prompts(exam: Exam) -> Figures:
    return caption_figures(exam, "prompts", lambda texts: text_to_pictures(exam, texts))


def vokens(exam: Exam) -> Figures:
    return caption_figures(exam, "vokens", lambda texts: [answer.picture for answer in draw_prompts(exam, texts)])


def caption_figures(exam: Exam, part: str, draw_all: Callable[[list[str]], list[Image.Image | None]]) -> Figures:
    figures = {}
    for name, things in COUNTS.items():
        texts, expected = held_out_prompts(exam, things)
        pictures = draw_all(texts)
        exam.sheet(f"{part} {name}", texts, pictures)
        named_shares = {fact: share([asks_for(facts, fact) for facts in expected]) for fact in (*ATTRIBUTES, "all")}
        figures[f"{name}, named"] = named_shares
        drawn_share = share([picture is not None for picture in pictures])
        figures[f"{name}, right"] = {"drawn": drawn_share} | right_shares(picture_facts(exam, pictures), expected)
    return figures


# ---- words


def captions(exam: Exam) -> Figures:
    """The user shows pictures. A fact is right if the answer says it and it is true; "no error": all that the answer
    says is true, and no thing is missing."""
    samples = [sample_pair(exam.seed, i, "held-out") for i in range(exam.n)]
    expected, pictures = [facts for facts, _, _ in samples], [draw(facts, jitter) for facts, _, jitter in samples]
    streams = (random_stream(exam.seed, i, QUESTIONS) for i in range(exam.n))
    sources = [exam.chat_source(usual(rng, CAPTIONS["shows"]), (None,)) for rng in streams]
    answers = ask(exam, sources, [(picture,) for picture in pictures])
    facts = [facts_in(answer.text) for answer in answers]
    return {"described, right": right_shares(facts, expected) | {"no error": right_shares(expected, facts)["all"]}}


class Exchange(NamedTuple):
    """A human's turn in a dialogue and the assistant's reply, which the model is to give."""

    source: str  # what the model reads
    pictures: tuple[Image.Image, ...]  # of the source
    request: Turn
    reply: Turn


def sample_exchanges(exam: Exam) -> dict[bool, list[Exchange]]:
    """n exchanges of dialogues whose reply has a picture (True) and n whose reply has none."""
    exchanges = {True: [], False: []}
    for i in count():
        dialogue, jitter = sample_dialogue(exam.seed, i, "held-out")
        turns = chat_turns(exam, dialogue, jitter)
        for k in range(1, len(dialogue), 2):
            before, (request, reply) = chat_history(turns, k, exam.sampling.words_first), dialogue[k - 1 : k + 1]
            source = dialog_source(before, k, exam.system)
            exchanges[bool(reply.pictures)].append(Exchange(source, pictures_of(before), request, reply))
        if min(map(len, exchanges.values())) >= exam.n:
            return {pictured: rows[: exam.n] for pictured, rows in exchanges.items()}


def has_picture(exchange: Exchange) -> bool:
    """Whether the source holds a picture, or the description of one."""
    return bool(exchange.pictures) or "(" in exchange.source


def replies(exam: Exam) -> Figures:
    """Requests in stage 1's form, and the human's turns in dialogues."""
    captions = enumerate(held_out_prompts(exam, 1)[0])
    if exam.sampling.words_first:
        requests = [exam.chat_source(f"{UAS_REQUESTS[i % len(UAS_REQUESTS)]} {caption}") for i, caption in captions]
    else:
        requests = [uas_texts(caption, instruction=i % len(UAS_REQUESTS))[0] for i, caption in captions]
    exchanges, figures = sample_exchanges(exam), {}
    for name, expected, rows in (
        ("a caption's picture is asked for", True, [(source, ()) for source in requests]),
        ("a dialogue asks for a picture", True, exchanges[True]),
        ("a dialogue asks for words", False, exchanges[False]),
    ):
        sources, pictures = [row[0] for row in rows], [row[1] for row in rows]
        answers = ask(exam, sources, pictures, sampler="ddim", steps=1)  # how the pictures look does not matter
        pictured = [answer.picture is not None for answer in answers]
        figures[name] = {"a picture came": share(pictured), "right": share([came == expected for came in pictured])}
    return figures


def dialogues(exam: Exam) -> Figures:
    """Four kinds of exchange. A picture is asked for: the facts that the request names count. It is changed ("make it
    red."): all its facts count. It is described: all that the answer says must be true, and no thing may be missing.
    A question about it is answered: the facts must be those of the dialogue's own answer."""
    exchanges, figures = sample_exchanges(exam), {}
    new = [e for e in exchanges[True] if facts_in(e.request.text).scene]
    # Without a picture in the source, the picture to be changed is too far back for the model to read.
    changes = [e for e in exchanges[True] if not facts_in(e.request.text).scene and has_picture(e)]
    expected = {"asked for": [facts_in(e.request.text) for e in new], "changed": [e.reply.pictures[0] for e in changes]}
    for name, rows in {"asked for": new, "changed": changes}.items():
        facts = picture_facts(exam, [answer.picture for _, answer in with_answers(exam, rows)])
        figures[f"{name}, right"] = {"samples": len(rows) / exam.n} | right_shares(facts, expected[name])
    descriptions = [e for e in exchanges[False] if e.request.pictures]
    others = [e for e in exchanges[False] if has_picture(e) and not e.request.pictures]
    questions = [e for e in others if facts_in(e.reply.text) != NOTHING and e.request.text not in SMALL_TALK]
    described = [right(*e.request.pictures, facts_in(a.text))["all"] for e, a in with_answers(exam, descriptions)]
    answered = [same_answer(answer.text, e.reply.text) for e, answer in with_answers(exam, questions)]
    for name, verdicts in {"described": described, "answered": answered}.items():
        figures[name] = {"samples": len(verdicts) / exam.n, "right": share(verdicts)}
    return figures


def same_answer(text: str, expected: str) -> bool:
    """Whether both texts name the same facts, and both or neither begin with "no,"."""
    return facts_in(text) == facts_in(expected) and text.startswith("no,") == expected.startswith("no,")


def with_answers(exam: Exam, rows: list[Exchange]) -> list[tuple[Exchange, Answer]]:
    return list(zip(rows, ask(exam, [row.source for row in rows], [row.pictures for row in rows]), strict=True))


# ---- the command

PARTS = {part.__name__: part for part in (people, prompts, vokens, captions, replies, dialogues, stories)}


def tables(figures: Figures) -> str:
    """The figures in per cent as Markdown tables; neighbouring rows with the same columns share a table."""
    lines = []
    for columns, rows in groupby(figures.items(), key=lambda row: tuple(row[1])):
        lines += [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        for name, row in rows:
            lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in row.values())} |")
        lines.append("")
    return "\n".join(lines)


def checkpoint_for(part: str, weights: Path, name: Path | None, words_first: bool) -> Path | None:
    """What `--checkpoint` names, or else what is shipped of stage 2 (words first, stories), or else of stage 1."""
    trained = weights / "minigpt5"
    if name:
        path = find_checkpoint(name) or find_checkpoint(trained / f"{name}.safetensors")
    else:
        path = shipped_checkpoint(trained, WORDS_FILES if words_first else STORY_FILES if part == "stories" else ())
    if path is None and (name or part not in ("prompts", "captions")):
        raise ValueError(f"{name or trained}: no checkpoint of MiniGPT-5's trained parts, needed for {part}")
    return path


def seeds(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", choices=[*PARTS, "all"], default="all", metavar="PART", help=", ".join(PARTS))
    cli.add_weights_option(parser)
    add("--checkpoint", type=Path, help="a file, a run's folder, or a name in WEIGHTS/minigpt5, as `uas`")
    add("--n", type=cli.FROM_1, help=f"samples of a part; default: {SAMPLES}, stories {STORIES}")
    add("--seed", type=int, default=0, help="of samples and noise; 0 or more")
    add("--prompts", type=Path, default=PROMPTS, help="prompts of the part people")
    add("--chats", type=Path, default=CHATS, help="chats of the part people")
    add("--seeds", type=seeds, default=[0, 1, 2], help="of the part people; default: 0,1,2")
    cli.add_sampling_options(parser, Sampling, words_first=True)
    parser.set_defaults(steps=20, guidance=2.0, sampler="dpm", max_new_tokens=MAX_ANSWER_TOKENS, words_first=True)
    parser.set_defaults(temperature=0.0, repetition_penalty=1.0)  # the likeliest words
    add("--sheets", type=Path, metavar="DIR", help="folder for the first pictures of people, prompts, vokens")
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON, anew after each part")
    cli.add_device_option(parser)
    args = cli.read_arguments(parser, argv)
    sampling = Sampling.of(vars(args))
    sheets = cli.make_folder(args.sheets) if args.sheets else None
    if args.out:
        cli.make_folder(args.out.parent)
    exam = Exam(args.weights, None, args.device, sampling, SAMPLES, args.seed, sheets)
    record = {"settings": {"seed": args.seed, **asdict(sampling)}, "samples": {}, "checkpoints": {}, "figures": {}}
    for part in PARTS if "all" in args.parts else args.parts:
        checkpoint = checkpoint_for(part, args.weights, args.checkpoint, args.words_first)
        n = args.n or (STORIES if part == "stories" else SAMPLES)  # people's prompts are as many as their files hold
        options = (args.prompts, args.chats, args.seeds) if part == "people" else ()
        record["figures"][part] = figures = PARTS[part](replace(exam, n=n, checkpoint=checkpoint), *options)
        record["checkpoints"][part] = checkpoint and checkpoint.name
        record["samples"] |= {} if part == "people" else {part: n}
        samples = "" if part == "people" else f", {n} samples"
        print(f"## {part}{samples}, in per cent\n\n{tables(figures)}", flush=True)
        if args.out:
            write_json(args.out, record)


if __name__ == "__main__":
    cli.run(main)
