"""The arithmetic of the paper's tables (section 4): texts, features and probabilities in, figures out.

`scorers.py` makes the features, `comparisons.py` says what is compared with what.

Left out: BLEU's smoothing and several references. The released code hands whole strings to nltk, so that its BLEU
counts characters; the paper's table says words, and so does this.

n m pictures or texts, D width of a feature, K classes.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

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
    matched, total = [0] * order, [0] * order
    for answer, reference in zip(answers, references, strict=True):
        for n in range(1, order + 1):
            said, known = n_grams(answer, n), n_grams(reference, n)
            matched[n - 1] += sum((said & known).values())
            total[n - 1] += sum(said.values())
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / order)
    ratio = sum(map(len, references)) / sum(map(len, answers))
    return precision * math.exp(min(0.0, 1 - ratio))  # the brevity penalty


def n_grams(text: list[str], n: int) -> Counter:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def rouge_l(answer: list[str], reference: list[str]) -> float:
    """F1 in [0, 1] of the longest common subsequence (Lin 2004)."""
    lengths = [0] * (len(reference) + 1)  # of what the answer so far shares with the reference's first words
    for word in answer:
        before = lengths
        lengths = [0]
        for j, known in enumerate(reference):
            lengths.append(before[j] + 1 if word == known else max(before[j + 1], lengths[j]))
    return 2 * lengths[-1] / max(len(answer) + len(reference), 1)


# ---- features


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(..., D) and (..., D) -> (...) in [-1, 1]; 0 where one of them is zero."""
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Frechet distance of the Gaussians that fit features (n, D) and (m, D) (Heusel et al. 2017):

        |mu - nu|^2 + trace(A) + trace(B) - 2 trace((A B)^(1/2))

    A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), whose roots' sum is the last trace. Biased upwards for
    few samples, so only figures of like n compare. ValueError for fewer than two of either.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("a covariance needs two pictures at least")
    (mean, covariance), (other_mean, other_covariance) = moments(one), moments(other)
    root = symmetric_root(covariance)
    mixed = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    between = (mean - other_mean).square().sum()
    return (between + covariance.trace() + other_covariance.trace() - 2 * mixed).clamp(min=0).item()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> mean (D,) and covariance (D, D), in double precision."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def inception_score(probabilities: Tensor, splits: int = 10) -> float:
    """exp(mean KL(p(y | picture) || p(y))) in [1, K] of probabilities (n, K), the mean over so many parts of the
    pictures (Salimans et al. 2016), or one part where those would have fewer than 100. n pictures cannot score above n,
    so only figures of like n compare. ValueError without a picture."""
    if not len(probabilities):
        raise ValueError("no picture came")
    splits = splits if len(probabilities) >= 100 * splits else 1
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))  # data may come sorted
    scores = []
    for p in probabilities.double()[order].tensor_split(splits):
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))  # (n, K)
        scores.append(divergence.sum(-1).mean().exp())
    return torch.stack(scores).mean().item()


# ---- MM-Relevance: answers of words and pictures, as CLIP's features


class Part(NamedTuple):
    """What stands in a turn: its words, or a picture."""

    modality: str  # "words", "picture"
    feature: Tensor  # (D,)


def relevance(similarity: float, said: int, wanted: int) -> float:
    """F1 of precision `similarity` / said and recall `similarity` / wanted; 0 where there is nothing."""
    return 2 * similarity / max(said + wanted, 1)  # which is 2 p r / (p + r), also where both are 0


def relevance_by_modality(turns: list[tuple[list[Part], list[Part]]]) -> float:
    """The released code's MM-Relevance of a dialogue, from what was said and what should have been, turn by turn.

    Words are compared with words and pictures with pictures, each modality in its order. Parts without a counterpart
    count in the denominators of precision (they were said) or recall (they were wanted); all turns are summed first.
    """
    similarity, said_count, wanted_count = 0.0, 0, 0
    for said, wanted in turns:
        for modality in ("words", "picture"):
            ours, theirs = ([p.feature for p in parts if p.modality == modality] for parts in (said, wanted))
            similarity += sum(cosine(a, b).item() for a, b in zip(ours, theirs, strict=False))
            said_count, wanted_count = said_count + len(ours), wanted_count + len(theirs)
    return relevance(similarity, said_count, wanted_count)


def relevance_in_order(said: list[Part], wanted: list[Part]) -> float:
    """MMDialog's own MM-Relevance of a turn (Feng et al. 2022): the two mixed sequences aligned from the
    left, a picture with words too where they meet; precision over the parts said, recall over those wanted."""
    similarity = sum(cosine(a.feature, b.feature).item() for a, b in zip(said, wanted, strict=False))
    return relevance(similarity, len(said), len(wanted))
