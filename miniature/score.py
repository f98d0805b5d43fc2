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
| stories   | the next step of a story, with and without its history; its own pictures fed back    |

All samples are held out; in stories and dialogues, a change of colour may lead back to a combination that was trained.
Figures are shares. "named" is how many prompts name a fact, and the other figures count only these prompts. A prompt
that gets no picture is wrong in everything.

People's prompts and chats are files of a line each, with the facts that a right picture has:

    prompts  {"prompt", "scene", "time", "things": [{"kind", "colour", "size", "place"}, ...]}
    chats    {"turns": [{"say", "picture": true, "scene", "time", "things"} or {"say", "picture": false}, ...]}

A fact that is null is left open: anything is right. The number of things is never open. Other fields of a line are
ignored. A turn that calls for words is right if no picture comes. Everything is asked as `sample.py` would with its
defaults, once with each seed; a chat goes on from what the model said and drew itself.
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
from miniature.exam import LONGEST, Exam, Figures, Said, ask, chat_source, draw_prompts, heard, look, text_to_pictures
from miniature.facts import Picture, random_stream
from miniature.judge import ATTRIBUTES, NOTHING, asks_for, right, right_shares, share
from miniature.paint import draw
from miniature.phrases import CAPTIONS, some
from miniature.score_stories import stories
from miniature.tales import SMALL_TALK
from miniature.words import facts_in
from miniature.world import sample_dialogue, sample_pair
from prompts import UAS_REQUESTS, Turn, chat_history, dialog_source, model_turn, pictures_of, uas_texts
from published.loading import STORY_FILES, WORDS_FILES, find_checkpoint, shipped_checkpoint

QUESTIONS = 401  # purpose of the random streams
SAMPLES, STORIES = 500, 300  # of a part, of the part "stories"
COUNTS = {"one thing": 1, "two things": 2}


# ---- people

FOLDER = Path(__file__).parent / "people"
PROMPTS, CHATS = FOLDER / "prompts.jsonl", FOLDER / "chats.jsonl"


class Wish(NamedTuple):
    """What is typed, and what a right picture shows; None: words are called for."""

    text: str
    wanted: Picture | None


def read_lines(path: Path, read: Callable[[dict], Any]) -> list:
    """`read` of each object of a JSONL file. ValueError that names the line where it finds something else."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found += [read(json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not in the form of {FOLDER} ({error!r})") from None
    return found


def wish_of(entry: dict, text_name: str = "say") -> Wish:
    return Wish(str(entry[text_name]), Picture.from_label(entry) if entry.get("picture", True) else None)


def read_prompts(path: Path) -> list[Wish]:
    return read_lines(path, partial(wish_of, text_name="prompt"))


def read_chats(path: Path) -> list[list[Wish]]:
    return read_lines(path, lambda entry: [wish_of(turn) for turn in entry["turns"]])


def sampling_of_sample(weights: Path) -> Sampling:
    """The defaults of sample.py with these weights."""
    return Sampling.of(cli.suited_options(weights, "sample"))


def hold_chats(exam: Exam, chats: list[list[Wish]]) -> list[list[Said]]:
    """All chats side by side, turn after turn."""
    turns, answers = [[] for _ in chats], [[] for _ in chats]
    for number in range(max(map(len, chats), default=0)):
        active = [i for i, chat in enumerate(chats) if number < len(chat)]
        for i in active:
            turns[i].append(exam.user_turn(chats[i][number].text))
        k = 2 * number + 1
        histories = [chat_history(turns[i], k, exam.sampling.words_first) for i in active]
        sources = [dialog_source(before, k, exam.system) for before in histories]
        for i, said in zip(active, ask(exam, sources, [pictures_of(before) for before in histories]), strict=True):
            turns[i].append(model_turn(exam.model.tokenizer, said.text, (said.picture,) if said.picture else ()))
            answers[i].append(said)
    return answers


def verdicts(exam: Exam, wishes: list[Wish], said: list[Said]) -> list[bool]:
    """Whether each answer is all right; what is wrong is printed."""
    found = []
    for wish, answer, seen in zip(wishes, said, look(exam, [answer.picture for answer in said]), strict=True):
        if wish.wanted is None:
            fine, seen_text = answer.picture is None, "a picture came"
        else:
            facts = right(seen, wish.wanted)
            fine = facts["all"] and answer.picture is not None
            seen_text = "wrong " + ", ".join(name for name, value in facts.items() if not value and name != "all")
        found.append(fine)
        if not fine:
            told = answer.picture.info.get("description", "") if answer.picture else f"no picture: {answer.text}"
            print(f"  seed {exam.seed}: {wish.text!r}: {seen_text} ({told})")
    return found


def people(exam: Exam, prompts: Path, chats: Path, seeds: list[int]) -> Figures:
    """Shares that are all right, and of how many. A chat's turn counts like any other, whatever came before it."""
    exam = replace(exam, sampling=sampling_of_sample(exam.weights))
    wishes, talks, drawn, turns = read_prompts(prompts), read_chats(chats), [], []
    flat = [wish for chat in talks for wish in chat]
    for seed in seeds:
        exam = replace(exam, seed=seed)
        said = draw_prompts(exam, [wish.text for wish in wishes])
        drawn += zip(wishes, verdicts(exam, wishes, said), strict=True)
        exam.sheet(f"people {seed}", [wish.text for wish in wishes], [answer.picture for answer in said])
        answers = [answer for chat in hold_chats(exam, talks) for answer in chat]
        turns += zip(flat, verdicts(exam, flat, answers), strict=True)
    rows = {"prompts": [fine for _, fine in drawn]}
    for name, things in COUNTS.items():
        rows[name] = [fine for wish, fine in drawn if wish.wanted and len(wish.wanted.things) == things]
    rows["chat turns"] = [fine for _, fine in turns]
    rows["of them pictures"] = [fine for wish, fine in turns if wish.wanted]
    return {f"{name}, {len(values)}": {"all right": share(values)} for name, values in rows.items() if values}


# ---- samples


def held_out_prompts(exam: Exam, things: int) -> tuple[list[str], list[Picture]]:
    """Captions of pictures with so many things, and the facts that they name."""
    captions = [sample_pair(exam.seed, i, "held-out", things)[1] for i in range(exam.n)]
    return captions, [facts_in(caption) for caption in captions]


def chat_turns(exam: Exam, told: list[Turn], jitter: int) -> list[Turn]:
    """Turns of a dialogue as they are read. Words first, the assistant's pictures stand as their descriptions."""
    turns = heard(told, jitter)
    if exam.sampling.words_first:
        turns[::2] = [exam.user_turn(text, pictures) for text, pictures in turns[::2]]
        turns[1::2] = [Turn(" ".join([text, *map(bracketed, pictures)])) for text, pictures in told[1::2]]
    return turns


# ---- pictures


def prompts(exam: Exam) -> Figures:
    return drawn_figures(exam, "prompts", lambda texts: text_to_pictures(exam, texts))


def vokens(exam: Exam) -> Figures:
    return drawn_figures(exam, "vokens", lambda texts: [said.picture for said in draw_prompts(exam, texts)])


def drawn_figures(exam: Exam, part: str, draw_all: Callable[[list[str]], list[Image.Image | None]]) -> Figures:
    figures = {}
    for name, things in COUNTS.items():
        texts, wanted = held_out_prompts(exam, things)
        drawn = draw_all(texts)
        exam.sheet(f"{part} {name}", texts, drawn)
        named = {fact: share([asks_for(facts, fact) for facts in wanted]) for fact in (*ATTRIBUTES, "all")}
        figures[f"{name}, named"] = named
        came = {"drawn": share([picture is not None for picture in drawn])}
        figures[f"{name}, right"] = came | right_shares(look(exam, drawn), wanted)
    return figures


# ---- words


def captions(exam: Exam) -> Figures:
    """Pictures that somebody shows. A fact is right if it is said and true; "no error": nothing that is said is wrong,
    and no thing is left out."""
    samples = [sample_pair(exam.seed, i, "held-out") for i in range(exam.n)]
    wanted, pictures = [facts for facts, _, _ in samples], [draw(facts, jitter) for facts, _, jitter in samples]
    streams = (random_stream(exam.seed, i, QUESTIONS) for i in range(exam.n))
    sources = [chat_source(exam, some(rng, CAPTIONS["shows"]), (None,)) for rng in streams]
    texts = [said.text for said in ask(exam, sources, [(picture,) for picture in pictures])]
    told = [facts_in(text) for text in texts]
    return {"described, right": right_shares(told, wanted) | {"no error": right_shares(wanted, told)["all"]}}


class Reply(NamedTuple):
    """A turn to be said in a dialogue."""

    source: str
    pictures: tuple[Image.Image, ...]  # of the turns before it, as far as they are heard
    asked: Turn  # the human's turn
    turn: Turn


def turns_to_answer(exam: Exam) -> dict[bool, list[Reply]]:
    """n turns of dialogues that have a picture (True) and n that have none."""
    asked = {True: [], False: []}
    for i in count():
        told, jitter = sample_dialogue(exam.seed, i, "held-out")
        turns = chat_turns(exam, told, jitter)
        for k in range(1, len(told), 2):
            before = chat_history(turns, k, exam.sampling.words_first)
            source = dialog_source(before, k, exam.system)
            asked[bool(told[k].pictures)].append(Reply(source, pictures_of(before), *told[k - 1 : k + 1]))
        if min(map(len, asked.values())) >= exam.n:
            return {wish: rows[: exam.n] for wish, rows in asked.items()}


def has_picture(reply: Reply) -> bool:
    """Whether a picture, or the description of one, is heard."""
    return bool(reply.pictures) or "(" in reply.source


def replies(exam: Exam) -> Figures:
    """Requests in stage 1's form, and the human's turns in dialogues."""
    captions = enumerate(held_out_prompts(exam, 1)[0])
    if exam.sampling.words_first:
        requests = [chat_source(exam, f"{UAS_REQUESTS[i % len(UAS_REQUESTS)]} {caption}") for i, caption in captions]
    else:
        requests = [uas_texts(caption, instruction=i % len(UAS_REQUESTS))[0] for i, caption in captions]
    turns, figures = turns_to_answer(exam), {}
    for name, wish, rows in (
        ("a caption's picture is asked for", True, [(source, ()) for source in requests]),
        ("a dialogue asks for a picture", True, turns[True]),
        ("a dialogue asks for words", False, turns[False]),
    ):
        sources, pictures = [row[0] for row in rows], [row[1] for row in rows]
        said = ask(exam, sources, pictures, sampler="ddim", steps=1)  # how the pictures look does not matter
        came = [answer.picture is not None for answer in said]
        figures[name] = {"a picture came": share(came), "right": share([picture == wish for picture in came])}
    return figures


def dialogues(exam: Exam) -> Figures:
    """A picture is asked for: what the request names counts. It is changed ("make it red."): every fact counts. It is
    described: all is true, no thing left out. A question is answered: with the facts of the dialogue's own answer."""
    turns, figures = turns_to_answer(exam), {}
    new = [r for r in turns[True] if facts_in(r.asked.text).scene]
    # Where there is no picture, the one to be changed is not heard of any more.
    changed = [r for r in turns[True] if not facts_in(r.asked.text).scene and has_picture(r)]
    wanted = {"asked for": [facts_in(r.asked.text) for r in new], "changed": [r.turn.pictures[0] for r in changed]}
    for name, rows in {"asked for": new, "changed": changed}.items():
        drawn = [said.picture for _, said in answers(exam, rows)]
        figures[f"{name}, right"] = {"samples": len(rows) / exam.n} | right_shares(look(exam, drawn), wanted[name])
    shown = [reply for reply in turns[False] if reply.asked.pictures]
    about = [r for r in turns[False] if has_picture(r) and not r.asked.pictures and facts_in(r.turn.text) != NOTHING]
    about = [r for r in about if r.asked.text not in SMALL_TALK]
    described = [right(*r.asked.pictures, facts_in(said.text))["all"] for r, said in answers(exam, shown)]
    answered = [same_answer(said.text, r.turn.text) for r, said in answers(exam, about)]
    for name, fine in {"described": described, "answered": answered}.items():
        figures[name] = {"samples": len(fine) / exam.n, "right": share(fine)}
    return figures


def same_answer(told: str, expected: str) -> bool:
    """Whether the facts are the same and both say no, or neither does."""
    return facts_in(told) == facts_in(expected) and told.startswith("no,") == expected.startswith("no,")


def answers(exam: Exam, rows: list[Reply]) -> list[tuple[Reply, Said]]:
    said = ask(exam, [reply.source for reply in rows], [reply.pictures for reply in rows])
    return list(zip(rows, said, strict=True))


# ---- the command

PARTS = {part.__name__: part for part in (people, prompts, vokens, captions, replies, dialogues, stories)}


def tables(figures: Figures) -> str:
    """Markdown: rows that have the same columns make a table. In per cent."""
    lines = []
    for columns, rows in groupby(figures.items(), key=lambda row: tuple(row[1])):
        lines += [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        for name, row in rows:
            lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in row.values())} |")
        lines.append("")
    return "\n".join(lines)


def checkpoint_for(part: str, weights: Path, wanted: Path | None, words_first: bool) -> Path | None:
    """What `--checkpoint` names; without it stage 2's for words first or for stories, if it is there, or stage 1's."""
    trained = weights / "minigpt5"
    if wanted:
        found = find_checkpoint(wanted) or find_checkpoint(trained / f"{wanted}.safetensors")
    else:
        found = shipped_checkpoint(trained, WORDS_FILES if words_first else STORY_FILES if part == "stories" else ())
    if found is None and (wanted or part not in ("prompts", "captions")):
        raise ValueError(f"{wanted or trained}: no checkpoint of MiniGPT-5's trained parts, needed for {part}")
    return found


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
    parser.set_defaults(steps=20, guidance=2.0, sampler="dpm", max_new_tokens=LONGEST, words_first=True)
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
    settings = {"seed": args.seed, **asdict(sampling)}
    record = {"settings": settings, "samples": {}, "checkpoints": {}, "figures": {}}
    for part in PARTS if "all" in args.parts else args.parts:
        checkpoint = checkpoint_for(part, args.weights, args.checkpoint, args.words_first)
        n = args.n or (STORIES if part == "stories" else SAMPLES)  # people's prompts are as many as their files hold
        options = (args.prompts, args.chats, args.seeds) if part == "people" else ()
        record["figures"][part] = figures = PARTS[part](replace(exam, n=n, checkpoint=checkpoint), *options)
        record["checkpoints"][part] = checkpoint and checkpoint.name
        record["samples"] |= {} if part == "people" else {part: n}
        counted = "" if part == "people" else f", {n} samples"
        print(f"## {part}{counted}, in per cent\n\n{tables(figures)}", flush=True)
        if args.out:
            write_json(args.out, record)


if __name__ == "__main__":
    cli.run(main)
