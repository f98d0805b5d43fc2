"""Recipe of the miniature's judge, `miniature.judge.Judge`.

It is trained on pictures that the other parts never see, too: every combination, no thing at all, three things, the
same thing twice, blurred and noisy pictures.

    pixels (B, 3, 64, 64) -> scores of six slots (B, 6, 23) and of the whole picture (B, 13)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.recipes.recipe import Recipe, Setup, drawn, to_pixels, write_tensors
from miniature import facts
from miniature.facts import Picture, Thing, fits, home, pick, random_stream
from miniature.judge import SLOT_SIZES, SLOTS, WHOLE_SIZES, Judge, read, right_shares

IGNORE = -100  # label of what is not asked


def any_picture(rng: np.random.Generator) -> Picture:
    """Up to three things, one a slot, in every combination; in one in six all are of one kind and colour."""
    scene, things = pick(rng, list(facts.SCENES)), []
    wanted, twins = int(rng.choice(4, p=[0.04, 0.40, 0.40, 0.16])), rng.random() < 1 / 6
    for _ in range(12 * wanted):
        kind, colour = pick(rng, facts.KINDS_IN[scene]), pick(rng, facts.COLOURS)
        if twins and things:
            kind, colour = things[0].kind, things[0].colour
        thing = Thing(kind, colour, pick(rng, facts.SIZES), pick(rng, facts.PLACES))
        free = slot_of(thing, scene) not in [slot_of(t, scene) for t in things]
        if free and all(t.place == thing.place or fits((t, thing), scene) for t in things):
            things.append(thing)
        if len(things) == wanted:
            break
    return Picture(scene, pick(rng, facts.TIMES), tuple(things))


def slot_of(thing: Thing, scene: str) -> int:
    return SLOTS.index(("sky" if home(thing.kind, scene) == "sky" else "ground", thing.place))


def labels(picture: Picture) -> np.ndarray:
    """int8 (6 * 3 + 3,): kind, colour and size of every slot, then scene, time and number of things."""
    slots = np.full((len(SLOTS), 3), IGNORE, np.int8)
    slots[:, 0] = 0
    for t in picture.things:
        known = list(facts.KINDS).index(t.kind) + 1, facts.COLOURS.index(t.colour), facts.SIZES.index(t.size)
        slots[slot_of(t, picture.scene)] = known
    whole = list(facts.SCENES).index(picture.scene), facts.TIMES.index(picture.time), min(len(picture.things), 3)
    return np.concatenate([slots.ravel(), np.array(whole, np.int8)])


def reading_losses(slots: Tensor, whole: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Scores of the slots (B, 6, 23) and of the whole picture (B, 13), labels (B, 21) -> each fact's mean loss, and
    their sum, "loss"."""
    of_slots, of_whole = known[:, :-3].unflatten(1, (len(SLOTS), 3)), known[:, -3:]
    scores = [s.flatten(0, 1) for s in slots.split(SLOT_SIZES, -1)] + list(whole.split(WHOLE_SIZES, -1))
    wanted = [*of_slots.flatten(0, 1).unbind(-1), *of_whole.unbind(-1)]
    names = ("kind", "colour", "size", "scene", "time", "number")
    losses = {}
    for name, score, label in zip(names, scores, wanted, strict=True):
        total = F.cross_entropy(score.float(), label, ignore_index=IGNORE, reduction="sum")
        losses[name] = total / (label != IGNORE).sum().clamp(min=1)
    return {"loss": sum(losses.values()), **losses}


def judged(seed: int, i: int) -> tuple[Picture, int]:
    rng = random_stream(seed, i, 100)  # a purpose that `world` does not use
    return any_picture(rng), int(rng.integers(1 << 31))


def labels_of(sample: Callable[[int], tuple], i: int) -> np.ndarray:
    """The labels of sample i, whose first value is the picture."""
    return labels(sample(i)[0])


def worsen(pixels: Tensor, blur: float, noise: Tensor) -> Tensor:
    """As an autoencoder might: a Gaussian blur of deviation `blur` pixels, then noise."""
    offsets = torch.arange(-3, 4, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / max(blur, 0.1)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3) + noise


class JudgeRecipe(Recipe):
    name, batch_sizes, budgets = "judge", (1024, 32), (1, 15)
    lr, matrix_lr, hold = 2e-3, 0.02, 1000

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = Judge()
        self.pictures = setup.training_set("judged-pictures", partial(drawn, partial(judged, setup.seed)))
        self.labels = setup.training_set("judged-labels", partial(labels_of, partial(judged, setup.seed)))
        pictures, self.wanted = setup.held_out_pictures()
        self.tested = to_pixels(pictures)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Three quarters of the batches are blurred, three quarters noisy."""
        picked = self.pick(len(self.pictures), generator)
        blur, loud = (torch.rand(2, generator=generator) - 0.25).clamp(min=0).tolist()
        pixels = to_pixels(self.pictures[picked])
        noise = 0.2 * loud * self.normal(pixels.shape, generator)
        return worsen(pixels, 1.6 * blur, noise), self.labels[picked].long()

    def losses(self, model: Judge, pixels: Tensor, known: Tensor) -> dict[str, Tensor]:
        return reading_losses(*model(pixels), known)

    def measure(self, model: Judge) -> dict[str, float]:
        found = right_shares(read(model, self.tested), self.wanted)
        return {f"{name}_right": value for name, value in found.items()}

    def export(self, model: Judge, weights: Path) -> None:
        write_tensors(weights / "judge.safetensors", model.state_dict())
