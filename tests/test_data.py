"""Index, pairs, batches: what a tar gives, in which order, what a broken member costs, where a run goes on."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tarfile
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import preprocess_output
from common.texts import clean_caption
from prompts import UAS_REQUESTS, uas_texts
from tars import batches as batches_module
from tars import index as tars
from tars.batches import SAMPLE, Batches, PairData, describe, epoch_order, random_bits
from tars.index import DIALOG, expand, read_index

HERE = Path(__file__).resolve().parent
small = partial(preprocess_output, size=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "CACHE", tmp_path / "cache")


def picture(number: int, kind: str = "PNG", side: int = 4) -> bytes:
    """A picture whose colour says which it is."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(numbers) -> list[tuple[str, bytes]]:
    return [m for i in numbers for m in ((f"{i:05}.png", picture(i)), (f"{i:05}.txt", f"Number {i}!".encode()))]


def numbers_of(batch: dict) -> list[int]:
    """Which samples a batch holds, by their pixels; keys and captions must say the same."""
    colours = batch["pixels"][:, :2, 0, 0]
    numbers = [int(red + 256 * green) for red, green in colours]
    assert batch["keys"] == [f"{n:05}" for n in numbers] and batch["captions"] == [f"number {n}" for n in numbers]
    return numbers


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def same(a: list[dict], b: list[dict]) -> bool:
    plain = [[{**batch, "pixels": batch["pixels"].tolist()} for batch in run] for run in (a, b)]
    return plain[0] == plain[1]


BROKEN = {  # what is wrong -> the members of such a sample
    "no caption": [("b0.png", picture(1))],
    "no picture": [("b1.txt", b"words alone")],
    "empty caption": [("b2.png", picture(1)), ("b2.txt", b" ...\n")],
    "not an image": [("b4.jpg", b"<html>not found</html>"), ("b4.txt", b"a")],
    "empty picture": [("b5.jpg", b""), ("b5.txt", b"a")],
    "broken image": [("b6.jpg", picture(1, "JPEG", 64)[:-300]), ("b6.txt", b"a")],
}


@pytest.fixture
def pairs(tmp_path) -> PairData:
    write_tar(tmp_path / "a.tar", good(range(13)))
    write_tar(tmp_path / "b.tar", [*BROKEN["no caption"], *good(range(13, 22))])
    return PairData(expand([str(tmp_path)]), small)


# ---- texts and random numbers


def test_captions_are_cleaned_as_released():
    for case in json.loads((HERE / "golden" / "text.json").read_text(encoding="utf-8"))["precaption"]:
        assert clean_caption(case["raw"]) == case["out"]
    assert clean_caption(" A\t(b)\n[IMG0], c ") == "a b [img0], c"


def test_uas_texts():
    target = "[IMG0][IMG1][IMG2] ###"
    assert uas_texts("a cat", 3) == ("a cat", target)
    sources = {uas_texts("a cat", 3, phrase)[0] for phrase in range(7)}
    start, end = "You will be able to generate image according to command.###Human: ", " a cat ###Assistant:"
    assert len(sources) == 7 == len(UAS_REQUESTS)
    assert all(source.startswith(start) and source.endswith(end) for source in sources)


def test_order_is_a_stable_permutation():
    order = epoch_order(10, 1, 0)
    assert order.tolist() == [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]  # another order would break every resumed run
    assert sorted(epoch_order(1000, 1, 5).tolist()) == list(range(1000))
    assert not np.array_equal(epoch_order(10, 1, 1), order) and not np.array_equal(epoch_order(10, 2, 0), order)


def test_one_sample_in_100_is_an_instruction(pairs, monkeypatch):
    choices = Counter(pairs.choose(random_bits(SAMPLE, 0, position)) for position in range(20_000))
    assert 150 < 20_000 - choices.pop(None) < 250
    assert set(choices) == set(range(7))
    monkeypatch.setattr(PairData, "choose", lambda _, bits: bits.random_raw())
    choices = [choice for batch in take(Batches(pairs, 23), 3) for choice in batch["instructions"]]
    assert len(set(choices)) == 69  # another one in each of three epochs


# ---- which tars


def test_expand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x-08.tar", "x-09.tar", "x-10.tar", "y-a.tar", "y-b.tar"):
        Path(name).touch()
    (tmp_path / "x-08.tar.index.npz").touch()
    assert expand(["x-*", "y-a.tar"]) == ["x-08.tar", "x-09.tar", "x-10.tar", "y-a.tar"]
    assert expand(["y-b.tar", "."]) == ["y-b.tar", "x-08.tar", "x-09.tar", "x-10.tar", "y-a.tar"]
    (tmp_path / "empty").mkdir()
    for value in (["z.tar"], ["z*.tar"], ["empty"], ["s3://a/b.tar"], [""]):
        with pytest.raises(ValueError) as error:
            expand(value)
        assert "\n" not in str(error.value) and value[0][:2] in str(error.value)


# ---- the index


def test_members_are_grouped_wherever_they_lie(tmp_path):
    first = [("d/1.JPG", picture(1, "JPEG")), ("d/2.txt", b"two"), ("1.txt", b"other folder"), ("e.1/3.webp", b"")]
    last = [
        ("d/2.webp", picture(2, "WEBP")),
        ("d/1.txt", b"one"),
        ("d/1.json", b"{}"),
        (".hid.txt", b""),
        ("d/1.cls", b""),
    ]
    pairs = PairData([str(write_tar(tmp_path / "x.tar", first + last))], small)
    got = {sample["key"]: sample["caption"] for sample in pairs if isinstance(sample, dict)}
    assert got == {"d/1": "one", "d/2": "two"}
    assert [s for s in pairs if isinstance(s, str)] == ["no picture", "empty picture"]


def test_json_captions_and_pixels(tmp_path):
    members = [("a.png", picture(300)), ("a.json", b'{"caption": "From JSON."}')]
    members += [("b.png", picture(300)), ("b.json", b'{"caption": "no"}'), ("b.txt", "\ufeffÜber".encode())]
    pairs = PairData([str(write_tar(tmp_path / "x.tar", members))], small)
    assert [sample["caption"] for sample in pairs] == ["from json", "über"]
    pixels = pairs[0]["pixels"]
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 0].tolist() == [44, 1, 0]


def test_duplicate_keys_and_odd_members(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*good([1]), *good([2]), ("00001.png", picture(9)), ("00001.txt", b"nine")])
    with tarfile.open(path, "a") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "3.png"),
            (tarfile.LNKTYPE, "4.png"),
            (tarfile.CHRTYPE, "5.png"),
            (tarfile.DIRTYPE, "6.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    pairs = PairData([str(path)], small)
    assert len(pairs) == 2 and pairs[0]["caption"] == "nine"
    other = write_tar(tmp_path / "y.tar", good([1]))  # a key counts within its tar
    assert [sample["key"] for sample in PairData([str(path), str(other)], small)] == ["00001", "00002", "00001"]


def test_index_is_cached_and_checked(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "x.tar", good(range(3))))
    cache = Path(path + ".index.npz")
    scans, scan = [], tars.scan_tar
    monkeypatch.setattr(tars, "scan_tar", lambda *args: scans.append(args[0]) or scan(*args))

    first = read_index(path).table.tolist()
    assert cache.exists() and read_index(path).table.tolist() == first and len(scans) == 1
    whole = cache.read_bytes()
    damaged = whole[:300] + bytes(8) + whole[308:]
    for content in (b"", b"PK", whole[:-40], damaged, pickle.dumps([1]), b"\x93NUMPY"):
        cache.write_bytes(content)
        count = len(scans)
        assert read_index(path).table.tolist() == first and len(scans) == count + 1 and cache.read_bytes() != content
    write_tar(Path(path), good(range(4)))  # another tar under the same name
    assert [len(read_index(path).table) for _ in range(2)] == [4, 4] and len(scans) == 8
    dialogue = [("d.json", b'{"kind": "dialog", "turns": ["a", "b"]}')]
    for count, (members, found) in enumerate((([("readme.md", b"")], []), (dialogue, [(DIALOG, 2)])), 9):
        write_tar(Path(path), members)
        for index in (read_index(path), read_index(path)):
            assert list(zip(index.kinds, index.turns, strict=True)) == found and len(scans) == count
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_index_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "x.tar", good(range(3))))
    (tmp_path / "other").mkdir()
    other = str(write_tar(tmp_path / "other" / "x.tar", good(range(4))))
    for tar in (path, other):
        Path(tar + ".index.npz").mkdir()  # stands in for a read-only folder, also where tests run as root
    assert [len(read_index(tar).table) for tar in (path, other)] == [3, 4]
    assert len(list(tars.CACHE.iterdir())) == 2 and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(tars, "scan_tar", None)
    assert [len(read_index(tar).table) for tar in (path, other)] == [3, 4]
    monkeypatch.undo()
    monkeypatch.setattr(tars, "CACHE", Path(path) / "no folder")
    assert len(read_index(path).table) == 3  # no cache at all


def test_members_are_forgotten_while_walking(tmp_path):
    """tarfile would collect them all."""
    path = write_tar(tmp_path / "x.tar", good(range(5)))
    with tarfile.open(path, "r:") as tar:
        assert [len(tar.members) <= 1 for _ in tars.walk(tar)] == [True] * 10


def test_sparse_members_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", good(range(1)))
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("00001.png")
        sparse = {"major": "1", "minor": "0", "name": "00001.png", "realsize": "9"}
        info.pax_headers = {f"GNU.sparse.{name}": value for name, value in sparse.items()}
        content = b"1\n0\n9\n".ljust(512, b"\0") + b"some data"
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"damaged after 1 samples .*sparse"):
        read_index(str(path))


def test_what_is_not_a_tar_is_one_line(tmp_path):
    (tmp_path / "empty.tar").touch()
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    tarfile.open(tmp_path / "packed.tar", "w:gz").close()
    write_tar(tmp_path / "other.tar", [("readme.md", b"hello")])
    for name, word in (("empty", "empty"), ("page", "tar"), ("packed", "compressed"), ("other", "no picture")):
        with pytest.raises(ValueError, match=word) as error:
            PairData([str(tmp_path / f"{name}.tar")], small)
        assert f"{name}.tar" in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_tar_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", good(range(5)))
    whole, member = path.read_bytes(), 2 * 512  # each here is a header and one block
    for content, samples in (
        (whole[: 3 * 2 * member + 512 + 20], 4),  # in the middle of the fourth picture
        (whole[: 3 * 2 * member + 100], 3),  # in the middle of its header
        (whole[: 2 * member] + b"\xff" * 512 + whole[2 * member + 512 :], 1),  # a header overwritten
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"x.tar: no uncompressed tar, or damaged after {samples} samples"):
            PairData([str(path)], small)


# ---- broken samples


def test_every_kind_of_broken_sample_is_named(tmp_path):
    bomb, thin = bytearray(picture(1)), io.BytesIO()
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height of the PNG header, then its checksum
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    Image.new("RGB", (10_001, 1)).save(thin, "PNG")
    members = [m for sample in BROKEN.values() for m in sample]
    members += [("c0.png", bytes(bomb)), ("c0.txt", b"a"), ("c1.png", thin.getvalue()), ("c1.txt", b"a")]
    members += [("c2.png", picture(1)), ("c2.txt", b"a" * 70_000), ("c3.json", b"[" * 100_000), ("c3.png", picture(1))]
    members += [("c4.png", picture(1)), ("c4.txt", b"caf\xe9"), ("c5.png", picture(1)), ("c5.json", b'{"caption": ')]
    pairs = PairData([str(write_tar(tmp_path / "x.tar", members))], small)
    assert list(pairs) == [*BROKEN, "too large", "too large", "too large", "no caption", "no caption", "no caption"]
    Path(pairs.tars[0]).unlink()
    assert pairs[0] == "tar not readable"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_once(tmp_path, workers):
    path = write_tar(tmp_path / "x.tar", [*good(range(9)), *(m for s in BROKEN.values() for m in s)])
    total, seen = Counter(), Counter()
    for rank in range(2):
        batches = Batches(PairData([str(path)], small), 2, rank=rank, world_size=2, workers=workers)
        for batch in take(batches, 15):  # 60 samples in all: three and a half epochs of 17
            assert batch["pixels"].shape == (2, 3, 8, 8)
            seen.update(numbers_of(batch))
            total.update(batch["bad"])
        batches.close()
    assert total == dict.fromkeys(BROKEN, 1)
    assert set(seen) == set(range(9)) and sum(seen.values()) == 60


def test_a_replacement_is_any_other_pair(tmp_path, monkeypatch):
    """With the request that was chosen for the broken one."""
    monkeypatch.setattr(PairData, "choose", lambda _, bits: bits.random_raw() % 7)
    broken = [(f"{i:05}.txt", b"no picture") for i in range(20, 40)]
    pairs = PairData([str(write_tar(tmp_path / "x.tar", good(range(20)) + broken))], small)
    batch = next(Batches(pairs, 40, seed=1, max_bad=1))
    filled = [n for n, item in zip(numbers_of(batch), epoch_order(40, 1, 0), strict=True) if item >= 20]
    assert len(filled) == 20 and len(set(filled)) > 8 and filled.count(0) < 8
    assert batch["instructions"] == [pairs.choose(random_bits(SAMPLE, 1, p)) for p in range(40)]


def test_too_many_broken_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "MIN_COUNTED", 20)
    path = write_tar(tmp_path / "x.tar", [*good(range(38)), *BROKEN["no caption"], *BROKEN["not an image"]])
    pairs = PairData([str(path)], small)
    with pytest.raises(ValueError, match=r"of .* samples are broken, over --max-bad 0.01: 1 n") as error:
        take(Batches(pairs, 4), 10)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="over --max-bad"):  # of which a rank has seen 10 at most
        for rank in range(4):
            take(Batches(pairs, 2, rank=rank, world_size=4), 5)
    batches = Batches(pairs, 4, max_bad=0.1)
    take(batches, 30)
    assert batches.bad == {"no caption": 1, "not an image": 1} and batches.seen == 40
    assert sorted(describe(batches.bad).split(", ")) == ["1 no caption", "1 not an image"]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable(tmp_path, workers):
    path = write_tar(tmp_path / "x.tar", [m for s in BROKEN.values() for m in s])
    with pytest.raises(ValueError, match=r"no usable sample in .*x\.tar: .* no picture") as error:
        next(Batches(PairData([str(path)], small), 2, workers=workers))
    assert "\n" not in str(error.value)


# ---- order, ranks, workers, resuming


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_an_epoch_exactly(tmp_path, world_size, workers):
    path = write_tar(tmp_path / "x.tar", good(range(24)))
    shares = []
    for rank in range(world_size):
        batches = Batches(PairData([str(path)], small), 3, seed=5, rank=rank, world_size=world_size, workers=workers)
        shares.append([numbers_of(batch) for batch in take(batches, 16 // world_size)])
        batches.close()
    row = [n for step in zip(*shares, strict=True) for block in step for n in block]
    assert row == [*epoch_order(24, 5, 0), *epoch_order(24, 5, 1)]
    if workers == 0:  # a batch larger than the data spans epochs
        batch = next(Batches(PairData([str(path)], small), 40, seed=5))
        assert numbers_of(batch) == row[:40]


def test_batches_are_the_same_for_any_number_of_workers(pairs):
    runs = []
    for workers in (0, 1, 2):
        batches = Batches(pairs, 4, seed=1, workers=workers)
        runs.append(take(batches, 14))
        batches.close()
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    spawned = pickle.loads(pickle.dumps(pairs))  # what a spawned worker gets
    assert same(runs[0], take(Batches(spawned, 4, seed=1), 14))
    assert not same(runs[0], take(Batches(pairs, 4, seed=2), 14))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_exactly(pairs, workers):
    whole = Batches(pairs, 4, seed=1, workers=workers)
    take(whole, 8)  # 32 samples: in the middle of the second epoch of 23
    state = json.loads(json.dumps(whole.state_dict()))
    assert (state["epoch"], state["position"], state["seen"]) == (1, 9, 23)
    rest = take(whole, 6)
    whole.close()
    resumed = Batches(pairs, 4, seed=1, workers=2 - workers)
    resumed.load_state_dict(state)
    assert same(take(resumed, 6), rest) and resumed.state_dict() == whole.state_dict()
    resumed.close()
    ranks = [Batches(pairs, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]  # now on two ranks
    for rank in ranks:
        next(rank)  # loading is right for one that has begun, too
        rank.load_state_dict(state)
    assert [rank.seen for rank in ranks] == [23, 0]
    for batch in rest:
        halves = [next(rank) for rank in ranks]
        assert all(batch[name] == halves[0][name] + halves[1][name] for name in ("keys", "instructions"))
    assert ranks[0].bad + ranks[1].bad == whole.bad
    others = PairData(pairs.tars[:1], small), PairData(pairs.tars[::-1], small)
    for wrong in (Batches(pairs, 4, seed=2), *(Batches(other, 4, seed=1) for other in others)):
        with pytest.raises(ValueError, match="cannot resume"):
            wrong.load_state_dict(state)


class SlowPairs(PairData):
    """Its second sample is never there."""

    def sample(self, i: int, choice: int | None) -> dict | str:
        time.sleep(3600 if i else 0)
        return super().sample(i, choice)


def test_a_worker_ends_with_its_batches_alone(tmp_path):
    """It passes over signals to stop, and what it waits for does not hold up the end."""
    pairs = SlowPairs([str(write_tar(tmp_path / "x.tar", good(range(2))))], small)
    seed = next(seed for seed in range(99) if list(epoch_order(2, seed, 0)) == [0, 1])
    batches = Batches(pairs, 1, seed=seed, workers=1)
    next(batches)
    [worker] = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
        worker.join(0.5)
    assert worker.is_alive()
    batches.close()
    worker.join(10)
    assert not worker.is_alive()


def test_real_tar(tmp_path):
    path = HERE.parent.parent / "shared" / "samples" / "cc3m" / "cc3m-validation-0000.tar"
    if not path.exists():
        pytest.skip("the CC3M sample tar is missing")
    copy = shutil.copy(path, tmp_path)  # the index is written beside it
    batches = Batches(PairData([copy], partial(preprocess_output, size=64)), 2)
    batch = next(batches)
    assert sorted(batch["keys"]) == ["000007775", "000009256"] and batch["pixels"].shape == (2, 3, 64, 64)
    assert len(batches.dataset) == 2 and not batches.bad
    for key, caption in zip(batch["keys"], batch["captions"], strict=True):
        assert caption == clean_caption((path.parent / "val" / f"{key}.txt").read_text(encoding="utf-8"))
