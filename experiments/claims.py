"""What the paper claims, as comparisons of figures, and the rule that says whether a claim holds here.

    verdict([0.02, 0.01, 0.03]) -> "holds"      differences of the same seed, positive where the claim is right

With k seeds the mean difference is compared with its standard error times Student's t for 95 % (two-sided, k - 1
degrees of freedom; with three seeds that is 4.3 standard errors): further above zero the claim holds, further below it
does not, between them is noise. One seed decides nothing. Test cases are the same for all systems and seeds.
"""

import math
from typing import NamedTuple

from experiments.systems import METRICS

HOLDS, FAILS, NOISE = "holds", "does not hold", "within noise"
UNMEASURED, ONE_SEED = "not measured", "not decided (one seed)"
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # t for 95 %


class Claim(NamedTuple):
    text: str
    source: str  # where the paper, or who read it, says so
    metric: str  # of METRICS
    better: str  # scorings
    worse: str


ABSTRACT, METHOD, REVIEW = "abstract", "section 3 (method)", "reviews of the first version, OpenReview"
CLAIMS = [
    Claim("Classifier-free guidance improves pictures", ABSTRACT, "all right", "cc3m/uas", "cc3m/no-cfg"),
    Claim("Classifier-free guidance brings pictures closer to the text", ABSTRACT, "CLIP-T", "cc3m/uas", "cc3m/no-cfg"),
    Claim("L_CAP helps", METHOD, "all right", "cc3m/uas", "cc3m/no-cap"),
    Claim("L_LDM helps (and so MiniGPT-5 is above GILL)", METHOD, "all right", "cc3m/uas", "cc3m/no-ldm"),
    Claim("L_LDM brings pictures closer to the true ones in distribution", METHOD, "FID", "cc3m/uas", "cc3m/no-ldm"),
    Claim("On single captions Stable Diffusion itself stays ahead", REVIEW, "CLIP-I", "cc3m/sd0", "cc3m/uas"),
    Claim("More vokens are better: 8 against 1", METHOD, "CLIP-I", "cc3m/uas", "cc3m/vokens-1"),
    Claim("16 vokens are better still than 8", REVIEW, "IS", "cc3m/vokens-16", "cc3m/uas"),
    Claim("Stage 1 (UAS) is needed", ABSTRACT, "all right", "last-both/lora", "last-both/no-uas"),
    Claim("Stage 1 (UAS) is needed, all steps of a story", ABSTRACT, "CLIP-I", "every/lora", "every/no-uas"),
    Claim("A story's texts and pictures help", METHOD, "CLIP-I", "last-both/lora", "last-none/lora"),
    Claim("A story's pictures tell what its texts do not", METHOD, "CLIP-I", "last-both/lora", "last-texts/lora"),
    Claim(
        "With texts alone, fine-tuned Stable Diffusion is ahead", REVIEW, "CLIP-I", "last-texts/sd", "last-texts/lora"
    ),
    Claim("With its pictures told, too, MiniGPT-5 is ahead of it", ABSTRACT, "CLIP-I", "every/lora", "every/sd"),
    Claim("Narration: fine-tuned MiniGPT-4 is ahead", REVIEW, "ROUGE-L", "narration/minigpt4", "narration/lora"),
    Claim("MMDialog: better words than Divter", ABSTRACT, "BLEU-1", "dialogue/minigpt5", "dialogue/divter"),
    Claim(
        "MMDialog: better MM-Relevance than Divter", ABSTRACT, "MM-Relevance", "dialogue/minigpt5", "dialogue/divter"
    ),
    Claim("MMDialog: Divter has the higher Inception score", REVIEW, "IS", "dialogue/divter", "dialogue/minigpt5"),
]


def verdict(differences: list[float]) -> str:
    if not differences:
        return UNMEASURED
    k = len(differences)
    if k == 1:
        return ONE_SEED
    mean = sum(differences) / k
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (k - 1) / k)
    if abs(mean) <= STUDENT[min(k - 1, 9)] * error or mean == 0:
        return NOISE
    return HOLDS if mean > 0 else FAILS


def differences(claim: Claim, figures: dict[tuple[str, int], dict[str, float]]) -> list[float]:
    """figures: {(scoring, seed): {metric: value}} -> per seed by how much the better one is better."""
    sign = 1 if METRICS[claim.metric][1] else -1
    seeds = sorted({seed for _, seed in figures})
    rows = [(figures.get((claim.better, s), {}), figures.get((claim.worse, s), {})) for s in seeds]
    return [sign * (a[claim.metric] - b[claim.metric]) for a, b in rows if claim.metric in a and claim.metric in b]
