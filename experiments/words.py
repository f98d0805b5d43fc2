"""LoRA for words first: with it a language model writes better descriptions, and the miniature's tells better stories.

    python experiments/words.py --out runs/words/trained.safetensors                                  # the miniature's
    python experiments/words.py --wide --weights smol --batch-size 8 --out runs/smollm2/trained.safetensors  # SmolLM2's
    python -m published pack runs/words/trained.safetensors --out miniature/weights/minigpt5/mls-words.safetensors

The language model writes the descriptions that words first paints, and the vokens are read after them. Fine-tuning it
would change the hidden states that the mapper reads, and stage 1 would have to be trained again. This LoRA is set aside
while vokens are read, so it changes the words alone: for the same description the picture stays what it was
(`train_mls.py --words-first` trains one on your dialogues). It learns from the documents of recipes/documents.py that
are words first, and in the loss only the words of answers and descriptions count.
"""

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import MINIATURE, run  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.texts import clean_prompt, words_in
from common.tokenizer import Tokenizer
from experiments.recipes import documents
from experiments.vocabulary import EXAM, wide_wish
from miniature.facts import Picture, Thing, chance, pick, pick_weighted, random_stream, sample_picture
from miniature.phrases import PHRASES, with_article
from miniature.score_stories import LEAVES
from miniature.typos import CHATTER, padded, typo
from miniature.wishes import enlarged, wish_from_sentence
from miniature.words import LEXICON, describe
from prompts import WORDS_FIRST_SYSTEM, Example, Turn, dialog_example, story_example
from published.loading import STAGE_1, save_trained
from published.parts import load_minigpt5

RANK, WARMUP = 32, 30
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPEN = "~"  # stands before and after what does not count in the loss; `clean_prompt` leaves none in a text
WORDS, TOKENS, KINDS = 310, 311, 312  # purposes of random streams


def told_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """A step of a story whose picture is given: what has changed is to be told. Most have the pictures before it, too.
    In one of five somebody has left, so that the model learns not to say this of a thing that it sees. One in four has
    no history; nobody leaves there, since the picture alone cannot tell who it was."""
    alone = rng.random() < 0.25
    left = not alone and rng.random() < 0.25
    least = 2 if left or rng.random() < 0.7 else 1
    while True:
        example = documents.described_story_document(rng, seed, int(rng.integers(1 << 31)), split)
        if len(example.inputs) < least or "(" in example.target or (alone and LEAVES.search(example.target)):
            continue
        if not left or len(example.inputs[-1].things) < len(example.inputs[-2].things):
            break
    if alone:
        picture = example.inputs[-1:]
        return story_example([], Turn("", picture), "text", 0, "", WORDS_FIRST_SYSTEM)._replace(target=example.target)
    return example


def blind_chat_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """A turn of a chat in which nobody shows a picture."""
    while (example := documents.chat_document(rng, seed, i, split)).inputs:
        pass
    return example


def wide_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """A wish in the words of vocabulary.json. Facts that it leaves open do not count in the loss: they are random, and
    what the wish does say would drown in them."""
    text, picture, named = wide_wish(rng, split)
    return dialog_example([Turn(clean_prompt(text))], Turn(with_open_facts(picture, named)), 1, "", WORDS_FIRST_SYSTEM)


def with_open_facts(picture: Picture, named: Picture) -> str:
    """The description in parentheses, with OPEN before and after each fact that is None in `named`."""

    def mark(fact: str | None, text: str) -> str:
        return text if fact else f"{OPEN}{text}{OPEN}"

    things = iter(named.things)

    def mark_thing(match: re.Match) -> str:
        thing = next(things)
        size, colour, place = map(mark, (thing.size, thing.colour, thing.place), match.groups())
        return f" that is{size} and{colour}{place}"

    text = re.sub(r" that is( \w+) and( \w+)( \w+ the \w+)", mark_thing, describe(picture))
    start, scene, time = re.fullmatch(r"(.*)( at sea| in the \w+)( \w+ \w+)", text).groups()
    return f"({start}{mark(named.scene, scene)}{mark(named.time, time)})"


def plain_wish(rng: np.random.Generator, split: str) -> tuple[str, Picture, Picture]:
    """A wish for one thing in the plainest words: "a red boat at the sea". Returns what `wish_from_sentence` does."""
    picture = sample_picture(rng, split, 1)
    (thing,) = picture.things
    colour, scene, time = (
        fact if chance(rng, share) else None
        for fact, share in ((thing.colour, 0.85), (picture.scene, 0.6), (picture.time, 0.2))
    )
    named = Picture(scene, time, (Thing(thing.kind, colour),))
    text = with_article(" ".join(filter(None, (colour, thing.kind))))
    text += f" {pick(rng, ('in the', 'on the', 'at the', 'in a'))} {scene}" if scene else ""
    return f"{text} at {time}" if time else text, enlarged(rng, picture, named), named


def slip_document(rng: np.random.Generator, seed: int, i: int, split: str) -> Example:
    """A wish with typos in most of the words that name its facts, or with words that sound like them. Facts that
    it leaves open do not count in the loss."""
    text, picture, named = (plain_wish if chance(rng, 0.6) else wish_from_sentence)(rng, split)
    text = clean_prompt(padded(rng, text) if chance(rng, CHATTER) else text)
    parts, sounds = text.split(), PHRASES["sounds like"] if chance(rng, 0.2) else {}
    parts = [sounds.get(part, part) for part in parts]
    parts = [typo(rng, part) if part in LEXICON and len(part) > 2 and chance(rng, 0.6) else part for part in parts]
    target = with_open_facts(picture, named)
    return dialog_example([Turn(clean_prompt(" ".join(parts)))], Turn(target), 1, "", WORDS_FIRST_SYSTEM)


MIXTURE = {
    documents.wish_document: 0.36,
    documents.chat_document: 0.2,
    documents.change_document: 0.05,
    documents.described_story_document: 0.03,
    told_document: 0.36,
}
WIDE_MIXTURE = {
    wide_document: 0.62,
    documents.wish_document: 0.1,
    slip_document: 0.16,
    blind_chat_document: 0.08,
    documents.change_document: 0.04,
}


def counted_tokens(tokenizer: Tokenizer, example: Example, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(token id, 1 where it counts in the loss, else 0) of a document and its end."""
    parts = example.target.split(OPEN)  # every second one is an open fact
    encoded = documents.encode(tokenizer, example._replace(target="".join(parts)), rng)
    ends = [len(tokenizer.encode("".join(parts[:i]))) for i in range(len(parts) + 1)]
    is_open = [i % 2 == 1 for i, (start, end) in enumerate(pairwise(ends)) for _ in range(start, end)]
    is_open = [False] * (len(encoded) - len(is_open)) + is_open
    counts = [int(weight > 1 and not skip) for (_, weight), skip in zip(encoded, is_open, strict=True)]
    return [*zip((token for token, _ in encoded), counts, strict=True), (tokenizer.eos_id, 0)]


def sequence(tokenizer: Tokenizer, mixture: dict, seed: int, i: int) -> np.ndarray:
    """int (2, LENGTH): ids of whole documents, and whether each counts. Four documents that do not fit are left out
    before the last one is cut off."""
    tokens, kinds, number, skipped = [], random_stream(seed, i, KINDS), documents.LENGTH * i, 0
    while len(tokens) < documents.LENGTH:
        rng = random_stream(seed, number, WORDS)
        example = pick_weighted(kinds, mixture)(rng, seed, number, "train")
        number += 1
        if EXAM & {*words_in(example.source.lower())}:
            continue
        document = counted_tokens(tokenizer, example, random_stream(seed, number - 1, TOKENS))
        if len(tokens) + len(document) > documents.LENGTH and skipped < 4:
            skipped += 1
        else:
            tokens += document
    return np.array(tokens[: documents.LENGTH]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=MINIATURE, help="folder of the miniature's weights")
    parser.add_argument("--checkpoint", type=Path, help="train its LoRA further; default: a new LoRA on stage 1")
    parser.add_argument("--steps", type=int, default=700, help=f"of sequences of {documents.LENGTH} tokens")
    parser.add_argument("--wide", action="store_true", help="the words of vocabulary.json too, and no stories: SmolLM2")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--lr", type=float, default=4e-4, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the documents and of a new LoRA")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint; written every 100 steps")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load_minigpt5(args.weights, args.checkpoint or args.weights / "minigpt5" / STAGE_1, read_pictures=False)
    if not model.lora:
        model.add_adapters(lora={"targets": TARGETS, "rank": RANK, "alpha": 2 * RANK})
    model.lora_for_words, llama = True, model.llama.train()
    trained = [p for layer in model.lora for p in (layer.lora_A.weight, layer.lora_B.weight)]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.0, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (args.steps - step) / args.steps)
    )
    mixture = WIDE_MIXTURE if args.wide else MIXTURE
    for step in (bar := tqdm(range(args.steps), "words", mininterval=5)):
        batch = np.stack(
            [sequence(model.tokenizer, mixture, args.seed, args.batch_size * step + i) for i in range(args.batch_size)]
        )
        ids, counts = torch.from_numpy(batch).unbind(1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = llama(llama.model.embed_tokens(ids[:, :-1]))
        counted = counts[:, 1:].bool()
        loss = F.cross_entropy(model.vokens.logits(llama, hidden[counted]), ids[:, 1:][counted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step % 20 == 19:
            bar.set_postfix(loss=round(loss.item(), 4))
        if step % 100 == 99 or step + 1 == args.steps:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            save_trained(model, model.trained_parameters(), args.out, "mls")


if __name__ == "__main__":
    run(main)
