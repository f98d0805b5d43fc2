"""The backgrounds of the miniature world: six scenes by day, at sunset and at night, in `VARIANTS` shapes each.

A background holds nothing that could be taken for one of the things: no trees, houses with a roof or birds, and stars
that are mere dots. Coordinates are page units, 64 by 64, y downwards. Everything is painted at four times the size and
averaged down. The shapes depend on scene and variant alone, so that they stay where they are when night falls. Stars,
flakes, blades of grass and lit windows are the same in every variant: many small details cost an autoencoder much.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

VARIANTS = 8
SUPERSAMPLE = 4
SKY = {  # colours from the top down to the horizon
    "day": ((96, 178, 240), (150, 208, 248), (214, 238, 252)),
    "sunset": ((86, 72, 152), (206, 104, 146), (255, 190, 120)),
    "night": ((12, 16, 48), (28, 38, 86), (62, 80, 138)),
}
LIGHT = {  # what the time of day makes of a colour: factors, then an offset
    "day": ((1.0, 1.0, 1.0), (0, 0, 0)),
    "sunset": ((0.86, 0.70, 0.64), (32, 12, 24)),
    "night": ((0.36, 0.42, 0.56), (4, 6, 22)),
}
TOWERS = {
    "back": ((168, 176, 208), (186, 172, 204), (160, 188, 206)),
    "front": ((132, 140, 178), (158, 138, 172), (126, 156, 178), (170, 150, 160)),
}
LIGHT_OF = {  # scenes whose ground has a light of its own
    ("snow", "night"): ((0.50, 0.54, 0.66), (0, 0, 16)),
    ("desert", "night"): ((0.40, 0.38, 0.62), (0, 4, 26)),
    ("meadow", "sunset"): ((0.80, 0.72, 0.60), (32, 10, 24)),
}


class Page:
    """A page being painted: a Pillow picture and its scale."""

    def __init__(self, size: int, scene: str, time: str, rng: np.random.Generator):
        self.time, self.rng = time, rng  # `rng`: of this variant
        self.specks = np.random.default_rng(0)  # the same in all
        self.light = LIGHT_OF.get((scene, time), LIGHT[time])
        self.side = size * SUPERSAMPLE
        self.scale = self.side / 64
        self.image = Image.new("RGB", (self.side, self.side))

    def tone(self, colour):
        factor, offset = self.light
        return tuple(min(255, round(c * f + o)) for c, f, o in zip(colour, factor, offset, strict=True))

    def points(self, points):
        return (np.asarray(points, float) * self.scale).ravel().tolist()

    def gradient(self, top: float, bottom: float, colours) -> Image.Image:
        """The whole page in colours that run from height `top` to height `bottom`."""
        rows = (np.arange(self.side) / self.scale - top) / (bottom - top)
        stops = np.linspace(0, 1, len(colours))
        column = np.stack([np.interp(rows, stops, [c[i] for c in colours]) for i in range(3)], 1)
        return Image.fromarray(column.round().astype(np.uint8)[:, None]).resize((self.side, self.side))

    def shape(self, points, top, bottom=None, lit=False):
        """A polygon, its colour running from `top` to `bottom` over its height; `lit`: the same by day and night."""
        points = np.asarray(points, float)
        colours = [c if lit else self.tone(c) for c in (top, bottom or top)]
        if bottom is None:
            ImageDraw.Draw(self.image).polygon(self.points(points), fill=colours[0])
            return
        mask = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(mask).polygon(self.points(points), fill=255)
        low, high = points[:, 1].min(), min(64.0, points[:, 1].max())
        self.image.paste(self.gradient(low, high, colours), (0, 0), mask)

    def land(self, heights, top, bottom, edge=None):
        """Everything below a line of heights (at equal distances from left to right); `edge`: the line's colour."""
        x = np.linspace(-1, 65, len(heights))
        line = np.stack([x, heights], 1)
        self.shape(np.concatenate([line, [(65, 65), (-1, 65)]]), top, bottom)
        if edge:
            self.stroke(line, edge, 0.7)

    def spot(self, x, y, rx, ry, colour, lit=False):
        box = self.points([(x - rx, y - ry), (x + rx, y + ry)])
        ImageDraw.Draw(self.image).ellipse(box, fill=colour if lit else self.tone(colour))

    def stroke(self, points, colour, width):
        width = max(1, round(width * self.scale))
        ImageDraw.Draw(self.image).line(self.points(points), fill=self.tone(colour), width=width)

    def glow(self, x, y, radius, colour, strength, top=0.0):
        """Draw light around a point, which fades to nothing at `radius`; no light falls above the height `top`."""
        rows, columns = np.mgrid[: self.side, : self.side] / self.scale
        fall = np.clip(1 - np.hypot(columns - x, rows - y) / radius, 0, 1) ** 2 * (rows >= top)
        mask = Image.fromarray((fall * 255 * strength).astype(np.uint8))
        self.image.paste(colour, (0, 0, self.side, self.side), mask)

    def waves(self, top, bottom, colours, crest, rows):
        """Water between two heights: rows of waves that grow towards the reader."""
        self.shape([(-1, top), (65, top), (65, 65), (-1, 65)], *colours)
        x = np.linspace(-1, 65, 133)
        for row in range(rows):
            depth = (row + 0.6) / rows
            length, swing = 6 + 8 * depth, 0.35 + 0.75 * depth
            phase = self.rng.uniform(0, length)
            line = top + (bottom - top) * depth - swing * np.abs(np.sin(np.pi * (x + phase) / length))
            share = 0.22 if row % 2 else 0.06
            colour = tuple(round(a + (b - a) * depth + share * 60) for a, b in zip(*colours, strict=True))
            ribbon = np.concatenate([np.stack([x, line], 1), [(65, 65), (-1, 65)]])
            self.shape(ribbon, colour, colours[1])
            self.stroke(np.stack([x, line], 1), crest, 0.3 + 0.3 * depth)


def hills(rng, height, swing, length):
    """Heights of rolling hills at equal distances from left to right, up to `swing` units around `height`."""
    x = np.linspace(-1, 65, 67)
    first, second = rng.uniform(0, 2 * np.pi, 2)
    wobble = 0.65 * np.sin(2 * np.pi * x / length + first) + 0.35 * np.sin(2 * np.pi * x / (0.55 * length) + second)
    return height - swing * wobble


def peaks(rng, height, swing, count):
    """Corners of a row of mountains: (x, y), a valley first, then peak and valley in turn."""
    at = np.linspace(-6, 70, 2 * count + 1) + rng.uniform(-2, 2, 2 * count + 1)
    y = np.where(np.arange(2 * count + 1) % 2, height - swing * rng.uniform(0.75, 1.0, 2 * count + 1), height)
    return np.stack([at, y], 1)


# ---- skies


def sky(page: Page, horizon: float) -> float:
    """Draw the sky. Returns the x of sun or moon, which stand in a gap between the places of things."""
    rng, time = page.rng, page.time
    page.image = page.gradient(0, horizon, SKY[time])
    x = (23.0 if rng.random() < 0.5 else 41.0) + rng.uniform(-1.5, 1.5)
    high = rng.uniform(6.0, 8.0)
    dots = page.specks.uniform((1, 1, 0.2), (63, 29, 0.5), (46, 3))  # x, y, radius
    puffs = [(rng.uniform(0, 64), rng.uniform(4, horizon - 9), rng.uniform(0.7, 1.25)) for _ in range(4)]
    if time == "day":
        page.glow(x, high, 17, (255, 246, 196), 0.8)
        page.spot(x, high, 3.4, 3.4, (255, 232, 128))
        for cloud in puffs:
            draw_cloud(page, *cloud, (255, 255, 255), (226, 240, 252))
    elif time == "sunset":
        low = horizon - 2.5
        page.glow(x, low, 34, (255, 214, 120), 0.95)
        page.spot(x, low, 5.4, 5.4, (255, 226, 120), lit=True)
        page.spot(x, low, 4.2, 4.2, (255, 240, 168), lit=True)
        for cx, cy, s in puffs:
            for dx, dy, length in ((0, 0, 9), (3, 1.3, 7), (-3, 2.4, 5)):
                y = cy + dy * s
                warm = (255, 176, 150) if y > horizon / 2 else (188, 112, 160)
                page.spot(cx + dx, y, length * s, 0.6 * s, warm, lit=True)
    else:
        page.glow(x, high, 20, (150, 170, 230), 0.6)
        for cx, cy, r in dots:
            page.spot(cx, cy, r, r, (255, 246, 210) if r > 0.35 else (190, 204, 240), lit=True)
        page.shape(crescent(x, high, 4.0), (252, 246, 214), lit=True)
    return x


def crescent(x, y, radius, n=20):
    """A moon that opens to the upper left: the outer arc, then the inner one back."""
    outer = np.linspace(-2.0, 2.0, n) + 0.5
    inner = np.linspace(1.42, -1.42, n) + 0.5
    tip = np.sin(2.0) / np.sin(1.42)  # the arcs share their ends
    shift = np.cos(2.0) - tip * np.cos(1.42)
    arc = np.stack([np.cos(outer), np.sin(outer)], 1)
    back = np.stack([np.cos(inner), np.sin(inner)], 1) * tip + shift * np.array([np.cos(0.5), np.sin(0.5)])
    return np.concatenate([arc, back]) * radius + (x, y)


def draw_cloud(page, x, y, s, light, shadow):
    for dx, dy, rx, ry in ((0, 0.5, 6.4, 1.5), (-2.6, -0.4, 2.6, 1.9), (0.6, -1.4, 3.1, 2.6), (3.4, -0.2, 2.4, 1.7)):
        page.spot(x + dx * s, y + dy * s + 0.7 * s, rx * s, ry * s, shadow)
    for dx, dy, rx, ry in ((0, 0.5, 6.2, 1.2), (-2.6, -0.4, 2.5, 1.8), (0.6, -1.4, 3.0, 2.5), (3.4, -0.2, 2.3, 1.6)):
        page.spot(x + dx * s, y + dy * s, rx * s, ry * s, light)


def glitter(page: Page, x: float, top: float, bottom: float) -> None:
    """Draw the light of sun or moon on water, around column `x` and between two heights."""
    colour = {"day": (214, 246, 250), "sunset": (255, 214, 140), "night": (150, 172, 222)}[page.time]
    for y in np.arange(top + 0.8, bottom, 2.1):
        width = 0.8 + (y - top) * 0.16
        for _ in range(2):
            at = x + page.rng.uniform(-1, 1) * (1.0 + (y - top) * 0.16)
            page.spot(at, y, width, 0.28, colour, lit=True)


# ---- scenes


def sea(page: Page) -> None:
    light = sky(page, 32)
    island = page.rng.uniform(4, 60)
    coast = ((-9, 32.5), (-4, 29.6), (0, 28.4), (5, 30.2), (9, 32.5))
    page.shape([(island + dx, y) for dx, y in coast], (120, 160, 176))
    page.waves(32, 64, ((78, 196, 206), (18, 108, 158)), (206, 246, 246), 6)
    if page.time == "sunset":
        page.glow(light, 32, 34, (255, 176, 120), 0.75, top=32)
    glitter(page, light, 32, 54)


def meadow(page: Page) -> None:
    sky(page, 36)
    rng, specks = page.rng, page.specks
    page.land(hills(rng, 35, 3.0, 50), (150, 208, 150), (132, 190, 120), (112, 170, 112))
    page.land(hills(rng, 41, 2.6, 42), (186, 222, 112), (150, 200, 96), (136, 184, 88))
    page.land(hills(rng, 49, 1.6, 60), (172, 216, 96), (112, 176, 70), (120, 180, 74))
    for _ in range(22):
        x, y = specks.uniform(0, 64), specks.uniform(52, 63)
        page.stroke([(x - 0.8, y - 1.5), (x, y), (x + 0.7, y - 1.7)], (86, 150, 60), 0.35)
    for _ in range(16):
        x, y = specks.uniform(0, 64), specks.uniform(47, 63)
        page.spot(x, y, 0.42, 0.42, [(255, 250, 230), (255, 226, 120), (250, 190, 214)][specks.integers(3)])


def snow(page: Page) -> None:
    sky(page, 38)
    rng, specks = page.rng, page.specks
    page.shape(np.concatenate([peaks(rng, 40, 9, 3), [(70, 64), (-6, 64)]]), (190, 208, 234), (214, 226, 242))
    page.land(hills(rng, 40, 2.6, 44), (226, 237, 250), (204, 221, 244), (176, 198, 230))
    page.land(hills(rng, 48, 2.0, 56), (240, 246, 254), (206, 222, 246), (190, 210, 238))
    for _ in range(9):  # drifts
        x, y = specks.uniform(0, 64), specks.uniform(52, 63)
        page.stroke([(x - 3, y), (x - 1, y - 0.6), (x + 1.6, y - 0.5), (x + 3.4, y)], (182, 203, 236), 0.45)
    flake = (255, 255, 255) if page.time != "night" else (190, 206, 240)
    for _ in range(46):
        r = specks.uniform(0.28, 0.6)
        page.spot(specks.uniform(0, 64), specks.uniform(0, 64), r, r, flake, lit=True)


def city(page: Page) -> None:
    sky(page, 44)
    rng, specks = page.rng, page.specks
    for back in (True, False):
        x = -2.0 - rng.uniform(0, 4)
        while x < 65:
            width = rng.uniform(6.5, 10.5)
            top = rng.uniform(17, 27) if back else rng.uniform(28, 37)
            colours = TOWERS["back" if back else "front"]
            colour = colours[rng.integers(len(colours))]
            foot, outline = (tuple(round(c * share) for c in colour) for share in (0.86, 0.74))
            corners = [(x, 52), (x, top), (x + width, top), (x + width, 52)]
            page.shape(corners, colour, foot)
            page.stroke(corners, outline, 0.35)
            if back and rng.random() < 0.4:
                page.stroke([(x + width / 2, top), (x + width / 2, top - 3.5)], (120, 124, 160), 0.4)
            lights(page, x, top, width)
            x += width + (rng.uniform(0, 2.5) if back else rng.uniform(-0.5, 1.0))
    page.shape([(-1, 46), (65, 46), (65, 54), (-1, 54)], (206, 200, 196), (178, 172, 176))
    page.stroke([(-1, 46), (65, 46)], (150, 146, 156), 0.5)
    page.shape([(-1, 51.5), (65, 51.5), (65, 53.5), (-1, 53.5)], (150, 140, 146))
    for x in np.arange(-1 + rng.uniform(0, 4), 65, 4.2):
        page.stroke([(x, 51.5), (x, 53.5)], (122, 114, 124), 0.35)
    page.waves(53.5, 64, ((92, 160, 178), (40, 104, 140)), (176, 220, 226), 3)
    if page.time != "day":
        for _ in range(14):
            x, y = specks.uniform(0, 64), specks.uniform(55, 63)
            page.spot(x, y, specks.uniform(0.8, 1.8), 0.28, (255, 214, 130), lit=True)


def lights(page: Page, x: float, top: float, width: float) -> None:
    """Draw the windows of a tower. By day none is lit, at sunset some are, at night most."""
    lit = {"day": 0.0, "sunset": 0.45, "night": 0.6}[page.time]
    for row in np.arange(top + 1.6, 45, 2.9):
        for column in np.arange(x + 1.3, x + width - 1.2, 2.3):
            on = page.specks.random() < lit
            box = [(column, row), (column + 1.1, row), (column + 1.1, row + 1.5), (column, row + 1.5)]
            page.shape(box, (255, 222, 128) if on else (222, 236, 248) if lit == 0 else (96, 104, 140), lit=on)


def desert(page: Page) -> None:
    sky(page, 40)
    rng, specks = page.rng, page.specks
    at = rng.uniform(20, 44)
    for x, y, h in ((at - 11, 41, 9), (at, 41, 14)):
        page.shape([(x, y - h), (x + h * 0.95, y + 1), (x - h * 0.95, y + 1)], (226, 186, 128), (212, 168, 112))
        page.shape([(x, y - h), (x + h * 0.95, y + 1), (x + h * 0.2, y + 1)], (196, 150, 104), (188, 142, 100))
    page.land(hills(rng, 41, 2.4, 46), (240, 208, 150), (228, 184, 124), (206, 162, 108))
    page.land(hills(rng, 48, 2.6, 58), (248, 220, 164), (226, 184, 122), (212, 170, 112))
    for start in (53, 57, 61):
        line = hills(rng, start, 0.9, 26)
        page.stroke(np.stack([np.linspace(-1, 65, 67), line], 1), (210, 168, 112), 0.4)
    for _ in range(12):
        page.spot(specks.uniform(0, 64), specks.uniform(51, 63), 0.5, 0.32, (190, 146, 100))


def mountains(page: Page) -> None:
    light = sky(page, 40)
    rng = page.rng
    for height, swing, count, rock in ((41, 18, 3, (158, 168, 206)), (43, 23, 2, (126, 134, 172))):
        line = peaks(rng, height, swing, count)
        shade = tuple(round(c * 0.82) for c in rock)
        page.shape(np.concatenate([line, [(70, 64), (-6, 64)]]), rock, tuple(round(c * 1.08) for c in rock))
        for i in range(1, len(line), 2):
            before, top, after = line[i - 1], line[i], line[i + 1]
            page.shape([top, after, (top[0] + 1.5, after[1])], shade, rock)
            left, right = top + (before - top) * 0.36, top + (after - top) * 0.36
            lower = [(right + top) / 2 + (-0.6, 3.0), (left + right) / 2 + (0, -0.6), (left + top) / 2 + (0.8, 3.2)]
            page.shape([left, top, right, *lower], (250, 252, 255), (228, 236, 250))
    page.land(hills(rng, 43.5, 1.3, 30), (150, 196, 112), (112, 164, 84), (104, 152, 82))
    page.land(hills(rng, 49.5, 0.5, 40), (216, 204, 168), (190, 178, 146))
    page.waves(51, 64, ((104, 190, 208), (36, 112, 156)), (206, 240, 244), 4)
    if page.time != "day":
        glitter(page, light, 51, 63)


PAINTERS = {"sea": sea, "meadow": meadow, "snow": snow, "city": city, "desert": desert, "mountains": mountains}


@lru_cache(maxsize=1024)
def background(scene: str, time: str, variant: int, size: int) -> Image.Image:
    """The background as RGB, size x size pixels, from a cache: copy it before you draw on it."""
    page = Page(size, scene, time, np.random.default_rng([variant, list(PAINTERS).index(scene)]))
    PAINTERS[scene](page)
    return page.image.reduce(SUPERSAMPLE)
