"""Pictures as files for people: one alone, a sheet of them with words, an answer in a folder with a page of it all."""

import base64
import html
import io
import json
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import write_json, write_text, written_whole

STYLE = "body{font:18px serif;max-width:40em;margin:2em auto}img{width:100%;max-width:32em;image-rendering:auto}"


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        image.save(temporary, "PNG")


def draw_grid(columns: list[tuple[str, list[Image.Image]]], path: Path, side: int = 192) -> None:
    """A sheet with a column for each (caption, pictures): the pictures under one another, the caption beneath."""
    font = ImageFont.load_default(12)
    tall = max(len(pictures) for _, pictures in columns)
    sheet = Image.new("RGB", (len(columns) * (side + 8), tall * (side + 8) + 52), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (caption, pictures) in enumerate(columns):
        left = column * (side + 8) + 4
        for row, picture in enumerate(pictures):
            square = ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, "white")
            sheet.paste(square, (left, row * (side + 8) + 4))
        lines = [""]
        for word in caption[:1000].split():  # three lines hold fewer characters
            if lines[-1] and pen.textlength(f"{lines[-1]} {word}", font=font) > side:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((left, tall * (side + 8) + 2), "\n".join(lines[:3]), fill="black", font=font)
    save_image(sheet, path)


def write_answer(segments: list[str | Image.Image], prompt: str, seed: int, out: Path) -> None:
    """Writes the pictures 0.png, 1.png ..., storyboard.png, index.html and answer.json into `out`, each under a
    temporary name first. Pictures of an older answer in the folder that are not written over are removed."""
    old = pictures_of(out / "answer.json")
    described, columns, words = [], [], ""
    for segment in segments:
        if isinstance(segment, str):
            described.append({"text": segment})
            words = f"{words} {segment}".strip()
        else:
            name = f"{len(columns)}.png"
            save_image(segment, out / name)
            description = segment.info.get("description")
            described.append({"image": name} | ({"description": description} if description else {}))
            columns.append((words, [segment]))
            words = ""
    if words and columns:  # words after the last picture stand below it, too
        columns[-1] = (f"{columns[-1][0]} {words}".strip(), columns[-1][1])
    if columns:
        draw_grid(columns, out / "storyboard.png", side=min(max(192, columns[0][1][0].width), 512))
    body = "".join(paragraph(segment) for segment in segments)
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(prompt)}</title><style>{STYLE}</style>{body}\n'
    write_text(out / "index.html", page)
    write_json(out / "answer.json", {"segments": described, "seed": seed, "prompt": prompt})
    for name in old - pictures_of(out / "answer.json"):
        (out / name).unlink(missing_ok=True)


def pictures_of(record: Path) -> set[str]:
    """The picture files that an answer.json names, and their storyboard; none where it cannot be read."""
    try:
        segments = json.loads(record.read_text(encoding="utf-8"))["segments"]
        names = {str(segment["image"]) for segment in segments if "image" in segment}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    names = {name for name in names if re.fullmatch(r"\d+\.png", name)}
    return names | {"storyboard.png"} if names else names


def paragraph(segment: str | Image.Image) -> str:
    """HTML of a text, or of a picture, whose data stand in the page itself."""
    if isinstance(segment, str):
        return f"<p>{html.escape(segment)}</p>"
    buffer = io.BytesIO()
    segment.save(buffer, "PNG")
    alt = html.escape(segment.info.get("description", ""))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{alt}" title="{alt}" src="data:image/png;base64,{data}"></p>'
