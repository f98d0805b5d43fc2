"""Data as people have them: keys with dots, links, sidecars, other endings, files replaced by others of their size."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import picture_bytes, write_tar

from common.files import atomic_write, write_json
from common.images import to_bytes
from evaluation.cases import file_of, read_answer, write_answer
from tars import datasets, index, precompute
from tars.batches import Batches, PairData
from tars.index import expand, read_index
from tars.writer import Sample, write_samples

ROOT = Path(__file__).resolve().parents[1]


def open_pairs(tar: Path) -> PairData:
    return PairData([str(tar)], lambda image: torch.tensor(image.size))


def samples(data: PairData) -> list:
    return [data[i] for i in range(len(data))]


def pairs(*keys: str, ending: str = "png") -> dict[str, bytes]:
    return {f"{key}.{e}": c for key in keys for e, c in ((ending, picture_bytes(0, (8, 4))), ("txt", key.encode()))}


# ---- keys and endings


@pytest.mark.parametrize("key", ["IMG_2021.07.01.v1", "photo0.final", "v1.5_000", "clip.5", "train.v2/a.b", "x.png"])
def test_keys_with_dots(tmp_path, key):
    data = open_pairs(write_tar(tmp_path / "x.tar", pairs("0", key)))
    assert [sample["key"] for sample in samples(data)] == ["0", key]


def test_half_samples_are_broken_ones(tmp_path):
    """As a mask of every picture, whose name has one more dot."""
    members = {**pairs("0", "1"), "0.mask.png": picture_bytes(0), "1.7.png": picture_bytes(0)}
    data = open_pairs(write_tar(tmp_path / "x.tar", members))
    found = [sample if isinstance(sample, str) else sample["key"] for sample in samples(data)]
    assert found == ["0", "1", "no caption", "no caption"]


def test_a_story_keeps_its_numbered_pictures(tmp_path):
    """Wherever its JSON lies, and with a dot in its key; its neighbour is a pair."""
    story = {"kind": "story", "turns": [{"text": "a", "image": "a.b.0.png"}, {"text": "b", "image": "a.b.1.png"}]}
    members = {"a.b.1.png": b"x", "a.b.json": json.dumps(story).encode(), "a.b.0.png": b"y", **pairs("a.b.c.0")}
    found = read_index(str(write_tar(tmp_path / "x.tar", members)))
    assert [found.key(i) for i in range(2)] == ["a.b", "a.b.c.0"] and found.turns.tolist() == [2, 0]
    assert (found.table[0].reshape(-1, 2)[:, 0] >= 0).tolist() == [False, False, True, False, True, True]


def test_the_later_of_two_equal_members_counts(tmp_path):
    story = {"kind": "story", "turns": [{"text": "a", "image": "0.0.png"}] * 2}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (story, {"source": "a pair"}):
            for name, data in {"0.json": json.dumps(content).encode(), **pairs("0")}.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    assert read_index(str(tmp_path / "x.tar")).turns.tolist() == [0]


@pytest.mark.parametrize("ending", ["gif", "JFIF", "jpe", "bmp", "tif"])
def test_endings_of_pictures(tmp_path, ending):
    assert isinstance(open_pairs(write_tar(tmp_path / "x.tar", pairs("0", ending=ending)))[0], dict)


def test_sidecars_beside_tars(tmp_path):
    for name in ("0.tar", "._0.tar"):
        (tmp_path / name).touch()
    assert expand([str(tmp_path)]) == [f"{tmp_path}/0.tar"]
    with pytest.raises(ValueError, match="no such tar"):
        expand(["~nobody-of-this-name/x.tar"])


def test_a_user_without_a_home():
    """No HOME and no entry in the list of users, as in a container."""
    code = "import pwd; pwd.getpwuid = lambda uid: {}[uid]; from tars import index; print(index.CACHE)"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("/"), done.stderr


# ---- data that were replaced


def test_a_tar_replaced_under_its_index(tmp_path, monkeypatch):
    """By one of the same size and time of change."""
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")
    path = tmp_path / "x.tar"
    for key in ("0", "1"):
        write_tar(path, pairs(key))
        os.utime(path, (1, 1))
        assert open_pairs(path)[0]["key"] == key


def test_a_run_does_not_go_on_with_other_contents(tmp_path):
    """The keys are the same, then the sizes, too; a copy is the same data, and so is what an older checkpoint says."""
    first = Batches(open_pairs(write_tar(tmp_path / "a.tar", pairs("0", "1"))), 1)
    state = first.state_dict()
    Batches(open_pairs(write_tar(tmp_path / "copy.tar", pairs("0", "1"))), 1).load_state_dict(state)
    for words in (b"other words", b"9"):
        others = open_pairs(write_tar(tmp_path / "b.tar", {**pairs("0", "1"), "0.txt": words}))
        assert others.identity()["digest"] == state["digest"]
        with pytest.raises(ValueError, match="cannot resume: the checkpoint's data has contents"):
            Batches(others, 1).load_state_dict(state)
    Batches(others, 1).load_state_dict({name: value for name, value in state.items() if name != "contents"})


# ---- folders into tars


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(0, (8, 4)))


def test_folders_of_pairs(tmp_path):
    """A linked folder, one that leads back to its start, other endings, a caption in JSON, sidecars, a pipe."""
    folder, linked = tmp_path / "files", tmp_path / "disk"
    for name in ("0.png", "1.gif", "2.png", "._0.png", "3.v2.jfif", "4.png"):
        picture(folder / name)
    picture(linked / "5.png")
    (linked / "5.txt").write_text("linked")
    (folder / "more").symlink_to(linked)
    (folder / "again").symlink_to(folder)
    (folder / "0.TXT").write_text("upper case")
    (folder / "1.txt").write_text("gif")
    (folder / "2.json").write_text('{"caption": "json"}')
    (folder / "3.v2.txt").write_text("dots")
    os.mkfifo(folder / "4.txt")
    report = datasets.convert("cc3m", [folder], tmp_path / "x.tar")
    assert report.kept == {"pairs": 5} and report.dropped == {"not a file": 1}
    captions = [sample["caption"] for sample in samples(open_pairs(tmp_path / "x.tar"))]
    assert sorted(captions) == ["dots", "gif", "json", "linked", "upper case"]


def test_a_linked_folder_of_story_pictures(tmp_path):
    for i in range(5):
        picture(tmp_path / "disk" / f"{i}.{'gif' if i else 'png'}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(tmp_path / "disk")
    steps = [
        {"story_id": "1", "worker_arranged_photo_order": i, "text": "a", "photo_flickr_id": str(i)} for i in range(5)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"annotations": [[step] for step in steps]}))
    report = datasets.convert("vist", [tmp_path / "x.json"], tmp_path / "x.tar")
    assert report.kept == {"stories": 1, "turns": 5, "pictures": 5}


# ---- answers


def test_answers_to_long_keys(tmp_path):
    """90 Chinese characters are 270 bytes, more than the name of a file may have."""
    keys = ["船" * 31, "船" * 90, "船" * 91, "a" * 300]
    for key in keys:
        write_answer(tmp_path, key, [key])
    assert [read_answer(tmp_path, key).segments for key in keys] == [[key] for key in keys]
    assert file_of(tmp_path, "a/b c", ".json").name == "a%2Fb c.json"


def test_names_that_are_not_utf_8(tmp_path):
    write_json(tmp_path / "x.json", {"data": "caf\udce9.tar"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"data": "caf?.tar"}


# ---- writing


@pytest.mark.parametrize("write", ["converted", "whole"])
def test_a_full_disk_names_the_file(tmp_path, write):
    def members():
        yield "a.txt", b"a"
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "x.tar"
    with pytest.raises(OSError, match=re.escape(f"not written: No space left on device: '{out}'")):
        if write == "converted":
            write_samples((Sample([member], {}) for member in members()), out)
        else:
            with atomic_write(out):
                list(members())
    assert not list(tmp_path.iterdir())


def test_what_a_killed_converter_left(tmp_path, capsys):
    """It goes at the next start; that of a process that still runs stays, and that of another file."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = [f".{name}.tar.{process}.tmp" for name, process in (("x", ended.stdout.strip()), ("x", 1), ("y", 4242))]
    for name in names:
        (tmp_path / name).touch()
    write_samples([Sample([("a.txt", b"a")], {"pairs": 1})], tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "x.tar"])
    assert capsys.readouterr().out.count("could not finish") == 1


def test_what_a_worker_hands_over_is_shared(tmp_path, monkeypatch):
    """Already where the main process learns of an error: with too little shared memory it would wait for ever."""
    picture, story = picture_bytes(1), {"kind": "story", "turns": [{"text": "a", "image": "s.0.png"}, {"text": "b"}]}
    members = {"a.png": picture, "a.txt": b"a", "s.json": json.dumps(story).encode(), "s.0.png": picture}
    tar = str(write_tar(tmp_path / "x.tar", members))
    pairs, stories = PairData([tar], to_bytes), precompute.WholeStories(tar, to_bytes, to_bytes)
    for is_worker in (False, True):
        broken, batch = precompute.split_broken(pairs, [pairs[0], "broken"])
        assert broken == ["broken"] and batch["pixels"].is_shared() == is_worker == stories[1]["inputs"].is_shared()
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: True)
