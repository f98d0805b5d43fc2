"""What the miniature's language model reads: documents of the drawn world, as text and as tokens.

Captions, instructions, stories and conversations, written as the stages of MiniGPT-5 write them. A picture in a
document stands between <Img> and </Img>, in ten words that name its facts:

    ###Human: <Img>sea night small red boat left nothing nothing nothing nothing</Img> what do you see here? ...

So the language model learns to retell a picture from ten vectors, which is what the captioner will put there, and to
know by the end of a caption or of a story's step what its picture has to show.

    language_row    (128,)            whole documents, one after the other
    look_row        (2 + 10 + 80,)    a question about a picture and the answer
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece

from data import REQUESTS, SYSTEM
from llama import Tokenizer
from miniature.facts import PLACES, Picture, pick
from miniature.tales import SEES, SHOWS
from miniature.words import agrees, description, facts_in, some
from miniature.world import random_stream, sample_dialogue, sample_pair, sample_story
from minigpt5 import expand_placeholders

PIECES = 768  # of the sentencepiece model: 256 bytes, the letters, the commonest words
TEXTS = 20_000  # documents that it is made from
WORDS = 10  # that stand for a picture
LENGTH = 128  # tokens of a training row
ANSWER_LENGTH = 80  # tokens of a question and its answer
PICTURE = "<Img><ImageHere></Img>"
DOCUMENTS, LOOKS = 200, 201  # purposes of the random streams


# ---- documents


def picture_words(picture: Picture) -> str:
    """The facts as WORDS words: "sea night small red boat left big white kite right"."""
    things = sorted(picture.things, key=lambda thing: PLACES.index(thing.place))
    words = [picture.scene, picture.time, *(f"{t.size} {t.colour} {t.kind} {t.place}" for t in things)]
    return " ".join(words + ["nothing"] * (4 * (2 - len(things))))


def caption_document(rng, seed, i, split):
    """A caption, in half of them with its picture."""
    picture, text, _ = sample_pair(seed, i, split)
    return (text, []) if rng.random() < 0.5 else (f"{text} {PICTURE}", [picture])


def request_document(rng, seed, i, split):
    """An instruction as stage 1 has them; the answer is given in words here."""
    text = f"{SYSTEM}###Human: {pick(rng, REQUESTS)} {sample_pair(seed, i, split)[1]} ###Assistant: here it is. ###"
    return text, []


def look_document(rng, seed, i, split):
    """A picture is shown and described."""
    picture = sample_pair(seed, i, split)[0]
    answer = some(rng, SEES).format(description(picture, rng, True, True))
    return f"###Human: {PICTURE} {some(rng, SHOWS)} ###Assistant: {answer} ###", [picture]


def story_document(rng, seed, i, split):
    """A story without its pictures, with them, or asked for step by step."""
    turns, _ = sample_story(seed, i, split)
    form = rng.random()
    if form < 0.4:
        return " ".join(turn.text for turn in turns), []
    told = " ".join(f"{turn.text} {PICTURE}" for turn in turns[:-1])
    shown = [turn.picture for turn in turns[:-1]]
    if form < 0.6:
        return f"{told} {turns[-1].text}", shown
    question = "what happens next?" if form < 0.9 else f"the scene description is: {turns[-1].text}"
    answer = turns[-1].text if form < 0.9 else "here it is."
    return f"###Human: {told} {question} ###Assistant: {answer} ###", shown


def dialogue_document(rng, seed, i, split):
    """A conversation; the assistant's own pictures are in it half of the time."""
    turns, _ = sample_dialogue(seed, i, split)
    text, shown, drawn = "", [], rng.random() < 0.5
    for k, turn in enumerate(turns):
        says = turn.text
        if turn.picture and (k % 2 == 0 or drawn):
            says = f"{PICTURE} {says}" if k % 2 == 0 else f"{says} {PICTURE}"
            shown.append(turn.picture)
        text += f"###Human: {says} " if k % 2 == 0 else f"###Assistant: {says} "
    return f"{text}###", shown


MIXTURE = {
    caption_document: 0.22,
    request_document: 0.05,
    look_document: 0.18,
    story_document: 0.25,
    dialogue_document: 0.30,
}


def document(seed: int, i: int, split: str) -> tuple[str, list[Picture]]:
    """Document i: its text with an <ImageHere> for each of its pictures."""
    rng = random_stream(seed, i, DOCUMENTS)
    kinds, shares = list(MIXTURE), list(MIXTURE.values())
    return kinds[int(rng.choice(len(kinds), p=shares))](rng, seed, i, split)


# ---- tokens


def train_tokenizer(path: Path, seed: int) -> None:
    """A sentencepiece model with Vicuna's settings, from TEXTS documents."""
    texts = []
    for i in range(TEXTS):
        text, shown = document(seed, i, "train")
        texts += [*text.replace("<ImageHere>", "\n").split("\n"), *map(picture_words, shown)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=PIECES,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            minloglevel=2,
        )
    temporary.replace(path)


@lru_cache
def tokenizer_at(path: Path) -> Tokenizer:
    return Tokenizer(path)


def encode(tokenizer: Tokenizer, text: str, shown: list[Picture]) -> list[int]:
    """The ids of a document. A picture's words are encoded by themselves, as its vectors will be set in."""
    ids, left = [], iter(shown)
    for i in tokenizer.encode(text):
        ids += tokenizer.pieces.encode(picture_words(next(left))) if i == tokenizer.image_id else [i]
    return ids


def language_row(path: Path, seed: int, split: str, i: int) -> np.ndarray:
    """Whole documents, <s> before and </s> after each, up to LENGTH; the last one is cut off."""
    tokenizer, ids, number = tokenizer_at(path), [], LENGTH * i  # no row can hold so many documents
    while len(ids) < LENGTH:
        ids += [tokenizer.bos_id, *encode(tokenizer, *document(seed, number, split)), tokenizer.eos_id]
        number += 1
    return np.array(ids[:LENGTH], np.int16)


def look_row(path: Path, seed: int, i: int) -> np.ndarray:
    """int16 (2 + WORDS + ANSWER_LENGTH,): where the answer begins and ends; the words of picture i; the ids of a
    question about it and the answer, with a placeholder for each of the words."""
    tokenizer, picture = tokenizer_at(path), sample_pair(seed, i)[0]
    text, _ = look_document(random_stream(seed, i, LOOKS), seed, i, "train")
    question, answer = text.split(" ###Assistant: ")
    source = expand_placeholders(tokenizer, tokenizer.encode(f"{question} ###Assistant:"), WORDS)
    source = [tokenizer.bos_id, *source]
    ids = [*source, *tokenizer.encode(answer), tokenizer.eos_id][:ANSWER_LENGTH]
    words = tokenizer.pieces.encode(picture_words(picture))
    padding = [tokenizer.eos_id] * (ANSWER_LENGTH - len(ids))
    return np.array([len(source), len(ids), *words, *ids, *padding], np.int16)


# ---- what was said


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What is said up to a stop sequence or </s>."""
    for end in range(1, len(ids) + 1):
        if tokenizer.ends(ids[:end]):
            return tokenizer.decode(ids[:end], skip_special=True).removesuffix("###").strip()
    return tokenizer.decode(ids, skip_special=True).strip()


def described(texts: list[str], wanted: list[Picture]) -> float:
    """The share of descriptions that name every fact of their picture."""

    def names_all(text: str, picture: Picture) -> bool:
        told = facts_in(text)
        return len(told.things) == len(picture.things) and agrees(picture, told)

    return sum(map(names_all, texts, wanted)) / len(texts)
