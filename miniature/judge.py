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
NOTHING = Picture(None, None, ())  # the facts where there is no picture
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


# ---- its verdict


@torch.no_grad()
def read(judge: Judge, pixels: Tensor) -> list[Picture]:
    """pixels (B, 3, 64, 64) in [-1, 1] -> the facts of each; its things from left to right, those in the sky first."""
    slots, whole = zip(*(judge(part.clamp(-1, 1)) for part in pixels.split(256)), strict=True)
    kinds, colours, sizes = (s.argmax(-1).tolist() for s in torch.cat(slots).split(SLOT_SIZES, -1))
    scenes, times, numbers = (s.argmax(-1).tolist() for s in torch.cat(whole).split(WHOLE_SIZES, -1))
    pictures = []
    for row in range(len(pixels)):
        things = [
            Thing(list(facts.KINDS)[kind - 1], facts.COLOURS[colours[row][i]], facts.SIZES[sizes[row][i]], SLOTS[i][1])
            for i, kind in enumerate(kinds[row])
            if kind
        ]
        if numbers[row] != min(len(things), 3):
            things.append(Thing(None))
        pictures.append(Picture(list(facts.SCENES)[scenes[row]], facts.TIMES[times[row]], tuple(things)))
    return pictures


def right(picture: Picture, expected: Picture) -> dict[str, bool]:
    """Which of the expected facts the picture has, and whether it has "all". Any fact is right where None is expected.

    The things are matched so that most of their facts agree. Where one is missing, doubled or extra, everything about
    things is wrong.
    """
    same_count = len(picture.things) == len(expected.things)
    right_in_things = dict.fromkeys(("kind", "colour", "size", "place"), False)
    for order in permutations(picture.things) if same_count else ():
        pairs = list(zip(order, expected.things, strict=True))
        agrees = {n: all(getattr(b, n) in (None, getattr(a, n)) for a, b in pairs) for n in right_in_things}
        right_in_things = max(right_in_things, agrees, key=lambda agrees: sum(agrees.values()))
    result = {name: getattr(expected, name) in (None, getattr(picture, name)) for name in ("scene", "time")}
    result |= {"count": same_count} | right_in_things
    return result | {"all": all(result.values())}


def share(values: list[bool]) -> float:
    return sum(values) / max(len(values), 1)


def asks_for(expected: Picture, attribute: str) -> bool:
    """Whether the expected facts include the attribute: a fact that is None is not asked for."""
    if attribute in ("scene", "time"):
        return getattr(expected, attribute) is not None
    return attribute in ("count", "all") or any(getattr(thing, attribute) for thing in expected.things)


def right_shares(pictures: list[Picture], expected: list[Picture]) -> dict[str, float]:
    """Of each attribute the share that is right where it is asked for; "all": the share with nothing wrong."""
    rows = [(right(a, b), b) for a, b in zip(pictures, expected, strict=True)]
    return {name: share([row[name] for row, b in rows if asks_for(b, name)]) for name in (*ATTRIBUTES, "all")}
