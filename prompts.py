"""Every string that MiniGPT-5 reads: the texts of stage 1, the forms of stories and dialogues, the marks between them.

    task         source                                                             target
    caption      the caption, or UAS_SYSTEM, a request and the caption              vokens ###
    image        steps before k, "Generate an image ...: text of k"                 vokens ###
    text+image   steps before k, "What should happen then?"                         text of k, vokens ###
    text         steps before k, "Tell me ... by this image:" and k's picture       text of k ###
    reply        a dialogue's previous exchange, and its current one up to turn k   text of k, its vokens if any ###

A caption is stage 1's (UAS); "image", "text+image" and "text" are stage 2's tasks (MLS) at step k of a story. The marks
(###Human:, <Img> ...) and each task's first request are the released code's, the other texts are our own.

A language model other than Vicuna may have its own chat template: its tokenizer translates these marks into it
(published/byte_pairs.py). How the released checkpoints' prompts were worded is in published/convert.py.

A text of the outside world is cleaned and escaped once, where it enters: `clean_caption` or `one_line` cleans it, and
`Tokenizer.escape` escapes what would be read as a special token. The readers of tars and sample.py do this for turns.
A caption is cleaned by its reader and escaped when its prompt is made, since Stable Diffusion's text encoder, for which
nothing in it is special, reads it too. The functions here expect texts that are clean and escaped.
"""

import re
from typing import NamedTuple

from common.tokenizer import Tokenizer

END = " ###"  # ends every answer
SPEAKERS = ("###Human:", "###Assistant:")
PICTURE_MARK = "<Img><ImageHere></Img>"  # where the model reads a picture

UAS_SYSTEM = "You will be able to generate image according to command."
UAS_REQUESTS = (
    "draw this for me:",
    "please make a picture of",
    "show me what this looks like:",
    "I would like to see an image of",
    "paint the following scene:",
    "create a photo that fits these words:",
    "turn this description into an image:",
)

MLS_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. "
    "You will be able to see the images once I provide it to you. "
)


class System(NamedTuple):
    """The sentences that open every prompt, and what ends each turn of a dialogue."""

    text: str
    separator: str = "\n"


STORY_SYSTEM = System(MLS_SYSTEM + "Please look at the images and tell the story.")
DIALOG_SYSTEM = System(MLS_SYSTEM + "Please talk with me and show images where they fit.")
WORDS_FIRST_SYSTEM = System("Put every picture into words first.")

STORY_REQUESTS = {  # {}: the step's text, or its picture
    "image": ("Generate an image with the scene description: {}", "Draw the scene that is described here: {}"),
    "text+image": ("What should happen then?", "Continue the story with an image.", "Show and tell me the next scene."),
    "text": ("Tell me the next scene description by this image: {}", "What does the story tell about this image: {}"),
}
TASKS = tuple(STORY_REQUESTS)


# ---- cleaning


def one_line(text: str) -> str:
    """A turn's text on one line, in valid UTF-8, and without "###", which would end the turn."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub("#(?=##)", "# ", " ".join(text.split()))


# ---- words first

DESCRIPTION = re.compile(r"\(([^()]+)\)")


def description_in(text: str) -> str | None:
    """The description of a picture that a text of the language model has in parentheses, or None. The signs with which
    special tokens begin (<, [ and #) become spaces."""
    match = DESCRIPTION.search(text)
    return match and re.sub(r"[<\[#]", " ", match[1]).strip()


# ---- stage 1


def uas_texts(caption: str, vokens: int = 8, instruction: int | None = None) -> tuple[str, str]:
    """Caption -> (source, target). `instruction` is the number of a request phrasing; None: the bare caption."""
    if instruction is not None:
        caption = f"{UAS_SYSTEM}###Human: {UAS_REQUESTS[instruction]} {caption} ###Assistant:"
    return caption, "".join(f"[IMG{i}]" for i in range(vokens)) + END


# ---- stage 2


class Turn(NamedTuple):
    """A turn of a dialogue or a step of a story."""

    text: str  # clean and escaped
    pictures: tuple = ()  # whatever stands for its pictures: images, facts, members of a tar


class Example(NamedTuple):
    """A prompt and its answer, with the pictures that the placeholders and the vokens stand for, in order."""

    source: str
    target: str
    inputs: tuple = ()
    outputs: tuple = ()
    ids: tuple = ()  # the token ids of source and target, once they are encoded


def with_pictures(turn: Turn, mark: str) -> str:
    """A turn's text, and `mark` for each of its pictures."""
    return f"{turn.text} {mark * len(turn.pictures)}".strip()


def pictures_of(turns: list[Turn]) -> tuple:
    return tuple(picture for turn in turns for picture in turn.pictures)


def story_source(before: list[Turn], request: str, system: System | None = None) -> str:
    """The steps of a story so far and a request, which may hold picture marks of its own. `system` replaces
    STORY_SYSTEM for a checkpoint that was trained with other sentences (`MiniGPT5.system`).

    A space stands between two texts that no picture separates: together they could make a special token.
    """
    story = "".join(turn.text + (PICTURE_MARK * len(turn.pictures) or " ") for turn in before).rstrip(" ")
    return f"{(system or STORY_SYSTEM).text}###Human:{story}" + ("\n" if story else "") + f" {request} ###Assistant:"


def story_example(
    before: list[Turn], turn: Turn, task: str, phrase: int, vokens: str, system: System | None = None
) -> Example:
    """The step `turn` of a story after the steps before it, for `task`. phrase: any integer; modulo the number of
    wordings it chooses that of the request."""
    requests, content = STORY_REQUESTS[task], PICTURE_MARK if task == "text" else turn.text
    source = story_source(before, requests[phrase % len(requests)].format(content), system)
    inputs = pictures_of(before)
    if task == "text":
        return Example(source, turn.text + END, inputs + turn.pictures)
    answer = Turn("" if task == "image" else turn.text, turn.pictures)
    return Example(source, with_pictures(answer, vokens) + END, inputs, turn.pictures)


def dialog_source(before: list[Turn], k: int, system: System | None = None) -> str:
    """The turns before turn k and the mark of who speaks next: even turns are the human's, odd ones the assistant's."""
    first, (opening, separator) = k - len(before), system or DIALOG_SYSTEM
    turns = (f"{SPEAKERS[i % 2]} {with_pictures(t, PICTURE_MARK)}{separator}" for i, t in enumerate(before, first))
    return opening + "".join(turns) + SPEAKERS[k % 2]


def dialog_example(before: list[Turn], turn: Turn, k: int, vokens: str, system: System | None = None) -> Example:
    """Turn k of a dialogue as the answer to the turns before it."""
    source, target = dialog_source(before, k, system), with_pictures(turn, vokens) + END
    return Example(source, target, pictures_of(before), turn.pictures)


def history_start(k: int) -> int:
    """The first turn in the history of turn k: that of the exchange before its own, as in the released code."""
    return max(0, k // 2 * 2 - 2)


def chat_history(turns: list[Turn], k: int, words_first: bool) -> list[Turn]:
    """The turns of a chat that are read before turn k: those from `history_start` on. With words first, the exchange of
    the last picture goes before them if it is an older one."""
    start = history_start(k)
    with_picture = [i for i, turn in enumerate(turns[:k]) if turn.pictures or description_in(turn.text)]
    first = with_picture[-1] // 2 * 2 if with_picture and words_first else start
    return (turns[first : first + 2] if first < start else []) + turns[start:k]


def user_turn(tokenizer: Tokenizer, text: str, pictures: tuple = ()) -> Turn:
    """What somebody typed, clean and escaped."""
    return Turn(tokenizer.escape(one_line(text)), pictures)


def model_turn(tokenizer: Tokenizer, words: str, pictures: tuple = ()) -> Turn:
    """What the model said. A picture that was put into words first is replaced by these words."""
    descriptions = [picture.info["description"] for picture in pictures if "description" in picture.info]
    if descriptions:
        words, pictures = " ".join([words, *(f"({description})" for description in descriptions)]).strip(), ()
    return Turn(tokenizer.escape(one_line(words)), pictures)
