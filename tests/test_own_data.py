"""Training on pictures of one's own: a folder, a list of files and captions, stories and dialogues as lines of JSON."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tars.datasets import convert, pack_sources
from tars.index import DIALOG, STORY, read_index
from trainer.run import FILES

ROOT = Path(__file__).resolve().parents[1]

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


def test_the_story_in_the_readme_is_one(pictures, tmp_path):
    """Training takes steps that have a text and a picture."""
    line = re.search(r"^echo '(.*)' > stories.jsonl$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]
    for name in re.findall(r'"(\w\.jpg)"', line):
        Image.new("RGB", (40, 30), "red").save(pictures / name)
    (pictures / "stories.jsonl").write_text(line)
    assert convert("turns", [pictures / "stories.jsonl"], tmp_path / "x.tar").kept["stories"] == 1
    assert all(turn["text"] and turn["images"] for turn in json.loads(line)["turns"])


def test_a_source_is_not_written_over(pictures):
    path = pictures / "list.csv"
    write_csv(path, CAPTIONS.items())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"list\.csv: is a source"):
        convert("pairs", [path], pictures / ".." / pictures.name / "list.csv")
    assert path.read_bytes() == before


def test_a_resumed_run_has_its_data_and_a_new_one_what_is_there_now(pictures, tmp_path):
    """Another source of the same run has a tar of its own. Tars stay what they are."""

    def pack(source, again: bool) -> tuple[str, bytes]:
        tar, name = pack_sources("pairs", [str(source), "a.tar"], tmp_path / "data", again)
        assert name == "a.tar" and re.fullmatch(FILES, Path(tar).name)
        return tar, Path(tar).read_bytes()

    (pictures / "b.txt").write_text("a house")
    first = pack(pictures, again=True)
    (pictures / "c.txt").write_text("a boat")
    assert pack(pictures, again=False) == first
    later = pack(pictures, again=True)
    assert later[0] == first[0] and later[1] != first[1]
    write_csv(pictures / "list.csv", CAPTIONS.items())
    assert pack(pictures / "list.csv", again=False)[0] != first[0]
    assert pack(pictures, again=False) == later and pack_sources("pairs", None, tmp_path / "x", True) == []
