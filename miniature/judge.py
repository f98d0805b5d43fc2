"""The judge: reads off a picture of the miniature world what is in it. Tests and experiments count with it.

A small convolutional network looks at six slots, left, middle and right in the sky and on the ground, and says of each
which kind of thing is there, if any, and its colour and size; and of the whole picture scene, time and the number of
things (3 means more than two). Where the number and the slots do not agree, something unclear is there, an extra or a
doubled thing: the picture then counts as one thing more, of no kind.

It is trained on pictures that the other parts never see, too: every combination, no thing at all,
three things, the same thing twice, blurred and noisy pictures.

    pixels (B, 3, 64, 64) -> features            (B, 128, 8, 8)
    slots: six, and one for the whole picture    (B, 7, 4 * 128)    four learned views of the 8 x 8 places each
    scores of a slot: kind or none, colour, size (B, 6, 13 + 8 + 2)
    scores of the picture: scene, time, number   (B, 6 + 3 + 4)

B batch, L places, K views of a slot.
"""

from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import MINIATURE
from miniature import facts
from miniature.facts import Picture, Thing, fits, home, pick, random_stream
from miniature.recipe import Recipe, Setup, drawn, to_pixels, write_tensors
from published.loading import load

SLOTS = [(level, place) for level in ("sky", "ground") for place in facts.PLACES]
VIEWS, WIDTH = 4, 128
SLOT_SIZES = (len(facts.KINDS) + 1, len(facts.COLOURS), len(facts.SIZES))
WHOLE_SIZES = (len(facts.SCENES), len(facts.TIMES), 4)
NOTHING = Picture(None, None, ())  # what is seen where no picture came
IGNORE = -100  # label of what is not asked
ATTRIBUTES = ("scene", "time", "count", "kind", "colour", "size", "place")


def convolutions() -> nn.Sequential:
    """pixels (B, 3, 64, 64) -> features (B, WIDTH, 8, 8)."""
    layers = nn.Sequential()
    for width_in, width, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, WIDTH, 2), (WIDTH, WIDTH, 1)):
        layers.extend([nn.Conv2d(width_in, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()])
    return layers


class Judge(nn.Module):
    """pixels (B, 3, 64, 64) in [-1, 1] -> scores of the slots (B, 6, 23), scores of the whole picture (B, 13)."""

    def __init__(self):
        super().__init__()
        self.features = convolutions()
        self.look = nn.Parameter(0.5 * torch.randn(len(SLOTS) + 1, VIEWS, 64))
        self.slot = nn.Sequential(nn.Linear(VIEWS * WIDTH, 96), nn.SiLU(), nn.Linear(96, sum(SLOT_SIZES)))
        self.whole = nn.Sequential(nn.Linear(VIEWS * WIDTH, 96), nn.SiLU(), nn.Linear(96, sum(WHOLE_SIZES)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(pixels).flatten(2)  # (B, D, L)
        views = torch.einsum("bdl,skl->bskd", x, self.look.softmax(-1)).flatten(2)  # (B, 7, K * D)
        return self.slot(views[:, :-1]), self.whole(views[:, -1])


def load_judge(path: Path = MINIATURE / "judge.safetensors", device: str | torch.device = "cpu") -> Judge:
    return load(Judge, [Path(path)], dtype=torch.float32, device=device)


# ---- what it says


@torch.no_grad()
def read(judge: Judge, pixels: Tensor) -> list[Picture]:
    """pixels (B, 3, 64, 64) in [-1, 1] -> the facts seen; things from left to right, in the sky first."""
    slots, whole = zip(*(judge(part.clamp(-1, 1)) for part in pixels.split(256)), strict=True)
    kinds, colours, sizes = (s.argmax(-1).tolist() for s in torch.cat(slots).split(SLOT_SIZES, -1))
    scenes, times, numbers = (s.argmax(-1).tolist() for s in torch.cat(whole).split(WHOLE_SIZES, -1))
    seen = []
    for row in range(len(pixels)):
        things = [
            Thing(list(facts.KINDS)[kind - 1], facts.COLOURS[colours[row][i]], facts.SIZES[sizes[row][i]], SLOTS[i][1])
            for i, kind in enumerate(kinds[row])
            if kind
        ]
        if numbers[row] != min(len(things), 3):
            things.append(Thing(None))
        seen.append(Picture(list(facts.SCENES)[scenes[row]], facts.TIMES[times[row]], tuple(things)))
    return seen


def right(seen: Picture, wanted: Picture) -> dict[str, bool]:
    """Which of the wanted facts are seen, and "all". A fact that is None in `wanted` is not asked for.

    The things are matched so that most of their facts agree. Where one is missing, doubled or extra, everything about
    things is wrong.
    """
    count = len(seen.things) == len(wanted.things)
    of_things = dict.fromkeys(("kind", "colour", "size", "place"), False)
    for order in permutations(seen.things) if count else ():
        pairs = list(zip(order, wanted.things, strict=True))
        agrees = {n: all(getattr(b, n) in (None, getattr(a, n)) for a, b in pairs) for n in of_things}
        of_things = max(of_things, agrees, key=lambda agrees: sum(agrees.values()))
    of_picture = {name: getattr(wanted, name) in (None, getattr(seen, name)) for name in ("scene", "time")}
    result = of_picture | {"count": count} | of_things
    return result | {"all": all(result.values())}


def share(values: list[bool]) -> float:
    return sum(values) / max(len(values), 1)


def asks_for(wanted: Picture, attribute: str) -> bool:
    """Whether `wanted` asks for the attribute: a fact that is None is not asked for."""
    if attribute in ("scene", "time"):
        return getattr(wanted, attribute) is not None
    return attribute in ("count", "all") or any(getattr(thing, attribute) for thing in wanted.things)


def right_shares(seen: list[Picture], wanted: list[Picture]) -> dict[str, float]:
    """Of each attribute the share that is right where it is asked for; "all": all that is asked for."""
    rows = [(right(a, b), b) for a, b in zip(seen, wanted, strict=True)]
    return {name: share([row[name] for row, asked in rows if asks_for(asked, name)]) for name in (*ATTRIBUTES, "all")}


# ---- training


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
    """Scores of the slots (B, 6, 23) and of the whole picture (B, 13), labels (B, 21) -> a mean loss a fact, and their
    sum, "loss"."""
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
