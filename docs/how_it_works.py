"""Draws docs/how-it-works.svg: one voken from prompt to picture, with shapes, files, and what trains.

    python docs/how_it_works.py

how-it-works.txt is the page, a line an element; the rows of tokens are made here. The pictures are drawings of the
miniature's world, with the noise that the schedule adds at a timestep.
"""

import base64
import html
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.images import to_image, to_tensor
from miniature.facts import Picture, Thing
from miniature.paint import draw
from scheduler import NoiseSchedule, ScheduleConfig

PAGE, OUT = (Path(__file__).with_name(f"how-it-works.{kind}") for kind in ("txt", "svg"))
WIDTH, HEIGHT = 1000, 1394
STEPS = ((45, 232), (300, 180), (18, 520), (18, 670), (618, 290), (640, 846), (206, 890), (440, 1126), (966, 1154))
WORDS = {"<s>": (34, 78), "this": (82, 130), "boat": (134, 182), "at": (186, 220), "night": (224, 278)}  # left, right
VOKENS = {f"[IMG{i}]": (474 + 56 * i, 526 + 56 * i) for i in range(8)}
TOKENS = {**WORDS, ":": (418, 470), **VOKENS, "###": (922, 966)}

INK, GREY, RED, ORANGE = "#1f2933", "#5b6770", "#c2185b", "#b45309"
FILLS = {"frozen": ("#e3ecf7", "#7f9bbd"), "trained": ("#ffe2bd", "#e8872b"), "loss": ("#fde4ee", RED)}
FILLS |= {"code": ("#ffffff", "#9aa5b1"), "data": ("#eceff2", "#a9b4bf"), "embedded": ("#d5eee6", "#55a58b")}
FILLS |= {"voken": (INK, INK), "zeros": ("#ffffff", "#c3cad2"), "mapper": ("#fffaf3", "#f0b679")}
LINES = {"arrow": (INK, 1.6), "thick": (INK, 2.2), "thin": (INK, 1), "dash": (RED, 1.6)}
SANS = "-apple-system,'Segoe UI','Helvetica Neue',Helvetica,Arial,sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
TYPES = {  # size, weight, colour, family
    "title": (22, 700, INK, SANS),
    "big": (16, 600, INK, SANS),
    "name": (14, 600, INK, SANS),
    "label": (13, 400, INK, SANS),
    "note": (13, 400, GREY, SANS),
    "said": (14, 700, ORANGE, MONO),
    "loss": (13, 400, RED, SANS),
    "step": (13, 700, "#ffffff", SANS),
    "shape": (12.5, 400, GREY, MONO),
    "token": (12.5, 400, INK, MONO),
    "next": (12.5, 400, ORANGE, MONO),
}


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    size, weight, colour, family = TYPES[kind]
    font = f'font-family="{family}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {font}>{html.escape(words, quote=False)}</text>'


def rect(kind: str, x: float, y: float, w: float, h: float, radius: float = 5) -> str:
    fill, stroke = FILLS[kind]
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" stroke="{stroke}"/>'


def box(kind: str, x: float, y: float, w: float, h: float, name: str, file: str = "") -> str:
    centre, middle = x + w / 2, y + h / 2
    if not file:
        return rect(kind, x, y, w, h) + text("name", centre, middle + 5, name, "middle")
    words = text("name", centre, middle - 3, name, "middle") + text("shape", centre, middle + 14, file, "middle")
    return rect(kind, x, y, w, h) + words


def arrow(kind: str, points: list[tuple[float, ...]], label: str = "") -> str:
    """A line with a head; the label stands beside its last piece if that is upright, else above."""
    (colour, width), (x0, y0), (x, y) = LINES[kind], points[-2], points[-1]
    length = math.dist((x0, y0), (x, y))
    dx, dy = (x - x0) / length, (y - y0) / length
    bx, by = x - 8 * dx, y - 8 * dy
    line = " ".join(f"{px:g},{py:g}" for px, py in (*points[:-1], (bx, by)))
    head = f"{x:g},{y:g} {bx - 4.2 * dy:g},{by + 4.2 * dx:g} {bx + 4.2 * dy:g},{by - 4.2 * dx:g}"
    dashes = ' stroke-dasharray="5 3"' if kind == "dash" else ""
    drawn = f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
    if dx:
        words = text("shape", (x + x0 - 8 * dx) / 2, y - 8, label, "middle")
    else:
        words = text("shape", x + 10, (y + y0) / 2 + 4, label)
    return drawn + f'<polygon points="{head}" fill="{colour}"/>' + (words if label else "")


def brace(left: float, right: float, y: float, depth: float) -> str:
    """A bracket under what lies from left to right; over it where the depth is negative."""
    path = f"M{left:g},{y:g} v{depth:g} H{right:g} v{-depth:g}"
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.6"/>'


def bars(kind: str, x: float, y: float, w: float, number: float) -> str:
    """Vectors side by side."""
    step = w / number
    return "".join(rect(kind, x + i * step, y, step - min(2, step / 4), 44, 2) for i in range(int(number)))


def sheet(kind: str, x: float, y: float) -> str:
    """Vectors on top of each other."""
    return rect("data", x, y, 84, 100) + "".join(rect(kind, x + 6, y + 5 + 9 * i, 72, 5, 2) for i in range(10))


def image(time: str, timestep: float, x: float, y: float, side: float, label: str) -> str:
    """A boat on the sea, noisy as its latent is at `timestep`; the words below."""
    picture = draw(Picture("sea", time, (Thing("boat", "red", "big", "middle"),)), 3, 192)
    if timestep:
        pixels = to_tensor(picture.resize((48, 48), Image.Resampling.BOX))[None] * 2 - 1
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal(pixels.shape)).float()
        schedule = NoiseSchedule(ScheduleConfig())
        picture = to_image(schedule.add_noise(pixels, noise, torch.tensor([int(timestep)]))[0])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    where = f'x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"'
    framed = f'<image {where} href="data:image/png;base64,{data}"/><rect {where} fill="none" stroke="{GREY}"/>'
    return framed + text("shape", x + side / 2, y + side + 16, label, "middle") * bool(label)


def element(line: str) -> str:
    """A line of the page."""
    head, *words = (part.strip() for part in line.split("|"))
    name, _, places = head.partition(" ")
    if name in LINES:
        paths = ([tuple(map(float, point.split(","))) for point in path.split()] for path in places.split("/"))
        return "".join(arrow(name, path, *words) for path in paths)
    values = [[float(v) if v.lstrip("-").isdigit() else v for v in place.split()] for place in places.split("/")]
    if name in TYPES:
        x, y, *anchor = values[0]
        return "".join(text(name, x, y + 17 * i, line, *anchor) for i, line in enumerate(words))
    drawing = {"rect": rect, "box": box, "brace": brace, "bars": bars, "sheet": sheet, "image": image}[name]
    return "".join(drawing(*value, *words) for value in values)


def tokens() -> str:
    """Ids, their embeddings, the hidden states, and what those before a voken predict."""
    drawn = []
    for place, (name, (left, right)) in enumerate(TOKENS.items()):
        middle, kind = (left + right) / 2, "trained" if name in VOKENS else "data"
        state = "voken" if 5 <= place < 13 else "data"  # one place before each voken
        drawn += [rect(kind, left, 442, right - left, 30), text("token", middle, 462, name, "middle")]
        drawn += [arrow("thin", [(middle, 472), (middle, 502)]), arrow("thin", [(middle, 538), (middle, 562)])]
        drawn += [rect(kind, middle - 7, 562, 14, 44, 3), rect(state, middle - 7, 732, 14, 44, 3)]
        drawn += [text("next", middle, 800, [*TOKENS][place + 1], "middle")] if state == "voken" else []
    return "\n".join(drawn)


def steps() -> str:
    discs = (f'<circle cx="{x}" cy="{y}" r="11" fill="{INK}"/>' for x, y in STEPS)
    numbers = (text("step", x, y + 4.5, str(i), "middle") for i, (x, y) in enumerate(STEPS, 1))
    return "\n".join(disc + number for disc, number in zip(discs, numbers, strict=True))


def figure() -> str:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    paper = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="#ffffff" stroke="#d0d7de"/>'
    title = "<title>One voken, from prompt to picture</title>"
    return "\n".join([head, title, paper, *map(element, lines), tokens(), steps(), "</svg>\n"])


if __name__ == "__main__":
    OUT.write_text(figure(), encoding="utf-8")
