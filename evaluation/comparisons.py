"""What is compared with what for every metric of `python -m evaluation`; METRICS is the list.

An `Outcome` holds no pictures, only what the networks of `scorers.py` saw in them. The arithmetic is in `metrics.py`.
How a picture that did not come counts: in `python -m evaluation`'s head.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.images import resize_and_crop
from evaluation import metrics
from evaluation.cases import Case, pictures_of, read_answer
from evaluation.scorers import Unavailable, look
from generation import split
from miniature.judge import NOTHING, right_shares
from miniature.score_stories import true_of
from tars.batches import describe
from tars.index import Unusable

LARGEST = 512  # pixels of a true picture's side, as released


@dataclass
class Outcome:
    """A case, what was answered, and what the networks see in the pictures."""

    case: Case
    segments: list[str | int]  # the answer in order; numbers are places in `came`
    wanted: list[dict]
    came: list[dict]

    @property
    def text(self) -> str:
        return split(self.segments)[0]

    @property
    def missing(self) -> int:
        return max(len(self.wanted) - len(self.came), 0)

    def pairs(self) -> list[tuple[dict, dict | None]]:
        """Each wanted picture and the one that came in its place, if any."""
        return list(zip(self.wanted, self.came + [None] * self.missing, strict=False))


class Bench(NamedTuple):
    networks: dict
    blank: dict  # what they see in a grey picture
    splits: int | None = None  # parts of the Inception Score


# ---- cases into outcomes


def outcomes_of(cases: list[Case], folder: Path, networks: dict) -> tuple[list[Outcome], Counter, Counter]:
    """Also counts of what could not be asked, and of what is missing in the folder. A case without an answer has said
    nothing. ValueError where there is no answer at all."""
    outcomes, unusable, missing = [], Counter(), Counter()
    for case in tqdm(cases, desc="pictures", unit="case", delay=2):
        answer = read_answer(folder, case.key)
        try:
            if answer and answer.unusable:
                raise Unusable(answer.unusable)
            # Training pads pictures to white squares, so the true ones are padded, too.
            true = pictures_of(case, case.pictures)
            wanted = [resize_and_crop(picture, min(LARGEST, max(picture.size)), pad=True) for picture in true]
        except Unusable as error:
            unusable[str(error)] += 1
            continue
        missing.update([] if answer else ["no answer"])
        segments, numbers = answer.segments if answer else [], count()
        seen = look(networks, [*wanted, *split(segments)[1]])
        said = [segment if isinstance(segment, str) else next(numbers) for segment in segments]
        outcomes.append(Outcome(case, said, seen[: len(wanted)], seen[len(wanted) :]))
    if not outcomes:
        raise ValueError(f"none of the {len(cases):,} cases can be used: {describe(unusable)}")
    if missing["no answer"] == len(outcomes):
        raise ValueError(f"{folder}: no answer to any of the {len(outcomes):,} cases")
    return outcomes, unusable, missing


# ---- metrics of pictures


def distance(name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    wanted = [picture[name] for outcome in outcomes for picture in outcome.wanted]
    return metrics.frechet_distance(torch.stack(wanted), torch.stack(drawn(name, bench, outcomes)))


def score(name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    return metrics.inception_score(torch.stack(drawn(f"{name} classes", bench, outcomes)), bench.splits)


def distance_per_story(name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    """The mean over stories of each story's own distance, as in the paper's Table 2. A story with one picture has none.
    Of so few pictures it is far above that of all together."""
    stories = {}
    for outcome in outcomes:
        stories.setdefault(outcome.case.group, []).append(outcome)
    stories = [story for story in stories.values() if sum(len(outcome.wanted) for outcome in story) > 1]
    if not stories:
        raise Unavailable("no story of which two pictures are wanted")
    return mean([distance(name, bench, story) for story in stories])


def drawn(name: str, bench: Bench, outcomes: list[Outcome]) -> list[Tensor]:
    """All pictures that came, also where none was wanted, and a blank for each that did not."""
    return [row[name] for outcome in outcomes for row in outcome.came + [bench.blank] * outcome.missing]


def beside_pictures(name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    pairs = [pair for outcome in outcomes for pair in outcome.pairs()]
    return mean([metrics.cosine(wanted[name], came[name]).item() if came else 0.0 for wanted, came in pairs])


def beside_texts(name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    """The mean cosine of each picture with its case's true text, which most prompts contain."""
    outcomes = [outcome for outcome in outcomes if outcome.wanted and outcome.case.turn.text]
    if not outcomes:
        raise Unavailable("no words beside the pictures that are wanted")
    texts = encode(bench, name, [outcome.case.turn.text for outcome in outcomes])
    pairs = [(text, came) for text, o in zip(texts, outcomes, strict=True) for _, came in o.pairs()]
    return mean([metrics.cosine(text, came[name]).item() if came else 0.0 for text, came in pairs])


def with_facts(outcomes: list[Outcome]) -> list[Outcome]:
    labelled = [outcome for outcome in outcomes if outcome.case.facts]
    if not labelled:
        raise Unavailable("the data has no labels of the miniature's world")
    return labelled


def attributes(bench: Bench, outcomes: list[Outcome]) -> dict[str, float]:
    labelled = with_facts([outcome for outcome in outcomes if outcome.wanted])
    seen = [outcome.came[0]["facts"] if outcome.came else NOTHING for outcome in labelled]
    return right_shares(seen, [outcome.case.facts for outcome in labelled])


# ---- metrics of words


def word_pairs(outcomes: list[Outcome]) -> list[tuple[list[str], list[str]]]:
    """The words of each answer and of its reference."""
    return [(metrics.words(o.text), metrics.words(o.case.words)) for o in outcomes if o.case.words]


def bleu(order: int, bench: Bench, outcomes: list[Outcome]) -> float:
    return metrics.corpus_bleu(*map(list, zip(*word_pairs(outcomes), strict=True)), order)


def bleu_of_replies(order: int, bench: Bench, outcomes: list[Outcome]) -> float:
    """MMDialog's own, the mean over replies (Feng et al. 2022): texts are paired in order with the references. Here is
    one, so that only the answer's first text counts."""
    firsts = [(next((s for s in o.segments if isinstance(s, str)), ""), o.case.words) for o in outcomes if o.case.words]
    return mean([metrics.corpus_bleu([metrics.words(said)], [metrics.words(known)], order) for said, known in firsts])


def rouge_of_texts(bench: Bench, outcomes: list[Outcome]) -> float:
    return mean([metrics.rouge_l_released(o.text.strip(), o.case.words.strip()) for o in outcomes if o.case.words])


def meteor(bench: Bench, outcomes: list[Outcome]) -> float:
    return over_answers(bench.networks["meteor"].compare, bench, outcomes)


def over_answers(compare: Callable, bench: Bench, outcomes: list[Outcome]) -> float:
    return mean([compare(*pair) if pair[0] else 0.0 for pair in word_pairs(outcomes)])


def truth(bench: Bench, outcomes: list[Outcome]) -> float:
    """The share of answers that say something of the case's true picture and nothing that is wrong."""
    labelled = with_facts([outcome for outcome in outcomes if outcome.case.words])
    return mean([true_of(outcome.text, outcome.case.facts) for outcome in labelled])


def sentence_similarity(bench: Bench, outcomes: list[Outcome]) -> float:
    outcomes = [outcome for outcome in outcomes if outcome.case.words]
    said = encode(bench, "sbert", [outcome.text for outcome in outcomes])
    known = encode(bench, "sbert", [outcome.case.words for outcome in outcomes])
    pairs = zip(outcomes, metrics.cosine(said, known).tolist(), strict=True)
    return mean([value if outcome.text else 0.0 for outcome, value in pairs])


def relevance(by_modality: bool, name: str, bench: Bench, outcomes: list[Outcome]) -> float:
    """With the features of the network `name`. by_modality: as the released code defines it, a mean over dialogues that
    takes a turn's words as one text, apart from its pictures; else as MMDialog does, over turns, parts in order."""
    said = [[outcome.text, *range(len(outcome.came))] if by_modality else outcome.segments for outcome in outcomes]
    wanted = [[outcome.case.turn.text, *range(len(outcome.wanted))] for outcome in outcomes]
    texts = sorted({part for parts in said + wanted for part in parts if isinstance(part, str) and part})
    of_texts = dict(zip(texts, encode(bench, name, texts), strict=True))

    def features(segments: list[str | int], pictures: list[dict], kind: type) -> list[Tensor]:
        known = [segment for segment in segments if isinstance(segment, kind) and segment != ""]
        return [of_texts[s] if isinstance(s, str) else pictures[s][name] for s in known]

    groups = {}
    for number, (outcome, ours, theirs) in enumerate(zip(outcomes, said, wanted, strict=True)):
        for kind in (str, int) if by_modality else (str | int,):
            turn = features(ours, outcome.came, kind), features(theirs, outcome.wanted, kind)
            groups.setdefault(outcome.case.group if by_modality else number, []).append(turn)
    return mean([metrics.mm_relevance(turns) for turns in groups.values()])


@torch.inference_mode()
def encode(bench: Bench, name: str, texts: list[str]) -> Tensor:
    """Features (n, D) of texts."""
    network = bench.networks[name]
    rows = [network.texts(texts[start : start + 64]) for start in range(0, len(texts), 64)]
    return torch.cat(rows) if rows else torch.empty(0, 0)


# ---- the list


class Metric(NamedTuple):
    title: str
    network: str | None  # of scorers.OPENERS
    of: str  # "pictures", "words", "dialogues": what must be wanted
    compute: Callable[[Bench, list[Outcome]], float | dict[str, float]]


METRICS = {
    "fid": Metric("FID", "inception", "pictures", partial(distance, "inception")),
    "is": Metric("IS", "inception", "pictures", partial(score, "inception")),
    "clip-i": Metric("CLIP-I", "clip", "pictures", partial(beside_pictures, "clip")),
    "clip-t": Metric("CLIP-T", "clip", "pictures", partial(beside_texts, "clip")),
    "hps": Metric("HPS v2", "hps", "pictures", partial(beside_texts, "hps")),
    "fid-story": Metric("FID, mean over stories", "inception", "pictures", partial(distance_per_story, "inception")),
    "judge-distance-story": Metric(
        "Frechet distance, judge, mean over stories", "judge", "pictures", partial(distance_per_story, "judge")
    ),
    "judge-distance": Metric("Frechet distance, judge", "judge", "pictures", partial(distance, "judge")),
    "judge-score": Metric("Inception-style score, judge", "judge", "pictures", partial(score, "judge")),
    "image-image": Metric("image-image score, pairing", "pairing", "pictures", partial(beside_pictures, "pairing")),
    "image-text": Metric("image-text score, pairing", "pairing", "pictures", partial(beside_texts, "pairing")),
    "attributes": Metric("right", "judge", "pictures", attributes),
    "bleu-1": Metric("BLEU-1", None, "words", partial(bleu, 1)),
    "bleu-2": Metric("BLEU-2", None, "words", partial(bleu, 2)),
    "rouge-l": Metric("ROUGE-L", None, "words", partial(over_answers, metrics.rouge_l)),
    "rouge-l-released": Metric("ROUGE-L, released package's", None, "words", rouge_of_texts),
    "true": Metric("words true of the picture", None, "words", truth),
    "meteor": Metric("METEOR", "meteor", "words", meteor),
    "s-bert": Metric("S-BERT", "sbert", "words", sentence_similarity),
    "mm-relevance": Metric("MM-Relevance, released code's", "clip", "dialogues", partial(relevance, True, "clip")),
    "mm-relevance-mmdialog": Metric("MM-Relevance, MMDialog's", "clip", "dialogues", partial(relevance, False, "clip")),
    "bleu-1-mmdialog": Metric("BLEU-1, MMDialog's", None, "dialogues", partial(bleu_of_replies, 1)),
    "bleu-2-mmdialog": Metric("BLEU-2, MMDialog's", None, "dialogues", partial(bleu_of_replies, 2)),
    "relevance": Metric("MM-Relevance, pairing", "pairing", "dialogues", partial(relevance, True, "pairing")),
}


def measure(wanted: list[str], bench: Bench, unavailable: dict[str, str], outcomes: list[Outcome]) -> tuple[dict, dict]:
    """{title: figure} and {title: reason} of the metrics that cannot be computed. unavailable: network -> why it is not
    there."""
    asked = {"pictures": any(o.wanted for o in outcomes), "words": any(o.case.words for o in outcomes)}
    asked["dialogues"] = any(outcome.case.task == "reply" for outcome in outcomes)
    figures, reasons = {}, {}
    for metric in (METRICS[name] for name in wanted):
        try:
            if not asked[metric.of]:
                raise Unavailable(f"no {metric.of} wanted in these cases")
            if metric.network in unavailable:
                raise Unavailable(unavailable[metric.network])
            value = metric.compute(bench, outcomes)
            values = value if isinstance(value, dict) else {"": value}
            figures |= {f"{metric.title} {name}".strip(): value for name, value in values.items()}
        except ValueError as error:
            reasons[metric.title] = str(error)
    return figures, reasons
