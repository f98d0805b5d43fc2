"""Draws the pictures of the miniature world with Pillow: `draw(picture, jitter, size)`.

The page is 64 units wide and high whatever its size in pixels. The background and every thing are drawn at four times
the wanted size and averaged down. A background depends on scene, time and one of `VARIANTS` shapes, and is cached;
things are drawn anew each time, so that their place, size, turn and side vary by the jitter seed.
"""

import numpy as np
from PIL import Image, ImageDraw

from miniature.backdrop import SUPERSAMPLE, VARIANTS, background
from miniature.facts import PLACES, Picture, Thing, home

RADIUS = {"small": 8.0, "big": 12.2}  # page units; an autoencoder with cells of 8 must keep the small ones
CENTRE = {"left": 14.0, "middle": 32.0, "right": 50.0}
SKY_LEVEL = 17.5  # centre of things in the sky
GROUND = {  # where things on land or water stand: the height of their lowest point
    "sea": {"water": 56.0},
    "meadow": {"land": 58.0},
    "snow": {"land": 58.0},
    "city": {"land": 50.5, "water": 60.0},
    "desert": {"land": 58.0},
    "mountains": {"land": 49.0, "water": 59.5},
}
INK = (40, 31, 52)
HALO = {"day": (255, 255, 255, 70), "sunset": (255, 240, 214, 120), "night": (226, 234, 255, 130)}
PAINTS = {
    "red": (226, 36, 44),
    "orange": (252, 132, 12),
    "yellow": (255, 221, 38),
    "green": (26, 160, 66),
    "blue": (32, 96, 242),
    "purple": (128, 46, 190),
    "pink": (255, 142, 200),
    "white": (252, 252, 255),
}


def mix(one, two, share):
    return tuple(round(a + (b - a) * share) for a, b in zip(one, two, strict=True))


def palette(colour: str) -> dict[str, tuple]:
    """The paints of the parts of a thing of this colour."""
    main = PAINTS[colour]
    pale = (255, 255, 255) if colour == "white" else mix(main, (255, 255, 255), 0.42)
    dark = (198, 204, 222) if colour == "white" else mix(main, (44, 16, 60), 0.24)
    warm = colour in ("orange", "yellow")
    return {
        "main": main,
        "light": pale,
        "dark": dark,
        "ink": INK,
        "wood": (128, 82, 48),
        "glass": (255, 238, 170) if colour != "yellow" else (206, 236, 255),
        "sky": (200, 232, 250),
        "beak": (255, 226, 90) if colour == "orange" else (255, 160, 40),
        "heart": (150, 82, 40) if warm else (255, 214, 66),
        "leaf": (44, 128, 58),
        "snow": (255, 255, 255),
        "blush": (255, 150, 170),
        "metal": (206, 210, 220),
    }


# ---- shapes


def oval(x, y, rx, ry, n=26):
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def poly(*coordinates):
    return np.array(coordinates, float).reshape(-1, 2)


def rounded(points, times=2):
    """Cut the corners of a polygon off, `times` times (Chaikin)."""
    for _ in range(times):
        after = np.roll(points, -1, 0)
        points = np.stack([points * 0.75 + after * 0.25, points * 0.25 + after * 0.75], 1).reshape(-1, 2)
    return points


def petals(x, y, inner, outer, count, n=60, turn=0.0):
    """A round with `count` round lobes: a flower or a tree's crown."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    radius = inner + (outer - inner) * np.abs(np.cos(count * angle / 2 + turn)) ** 0.7
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def ribbon(points, width):
    """A polygon along a line."""
    points = np.asarray(points, float)
    along = np.gradient(points, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True) * width / 2
    return np.concatenate([points + side, (points - side)[::-1]])


def wave(x0, y0, x1, y1, swing, turns=1.5, n=14):
    """Points of a wavy line from (x0, y0) to (x1, y1)."""
    t = np.linspace(0, 1, n)[:, None]
    line = (1 - t) * (x0, y0) + t * (x1, y1)
    across = np.array([-(y1 - y0), x1 - x0]) / np.hypot(x1 - x0, y1 - y0)
    return line + across * swing * np.sin(2 * np.pi * turns * t)


def star(x, y, outer, inner, count=5):
    angle = np.pi * np.arange(2 * count) / count - np.pi / 2
    radius = np.where(np.arange(2 * count) % 2, inner, outer)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def normals(points):
    """Outward vectors at the corners: a corner moved by d times its vector moves its edges out by d."""
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    area = np.sum(points[:, 0] * np.roll(points[:, 1], -1) - np.roll(points[:, 0], -1) * points[:, 1])
    flip = np.sign(area)

    def outward(edge):
        return flip * np.stack([edge[:, 1], -edge[:, 0]], 1) / np.maximum(np.linalg.norm(edge, axis=1), 1e-9)[:, None]

    total = outward(before) + outward(after)
    return 2 * total / np.maximum((total**2).sum(1, keepdims=True), 1.2)  # 1.2: no spikes at sharp corners


SMILE = [(0.2376 * np.sin(a), 0.1456 + 0.1584 * np.cos(a)) for a in np.linspace(-1.1, 1.1, 7)]
CAT_HEAD = poly(-0.58, -1.04, -0.22, -0.78, 0.22, -0.78, 0.58, -1.04, 0.68, -0.34, 0.4, 0.06, -0.4, 0.06, -0.68, -0.34)
BIRD_BODY = poly(-0.86, -0.5, -0.3, -0.56, 0.1, -0.12, 0.66, 0.12, 0.5, 0.5, -0.1, 0.76, -0.7, 0.56, -0.94, 0.0)
BALLOON_SKIN = poly(-0.5, -1.06, 0.5, -1.06, 0.84, -0.62, 0.72, 0, 0.26, 0.52, -0.26, 0.52, -0.72, 0, -0.84, -0.62)
SHAPES = {  # (paint, width of the outline, polygon) of each part, in units of the radius
    "ball": [
        ("main", 1, oval(0, 0, 1, 1, 40)),
        ("dark", 0, rounded(poly(-0.30, -0.95, -0.78, -0.45, -0.86, 0.1, -0.62, 0.7, -0.42, 0.1), 2)),
        ("light", 0, rounded(poly(0.05, -1.0, 0.62, -0.55, 0.8, 0.1, 0.5, 0.8, 0.2, 0.95, 0.36, 0.0), 2)),
        ("snow", 0, oval(0.0, -0.86, 0.2, 0.12, 14)),
    ],
    "house": [
        ("dark", 1, poly(0.34, -0.98, 0.62, -0.98, 0.62, -0.2, 0.34, -0.2)),
        ("main", 1, poly(-0.76, -0.1, 0.76, -0.1, 0.76, 1, -0.76, 1)),
        ("dark", 1, poly(-1.0, 0.02, -0.1, -0.9, 0.1, -0.9, 1.0, 0.02)),
        ("main", 0, poly(-0.52, -0.24, 0.0, -0.76, 0.0, -0.64, -0.44, -0.18)),
        ("glass", 0.6, poly(-0.56, 0.2, -0.14, 0.2, -0.14, 0.6, -0.56, 0.6)),
        ("wood", 0.6, rounded(poly(0.12, 1, 0.12, 0.26, 0.54, 0.26, 0.54, 1), 1)),
        ("glass", 0, oval(0.42, 0.66, 0.06, 0.06, 8)),
    ],
    "tree": [
        ("wood", 1, poly(-0.2, 0.3, 0.2, 0.3, 0.24, 1, -0.24, 1)),
        ("main", 1, petals(0, -0.26, 0.62, 0.76, 7, turn=0.5) * (1.15, 1.0)),
        ("light", 0, petals(-0.26, -0.5, 0.22, 0.3, 5)),
        ("dark", 0, petals(0.36, 0.06, 0.14, 0.2, 5)),
        ("dark", 0, oval(-0.3, 0.16, 0.13, 0.1, 10)),
        ("light", 0, oval(0.36, -0.48, 0.1, 0.09, 10)),
    ],
    "boat": [
        ("wood", 1, poly(-0.04, -1.0, 0.06, -1.0, 0.06, 0.45, -0.04, 0.45)),
        ("main", 1, poly(0.14, -0.92, 0.5, -0.5, 0.78, 0.2, 0.14, 0.2)),
        ("light", 1, poly(-0.14, -0.7, -0.14, 0.2, -0.68, 0.2)),
        ("dark", 0, poly(0.14, -0.1, 0.67, -0.1, 0.75, 0.1, 0.14, 0.1)),
        ("main", 1, poly(-1.0, 0.38, 1.0, 0.38, 0.82, 0.72, 0.62, 0.92, -0.58, 0.92, -0.82, 0.72)),
        ("snow", 0, poly(-0.92, 0.46, 0.93, 0.46, 0.88, 0.56, -0.88, 0.56)),
    ],
    "fish": [
        ("dark", 1, rounded(poly(-0.3, -0.5, 0.24, -0.94, 0.42, -0.36), 1)),
        ("dark", 1, rounded(poly(0.4, 0.0, 0.98, -0.62, 0.84, 0.0, 0.98, 0.62), 1)),
        ("main", 1, oval(-0.2, 0, 0.82, 0.66, 34)),
        ("light", 0, rounded(poly(-0.86, 0.2, -0.2, 0.28, 0.4, 0.14, 0.1, 0.46, -0.3, 0.54, -0.66, 0.42), 2)),
        ("dark", 0, rounded(poly(-0.02, -0.4, 0.12, -0.4, 0.2, 0.0, 0.1, 0.36, -0.04, 0.36, 0.04, 0.0), 1)),
        ("dark", 0, rounded(poly(0.28, -0.3, 0.38, -0.26, 0.44, 0.0, 0.36, 0.24, 0.26, 0.24, 0.32, 0.0), 1)),
        ("snow", 0.5, oval(-0.56, -0.14, 0.19, 0.2, 16)),
        ("ink", 0, oval(-0.6, -0.13, 0.1, 0.12, 12)),
        ("ink", 0, ribbon([(-0.92, 0.16), (-0.8, 0.25), (-0.66, 0.26)], 0.09)),
    ],
    "car": [
        ("main", 1, rounded(poly(-0.68, 0.12, -0.46, -0.62, 0.36, -0.62, 0.72, 0.12), 1)),
        ("sky", 0.5, poly(-0.46, 0.02, -0.34, -0.42, -0.04, -0.42, -0.04, 0.02)),
        ("sky", 0.5, poly(0.1, 0.02, 0.1, -0.42, 0.3, -0.42, 0.5, 0.02)),
        ("main", 1, rounded(poly(-1.0, 0.0, 0.8, -0.02, 1.04, 0.3, 1.0, 0.72, -1.0, 0.72), 1)),
        ("light", 0, poly(-0.8, 0.12, 0.7, 0.12, 0.7, 0.24, -0.8, 0.24)),
        ("dark", 0, poly(-0.9, 0.54, 0.92, 0.54, 0.9, 0.68, -0.9, 0.68)),
        ("glass", 0.4, oval(0.86, 0.3, 0.1, 0.12, 12)),
        ("ink", 0.6, oval(-0.52, 0.68, 0.31, 0.31, 22)),
        ("ink", 0.6, oval(0.52, 0.68, 0.31, 0.31, 22)),
        ("metal", 0, oval(-0.52, 0.68, 0.16, 0.16, 14)),
        ("metal", 0, oval(0.52, 0.68, 0.16, 0.16, 14)),
    ],
    "star": [
        ("main", 1, rounded(star(0, 0.08, 1.12, 0.56), 2)),
        ("light", 0, rounded(poly(0.0, -0.86, 0.2, -0.36, 0.0, -0.26, -0.24, -0.34), 1)),
        ("blush", 0, oval(-0.46, 0.2, 0.13, 0.09, 10)),
        ("blush", 0, oval(0.46, 0.2, 0.13, 0.09, 10)),
        ("ink", 0, oval(-0.2772, 0.04, 0.099, 0.132, 12)),
        ("ink", 0, oval(0.2772, 0.04, 0.099, 0.132, 12)),
        ("ink", 0, ribbon(SMILE, 0.0858)),
    ],
    "flower": [
        ("leaf", 1, ribbon([(0.02, 0.1), (0.05, 0.5), (0.0, 0.98)], 0.15)),
        ("leaf", 1, rounded(poly(0.04, 0.9, 0.3, 0.6, 0.76, 0.56, 0.5, 0.86), 2)),
        ("leaf", 1, rounded(poly(0.0, 0.94, -0.26, 0.66, -0.7, 0.62, -0.44, 0.9), 2)),
        ("main", 1, petals(0, -0.26, 0.38, 0.8, 6)),
        ("light", 0, petals(0, -0.26, 0.22, 0.46, 6)),
        ("heart", 0.7, oval(0, -0.26, 0.25, 0.25, 18)),
    ],
    "cat": [
        ("main", 1, ribbon([(0.4, 0.86), (0.74, 0.78), (0.9, 0.5), (0.78, 0.2), (0.92, -0.02)], 0.2)),
        ("main", 1, rounded(poly(-0.3, -0.1, 0.3, -0.1, 0.52, 0.5, 0.6, 1.02, -0.6, 1.02, -0.52, 0.5), 2)),
        ("light", 0, oval(0, 0.6, 0.26, 0.32, 16)),
        ("main", 1, rounded(CAT_HEAD, 1)),
        ("blush", 0, poly(-0.5, -0.82, -0.28, -0.68, -0.5, -0.54)),
        ("blush", 0, poly(0.5, -0.82, 0.28, -0.68, 0.5, -0.54)),
        ("ink", 0, oval(-0.27, -0.36, 0.1, 0.14, 12)),
        ("ink", 0, oval(0.27, -0.36, 0.1, 0.14, 12)),
        ("blush", 0.3, poly(-0.09, -0.19, 0.09, -0.19, 0, -0.09)),
        ("ink", 0, ribbon([(-0.16, -0.02), (-0.06, 0.0), (0.0, -0.09), (0.06, 0.0), (0.16, -0.02)], 0.07)),
        ("ink", 0, ribbon([(-0.2, 1.0), (-0.2, 0.74)], 0.07)),
        ("ink", 0, ribbon([(0.2, 1.0), (0.2, 0.74)], 0.07)),
    ],
    "bird": [
        ("dark", 1, poly(0.4, 0.12, 1.02, -0.1, 0.98, 0.16, 1.0, 0.42, 0.4, 0.34)),
        ("beak", 0.8, poly(-0.82, -0.26, -1.06, -0.06, -0.78, 0.04)),
        ("main", 1, rounded(BIRD_BODY)),
        ("light", 0, rounded(poly(-0.74, 0.16, -0.3, 0.3, 0.2, 0.4, -0.1, 0.66, -0.6, 0.5), 2)),
        ("dark", 1, rounded(poly(-0.3, 0.22, -0.2, -0.2, 0.2, -0.8, 0.64, -1.06, 0.66, -0.5, 0.4, 0.1, 0.1, 0.3), 1)),
        ("main", 0, rounded(poly(-0.16, 0.12, -0.06, -0.16, 0.22, -0.6, 0.46, -0.78, 0.44, -0.44, 0.2, 0.0), 1)),
        ("snow", 0, oval(-0.54, -0.2, 0.15, 0.16, 14)),
        ("ink", 0, oval(-0.57, -0.19, 0.1, 0.12, 12)),
    ],
    "balloon": [
        ("ink", 0, ribbon(wave(0, 0.5, 0.04, 1.02, 0.1, 1.0), 0.09)),
        ("dark", 1, poly(-0.14, 0.62, 0.14, 0.62, 0.0, 0.42)),
        ("main", 1, rounded(BALLOON_SKIN)),
        ("light", 0, rounded(poly(-0.46, -0.8, -0.16, -0.86, -0.3, -0.5, -0.5, -0.16, -0.6, -0.46), 2)),
        ("snow", 0, oval(-0.34, -0.62, 0.1, 0.14, 10)),
    ],
    "kite": [
        ("ink", 0, ribbon(wave(0.0, 0.4, -0.72, 1.0, 0.12, 1.0), 0.08)),
        ("main", 0.8, poly(-0.42, 0.56, -0.12, 0.76, -0.18, 0.5, -0.36, 0.82)),
        ("dark", 0.8, poly(-0.86, 0.72, -0.5, 0.98, -0.62, 0.7, -0.74, 1.04)),
        ("main", 1, poly(0.18, -1.04, 0.86, -0.4, 0.0, 0.54, -0.62, -0.44)),
        ("light", 0, poly(0.16, -0.96, 0.16, -0.42, -0.56, -0.44)),
        ("dark", 0, poly(0.14, -0.42, 0.76, -0.4, 0.02, 0.44)),
        ("ink", 0, ribbon([(0.18, -1.0), (0.0, 0.5)], 0.06)),
        ("ink", 0, ribbon([(-0.6, -0.44), (0.84, -0.4)], 0.06)),
    ],
}
LOWEST = {"fish": 0.66}  # of the parts, where it is not about 1
TURNS = {"ball": 3.14, "star": 0.16, "bird": 0.12, "balloon": 0.1, "kite": 0.16, "fish": 0.12, "boat": 0.05}  # radians
ONE_SIDED = {"boat", "fish", "car", "cat", "bird", "kite", "flower"}  # these may be mirrored
PARTS = {kind: [(p, e, q, normals(q)) for p, e, q in parts] for kind, parts in SHAPES.items()}


# ---- drawing


def light(side: int, radius: float) -> np.ndarray:
    """(side, side, 1): how much light falls on a thing in the middle, 1.08 at its upper left to 0.82 at lower right."""
    x = np.arange(side) - side / 2
    return (0.95 - 0.13 * np.clip((x[:, None] + x) / (2.8 * radius), -1, 1))[..., None]


def put(page: Image.Image, thing: Thing, scene: str, time: str, jitter: int) -> None:
    """Draw one thing on the page."""
    unit = page.width / 64
    level = home(thing.kind, scene)
    place = np.random.default_rng([jitter, PLACES.index(thing.place)]).uniform(-1, 1, 2)
    shape = np.random.default_rng([jitter, 3 + list(SHAPES).index(thing.kind)]).uniform(-1, 1, 5)

    radius = RADIUS[thing.size] * (1 + 0.04 * shape[0]) * unit
    x = (CENTRE[thing.place] + 0.8 * place[0]) * unit
    if level == "sky":
        y = (SKY_LEVEL + 1.5 * place[1]) * unit
    else:
        y = (GROUND[scene][level] + place[1]) * unit - radius * LOWEST.get(thing.kind, 1.0)
    angle = TURNS.get(thing.kind, 0.0) * shape[1]
    mirror = -1.0 if thing.kind in ONE_SIDED and shape[2] > 0 else 1.0
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # row vectors
    turn = np.array([[mirror * (1 + 0.04 * shape[3])], [1.0 + 0.04 * shape[4]]]) * turn

    half = int(radius * 1.22 + 3 * unit)
    x0, y0 = round(x) - half, round(y) - half
    sprite = Image.new("RGBA", (2 * half * SUPERSAMPLE,) * 2, (0, 0, 0, 0))
    pen = ImageDraw.Draw(sprite)
    at, scale = np.array([x - x0, y - y0]) * SUPERSAMPLE, radius * SUPERSAMPLE
    line = (0.75 + 0.025 * radius / unit) / radius * unit  # of the dark outline, in the thing's own units
    paints = palette(thing.colour)

    def fill(points, paint):
        pen.polygon(((points @ turn) * scale + at).ravel().tolist(), fill=paint)

    if level == "land":
        shadow = oval(0, LOWEST.get(thing.kind, 1.0), 0.86, 0.15, 24) * scale + at  # not turned with the thing
        pen.polygon(shadow.ravel().tolist(), fill=(20, 16, 40, 90))
    halo = line + 0.9 * unit / radius
    for _, edge, points, normal in PARTS[thing.kind]:
        if edge == 1:
            fill(points + normal * halo, HALO[time])
    for paint, edge, points, normal in PARTS[thing.kind]:
        if edge:
            fill(points + normal * line * edge, INK)
        fill(points, paints[paint])

    sprite = sprite.reduce(SUPERSAMPLE)
    pixels = np.asarray(sprite)
    lit = pixels[..., :3] * light(2 * half, radius)
    colour = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
    page.paste(colour, (x0, y0), sprite.getchannel("A"))
    if level == "water":
        ripple(page, x / unit, (y + radius * LOWEST.get(thing.kind, 1.0)) / unit, radius / unit, time)


def ripple(page: Image.Image, x: float, y: float, radius: float, time: str) -> None:
    """Draw two light strokes over a thing at its waterline."""
    unit, s = page.width / 64, SUPERSAMPLE
    width, height = int(2.6 * radius * unit), int(5 * unit)
    sprite = Image.new("RGBA", (width * s, height * s), (255, 255, 255, 0))
    pen = ImageDraw.Draw(sprite)
    ink = (255, 255, 255, 215) if time == "day" else (255, 232, 214, 190) if time == "sunset" else (176, 200, 240, 170)
    for dx, dy, length in ((0.0, 0.2, 0.95), (0.25, 0.55, 0.5)):
        left, right, y0 = width * (0.5 + dx - length / 2), width * (0.5 + dx + length / 2), height * dy
        line = wave(left, y0, right, y0 + 0.01, 0.4 * unit, 2.5 * length + 0.5, 24)
        pen.line((line * s).ravel().tolist(), fill=ink, width=max(1, round(0.8 * unit * s)))
    sprite = sprite.reduce(s)
    page.paste(sprite, (round(x * unit - width / 2), round((y - 1.6) * unit)), sprite)


def draw(picture: Picture, jitter: int, size: int = 64) -> Image.Image:
    """The picture as RGB, size x size pixels. A story is drawn with one jitter seed: background and shapes stay the
    same while its things change."""
    page = background(picture.scene, picture.time, jitter % VARIANTS, size).copy()
    depth = {"sky": 0, "land": 1, "water": 2}
    for thing in sorted(picture.things, key=lambda t: (depth[home(t.kind, picture.scene)], t.size)):  # "big" first
        put(page, thing, picture.scene, picture.time, jitter)
    return page
