"""What the paper claims, as comparisons of figures, and the rule that says whether a claim holds here.

    verdict([0.02, 0.01, 0.03]) -> "holds"      differences of the same seed, positive where the claim is right

With k seeds the mean difference has a confidence interval of 95 %: its standard error times Student's t (two-sided,
k - 1 degrees of freedom; with three seeds that is 4.3 standard errors). Above zero the claim holds, below it does not,
and an interval around zero is noise. One seed decides nothing. Test cases are the same for all systems and seeds.

A claim with several comparisons ("in every context") holds where each of them does; it is shown by the weakest. Where
the paper says "within" or "the same", a margin takes the place of zero. At 95 %, of forty comparisons of systems that
are equal one "holds" by chance and another "does not".
"""

import math
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from experiments.duel import WAYS
from experiments.systems import CONTEXTS, GUIDANCES, METRICS, RIVALS, VOKENS

HOLDS, FAILS, NOISE = "holds", "does not hold", "within noise"
UNMEASURED, ONE_SEED = "not measured", "not decided (one seed)"
MANY_SEEDS = 1000
Figures = dict[tuple[str, int], dict[str, float]]  # (scoring, seed) -> {metric: value}
Side = tuple[str, ...]  # scorings, whose mean is compared


class Claim(NamedTuple):
    text: str
    source: str  # of the paper
    metric: str  # of METRICS
    comparisons: list[tuple[Side, Side]]  # (better, worse); all have to hold
    margin: float = 0  # the difference may be as low as -margin
    same: bool = False  # and must then stay below +margin


def above(better: str, *worse: str) -> list[tuple[Side, Side]]:
    return [((better,), (name,)) for name in worse]


def rising(*scorings: str) -> list[tuple[Side, Side]]:
    """Each better than the one before it."""
    return [((more,), (less,)) for less, more in pairwise(scorings)]


# ---- the list, in the order and with the numbers of the paper's statements


def claims() -> Iterable[Claim]:
    captions = ("CLIP-I", "CLIP-T", "IS", "FID")  # of Table 6
    narrowly = 0.004  # what the paper calls not compromised, in ROUGE-L and METEOR

    text = "MiniGPT-5 beats fine-tuned SD: "
    for context in ("none", "texts"):
        comparison = above(f"last-{context}/lora", f"last-{context}/sd")
        yield Claim(text + CONTEXTS[context], "Table 1", "CLIP-I", comparison)
    yield Claim(text + "all steps", "Table 2", "CLIP-I", above("every-both/lora", "every-none/sd", "every-texts/sd"))

    text = "LoRA is the best variant: "
    for context, name in CONTEXTS.items():
        comparisons = above(f"last-{context}/lora", f"last-{context}/prefix", f"last-{context}/no-uas")
        yield Claim(text + name, "Table 1, section 4.2.1", "CLIP-I", comparisons)
    comparisons = above("every-both/lora", "every-both/prefix", "every-both/no-uas")
    yield Claim(text + "all steps", "Table 2", "CLIP-I", comparisons)

    for system, name in (("lora", "LoRA"), ("prefix", "prefix")):
        for less, more in pairwise(CONTEXTS):
            text = f"More context is better: {CONTEXTS[more]} above {CONTEXTS[less]}, {name}"
            yield Claim(text, "Table 1", "CLIP-I", above(f"last-{more}/{system}", f"last-{less}/{system}"))

    for context in ("texts", "both"):
        text = f"Prefix tuning has the better IS: {CONTEXTS[context]}"
        yield Claim(text, "Table 1", "IS", above(f"last-{context}/prefix", f"last-{context}/lora"))

    for metric in ("CLIP-I", "IS", "FID"):
        comparisons = [pair for c in CONTEXTS for pair in above(f"last-{c}/lora", f"last-{c}/no-uas")]
        yield Claim("Without UAS it is worse in every context", "Table 1", metric, comparisons)
    without = above("every-both/lora", "every-both/no-uas")
    for metric in ("CLIP-I", "FID per story"):
        yield Claim("Without UAS it is worse, all steps", "Table 2", metric, without)

    for table, steps, metric in (
        ("Table 1", "last", "CLIP-I"),
        ("Table 1", "last", "FID"),
        ("Table 2", "every", "CLIP-I"),
        ("Table 2", "every", "FID per story"),
    ):
        comparisons = [pair for c in ("none", "texts") for pair in above(f"{steps}-{c}/sd", f"{steps}-{c}/sd0")]
        yield Claim("Fine-tuning helps SD", table, metric, comparisons)

    told = above("narration/lora", "narration/minigpt4")
    yield Claim("Narration is not compromised: higher", "Table 3", "S-BERT", told)
    for metric in ("ROUGE-L", "METEOR"):
        yield Claim(f"Narration is not compromised: at most {narrowly} lower", "Table 3", metric, told, narrowly)

    for way in WAYS:
        yield Claim("Better than two stages", "Table 4", way, above("two-stages/first", "two-stages/second"))

    replies = above("dialogue/minigpt5", "dialogue/divter")
    for metric in ("BLEU-1", "BLEU-2", "MM-Relevance"):
        yield Claim("Dialogues: better than Divter", "Table 5", metric, replies)
    yield Claim(f"Dialogues: as good as Divter, to {narrowly}", "Table 5", "ROUGE-L", replies, narrowly, same=True)
    worse = above("dialogue/divter", "dialogue/minigpt5")
    yield Claim("Dialogues: Divter is slightly better", "Table 5", "IS", worse)

    for metric in captions:
        yield Claim("On captions zero-shot SD is first", "Table 6", metric, above("cc3m/sd0", *RIVALS.values()))
    for metric in captions:
        yield Claim("On captions MiniGPT-5 is above GILL", "Table 6", metric, above("cc3m/uas", RIVALS["GILL"]))
    for metric in ("IS", "FID", "CLIP-I"):
        text = f"Without CFG it is {'slightly ' * (metric == 'CLIP-I')}worse"
        yield Claim(text, "Table 6", metric, above("cc3m/uas", "cc3m/no-cfg"))
    for metric in captions:
        yield Claim("Without L_CAP it is worse", "Table 6", metric, above("cc3m/uas", "cc3m/no-cap"))
    for metric in captions:
        yield Claim("... and more so than without L_LDM", "Table 6", metric, above("cc3m/no-ldm", "cc3m/no-cap"))
    for metric in captions:
        yield Claim("Without L_LDM it is worse", "Table 6", metric, above("cc3m/uas", "cc3m/no-ldm"))

    others = [f"figure3/{name}" for name in RIVALS.values() if name != "cc3m/uas"]
    yield Claim("MiniGPT-5 is preferred most often", "Figure 3", "wins", above("figure3/cc3m/uas", *others))

    for system, name in (("uas", "MiniGPT-5"), ("sd0", "SD")):
        at = {guidance: f"guidance-{guidance}/{system}" for guidance in GUIDANCES}
        for metric in ("CLIP-I", "FID"):
            yield Claim(f"{name} gets better from guidance 1 to 7.5", "Figure 6", metric, rising(at[1], at[3], at[7.5]))
        yield Claim(f"{name}: past guidance 10 coherence stands still, to 0.01", "Figure 6", "CLIP-I",
                    above(at[15], at[10]), 0.01, same=True)  # fmt: skip
        yield Claim(f"{name}: past guidance 10 quality falls", "Figure 6", "FID", above(at[10], at[15]))

    with_vokens = {n: "cc3m/uas" if n == 8 else f"cc3m/vokens-{n}" for n in VOKENS}
    for metric in captions:
        yield Claim("More vokens are better", "Figure 7", metric, rising(*with_vokens.values()))
    for metric in captions:
        steep = [((with_vokens[4],), (with_vokens[1], with_vokens[16]))]  # 4 lies above the middle of 1 and 16
        yield Claim("... most from 1 to 4 vokens", "Figure 7", metric, steep)


CLAIMS = list(claims())

# ---- the rule


def student(degrees: int) -> float:
    """Student's t for 95 %, two-sided; from 4 degrees of freedom on by a series, to 0.3 %."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    return exact.get(degrees) or 1.960 + 2.372 / degrees + 2.822 / degrees**2 + 2.556 / degrees**3


def verdict(differences: list[float], margin: float = 0, same: bool = False) -> str:
    if len(differences) < 2:
        return ONE_SEED if differences else UNMEASURED
    mean, half = interval(differences)
    low, high = mean - half, mean + half
    if high < -margin or (same and low > margin):
        return FAILS
    return HOLDS if low > -margin and not (same and high >= margin) else NOISE


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval."""
    k = len(differences)
    return statistics.mean(differences), student(k - 1) * statistics.stdev(differences) / math.sqrt(k)


def seeds_to_decide(differences: list[float], margin: float = 0, same: bool = False) -> int | None:
    """How many seeds would decide, should their mean and spread stay as they are; None for over MANY_SEEDS. What claims
    to be the same needs an interval that is shorter than its distance from both margins."""
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    distance = min(abs(mean - margin), abs(mean + margin)) if same else abs(mean + margin)
    found = (k for k in range(2, MANY_SEEDS + 1) if student(k - 1) * deviation < distance * math.sqrt(k))
    return next(found, None)


def differences(better: Side, worse: Side, metric: str, figures: Figures) -> list[float]:
    """By how much the better one is better, for each seed that has all figures."""
    sign, found = 1 if METRICS[metric][1] else -1, []
    for seed in sorted({seed for _, seed in figures}):
        sides = [[figures.get((name, seed), {}).get(metric) for name in side] for side in (better, worse)]
        if None not in sides[0] + sides[1]:
            found.append(sign * (statistics.mean(sides[0]) - statistics.mean(sides[1])))
    return found


class Finding(NamedTuple):
    verdict: str
    better: Side  # of the weakest comparison
    worse: Side
    differences: list[float]


def judge(claim: Claim, figures: Figures) -> Finding:
    """The weakest comparison of a claim: one that fails before one that is not measured, that before noise."""
    order = [FAILS, UNMEASURED, ONE_SEED, NOISE, HOLDS]
    found = []
    for better, worse in claim.comparisons:
        by = differences(better, worse, claim.metric, figures)
        found.append(Finding(verdict(by, claim.margin, claim.same), better, worse, by))
    return min(found, key=lambda f: (order.index(f.verdict), statistics.mean(f.differences) if f.differences else 0))
