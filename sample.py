"""Ask MiniGPT-5: text and pictures in, text and pictures out.

    python sample.py "a red boat on the sea at night"
    python sample.py "a cat in the snow" --count 8                    # eight seeds on one sheet
    python sample.py --prompts prompts.txt --count 4                  # a prompt a line
    python sample.py "a kite flies over the meadow." --turns 4        # a story, step by step
    python sample.py --chat                                           # a chat in the terminal
    python sample.py "what is this?" --image a.jpg --image b.jpg --weights weights --out out/answer

The default weights are the miniature's. It knows balls, houses, trees, boats, fish, cars, stars, flowers, cats, birds,
balloons and kites, one or two in a picture; red, orange, yellow, green, blue, purple, pink and white; small and big;
left, middle and right; the sea, a meadow, the snow, a city, a desert and the mountains; day, sunset and night. It says
in words what it is going to draw (--words-first), and which words of yours it does not know.

Prints the answer and writes into OUT the pictures 0.png, 1.png ..., storyboard.png (pictures with their words),
index.html (the same as one page without other files) and answer.json: {"segments": [{"text": ...} |
{"image": "0.png", "description": ...}, ...], "seed": ..., "prompt": ...}; what you said has "from": "you".

The same from Python:

    from sample import load
    model = load()                                       # the miniature; load("weights") for others
    model.draw("a red boat on the sea").save("boat.png")
    model.chat("draw a cat in the snow"), model.chat("now at night")
    for step in model.story("a kite flies over the meadow.", turns=4):
        print(step)                                      # text and pictures (PIL.Image) in turn
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from common.cli import DTYPES, FROM_0, FROM_1, MINIATURE, can_compile, make_folder  # isort: skip
from common.cli import parse, pick_device, run, suited_options  # isort: skip

import torch
from PIL import Image

import prompts
from common.images import read_image
from common.page import write_answer
from common.terminal import Terminal, chat, read_prompts
from common.texts import Words, clean_caption
from generation import Sampling, Segments, answer, prompt_ids, room_after, room_wanted, split
from minigpt5 import MiniGPT5
from prompts import Turn
from published.loading import CHAT_FILES, STORY_FILES, WORDS_FILES, given_checkpoint, shipped_checkpoint
from published.parts import load_minigpt5

BATCH = 8  # prompts that are answered at once
SHIPPED = {"draw": (), "chat": CHAT_FILES, "story": STORY_FILES}  # stage 2's files, by what the model is for


def load(
    weights: Path | str = MINIATURE,
    checkpoint: Path | str | None = None,
    purpose: str = "draw",
    device: torch.device | str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    read_pictures: bool = True,
    int8: bool = False,
    sampling: Sampling | None = None,
    **changes,
) -> "Session":
    """A model to draw, chat and tell stories with.

    weights: a folder of the published layout. checkpoint: a file or a run's folder; default: in `weights`, with
    words_first that of `train_mls.py --words-first`, else stage 2's for the `purpose` "chat" or "story"; stage 1's
    where that is missing. read_pictures: load the image encoder. int8: hold the language model's matrices in 8 bits.
    sampling: default: the settings of the weights. changes: fields of `Sampling` that replace its own. ValueError where
    something is missing.
    """
    weights = Path(weights)
    sampling = sampling or Sampling.of(suited_options(weights, "sample"))
    sampling = replace(sampling, **changes) if changes else sampling
    files = WORDS_FILES if sampling.words_first else SHIPPED[purpose]
    trained = given_checkpoint(Path(checkpoint)) if checkpoint else shipped_checkpoint(weights / "minigpt5", files)
    if trained is None:
        print("no trained checkpoint found: voken rows and mapper are untrained, pictures will be noise")
    torch.manual_seed(seed)  # the mapper starts at random where there is no checkpoint
    read_pictures &= not sampling.words_first or (weights / "blip2").is_dir()  # words first needs no image encoder
    device = pick_device(device) if isinstance(device, str) else device
    options = {"dtype": DTYPES[dtype], "device": device, "read_pictures": read_pictures, "int8": int8}
    return Session(load_minigpt5(weights, trained, **options).eval(), sampling, seed, Words.of(weights))


class Session:
    """A model, how its answers are sampled, and the turns of one chat or story. Every text is cleaned and escaped, so
    that no special token is read in it.

    watch: is called while an answer is made (`generation.Watch`).
    """

    def __init__(self, model: MiniGPT5, sampling: Sampling, seed: int, words: Words | None = None):
        self.model, self.sampling, self.watch = model, sampling, None
        self.words = words if sampling.words_first else None
        self.system = prompts.WORDS_FIRST_SYSTEM if sampling.words_first else model.system
        self.new(seed)

    def new(self, seed: int = 0) -> None:
        """Begin a new chat."""
        self.turns, self.generator = [], torch.Generator().manual_seed(seed)

    def draw(self, prompt: str, seed: int = 0) -> Image.Image:
        """The picture for a prompt, without regard to the turns. ValueError if the answer has none."""
        words, pictures = split(self.answers([prompt], [seed])[0])
        if not pictures:
            raise ValueError(f"no picture was drawn for {prompt!r}; the answer was {words!r}")
        return pictures[0]

    def answers(self, texts: list[str], seeds: list[int], pictures: tuple[Image.Image, ...] = ()) -> list[Segments]:
        """An answer to each text by itself, with its seed. The pictures come with every one of them."""
        model, results = self.model, []
        if pictures or self.sampling.words_first or model.lora or model.prefix:
            turns = {text: self.user_turn(text, pictures) for text in dict.fromkeys(texts)}
            ids = [prompt_ids(model, prompts.dialog_source([turns[text]], 1, self.system)) for text in texts]
        else:  # stage 1 reads bare captions
            captions = [clean_caption(text) or prompts.one_line(text) for text in texts]
            ids = [prompt_ids(model, model.tokenizer.escape(caption)) for caption in captions]
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + BATCH]]
            results += answer(model, part, [list(pictures)] * len(part), self.sampling, generators, watch=self.watch)
        return results

    def chat(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> Segments:
        """The answer to the next turn of the chat. Where that fails, the chat stays as it was."""
        turns = [*self.turns, self.user_turn(text, pictures)]
        k = len(turns)
        history = prompts.chat_history(turns, k, self.sampling.words_first)
        return self.continue_with(turns, history, lambda before: prompts.dialog_source(before, k, self.system))

    def story(self, text: str, turns: int = 4, pictures: tuple[Image.Image, ...] = ()) -> Iterator[Segments]:
        """A new story that begins with this sentence, and perhaps its picture, told in so many answers."""
        self.begin(text, pictures)
        for _ in range(turns):
            yield self.next_step()

    def begin(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> None:
        self.turns = [self.user_turn(text, pictures)]

    def next_step(self) -> Segments:
        """The next answer of a story: a picture for its first sentence if it has none, then step after step, each of
        which reads the pictures before it."""
        *before, last = self.turns
        if not before and not last.pictures and not prompts.description_in(last.text):
            request = prompts.STORY_REQUESTS["image"][0].format(last.text)
            ids = prompt_ids(self.model, prompts.story_source([], request, self.system))
            segments = self.ask(ids, [], force_image=not self.sampling.words_first)
            self.turns = [self.model_turn([last.text, *split(segments)[1]])]
            return segments
        request = prompts.STORY_REQUESTS["text+image"][0]
        return self.continue_with(self.turns, self.turns, lambda b: prompts.story_source(b, request, self.system))

    def user_turn(self, text: str, pictures: tuple[Image.Image, ...] = ()) -> Turn:
        """What somebody typed, its typos corrected where the weights bring a list of words. Words that the model does
        not know are printed to standard error."""
        text, unknown = self.words.read(text) if self.words else (text, [])
        if unknown:
            print(f"not in the miniature's world: {', '.join(unknown)}", file=sys.stderr)
        return prompts.user_turn(self.model.tokenizer, text, pictures)

    def model_turn(self, segments: Segments) -> Turn:
        return prompts.model_turn(self.model.tokenizer, *split(segments))

    def continue_with(self, turns: list[Turn], history: list[Turn], source: Callable[[list[Turn]], str]) -> Segments:
        """The answer to the prompt source(history), which becomes the turn after `turns`. The oldest turns of the
        history are left out where they would leave too little room for the answer."""
        for first in range(len(history)):
            ids = prompt_ids(self.model, source(history[first:]))
            if room_after(self.model, ids) >= room_wanted(self.model, self.sampling):
                break
        segments = self.ask(ids, list(prompts.pictures_of(history[first:])))
        self.turns = [*turns, self.model_turn(segments)]
        return segments

    def ask(self, ids: list[int], pictures: list[Image.Image], **changes) -> Segments:
        sampling = replace(self.sampling, **changes)
        return answer(self.model, [ids], [pictures], sampling, [self.generator], watch=self.watch)[0]


# ---- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_mutually_exclusive_group().add_argument
    add("text", nargs="?", metavar="PROMPT", help="what to say to the model")
    add("--prompt", help="the same as PROMPT")
    add("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line; each is answered by itself")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--count", type=FROM_1, default=1, help="answers to each prompt, with the seeds SEED, SEED + 1 ...")
    add("--turns", type=FROM_1, help="tell a story in this many answers; their pictures are read again for the next")
    add("--chat", action="store_true", help="chat in the terminal, a line a turn; /help lists the commands")
    add = parser.add_argument
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="a picture with the prompt; repeatable")
    add("--checkpoint", type=Path, help="trained parts: a file or a run's folder; default: in WEIGHTS/minigpt5 "
        "mls-words with --words-first, stage 2's with --turns, --chat, --image; if missing, stage 1's")  # fmt: skip
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and answer.json")
    add("--seed", type=int, default=0, help="same seed, same answer")
    add("--threads", type=FROM_0, default=0, help="CPU threads; 0: as many as PyTorch takes by itself")
    add("--int8", action="store_true", help="hold the language model's matrices in 8 bits")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model; default: on for --chat on a "
        "GPU, else off")  # fmt: skip
    args = parse(parser, "sample", Sampling, words_first=True)
    typed = args.prompt or args.text or ""
    args.prompt = typed.encode("utf-8", "replace").decode().strip()  # a terminal can pass bytes that are no UTF-8
    if not (args.prompt or args.prompts or args.chat):
        parser.error("a PROMPT is needed, or --prompts, or --chat")
    if args.prompts and (args.chat or args.turns):
        parser.error("--prompts is for single answers, not for --chat or --turns")
    return args


def main() -> None:
    args = arguments()
    pictures, out = [read_image(path) for path in args.image], make_folder(args.out)
    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.compile is None:  # compiling takes minutes: for one answer that is too long
        args.compile = args.chat and can_compile(args.device)
    purpose = "story" if args.turns else "chat" if args.chat or pictures else "draw"
    options = {name: getattr(args, name) for name in ("weights", "checkpoint", "device", "dtype", "seed", "int8")}
    session = load(purpose=purpose, read_pictures=purpose != "draw", sampling=Sampling.of(vars(args)), **options)
    loaded = time.perf_counter()
    if args.compile:
        print("compiling takes minutes: at the first words and picture, and when a chat outgrows 256, 512 ... tokens")

    if args.chat:
        return chat(session, out, args.prompt, args.seed, pictures)
    texts, terminal = [args.prompt] if args.prompt else read_prompts(args.prompts), Terminal(session, out)
    if args.turns:
        turns = [("you", [args.prompt, *pictures])]
        terminal.show(args.prompt, *pictures)
        for segments in session.story(args.prompt, args.turns, tuple(pictures)):
            turns.append(("model", segments))
            write_answer(turns, args.prompt, args.seed, out)
            terminal.show(*segments)
    else:
        count, turns = args.count, []
        seeds = [args.seed + k for k in range(count)] * len(texts)
        answers = session.answers([text for text in texts for _ in range(count)], seeds, tuple(pictures))
        for number, text in enumerate(texts):
            turns += [("you", [text])] if len(answers) > 1 else []
            turns.append(("model", list(chain(*answers[number * count : (number + 1) * count]))))
        write_answer(turns, args.prompt or args.prompts.name, args.seed, out)
        terminal.show(*chain(*(segments for _, segments in turns)))
    answered = time.perf_counter()
    print(f"loaded in {loaded - start:.1f} s, answered in {answered - loaded:.1f} s, see {out / 'answer.json'}")


if __name__ == "__main__":
    run(main)
