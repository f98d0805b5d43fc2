"""Ask MiniGPT-5: text and pictures in, text and pictures out.

    python sample.py --prompt "a red boat on the sea at night"
    python sample.py --prompt "a kite flies over the meadow." --turns 4      # a story, step by step
    python sample.py --chat                                                  # a chat in the terminal
    python sample.py --weights weights --prompt "what is this?" --image a.jpg --image b.jpg --out out/answer

The default weights are the miniature's. It knows balls, houses, trees, boats, fish, cars, stars, flowers, cats, birds,
balloons and kites, one or two in a picture; red, orange, yellow, green, blue, purple, pink and white; small and big;
left, middle and right; the sea, a meadow, the snow, a city, a desert and the mountains; day, sunset and night. It says
in words what it is going to draw (--words-first), and which words of yours it does not know.

Prints the answer and writes into OUT the pictures 0.png, 1.png ..., storyboard.png (pictures with their words),
index.html (the same as one page without other files) and answer.json:
{"segments": [{"text": ...} | {"image": "0.png", "description": ...}, ...], "seed": ..., "prompt": ...}.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from common.cli import DTYPES, can_compile, make_folder, parse, pick_device, run  # isort: skip

import torch
from PIL import Image

from common.images import read_image
from common.page import write_answer
from common.spelling import Words
from generation import (
    Sampling,
    Segments,
    add_sampling_options,
    add_words_first_option,
    answer,
    fit,
    prompt_ids,
    sampling_of,
)
from minigpt5 import MiniGPT5
from prompts import (
    STORY_REQUESTS,
    WORDS_FIRST_SYSTEM,
    Turn,
    chat_history,
    clean_caption,
    description_in,
    dialog_source,
    one_line,
    own_turn,
    plain_words,
    story_source,
    user_turn,
)
from published.loading import CHAT_FILES, STORY_FILES, given_checkpoint, shipped_checkpoint
from published.parts import load_minigpt5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to say to the model")
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="a picture with the prompt; repeatable")
    add("--turns", type=int, help="tell a story in this many answers; their pictures are read again for the next")
    add("--chat", action="store_true", help="chat: a line a turn, `/image FILE` adds a picture, an empty line ends")
    add("--checkpoint", type=Path, help="trained parts: a file or a run's folder; default: of WEIGHTS/minigpt5 "
        "stage 1's; without words first stage 2's for stories, chats and pictures that are given")  # fmt: skip
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and answer.json")
    add("--seed", type=int, default=0, help="same seed, same answer")
    add_sampling_options(parser)
    add_words_first_option(parser)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU (bench/README.md)")
    add("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch takes by itself")
    add("--int8", action="store_true", help="hold the language model's matrices in 8 bits")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model; default: on for --chat on a "
        "GPU, else off")  # fmt: skip
    args = parse(parser, "sample")
    args.prompt = args.prompt and valid(args.prompt).strip()
    if not args.prompt and not args.chat:
        parser.error("--prompt is needed, or --chat")
    if args.chat and args.turns is not None:
        parser.error("--chat and --turns exclude each other: the second tells a story")
    if args.turns is not None and args.turns < 1:
        parser.error("--turns is at least 1")
    if args.threads < 0:
        parser.error("--threads is at least 0")
    return args


def valid(text: str) -> str:
    """Typed text with "?" for each lone surrogate, Python's stand-in for a byte that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


class Conversation:
    """The turns so far, in the forms that the two stages were trained to read.

    Every text comes in through `turn` or `caption`, which clean it and make special tokens in it plain text.
    """

    def __init__(self, model: MiniGPT5, sampling: Sampling, seed: int, words: Words | None = None):
        self.model, self.sampling, self.turns = model, sampling, []
        self.words_first = sampling.words_first
        self.words = words if self.words_first else None
        self.system = WORDS_FIRST_SYSTEM if self.words_first else model.system
        self.generator = torch.Generator().manual_seed(seed)

    def turn(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> Turn:
        return user_turn(self.model.tokenizer, text, self.words, pictures)

    def report_unknown(self, text: str) -> None:
        """Says which words of a text are not in the world of the weights, where these bring a list of it."""
        if self.words and (missing := self.words.missing(plain_words(text))):
            print(f"not in the miniature's world: {', '.join(missing)}", file=sys.stderr)

    def own_turn(self, segments: Segments) -> Turn:
        return own_turn(self.model.tokenizer, *split(segments))

    def caption(self, text: str) -> Segments:
        """Stage 1's answer to the bare words, cleaned as its captions were: a picture."""
        return self.ask(prompt_ids(self.model, self.model.tokenizer.plain(clean_caption(text) or one_line(text))), [])

    def reply(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> Segments:
        """A turn of a chat and the answer to it. Where that fails, the chat stays as it was."""
        turns = [*self.turns, self.turn(text, pictures)]
        k = len(turns)
        heard = chat_history(turns, k, self.words_first)
        return self.go_on(turns, heard, lambda heard: dialog_source(heard, k, self.system))

    def begin(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> None:
        """The first sentence of a story, and perhaps its picture."""
        self.turns = [self.turn(text, pictures)]

    def next_step(self) -> Segments:
        """The next answer of a story: a picture for its first sentence if it has none, then step after step."""
        *before, last = self.turns
        if not before and not last.pictures and not description_in(last.text):
            request = story_source([], STORY_REQUESTS["image"][0].format(last.text), self.system)
            segments = self.ask(prompt_ids(self.model, request), [], force_image=not self.words_first)
            self.turns = [self.own_turn([last.text, *split(segments)[1]])]
            return segments
        request = STORY_REQUESTS["text+image"][0]
        return self.go_on(self.turns, self.turns, lambda told: story_source(told, request, self.system))

    def go_on(self, turns: list[Turn], heard: list[Turn], source: Callable[[list[Turn]], str]) -> Segments:
        """The answer to the `source` of the turns `heard`; it becomes the turn after `turns`. The oldest turns are left
        out where they would leave too little room for it."""
        first, ids = fit(self.model, self.sampling, (source(heard[k:]) for k in range(len(heard))))
        segments = self.ask(ids, [picture for turn in heard[first:] for picture in turn.pictures])
        self.turns = [*turns, self.own_turn(segments)]
        return segments

    def ask(self, ids: list[int], pictures: list[Image.Image], **otherwise) -> Segments:
        return answer(self.model, [ids], [pictures], replace(self.sampling, **otherwise), [self.generator])[0]


def split(segments: Segments) -> tuple[str, tuple[Image.Image, ...]]:
    """An answer's words and its pictures."""
    words = " ".join(segment for segment in segments if isinstance(segment, str))
    return words, tuple(segment for segment in segments if not isinstance(segment, str))


def show(segments: Segments, out: Path, first: int = 0) -> int:
    """Prints an answer whose first picture has the number `first`; returns the number after its last one."""
    for segment in segments:
        if isinstance(segment, str):
            print(segment)
        else:
            print(f"[{out / f'{first}.png'}] {segment.info.get('description', '')}".rstrip())
            first += 1
    return first


def chat(conversation: Conversation, args: argparse.Namespace, pictures: list[Image.Image]) -> None:
    """Answers --prompt, if it is given, then line after line of the terminal until an empty one."""
    said, count = [], 0
    for line in chain([args.prompt] if args.prompt else [], iter(read_line, "")):
        try:
            if line.startswith("/image "):
                pictures.append(read_image(line.removeprefix("/image ").strip()))
                continue
            given, pictures = pictures, []
            conversation.report_unknown(line)
            segments = conversation.reply(line, tuple(given))
        except ValueError as error:  # a file that is no picture, or more words than there is room for
            print(f"error: {error}", file=sys.stderr)
            continue
        said += [f"> {line}", *given, *segments]
        write_answer(said, "chat", args.seed, args.out)
        count = show(segments, args.out, count + len(given))


def read_line() -> str:
    try:
        return valid(input("> ")).strip()
    except EOFError:  # the end of what was piped in, or Ctrl-D
        return ""


def main() -> None:
    args = arguments()
    pictures, out = [read_image(path) for path in args.image], make_folder(args.out)
    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = STORY_FILES if args.turns is not None else CHAT_FILES if args.chat or pictures else ()
    shipped = shipped_checkpoint(args.weights / "minigpt5", () if args.words_first else names)
    checkpoint = given_checkpoint(args.checkpoint) if args.checkpoint else shipped
    torch.manual_seed(args.seed)  # of the embedding rows and the mapper, where there is no checkpoint
    reads = bool(pictures) or args.chat or args.turns is not None
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    if args.compile is None:  # compiling takes minutes: for one answer that is too long
        args.compile = args.chat and can_compile(device)
    sampling = sampling_of(args)
    model = load_minigpt5(args.weights, checkpoint, dtype=dtype, device=device, read_pictures=reads, int8=args.int8)
    conversation = Conversation(model.eval(), sampling, args.seed, Words.of(args.weights))
    loaded = time.perf_counter()
    if checkpoint is None:
        print("no trained checkpoint found: the embedding rows and the mapper are random, pictures will be noise")
    if args.compile:
        print("compiling takes minutes: at the first words and picture, and when a chat outgrows 256, 512 ... tokens")

    if args.chat:
        return chat(conversation, args, pictures)
    conversation.report_unknown(args.prompt)
    if args.turns is not None:
        conversation.begin(args.prompt, tuple(pictures))
        segments, count = [args.prompt, *pictures], show([args.prompt, *pictures], out)
        for _ in range(args.turns):
            step = conversation.next_step()
            segments += step
            write_answer(segments, args.prompt, args.seed, out)
            count = show(step, out, count)
    else:
        replies = bool(pictures) or sampling.words_first or model.lora or model.prefix
        segments = conversation.reply(args.prompt, tuple(pictures)) if replies else conversation.caption(args.prompt)
        write_answer(segments, args.prompt, args.seed, out)
        show(segments, out)
    answered = time.perf_counter()
    print(f"loaded in {loaded - start:.1f} s, answered in {answered - loaded:.1f} s, see {out / 'answer.json'}")


if __name__ == "__main__":
    run(main)
