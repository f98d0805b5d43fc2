"""The judge: reads off a picture of the miniature world what is in it. Tests and experiments count with it.

A small convolutional network looks at six slots, left, middle and right in the sky and on the ground, and says of each
which kind of thing is there, if any, and its colour and size; and of the whole picture scene, time and the number of
things (3 means more than two). Where the number and the slots do not agree, something unclear is there, an extra or a
doubled thing: the picture then counts as one thing more, of no kind. experiments/recipes/judge.py trains it.

    pixels (B, 3, 64, 64) -> features            (B, 128, 8, 8)
    slots: six, and one for the whole picture    (B, 7, 4 * 128)    four learned views of the 8 x 8 places each
    scores of a slot: kind or none, colour, size (B, 6, 13 + 8 + 2)
    scores of the picture: scene, time, number   (B, 6 + 3 + 4)

B batch, L places, K views of a slot.
"""

from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import MINIATURE
from miniature import facts
from miniature.facts import Picture, Thing
from published.loading import load

SLOTS = [(level, place) for level in ("sky", "ground") for place in facts.PLACES]
VIEWS, WIDTH = 4, 128
SLOT_SIZES = (len(facts.KINDS) + 1, len(facts.COLOURS), len(facts.SIZES))
WHOLE_SIZES = (len(facts.SCENES), len(facts.TIMES), 4)
NOTHING = Picture(None, None, ())  # what is seen where no picture came
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
