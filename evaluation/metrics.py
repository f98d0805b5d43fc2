"""The arithmetic of the paper's tables (section 4): texts, features and probabilities in, figures out.

`scorers.py` makes the features, `comparisons.py` chooses what each metric compares.

Left out: BLEU's smoothing and several references. The released code hands whole strings to nltk, so that its BLEU
counts characters; the paper's table says words, and so does this.

n m pictures or texts, D width of a feature, K classes.
"""

import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- words


def words(text: str) -> list[str]:
    """Lower case, white space and punctuation left out: "It's a Boat." -> it, s, a, boat."""
    return re.findall(r"[^\W_]+", text.lower())


def corpus_bleu(answers: list[list[str]], references: list[list[str]], order: int) -> float:
    """BLEU in [0, 1] up to n-grams of `order` words, one reference an answer, counts summed over all answers first
    (Papineni et al. 2002). 0 where an order has no match."""
    precision = 1.0
    for n in range(1, order + 1):
        answer_grams, reference_grams = ([n_grams(text, n) for text in texts] for texts in (answers, references))
        matches = sum((ours & theirs).total() for ours, theirs in zip(answer_grams, reference_grams, strict=True))
        precision *= (matches / max(sum(grams.total() for grams in answer_grams), 1)) ** (1 / order)
    ratio = sum(map(len, references)) / max(sum(map(len, answers)), 1)
    return precision * math.exp(min(0.0, 1 - ratio))  # the brevity penalty


def n_grams(text: list[str], n: int) -> Counter:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def rouge_l(answer: list[str], reference: list[str]) -> float:
    """F1 in [0, 1] of the longest common subsequence (Lin 2004)."""
    return 2 * len(common_subsequence(reference, answer)) / max(len(answer) + len(reference), 1)


def rouge_l_released(answer: str, reference: str) -> float:
    """ROUGE-L as the package `rouge` counts it, which the released code takes: spaces separate words, full stops end
    sentences, and each different word counts once. The shared words are those of the longest common subsequences of
    every sentence of the answer with every one of the reference."""
    ours, theirs = ([part.split() or [""] for part in text.split(".") if part] for text in (answer, reference))
    shared = {word for reference in theirs for answer in ours for word in common_subsequence(reference, answer)}
    count = sum(len({word for sentence in side for word in sentence}) for side in (ours, theirs))
    return 2 * len(shared) / max(count, 1)


def common_subsequence(one: list[str], other: list[str]) -> tuple[str, ...]:
    """The longest common subsequence; of several equally long ones, the one which the package `rouge` finds."""
    longest = [[()] * (len(other) + 1) for _ in range(len(one) + 1)]  # of the first i words and the first j
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            without = max(longest[i + 1][j], longest[i][j + 1], key=len)
            longest[i + 1][j + 1] = (*longest[i][j], a) if a == b else without
    return longest[-1][-1]


# ---- what judges say


def agreement(verdicts: list[list[str]]) -> tuple[float | None, float | None]:
    """Of each case's verdicts the share of pairs that agree, and Krippendorff's alpha for nominal data: 1 - observed /
    expected disagreement (Krippendorff 2004). None where no case has two verdicts; no alpha where all are equal."""
    cases = [Counter(case) for case in verdicts if len(case) > 1]
    if not cases:
        return None, None
    pairs = sum(case.total() * (case.total() - 1) for case in cases)
    agreeing = sum(n * (n - 1) for case in cases for n in case.values())
    total, together = sum(case.total() for case in cases), sum(cases, Counter())
    disagreeing = sum(case.total() - sum(n * (n - 1) for n in case.values()) / (case.total() - 1) for case in cases)
    expected = 1 - sum(n * (n - 1) for n in together.values()) / (total * (total - 1))
    return agreeing / pairs, 1 - disagreeing / total / expected if expected else None


# ---- features


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(..., D) and (..., D) -> (...) in [-1, 1]; 0 where one of them is zero."""
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Frechet distance of the Gaussians that fit features (n, D) and (m, D) (Heusel et al. 2017):

        |mu - nu|^2 + trace(A) + trace(B) - 2 trace((A B)^(1/2))

    With A = R^T R and B = S^T S the last trace is the sum of the singular values of R S^T, since their squares are the
    eigenvalues of A B. Biased upwards for few samples, so only figures of equal n can be compared. ValueError for
    fewer than two features.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("a covariance needs two pictures at least")
    mean_distance = (one.double().mean(0) - other.double().mean(0)).square().sum()
    root, other_root = covariance_root(one), covariance_root(other)
    cross_trace = torch.linalg.svdvals(root @ other_root.T).sum()
    return (mean_distance + root.square().sum() + other_root.square().sum() - 2 * cross_trace).clamp(min=0).item()


def covariance_root(features: Tensor) -> Tensor:
    """(n, D) -> R (min(n, D), D) in double precision, so that R^T R is the covariance of the features."""
    centred = (features.double() - features.double().mean(0)) / (len(features) - 1) ** 0.5
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def inception_score(probabilities: Tensor, splits: int | None = None) -> float:
    """exp(mean KL(p(y | picture) || p(y))) in [1, K] of probabilities (n, K), the mean over `splits` parts of the
    pictures (Salimans et al. 2016); default: 10, as released, or 1 part of fewer than 1,000 pictures. n pictures
    cannot score above n, so only figures of equal n can be compared. ValueError for fewer pictures than parts."""
    if len(probabilities) < (splits or 1):
        raise ValueError(f"{len(probabilities):,} pictures for {splits:,} parts" if splits else "no picture came")
    splits = splits or (10 if len(probabilities) >= 1000 else 1)
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))  # data may come sorted
    scores = []
    for p in probabilities.double()[order].tensor_split(splits):
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))  # (n, K)
        scores.append(divergence.sum(-1).mean().exp())
    return torch.stack(scores).mean().item()


# ---- MM-Relevance: answers of words and pictures, as CLIP's features


def mm_relevance(turns: list[tuple[list[Tensor], list[Tensor]]]) -> float:
    """F1 of turns (answer, reference), each a list of features (D,). The parts of both are paired from the first on.

    The sum of the cosines of all pairs, divided by the number of answer parts, is the precision p; divided by the
    number of reference parts it is the recall r. 0 where there are no parts.
    """
    similarity = sum(cosine(a, b).item() for answer, true in turns for a, b in zip(answer, true, strict=False))
    count = sum(len(answer) + len(true) for answer, true in turns)
    return 2 * similarity / max(count, 1)  # which is 2 p r / (p + r), also where both are 0
