"""Training on pictures of one's own: a folder, a list of files and captions, stories and dialogues as lines of JSON."""

import csv
import json

import pytest
from PIL import Image

from tars.datasets import convert, pack_sources
from tars.index import DIALOG, STORY, read_index

CAPTIONS = {"a cat.jpg": 'a cat, "small"', "b.png": "ein Häuschen", "c.webp": "a boat"}


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (40, 30), (80 * number, 90, 100)).save(folder / name)
    return folder


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("caption", "file", "more"), *((text, name, 1) for name, text in rows)])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"file": name, "caption": text}) + "\n\n" for name, text in rows))


@pytest.mark.parametrize("ending, write", [("csv", write_csv), ("jsonl", write_jsonl)])
def test_a_list_of_captions(pictures, tmp_path, ending, write):
    """Beside the pictures or elsewhere; what cannot be used is counted with its reason."""
    rows = [*CAPTIONS.items(), ("nowhere.jpg", "a dog"), ("b.png", "")]
    for path, folders in ((pictures / f"list.{ending}", []), (tmp_path / f"list.{ending}", [pictures])):
        write(path, rows)
        report = convert("pairs", [path, *folders], tmp_path / "x.tar")
        assert report.kept == {"pairs": 3} and report.dropped == {"missing picture": 1, "empty caption": 1}
        assert len(read_index(str(tmp_path / "x.tar")).turns) == 3


def test_a_csv_without_names_is_refused(pictures, tmp_path):
    (tmp_path / "list.csv").write_text("b.png,a house\n")
    with pytest.raises(ValueError, match=r"list\.csv: the first line should name the columns file and caption"):
        convert("pairs", [tmp_path / "list.csv", pictures], tmp_path / "x.tar")


def test_a_csv_with_an_open_quote_is_one_line(pictures, tmp_path):
    (tmp_path / "list.csv").write_text('file,caption\nb.png,"a house\n' + "c.webp,a boat\n" * 20_000)
    with pytest.raises(ValueError, match=r"list\.csv: not readable as CSV \(field larger"):
        convert("pairs", [tmp_path / "list.csv", pictures], tmp_path / "x.tar")


def test_stories_and_dialogues(pictures, tmp_path):
    names = list(CAPTIONS)
    turns = [{"text": "first", "images": [names[0]]}, {"text": "then", "images": names[1:]}, {"text": "and on"}]
    broken = [{"turns": turns[:1]}, {"turns": [{"text": " "}, turns[0]]}, {"turns": [{"text": "x", "images": "y"}] * 2}]
    broken += [{"turns": [{"text": "x", "images": ["no.jpg"]}] * 2}, {"kind": "poem", "turns": turns}]
    lines = [{"turns": turns}, {"kind": "dialog", "turns": turns}, *broken]
    path = pictures / "stories.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[]\n{\n")
    report = convert("turns", [path], tmp_path / "x.tar")
    assert report.kept == {"stories": 1, "dialogues": 1, "turns": 6, "pictures": 6}
    assert sum(report.dropped.values()) == len(broken) + 2
    index = read_index(str(tmp_path / "x.tar"))
    assert index.kinds.tolist() == [STORY, DIALOG] and index.turns.tolist() == [3, 3]


def test_data_is_packed_once(pictures, tmp_path):
    """A run that goes on has the data that it began with. Tars stay what they are."""
    (pictures / "b.txt").write_text("a house")
    named = pack_sources("pairs", [str(pictures), "a.tar"], tmp_path / "data")
    assert named == [str(tmp_path / "data-0.tar"), "a.tar"]
    before = (tmp_path / "data-0.tar").read_bytes()
    (pictures / "c.txt").write_text("a boat")
    assert pack_sources("pairs", [str(pictures), "a.tar"], tmp_path / "data") == named
    assert (tmp_path / "data-0.tar").read_bytes() == before and pack_sources("pairs", None, tmp_path / "x") == []
