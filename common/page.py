"""Pictures as files for people: one alone, a sheet of them with words, an answer in a folder with a page of it all."""

import base64
import html
import io
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import write_file

Turn = tuple[str, list[str | Image.Image]]  # who speaks, "you" or "model", and text and pictures in turn
ACROSS = 8  # pictures beside one another on a storyboard
STYLE = """
:root { color-scheme: light dark }
body { font: 18px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 0 auto; padding: 1rem }
h2 { font-size: 0.8rem; margin: 0; opacity: 0.6 }
p, figure { margin: 0.4rem 0; overflow-wrap: anywhere }
section { margin: 1rem 0; width: fit-content; max-width: 100% }
.you { margin-left: auto; max-width: 85%; padding: 0.5rem 1rem; border-radius: 1rem; background: #8883 }
img { display: block; width: 100%; border-radius: 0.5rem }
.small { width: min(100%, 20rem); image-rendering: pixelated }
figcaption { font-size: 0.85rem; opacity: 0.7 }"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
{body}"""


def png_bytes(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    write_file(path, png_bytes(image))


def draw_sheet(columns: list[tuple[str, list[Image.Image]]], side: int = 192, across: int = 1000) -> Image.Image:
    """A sheet with a column for each (caption, pictures): the pictures under one another, the caption beneath; at most
    `across` columns beside one another, the others below them."""
    font, across = ImageFont.load_default(12), min(across, len(columns))
    height = max(len(pictures) for _, pictures in columns) * (side + 8) + 52
    sheet = Image.new("RGB", (across * (side + 8), -(-len(columns) // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (caption, pictures) in enumerate(columns):
        left, top = number % across * (side + 8) + 4, number // across * height
        for row, picture in enumerate(pictures):
            square = ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, "white")
            sheet.paste(square, (left, top + row * (side + 8) + 4))
        lines = textwrap.wrap(caption, side // 6)[:3]  # of letters of 6 pixels, as they are on average
        pen.multiline_text((left, top + height - 50), "\n".join(lines), fill="black", font=font)
    return sheet


def write_answer(turns: list[Turn], prompt: str, seed: int, out: Path) -> None:
    """Writes the pictures 0.png, 1.png ..., storyboard.png, index.html and answer.json into `out`, each under a
    temporary name first."""
    files, records, columns, words = {}, [], [], ""
    for speaker, segment in ((speaker, segment) for speaker, segments in turns for segment in segments):
        if isinstance(segment, str):
            records.append({"text": segment})
            words = f"{words} {segment}".strip()
        else:
            name = f"{len(columns)}.png"
            files[name] = png_bytes(segment)
            description = segment.info.get("description")
            records.append({"image": name} | ({"description": description} if description else {}))
            columns.append((words, [segment]))
            words = ""
        records[-1] |= {"from": "you"} if speaker == "you" else {}
    if words and columns:  # words after the last picture stand below it, too
        columns[-1] = (f"{columns[-1][0]} {words}".strip(), columns[-1][1])
    if columns:
        files["storyboard.png"] = png_bytes(draw_sheet(columns, min(max(192, columns[0][1][0].width), 512), ACROSS))
    body = "".join(paragraphs(*turn) for turn in ([] if turns[0][0] == "you" else [("you", [prompt])]) + turns)
    files["index.html"] = PAGE.format(title=html.escape(prompt), style=STYLE, body=body).encode("utf-8", "replace")
    content = {"segments": records, "seed": seed, "prompt": prompt}
    files["answer.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    for name, data in files.items():
        write_file(out / name, data)


def paragraphs(speaker: str, segments: list[str | Image.Image]) -> str:
    """HTML of a turn's text and pictures; a picture's data stand in the page itself."""
    parts = []
    for segment in segments:
        if isinstance(segment, str):
            parts.append(f"<p>{html.escape(segment)}</p>")
            continue
        data, alt = base64.b64encode(png_bytes(segment)).decode(), html.escape(segment.info.get("description", ""))
        kind = "small" if segment.width < 256 else "large"
        caption = f"<figcaption>{alt}</figcaption>" if alt else ""
        image = f'<img class="{kind}" alt="{alt or "picture"}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}{caption}</figure>")
    name = {"you": "You", "model": "MiniGPT-5"}[speaker]
    return f'<section class="{speaker}"><h2>{name}</h2>{"".join(parts)}</section>\n'
