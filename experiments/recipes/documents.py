"""What the miniature's language model reads: documents of the drawn world, as text and as tokens.

Captions, instructions, stories and dialogues as the two stages of MiniGPT-5 write them, but words that name a picture's
facts stand in the place of each input picture (ten words in a fixed order) and of the vokens (in any order):

    <Img>sea day small red boat left nothing nothing nothing nothing</Img> what do you see?
    a small red boat on the left at sea <Img>left boat day red small sea</Img> ###

So the language model learns to retell a picture from ten vectors, which the captioner will put there, and by the end
of a text to know what its picture has to show.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

import prompts
from common.texts import clean_prompt
from common.tokenizer import Tokenizer
from miniature.chats import bracketed, change, chat
from miniature.facts import Picture, pick, pick_weighted, random_stream
from miniature.phrases import CAPTIONS, usual
from miniature.typos import typed
from miniature.wishes import wish
from miniature.words import as_named, describe, description, from_left
from miniature.world import sample_dialogue, sample_pair, sample_story
from prompts import Example, Turn, chat_history, dialog_example, history_start, story_example, uas_texts

WORDS = 10  # that stand for a picture
LENGTH = 256  # tokens of a training sequence
LONGEST = 800  # characters of a document: with typos they take at most LENGTH tokens
PICTURE_WEIGHT = 4  # loss weight of an answer's picture words: they can be predicted, half of the others are random
ANSWER_WEIGHT = 4  # words first: loss weight of the words of an answer, or of a description in the history
TOLD_WEIGHT = 3  # loss weight of the words that answer a question about a picture
ANSWER_LENGTH = 112  # tokens of a question and its answer
DOCUMENTS, LOOKS, ORDERS = 200, 201, 202  # purposes of the random streams


# ---- documents: pictures are facts, `inputs` and `outputs` alike


def picture_words(picture: Picture) -> str:
    """The facts as WORDS words: "sea night small red boat left big white kite right"."""
    things = [f"{t.size} {t.colour} {t.kind} {t.place}" for t in from_left(picture).things]
    return " ".join([picture.scene, picture.time, *things] + ["nothing"] * (4 * (2 - len(things))))


def shuffled_words(picture: Picture, rng: np.random.Generator) -> str:
    """The facts in any order, those of one of two things together: "night left small boat red sea". Where every word
    may come next, the language model has to hold all facts at once, as the vokens' features should."""
    things = [[t.size, t.colour, t.kind, t.place] for t in picture.things]
    groups = [[picture.scene], [picture.time], *(things if len(things) > 1 else ([word] for word in things[0]))]
    shuffled = [groups[g] for g in rng.permutation(len(groups))]
    return " ".join(group[k] for group in shuffled for k in rng.permutation(len(group)))


def caption_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Stage 1; more instructions than there, and half of the captions are whole descriptions."""
    picture, text, _ = sample_pair(seed, i, split)
    text = describe(picture) if rng.random() < 0.5 else text
    instruction = int(rng.integers(len(prompts.UAS_REQUESTS))) if rng.random() < 0.15 else None
    return Example(uas_texts(text, 0, instruction)[0], prompts.PICTURE_MARK + prompts.END, (), (picture,))


def look_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """A picture is shown and described, in stage 2's form or in MiniGPT-4's."""
    picture = sample_pair(seed, i, split)[0]
    told = describe(from_left(picture)) if rng.random() < 0.7 else description(picture, rng, True, True)
    question, answer = usual(rng, CAPTIONS["shows"]), usual(rng, CAPTIONS["sees"]).format(told)
    if rng.random() < 0.6:
        return dialog_example([Turn(question, (picture,))], Turn(answer), 1, prompts.PICTURE_MARK)
    human, assistant = prompts.SPEAKERS
    return Example(f"{human} {prompts.PICTURE_MARK} {question} {assistant}", answer + prompts.END, (picture,))


def story_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Stage 2: a step of a story as one of its tasks."""
    turns = sample_story(seed, i, split)[0]
    k = int(rng.integers(1, len(turns)))
    return story_example(turns[:k], turns[k], pick(rng, prompts.TASKS), int(rng.integers(6)), prompts.PICTURE_MARK)


def dialogue_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Stage 2: a turn of a dialogue."""
    turns = sample_dialogue(seed, i, split)[0]
    k = int(rng.integers(1, len(turns)))
    return dialog_example(turns[history_start(k) : k], turns[k], k, prompts.PICTURE_MARK)


def wish_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Words first: somebody wishes for a picture, and it is described before it is drawn."""
    text, picture = wish(rng, split)
    return dialog_example([Turn(text)], Turn(bracketed(picture)), 1, "", prompts.WORDS_FIRST_SYSTEM)


def chat_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Words first: a turn of a chat, after what `sample.py` reads of the turns before it or after all of them."""
    turns = chat(rng, split)
    k = 2 * int(rng.integers(len(turns) // 2)) + 1 if rng.random() < 0.3 else len(turns) - 1
    before = turns[:k] if rng.random() < 0.5 else chat_history(turns, k, True)
    return dialog_example(before, turns[k], k, "", prompts.WORDS_FIRST_SYSTEM)


def pair_wish(rng: np.random.Generator, split: str) -> tuple[str, Picture]:
    """A wish for two things."""
    while len((wished := wish(rng, split))[1].things) < 2:
        pass
    return wished


def change_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Words first: one change of a picture of two things. To learn whose the new facts are takes most of the training,
    and this teaches it without the rest of a chat."""
    asked, picture = pair_wish(rng, split)
    text, after = change(rng, picture)
    before = [Turn(asked), Turn(bracketed(picture)), Turn(clean_prompt(typed(rng, text)))]
    return dialog_example(before, Turn(bracketed(after)), 3, "", prompts.WORDS_FIRST_SYSTEM)


def order_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """One picture of two things described again and again, its things in any order: whoever copies facts from one
    description into the next has to go by the thing's kind, not by its place in the sentence."""
    picture = pair_wish(rng, split)[1]
    turned = replace(picture, things=picture.things[::-1])
    said = [bracketed(turned if rng.random() < 0.5 else picture) for _ in range(6)]
    return Example(f"{prompts.WORDS_FIRST_SYSTEM.text} {' '.join(said[:-1])}", f" {said[-1]}{prompts.END}", (), ())


def described_story_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """Words first: a step of a story. The steps before it have their pictures as descriptions, as pictures or not at
    all; the first sentence may be what somebody typed."""
    told = sample_story(seed, i, split)[0]
    history, is_typed = rng.random(), rng.random() < 0.4
    k, task = int(rng.integers(len(told))), pick(rng, prompts.TASKS)
    texts = [clean_prompt(told[0].text) if is_typed else told[0].text, *(turn.text for turn in told[1:])]
    pictures = [as_named(told[0].pictures[0], told[0].text), *prompts.pictures_of(told[1:])]
    if k == 0:
        task = "image"
        if rng.random() < 0.5:
            texts[0], pictures[0] = wish(rng, split)
    # Descriptions keep the order in which the first sentence names the things.
    order = [thing.kind for picture in pictures for thing in picture.things]
    pictures = [replace(p, things=tuple(sorted(p.things, key=lambda t: order.index(t.kind)))) for p in pictures]
    before = []
    for text, picture in zip(texts[:k], pictures, strict=False):
        if history < 0.4:
            before.append(Turn(f"{text} {bracketed(picture)}"))
        else:
            before.append(Turn(text, (picture,) if history < 0.75 else ()))
    phrase = int(rng.integers(6))
    if task == "text":
        return story_example(before, Turn(texts[k], (pictures[k],)), task, phrase, "", prompts.WORDS_FIRST_SYSTEM)
    row = story_example(before, Turn(texts[k]), task, phrase, "", prompts.WORDS_FIRST_SYSTEM)
    answer = bracketed(pictures[k]) if task == "image" else f"{texts[k]} {bracketed(pictures[k])}"
    return row._replace(target=answer + prompts.END)


MIXTURE = {
    caption_document: 0.06,
    look_document: 0.06,
    story_document: 0.04,
    dialogue_document: 0.02,
    wish_document: 0.12,
    chat_document: 0.24,
    change_document: 0.22,
    order_document: 0.06,
    described_story_document: 0.18,
}


def document(seed: int, i: int, split: str) -> Example:
    rng, row = random_stream(seed, i, DOCUMENTS), None
    while row is None or len(row.source + row.target) > LONGEST:
        row = pick_weighted(rng, MIXTURE)(rng, seed, i, split)
    return row


# ---- tokens


tokenizer_at = lru_cache(Tokenizer)  # of a tokenizer.model


@lru_cache
def ids_with(tokenizer: Tokenizer, mark: str) -> set[int]:
    """The pieces that hold this character."""
    return {i for i in range(tokenizer.base_vocabulary) if mark in tokenizer.decode([i])}


def encode(tokenizer: Tokenizer, row: Example, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(token id, loss weight) of <s>, source and target, which are encoded by themselves as in `collate`. So are the
    words of each picture; those of an answer's picture are in random order."""
    words_first, described = row.source.startswith(prompts.WORDS_FIRST_SYSTEM.text), False
    told = ANSWER_WEIGHT if words_first else 1
    told = TOLD_WEIGHT if row.inputs and not row.outputs else told
    weighted = [(picture_words(picture), 1) for picture in row.inputs]
    weighted += [(shuffled_words(picture, rng), PICTURE_WEIGHT) for picture in row.outputs]
    tokens, left = [(tokenizer.bos_id, 1)], iter(weighted)
    for text, count in ((row.source, 1), (row.target, told)):
        for i in tokenizer.encode(text):
            if i == tokenizer.image_id:
                words, weight = next(left)
                tokens += [(word, weight) for word in tokenizer.pieces.encode(words)]
            else:
                tokens.append((i, ANSWER_WEIGHT if described else count))
                described = words_first and (described or i in ids_with(tokenizer, "("))
                described = described and i not in ids_with(tokenizer, ")")
    return tokens


def language_ids(path: Path, seed: int, split: str, i: int) -> np.ndarray:
    """int16 (2, LENGTH): whole documents, each with </s> after it, the last one cut off. Ids, then weights."""
    tokenizer, tokens, number = tokenizer_at(path), [], LENGTH * i  # no sequence can hold so many documents
    while len(tokens) < LENGTH:
        rng = random_stream(seed, number, ORDERS)
        tokens += [*encode(tokenizer, document(seed, number, split), rng), (tokenizer.eos_id, 1)]
        number += 1
    return np.array(tokens[:LENGTH], np.int16).T


def answer_ids(path: Path, seed: int, i: int) -> np.ndarray:
    """int16 (2 + WORDS + ANSWER_LENGTH,): where the answer begins and ends; the words of picture i; the ids of a
    question about it and of the answer, with a placeholder for each of the words."""
    tokenizer, row = tokenizer_at(path), look_document(random_stream(seed, i, LOOKS), seed, i, "train")
    source = [tokenizer.bos_id, *tokenizer.encode(row.source, WORDS)]
    ids = [*source, *tokenizer.encode(row.target), tokenizer.eos_id][:ANSWER_LENGTH]
    words = tokenizer.pieces.encode(picture_words(row.inputs[0]))
    padding = [tokenizer.eos_id] * (ANSWER_LENGTH - len(ids))
    return np.array([len(source), len(ids), *words, *ids, *padding], np.int16)
