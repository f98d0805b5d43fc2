"""What each metric of `python -m evaluation` compares with what; METRICS lists them.

An `Outcome` holds the outputs of the networks of `scorers.py` in the place of pictures. The arithmetic is in
`metrics.py`. The docstring of `evaluation/__main__.py` says how a missing picture counts.
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
from evaluation.scorers import Unavailable, network_outputs
from generation import split
from miniature.judge import NOTHING, right_shares
from miniature.score_stories import true_of
from tars.batches import describe
from tars.index import Unusable

LARGEST = 512  # pixels of a reference picture's side, as released


@dataclass
class Outcome:
    """A case and its answer, with the networks' outputs (`network_outputs`) in the place of pictures."""

    case: Case
    segments: list[str | int]  # the answer in order; numbers are indices of `answer_pictures`
    reference_pictures: list[dict]
    answer_pictures: list[dict]

    @property
    def text(self) -> str:
        return split(self.segments)[0]

    @property
    def missing(self) -> int:
        return max(len(self.reference_pictures) - len(self.answer_pictures), 0)

    def pairs(self) -> list[tuple[dict, dict | None]]:
        """Each reference picture and the answer's picture in its place, or None."""
        return list(zip(self.reference_pictures, self.answer_pictures + [None] * self.missing, strict=False))


class MetricSetup(NamedTuple):
    networks: dict
    blank: dict  # their outputs for a grey picture, which stands for a missing one
    splits: int | None = None  # parts of the Inception Score


# ---- cases into outcomes


def outcomes_of(cases: list[Case], folder: Path, networks: dict) -> tuple[list[Outcome], Counter, Counter]:
    """The outcomes, the number of unusable cases by reason, and that of cases without an answer in the folder, which
    count as empty answers. ValueError where no case can be used, or none has an answer."""
    outcomes, unusable, missing = [], Counter(), Counter()
    for case in tqdm(cases, desc="pictures", unit="case", delay=2):
        answer = read_answer(folder, case.key)
        try:
            if answer and answer.unusable:
                raise Unusable(answer.unusable)
            # Training pads pictures to white squares, so the references are padded, too.
            true = pictures_of(case, case.pictures)
            references = [resize_and_crop(picture, min(LARGEST, max(picture.size)), pad=True) for picture in true]
        except Unusable as error:
            unusable[str(error)] += 1
            continue
        missing.update([] if answer else ["no answer"])
        segments, indices = answer.segments if answer else [], count()
        outputs, n = network_outputs(networks, [*references, *split(segments)[1]]), len(references)
        segments = [segment if isinstance(segment, str) else next(indices) for segment in segments]
        outcomes.append(Outcome(case, segments, outputs[:n], outputs[n:]))
    if not outcomes:
        raise ValueError(f"none of the {len(cases):,} cases can be used: {describe(unusable)}")
    if missing["no answer"] == len(outcomes):
        raise ValueError(f"{folder}: no answer to any of the {len(outcomes):,} cases")
    return outcomes, unusable, missing


# ---- metrics of pictures


def distance(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    references = [picture[name] for outcome in outcomes for picture in outcome.reference_pictures]
    return metrics.frechet_distance(torch.stack(references), torch.stack(answer_outputs(name, setup, outcomes)))


def score(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    return metrics.inception_score(torch.stack(answer_outputs(f"{name} classes", setup, outcomes)), setup.splits)


def distance_per_story(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    """The mean over stories of each story's own distance, as in the paper's Table 2. A story with one picture
    has no distance. With so few pictures a distance is far larger than that of all stories' pictures together."""
    stories = {}
    for outcome in outcomes:
        stories.setdefault(outcome.case.group, []).append(outcome)
    stories = [story for story in stories.values() if sum(len(outcome.reference_pictures) for outcome in story) > 1]
    if not stories:
        raise Unavailable("no story of which two pictures are wanted")
    return mean([distance(name, setup, story) for story in stories])


def answer_outputs(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> list[Tensor]:
    """The outputs `name` for all pictures of the answers, surplus ones too, and for a grey picture per missing one."""
    return [picture[name] for o in outcomes for picture in o.answer_pictures + [setup.blank] * o.missing]


def picture_similarity(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    pairs = [pair for outcome in outcomes for pair in outcome.pairs()]
    return mean([metrics.cosine(true[name], picture[name]).item() if picture else 0.0 for true, picture in pairs])


def text_similarity(name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    """The mean cosine of each picture with its case's true text, which most prompts contain."""
    outcomes = [outcome for outcome in outcomes if outcome.reference_pictures and outcome.case.turn.text]
    if not outcomes:
        raise Unavailable("no words beside the pictures that are wanted")
    texts = encode(setup.networks[name], [outcome.case.turn.text for outcome in outcomes])
    pairs = [(text, picture) for text, o in zip(texts, outcomes, strict=True) for _, picture in o.pairs()]
    return mean([metrics.cosine(text, picture[name]).item() if picture else 0.0 for text, picture in pairs])


def labelled_outcomes(outcomes: list[Outcome]) -> list[Outcome]:
    labelled = [outcome for outcome in outcomes if outcome.case.facts]
    if not labelled:
        raise Unavailable("the data has no labels of the miniature's world")
    return labelled


def attributes(setup: MetricSetup, outcomes: list[Outcome]) -> dict[str, float]:
    labelled = labelled_outcomes([outcome for outcome in outcomes if outcome.reference_pictures])
    facts = [o.answer_pictures[0]["facts"] if o.answer_pictures else NOTHING for o in labelled]
    return right_shares(facts, [outcome.case.facts for outcome in labelled])


# ---- metrics of words


def word_pairs(outcomes: list[Outcome]) -> list[tuple[list[str], list[str]]]:
    """The words of each answer and of its reference."""
    return [(metrics.words(o.text), metrics.words(o.case.words)) for o in outcomes if o.case.words]


def bleu(order: int, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    return metrics.corpus_bleu(*map(list, zip(*word_pairs(outcomes), strict=True)), order)


def bleu_of_replies(order: int, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    """MMDialog's own BLEU, a mean over replies (Feng et al. 2022). It pairs the texts of answer and reference in
    order. The reference is one text here, so that only the answer's first text counts."""
    pairs = [(next((s for s in o.segments if isinstance(s, str)), ""), o.case.words) for o in outcomes if o.case.words]
    return mean([metrics.corpus_bleu([metrics.words(text)], [metrics.words(true)], order) for text, true in pairs])


def rouge_of_texts(setup: MetricSetup, outcomes: list[Outcome]) -> float:
    return mean([metrics.rouge_l_released(o.text.strip(), o.case.words.strip()) for o in outcomes if o.case.words])


def meteor(setup: MetricSetup, outcomes: list[Outcome]) -> float:
    return mean_over_answers(setup.networks["meteor"].compare, setup, outcomes)


def mean_over_answers(compare: Callable, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    return mean([compare(*pair) if pair[0] else 0.0 for pair in word_pairs(outcomes)])


def truth(setup: MetricSetup, outcomes: list[Outcome]) -> float:
    """The share of answers that say something of the case's true picture and nothing that is wrong."""
    labelled = labelled_outcomes([outcome for outcome in outcomes if outcome.case.words])
    return mean([true_of(outcome.text, outcome.case.facts) for outcome in labelled])


def sentence_similarity(setup: MetricSetup, outcomes: list[Outcome]) -> float:
    outcomes = [outcome for outcome in outcomes if outcome.case.words]
    answers = encode(setup.networks["sbert"], [outcome.text for outcome in outcomes])
    references = encode(setup.networks["sbert"], [outcome.case.words for outcome in outcomes])
    pairs = zip(outcomes, metrics.cosine(answers, references).tolist(), strict=True)
    return mean([value if outcome.text else 0.0 for outcome, value in pairs])


def relevance(by_modality: bool, name: str, setup: MetricSetup, outcomes: list[Outcome]) -> float:
    """MM-Relevance with the features of the network `name`. by_modality: the released code's definition, a mean over
    dialogues, which compares a turn's words as one text and its pictures apart; else MMDialog's, a mean over turns,
    which compares all parts in order."""
    answers = [[o.text, *range(len(o.answer_pictures))] if by_modality else o.segments for o in outcomes]
    references = [[o.case.turn.text, *range(len(o.reference_pictures))] for o in outcomes]
    texts = sorted({part for parts in answers + references for part in parts if isinstance(part, str) and part})
    text_features = dict(zip(texts, encode(setup.networks[name], texts), strict=True))

    def features(segments: list[str | int], pictures: list[dict], kind: type) -> list[Tensor]:
        parts = [segment for segment in segments if isinstance(segment, kind) and segment != ""]
        return [text_features[part] if isinstance(part, str) else pictures[part][name] for part in parts]

    groups = {}
    for number, (outcome, ours, theirs) in enumerate(zip(outcomes, answers, references, strict=True)):
        for kind in (str, int) if by_modality else (str | int,):
            turn = features(ours, outcome.answer_pictures, kind), features(theirs, outcome.reference_pictures, kind)
            groups.setdefault(outcome.case.group if by_modality else number, []).append(turn)
    return mean([metrics.mm_relevance(turns) for turns in groups.values()])


@torch.inference_mode()
def encode(network, texts: list[str]) -> Tensor:
    """Features (n, D) of texts, by a network of `scorers.py` that reads texts."""
    rows = [network.texts(texts[start : start + 64]) for start in range(0, len(texts), 64)]
    return torch.cat(rows) if rows else torch.empty(0, 0)


# ---- the list


class Metric(NamedTuple):
    title: str
    network: str | None  # of scorers.OPENERS
    of: str  # "pictures", "words", "dialogues": what a case must expect
    compute: Callable[[MetricSetup, list[Outcome]], float | dict[str, float]]


METRICS = {
    "fid": Metric("FID", "inception", "pictures", partial(distance, "inception")),
    "is": Metric("IS", "inception", "pictures", partial(score, "inception")),
    "clip-i": Metric("CLIP-I", "clip", "pictures", partial(picture_similarity, "clip")),
    "clip-t": Metric("CLIP-T", "clip", "pictures", partial(text_similarity, "clip")),
    "hps": Metric("HPS v2", "hps", "pictures", partial(text_similarity, "hps")),
    "fid-story": Metric("FID, mean over stories", "inception", "pictures", partial(distance_per_story, "inception")),
    "judge-distance-story": Metric(
        "Frechet distance, judge, mean over stories", "judge", "pictures", partial(distance_per_story, "judge")
    ),
    "judge-distance": Metric("Frechet distance, judge", "judge", "pictures", partial(distance, "judge")),
    "judge-score": Metric("Inception-style score, judge", "judge", "pictures", partial(score, "judge")),
    "image-image": Metric("image-image score, pairing", "pairing", "pictures", partial(picture_similarity, "pairing")),
    "image-text": Metric("image-text score, pairing", "pairing", "pictures", partial(text_similarity, "pairing")),
    "attributes": Metric("right", "judge", "pictures", attributes),
    "bleu-1": Metric("BLEU-1", None, "words", partial(bleu, 1)),
    "bleu-2": Metric("BLEU-2", None, "words", partial(bleu, 2)),
    "rouge-l": Metric("ROUGE-L", None, "words", partial(mean_over_answers, metrics.rouge_l)),
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


def measure(names: list[str], setup: MetricSetup, unavailable: dict, outcomes: list[Outcome]) -> tuple[dict, dict]:
    """{title: figure} of the metrics `names`, and {title: reason} of those that cannot be computed. unavailable:
    {network: the reason why it cannot be used}."""
    expected = {"pictures": any(o.reference_pictures for o in outcomes), "words": any(o.case.words for o in outcomes)}
    expected["dialogues"] = any(outcome.case.task == "reply" for outcome in outcomes)
    figures, reasons = {}, {}
    for metric in (METRICS[name] for name in names):
        try:
            if not expected[metric.of]:
                raise Unavailable(f"no {metric.of} wanted in these cases")
            if metric.network in unavailable:
                raise Unavailable(unavailable[metric.network])
            value = metric.compute(setup, outcomes)
            values = value if isinstance(value, dict) else {"": value}
            figures |= {f"{metric.title} {name}".strip(): value for name, value in values.items()}
        except ValueError as error:
            reasons[metric.title] = str(error)
    return figures, reasons
