"""Ask MiniGPT-5: text and pictures in, text and pictures out.

    python sample.py --prompt "a red boat on the sea at night"
    python sample.py --prompt "a kite flies over the meadow." --turns 4      # a story, step by step
    python sample.py --chat                                                  # a talk in the terminal
    python sample.py --weights weights --prompt "what is this?" --image a.jpg --image b.jpg --out out/answer

Prints the answer and writes into OUT the pictures 0.png, 1.png ..., storyboard.png (pictures with their words),
index.html (the same as one page without other files) and answer.json:
{"segments": [{"text": ...} | {"image": "0.png"}, ...], "seed": ..., "prompt": ...}.
"""

import argparse
import base64
import html
import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from common.cli import DTYPES, add_weights_option, can_compile, make_folder, parse, pick_device, run
from common.files import write_json, write_text
from common.images import draw_grid, read_image, save_image
from generation import Sampling, add_sampling_options, answer, room_after, room_wanted, sampling_of
from minigpt5 import MiniGPT5, load_minigpt5
from prompts import STORY_REQUESTS, Turn, clean_caption, dialog_source, history_start, one_line, story_source
from published.checkpoints import STORY_FILES, TALK_FILES, given_checkpoint, shipped_checkpoint
from published.loading import WeightsError, read_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to say to the model")
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="a picture with the prompt; repeatable")
    add("--turns", type=int, help="tell a story in this many answers; their pictures are read again for the next")
    add("--chat", action="store_true", help="talk: a line a turn, `/image FILE` adds a picture, an empty line ends")
    add_weights_option(parser)
    add("--checkpoint", type=Path, help="trained parts: a file or a run's folder; default: of WEIGHTS/minigpt5 "
        "stage 2's for stories, talks and pictures that are given, else stage 1's")  # fmt: skip
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and answer.json")
    add("--seed", type=int, default=0, help="same seed, same answer")
    add_sampling_options(parser)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU (README, Memory)")
    add("--int8", action="store_true", help="the language model's matrices in 8 bits")
    add("--offload", action="store_true", help="keep on the host what is not in use: for a GPU of 16 GB")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model; default: on for --chat on a "
        "GPU, else off")  # fmt: skip
    args = parse(parser, "sample")
    args.prompt = args.prompt and valid(args.prompt).strip()
    if not args.prompt and not args.chat:
        parser.error("--prompt is needed, or --chat")
    if args.chat and args.turns is not None:
        parser.error("--chat is a talk, --turns tells a story: one of them")
    if args.offload and args.compile:
        parser.error("--offload cannot be combined with --compile: compiled code needs weights that stay in place")
    if args.turns is not None and args.turns < 1:
        parser.error("--turns is at least 1")
    return args


def valid(text: str) -> str:
    """Typed text with "?" for each lone surrogate, Python's stand-in for a byte that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def spoken(segments: list[str | Image.Image]) -> tuple[str, tuple[Image.Image, ...]]:
    """An answer's words and its pictures."""
    words = " ".join(segment for segment in segments if isinstance(segment, str))
    return words, tuple(segment for segment in segments if not isinstance(segment, str))


class Conversation:
    """What was said so far, in the forms that the stages were trained to read. Words that look like special tokens are
    taken as plain text."""

    def __init__(self, model: MiniGPT5, sampling: Sampling, seed: int):
        self.model, self.sampling, self.turns = model, sampling, []
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> None:
        self.turns.append(Turn(self.model.tokenizer.plain(one_line(text)), pictures))

    def ask(self, prompt: str, turns: list[Turn], **otherwise) -> list[str | Image.Image]:
        pictures = [picture for turn in turns for picture in turn.pictures]
        return answer(self.model, [prompt], [pictures], replace(self.sampling, **otherwise), [self.generator])[0]

    def caption(self) -> list[str | Image.Image]:
        """Stage 1's form: the bare words, cleaned as its captions were, which it answers with a picture."""
        text = self.turns[-1].text
        return self.ask(self.model.tokenizer.plain(clean_caption(text) or text), [])

    def reply(self) -> list[str | Image.Image]:
        """The answer to the last turn of a talk, which becomes the next turn."""
        k = len(self.turns)
        return self.go_on(self.turns[history_start(k) :], lambda heard: dialog_source(heard, k, self.model.system))

    def next_step(self) -> list[str | Image.Image]:
        """A story goes on: first a picture for its first sentence if it has none, then step after step."""
        *before, last = self.turns
        if not before and not last.pictures:
            request = story_source([], STORY_REQUESTS["image"][0].format(last.text), self.model.system)
            segments = self.ask(request, [], force_image=True)  # without one it would not begin
            self.turns = [Turn(last.text, spoken(segments)[1])]
            return segments
        request = STORY_REQUESTS["text+image"][0]
        return self.go_on(self.turns, lambda told: story_source(told, request, self.model.system))

    def go_on(self, turns: list[Turn], source: Callable[[list[Turn]], str]) -> list[str | Image.Image]:
        """The answer to the `source` of the turns, which becomes the next turn. The oldest turns are left out where
        they leave too little room for it."""
        needed = room_wanted(self.model, self.sampling)
        while len(turns) > 1 and room_after(self.model, source(turns)) < needed:
            turns = turns[1:]
        segments = self.ask(source(turns), turns)
        self.add(*spoken(segments))
        return segments


def write_answer(segments: list[str | Image.Image], prompt: str, seed: int, out: Path) -> None:
    """Pictures, storyboard, page and answer.json, each under a temporary name first. Pictures of an older answer in the
    folder that are not written over are removed."""
    old = pictures_of(out / "answer.json")
    described, columns, words = [], [], ""
    for segment in segments:
        if isinstance(segment, str):
            described.append({"text": segment})
            words = f"{words} {segment}".strip()
        else:
            name = f"{len(columns)}.png"
            save_image(segment, out / name)
            described.append({"image": name})
            columns.append((words, [segment]))
            words = ""
    if words and columns:
        columns[-1] = (f"{columns[-1][0]} {words}".strip(), columns[-1][1])
    if columns:
        draw_grid(columns, out / "storyboard.png", side=min(max(192, columns[0][1][0].width), 512))
    body = "".join(paragraph(segment) for segment in segments)
    style = "body{font:18px serif;max-width:40em;margin:2em auto}img{width:100%;max-width:32em;image-rendering:auto}"
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(prompt)}</title><style>{style}</style>{body}\n'
    write_text(out / "index.html", page)
    write_json(out / "answer.json", {"segments": described, "seed": seed, "prompt": prompt})
    for name in old - pictures_of(out / "answer.json"):
        (out / name).unlink(missing_ok=True)


def pictures_of(answer: Path) -> set[str]:
    """The files that came with an answer.json: its pictures and, where it has any, their storyboard."""
    try:
        segments = read_json(answer)["segments"]
        names = {str(segment["image"]) for segment in segments if "image" in segment}
    except (WeightsError, KeyError, TypeError):
        return set()
    names = {name for name in names if re.fullmatch(r"\d+\.png", name)}
    return names | {"storyboard.png"} if names else names


def paragraph(segment: str | Image.Image) -> str:
    """HTML of a piece of text or of a picture, which is put inside the page."""
    if isinstance(segment, str):
        return f"<p>{html.escape(segment)}</p>"
    buffer = io.BytesIO()
    segment.save(buffer, "PNG")
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'


def show(segments: list[str | Image.Image], out: Path, pictures: int) -> int:
    """Print an answer, `pictures` of which came before; returns how many have come now."""
    for segment in segments:
        if isinstance(segment, str):
            print(segment)
        else:
            print(f"[{out / f'{pictures}.png'}]")
            pictures += 1
    return pictures


def read_line() -> str:
    try:
        return valid(input("> ")).strip()
    except EOFError:  # the end of what was piped in, or Ctrl-D
        return ""


def chat(conversation: Conversation, first: str | None, pictures: list[Image.Image], out: Path, seed: int) -> None:
    said, count, turns = [], 0, 0
    while line := first or read_line():
        first = None
        try:
            if line.startswith("/image "):
                pictures.append(read_image(line.removeprefix("/image ").strip()))
                continue
            conversation.add(line, tuple(pictures))
            segments = conversation.reply()
        except ValueError as error:  # no picture, or more words than there is room for: the talk goes on without
            print(f"error: {error}", file=sys.stderr)
            if len(conversation.turns) > 2 * turns:  # it was said with these pictures
                conversation.turns, pictures = conversation.turns[: 2 * turns], []
            continue
        said += [f"> {line}", *pictures, *segments]
        count, pictures, turns = show(segments, out, count + len(pictures)), [], turns + 1
        write_answer(said, "talk", seed, out)


def main() -> None:
    args = arguments()
    pictures = [read_image(path) for path in args.image]
    out = make_folder(args.out)
    start = time.perf_counter()
    names = STORY_FILES if args.turns is not None else TALK_FILES if args.chat or pictures else ()
    shipped = shipped_checkpoint(args.weights / "minigpt5", names)
    checkpoint = given_checkpoint(args.checkpoint) if args.checkpoint else shipped
    torch.manual_seed(args.seed)  # of the voken rows and the mapper, where there is no checkpoint
    reads = bool(pictures) or args.chat or args.turns is not None
    device = pick_device(args.device)
    if args.compile is None:  # it takes minutes: for one answer that is too long
        args.compile = args.chat and can_compile(device) and not args.offload
    sampling = sampling_of(args)
    model = load_minigpt5(
        args.weights,
        checkpoint,
        dtype=DTYPES[args.dtype],
        device=device,
        read_pictures=reads,
        int8=args.int8,
        offload=args.offload,
    ).eval()
    loaded = time.perf_counter()
    if checkpoint is None:
        print("no trained checkpoint found: the voken rows and the mapper are random, pictures will be noise")

    if args.compile:
        print("compiling takes minutes: at the first words and picture, and when a talk outgrows 256, 512 ... tokens")
    conversation = Conversation(model, sampling, args.seed)
    if args.chat:
        return chat(conversation, args.prompt, pictures, out, args.seed)
    conversation.add(args.prompt, tuple(pictures))
    if args.turns is not None:
        segments = [args.prompt, *pictures]
        count = show(segments, out, 0)
        for _ in range(args.turns):
            step = conversation.next_step()
            count, segments = show(step, out, count), segments + step
            write_answer(segments, args.prompt, args.seed, out)
    else:
        segments = conversation.reply() if pictures or model.lora or model.prefix else conversation.caption()
        show(segments, out, 0)
        write_answer(segments, args.prompt, args.seed, out)
    print(
        f"loaded in {loaded - start:.1f} s, answered in {time.perf_counter() - loaded:.1f} s, see {out / 'answer.json'}"
    )


if __name__ == "__main__":
    run(main)
