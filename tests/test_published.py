"""tars/datasets.py: what of each published data set gets into a tar, byte for byte, and what is counted as dropped."""

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import sample_file
from PIL import Image

from common.cli import run
from tars import __main__ as command
from tars import datasets
from tars.datasets import convert


def picture(shade: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


BROKEN = picture(0)[:-200]


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def told(members: dict[str, bytes], key: str) -> dict:
    return json.loads(members[f"{key}.json"])


# ---- VIST


def annotation(story: str, order: int, text: str = "", photo: str = "") -> list[dict]:
    """A step as the published files have it."""
    text = text or f"step {order} of {story} ."
    return [
        {
            "story_id": story,
            "worker_arranged_photo_order": order,
            "text": text,
            "original_text": text.title(),
            "photo_flickr_id": photo or str(100 + order),
            "tier": "story-in-sequence",
        }
    ]


@pytest.fixture
def vist(tmp_path) -> Path:
    """Raw annotations of ten stories, shuffled; pictures 100 to 104, 105 broken, 106 no picture, 107 not there."""
    annotations = [annotation("1", order) for order in range(5)]
    annotations += [annotation("2", order, photo=str(104 - order)) for order in range(5)]
    for story, photo in (("3", "105"), ("4", "106"), ("5", "107"), ("6", "107")):
        annotations += [annotation(story, order, photo=photo if order == 2 else "") for order in range(5)]
    annotations += [annotation("7", order) for order in range(4)]
    annotations += [annotation("8", order) for order in range(6)]
    annotations += [annotation("9", order, text=" \n" if order == 4 else "") for order in range(5)]
    annotations += [annotation("10", max(order, 1)) for order in range(5)]
    annotations += [annotation("11", order) for order in range(4)] + [[{"story_id": "11", "text": "alone"}]]
    random.Random(0).shuffle(annotations)
    for i in range(5):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        name, kind = ("100.png", "PNG") if i == 0 else (f"{100 + i}.jpg", "JPEG")
        (folder / name).write_bytes(picture(i, kind))
    (tmp_path / "images" / "105.jpg").write_bytes(BROKEN)
    (tmp_path / "images" / "106.jpg").write_bytes(b"<html>gone</html>")
    file = tmp_path / "train.story-in-sequence.json"
    file.write_text(json.dumps({"images": [], "albums": [], "annotations": annotations}))
    return file


def test_raw_vist(tmp_path, vist):
    out = tmp_path / "x.tar"
    report = convert("vist", [vist, tmp_path / "images"], out)
    assert report.kept == {"stories": 2, "turns": 10, "pictures": 10}
    assert report.dropped == {
        "broken image": 1,
        "not an image": 1,
        "missing picture": 2,
        "not five steps in a clear order": 3,
        "empty text": 1,
        "not in the form of the data set": 1,
    }
    assert str(report).startswith(
        "kept: 2 stories, 10 turns, 10 pictures\ndropped: 3 not five steps in a clear order, 2"
    )
    members = contents(out)
    stories = {told(members, name[:9])["id"]: name[:9] for name in members if name.endswith(".json")}
    key, other = stories["1"], stories["2"]
    assert told(members, key) == {
        "kind": "story",
        "id": "1",
        "turns": [{"text": f"step {k} of 1 .", "image": f"{key}.{k}.{'png' if k == 0 else 'jpg'}"} for k in range(5)],
    }
    assert members[f"{key}.0.png"] == members[f"{other}.4.png"] == picture(0, "PNG")
    assert members[f"{key}.3.jpg"] == members[f"{other}.1.jpg"] == picture(3)
    assert len(members) == 12


def test_cleaned_vist(tmp_path):
    (tmp_path / "val_images").mkdir()
    for i in range(5):
        (tmp_path / "val_images" / f"{i}.jpg").write_bytes(picture(i))
    steps = [{"caption": f"step {k} .", "image_id": f"p{k}", "sequence_index": k} for k in range(5)]
    stories = {"a": steps[::-1], "b": steps[:3], "c": [*steps[:4], {**steps[4], "image_id": "gone"}], "d": []}
    (tmp_path / "val_cleaned.json").write_text(json.dumps(stories))
    mapping = {f"p{k}": f"val_images/{k}.jpg" for k in range(5)}
    (tmp_path / "val_image_mapping.json").write_text(json.dumps(mapping))
    report = convert("vist", [tmp_path / "val_cleaned.json"], tmp_path / "x.tar")
    assert report.kept == {"stories": 1, "turns": 5, "pictures": 5}
    assert report.dropped == {"not five steps in a clear order": 2, "missing picture": 1}
    members = contents(tmp_path / "x.tar")
    assert [turn["text"] for turn in told(members, "000000000")["turns"]] == [f"step {k} ." for k in range(5)]
    assert members["000000000.2.jpg"] == picture(2)


def test_vist_errors_are_one_line(tmp_path):
    cases = {"{": "not readable as JSON", "[]": "JSON object", '{"a": []}': "image_mapping.json: no such file"}
    for content, words in (cases | {'{"annotations": [{}]}': "neither", '{"annotations": 1}': "neither"}).items():
        (tmp_path / "val_cleaned.json").write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            convert("vist", [tmp_path / "val_cleaned.json"], tmp_path / "x.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is a folder: name"):
        convert("vist", [tmp_path], tmp_path / "x.tar")
    (tmp_path / "val_cleaned.json").unlink()
    (tmp_path / "val.json").write_text('{"a": []}')  # which is taken for its own image mapping
    with pytest.raises(ValueError, match=r"val\.json: neither .* X_cleaned\.json with X_image_mapping\.json"):
        convert("vist", [tmp_path / "val.json"], tmp_path / "x.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["val.json"]


# ---- MMDialog


def turn(text: str, *media: str) -> dict:
    return {"turn": [{"__TEXT__": text}, *({"__MEDIA__": name} for name in media)]}


def dialog(*turns) -> bytes:
    return json.dumps({"conversation_id": 7, "conversation": turns, "negative_candidate_media_keys": ["1"]}).encode()


def test_mmdialog(tmp_path):
    for name in ("-5", "6"):
        (tmp_path / f"{name}.jpg").write_bytes(picture(int(name) % 256))
    (tmp_path / "bad.jpg").write_bytes(BROKEN)
    words = " ".join(["word"] * 51)
    lines = [
        dialog(turn("hello"), turn("look", "-5"), turn("two", "6", "-5")),
        dialog(turn("a"), turn("b"), turn(" ")),  # cut, each for its own reason
        dialog(turn("a"), turn("b"), turn("c", "gone"), turn("d")),
        dialog(turn("a"), turn("b"), turn("c", "6"), turn("d", "6", "bad")),
        dialog(turn("a"), turn("b"), turn(words)),
        dialog(turn("a"), turn("b"), {"turn": [{"__TEXT__": 3}]}),
        dialog(turn("a"), turn("")),  # dropped
        dialog(turn(words), turn("b")),
        dialog(turn("a", "gone"), turn("b")),
        dialog(turn("alone")),
        dialog(),
        b'{"conversation_id": 1}',
        b'{"conversation": ',
        b"\xff",
        b"[" * 100_000,
        b"",
    ]
    file = tmp_path / "train_conversations.txt"
    file.write_bytes(b"\n".join(lines))
    report = convert("mmdialog", [file], tmp_path / "x.tar")
    reasons = ("empty text", "missing picture", "broken image", "long turn")
    cut = {f"cut short ({reason})": 1 for reason in reasons}
    assert report.kept == {"dialogues": 5, "turns": 12, "pictures": 4} | cut
    assert report.dropped == {
        "empty text": 1,
        "long turn": 1,
        "missing picture": 1,
        "fewer than two turns": 2,
        "not in the form of the data set": 5,
    }
    members = contents(tmp_path / "x.tar")
    assert told(members, "000000000")["turns"] == [
        {"text": "hello", "image": None},
        {"text": "look", "image": "000000000.0.jpg"},
        {"text": "two", "image": ["000000000.1.jpg", "000000000.2.jpg"]},
    ]
    assert members["000000000.0.jpg"] == members["000000000.2.jpg"] == picture(-5 % 256)
    assert len(told(members, "000000003")["turns"]) == 3 and "000000003.1.jpg" not in members

    report = convert("mmdialog", [file], tmp_path / "x.tar", max_words=0)
    del cut["cut short (long turn)"]
    assert report.kept == {"dialogues": 6, "turns": 15, "pictures": 4} | cut


def test_a_dialogue_of_too_many_pictures_is_cut(tmp_path):
    (tmp_path / "6.jpg").write_bytes(picture(6))
    (tmp_path / "c.txt").write_bytes(dialog(*(turn("a", "6") for _ in range(102))))
    report = convert("mmdialog", [tmp_path / "c.txt"], tmp_path / "x.tar")
    assert report.kept == {"dialogues": 1, "turns": 100, "pictures": 100, "cut short (too many pictures)": 1}


# ---- CC3M


def test_cc3m_tsv(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.jpg").write_bytes(picture(1))
    (tmp_path / "val" / "2.jpg").write_bytes(BROKEN)
    rows = [b"One .\tval/1.jpg", b"broken\tval/2.jpg", b"gone\tval/3.jpg", b" ...\tval/1.jpg", b"caf\xe9\tval/1.jpg"]
    rows += [b"no tab", "två\tval/1.jpg".encode(), b""]
    wanted = {"broken image": 1, "missing picture": 1, "empty caption": 1, "not in the form of the data set": 2}
    (tmp_path / "a.tsv").write_bytes(b"\r\n".join(rows))
    swapped = [b"\t".join(row.split(b"\t")[::-1]) for row in rows]
    (tmp_path / "b.tsv").write_bytes(b"\n".join([b"\xef\xbb\xbfimage_path\tcaption", *swapped]))
    for name in ("a", "b"):
        report = convert("cc3m", [tmp_path / f"{name}.tsv"], tmp_path / f"{name}.tar")
        assert report.kept == {"pairs": 2} and report.dropped == wanted
    members = contents(tmp_path / "a.tar")
    assert members == contents(tmp_path / "b.tar") and len(members) == 6
    assert members["000000000.jpg"] == picture(1) and members["000000006.txt"] == "två".encode()
    assert told(members, "000000006") == {"source": "val/1.jpg"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.tsv").rename(tmp_path / "elsewhere" / "a.tsv")
    assert convert("cc3m", [tmp_path / "elsewhere" / "a.tsv", tmp_path], tmp_path / "c.tar").kept == {"pairs": 2}


def test_cc3m_folder(tmp_path):
    folder = tmp_path / "pairs" / "0"
    folder.mkdir(parents=True)
    files = {"a.jpg": picture(1), "a.txt": b"one", "b.PNG": picture(2, "PNG"), "b.txt": b"two", "c.jpg": picture(3)}
    for name, content in {**files, "d.txt": b"four", "e.json": b"{}"}.items():
        (folder / name).write_bytes(content)
    report = convert("cc3m", [tmp_path / "pairs"], tmp_path / "x.tar")
    assert report.kept == {"pairs": 2} and report.dropped == {"no caption": 2, "missing picture": 1}
    members = contents(tmp_path / "x.tar")
    assert members["000000001.png"] == picture(2, "PNG") and members["000000001.txt"] == b"two"
    assert told(members, "000000001") == {"source": "0/b"}


# ---- the tar


def test_any_number_of_threads_writes_the_same_tar(tmp_path, vist):
    sources = [vist, tmp_path / "images"]
    reports = [convert("vist", sources, tmp_path / f"{n}.tar", workers=n) for n in (1, 4)]
    assert reports[0] == reports[1]
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "4.tar").read_bytes()


def test_pictures_are_read_a_few_samples_ahead():
    started = []
    results = datasets.make_samples((lambda key, i=i: started.append(i) or i for i in range(1000)), workers=3)
    for wanted in range(1000):
        assert next(results) == wanted and len(started) <= wanted + 8


def test_there_is_no_half_tar(tmp_path, vist, monkeypatch):
    out = tmp_path / "x.tar"
    out.write_bytes(b"earlier")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nothing to keep, .* 7 missing picture") as error:
        convert("vist", [vist, tmp_path / "empty"], out)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets, "interleaved_sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert("vist", [vist, tmp_path / "images"], out)
    assert out.read_bytes() == b"earlier" and not list(tmp_path.glob(".*"))


def test_command_line(tmp_path, vist, monkeypatch, capsys):
    out = tmp_path / "x.tar"
    for arguments, words in (
        (["vist", tmp_path / "none.json", "--out", out], "none.json: no such file or folder"),
        (["vist", vist, "--out", tmp_path], "a folder"),
        (["cc3m", vist, "--out", tmp_path / "no" / "x.tar"], "no folder"),
        (["mmdialog", vist, "--out", out], "nothing to keep"),
        (["mmdialog", vist, "--out", out, "--max-words", "-1"], "at least 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["tars", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(command.main)
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    line = [sys.executable, "-m", "tars", "vist", str(vist), str(tmp_path / "images"), "--out", str(out)]
    result = subprocess.run(line, cwd=Path(datasets.__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("kept: 2 stories") and out.exists()


# ---- the samples of the released repository


def test_vist_sample(tmp_path):
    file = sample_file("samples", "vist", "val_cleaned.json")
    report = convert("vist", [file], tmp_path / "x.tar")
    assert report.kept == {"stories": 1, "turns": 5, "pictures": 5} and not report.dropped
    members = contents(tmp_path / "x.tar")
    assert members["000000000.1.jpg"] == (file.parent / "val_images" / "000000007.jpg").read_bytes()
    turns = told(members, "000000000")["turns"]
    assert turns[2] == {"text": "dad manned the grill .", "image": "000000000.2.jpg"}


def test_mmdialog_sample(tmp_path):
    file = sample_file("samples", "mmdialog", "test", "test_conversations.txt")
    report = convert("mmdialog", [file], tmp_path / "x.tar")
    assert report.kept == {"dialogues": 1, "turns": 9, "pictures": 4} and not report.dropped
    with pytest.raises(ValueError, match="1 long turn"):  # its first turn has 50 words
        convert("mmdialog", [file], tmp_path / "y.tar", max_words=49)


def test_cc3m_sample(tmp_path):
    file = sample_file("samples", "cc3m", "cc3m_val.tsv")
    pictures = [(file.parent / "val" / f"{name}.jpg").read_bytes() for name in ("000007775", "000009256")]
    for source in (file, file.parent / "val"):
        report = convert("cc3m", [source], tmp_path / "x.tar")
        members = contents(tmp_path / "x.tar")
        assert report.kept == {"pairs": 2} and not report.dropped
        assert [members[f"00000000{i}.jpg"] for i in range(2)] == pictures
