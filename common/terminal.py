"""A chat in the terminal, and how answers are printed there."""

import sys
from itertools import chain
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.images import read_image
from common.page import write_answer


class Terminal:
    """Prints answers and numbers their pictures. On a terminal the words are seen as they come, and a bar where the
    pictures take longer than two seconds."""

    def __init__(self, session, out: Path):
        self.tokenizer, self.out, self.count = session.model.tokenizer, out, 0
        self.printed, self.bar = "", None
        session.watch = self.watch if sys.stdout.isatty() else None

    def watch(self, ids: list[int] | None = None, done: int = 0, steps: int = 0, latents: object = None) -> None:
        if ids is not None:
            words = self.tokenizer.decode(ids).strip().rstrip("#\N{REPLACEMENT CHARACTER}").rstrip()
            if words.startswith(self.printed):
                print(words.removeprefix(self.printed), end="", flush=True)
                self.printed = words
            return
        if done == 1:
            self.bar = tqdm(total=steps, desc="pictures", unit="step", delay=2, leave=False, disable=None)
        self.bar.update()
        if done == steps:
            self.bar.close()

    def show(self, *segments: str | Image.Image) -> None:
        """Prints those words of an answer that are not on the screen yet, and the files of its pictures."""
        if self.printed:
            print()
        for segment in segments:
            words = segment if isinstance(segment, str) else f"({segment.info.get('description', '')})"
            if words in self.printed:  # of the first answer, whose words were seen as they came
                self.printed = self.printed.replace(words, "", 1)
            elif words != "()":
                print(words)
            if not isinstance(segment, str):
                print(f"[{self.out / f'{self.count}.png'}]")
                self.count += 1
        self.printed = ""


COMMANDS = """/image FILE   show a picture with your next line
/new          begin a new chat
/help         list these commands
/quit         end the chat; so does an empty line"""


def chat(session, out: Path, first: str, seed: int, pictures: list[Image.Image]) -> None:
    """Answers the line `first`, if it is not empty, then line after line of the terminal until an empty one. session:
    sample.Session, whose chats begin with `seed`. The first line goes with the pictures."""
    turns, terminal = [], Terminal(session, out)
    print("Ask for a picture, then for changes. /help lists the commands.")
    for line in chain([first] if first else [], iter(read_line, "")):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                session.new(seed)
                print("A new chat begins.")
            elif command == "/image":
                pictures.append(read_image(rest.strip()))
                print(f"{rest.strip()} goes with your next line.")
            elif line.startswith("/"):
                print(COMMANDS)
            else:
                attachments, pictures = pictures, []
                segments = session.chat(line, tuple(attachments))
                turns += [("you", [line, *attachments]), ("model", segments)]
                write_answer(turns, "chat", seed, out)
                terminal.count += len(attachments)
                terminal.show(*segments)
        except ValueError as error:  # a file that is no picture, or more words than there is room for
            print(f"error: {error}", file=sys.stderr)


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:  # the end of what was piped in, or Ctrl-D
        return ""


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. ValueError where it has none."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # UTF-16: Windows PowerShell's
    lines = map(str.strip, content.decode(encoding, "replace").splitlines())
    if not (prompts := [line for line in lines if line]):
        raise ValueError(f"{path}: no prompt in it")
    return prompts
