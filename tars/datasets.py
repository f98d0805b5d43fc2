"""Data into tars: your own, and the published data sets, CC3M for stage 1, VIST and MMDialog for stage 2 (paper section
4.1).

    python -m tars pairs pictures/ --out mine.tar                     # a folder of KEY.jpg with KEY.txt
    python -m tars pairs captions.csv pictures/ --out mine.tar        # columns file and caption; or .jsonl
    python -m tars turns stories.jsonl pictures/ --out mine.tar       # stories and dialogues of your own
    python -m tars vist train.story-in-sequence.json images/train --out vist-train.tar
    python -m tars vist val_cleaned.json --out vist-val.tar           # as in the released repository
    python -m tars mmdialog train/train_conversations.txt --out mmdialog-train.tar
    python -m tars mmdialog test/test_conversations.txt --max-words 0 --out mmdialog-test.tar
    python -m tars cc3m cc3m_train.tsv --out cc3m-train.tar

    source                            tar                                             read by
    a story of five steps             KEY.json, KEY.0.jpg .. KEY.4.jpg                stories.py
    a dialogue of two or more turns   KEY.json, KEY.0.jpg ... as many as it has       stories.py
    a caption and its picture         KEY.jpg, KEY.txt, KEY.json with its source      batches.py

A line of stories.jsonl is {"kind": "story" or "dialog", "turns": [{"text": "...", "images": ["a.jpg"]}, ...]}; in a
dialogue the human has the first turn, then the assistant. KEY is the sample's number, counted over all sources. Every
picture is decoded once, to see that it can be, then copied byte for byte. Few samples are in memory at a time, and the
tar does not depend on the number of threads.
"""

import csv
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

from common.files import read_json
from common.texts import clean_caption
from tars.batches import decode, read_caption
from tars.index import ENDINGS, MAX_BYTES, MAX_PICTURES, Member, Unusable
from tars.writer import Report, Sample, write_samples

STEPS = 5  # of a VIST story
Job = Callable[[str], Sample]  # makes the sample of a key, or raises Unusable
Turns = Iterable[tuple[str, list[Path | None]]]  # texts with their pictures, of which None is missing


# ---- pictures


def find_picture(folders: list[Path], name: str) -> Path | None:
    """The file `name` in one of the folders; None where there is none."""
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), None)


def read_picture(path: Path | None) -> tuple[str, bytes]:
    """The ending and the bytes of a picture that can be decoded. Raises Unusable."""
    if path is None:
        raise Unusable("missing picture")
    content = read_file(path, Member.PICTURE)
    decode(content)
    ending = path.suffix.lower().removeprefix(".")
    return ending if ENDINGS.get(ending) == Member.PICTURE else "jpg", content


def read_file(path: Path, member: Member) -> bytes:
    """The bytes of a regular file that is to be this member of a sample. Raises Unusable."""
    if not path.is_file():  # a pipe would block
        raise Unusable("not a file")
    if path.stat().st_size > MAX_BYTES[member]:
        raise Unusable("too large")
    return path.read_bytes()


def walk(folder: Path) -> Iterator[dict[str, dict[Member, Path]]]:
    """{key: {member: path}} of `folder`, then of each folder in it. Links are followed; none comes twice."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        members = {}
        for name in sorted(names, reverse=True):
            key, _, ending = name.rpartition(".")
            if ending.lower() in ENDINGS and not name.startswith("."):
                members.setdefault(key, {})[ENDINGS[ending.lower()]] = Path(root, name)
        yield members


def interleaved_sample(key: str, kind: str, name: str, turns: Turns, may_cut: bool = False) -> Sample:
    """The sample of a story or dialogue. Raises Unusable for fewer than two turns, and at a turn that cannot be used;
    where the sample `may_cut`, it ends before that turn, if that leaves two, and its counts say why."""
    records, pictures, cut = [], [], {}
    try:
        for text, paths in turns:
            if not text.strip():
                raise Unusable("empty text")
            if len(pictures) + len(paths) > MAX_PICTURES:
                raise Unusable("too many pictures")
            added = [read_picture(path) for path in paths]
            names = [f"{key}.{i}.{ending}" for i, (ending, _) in enumerate(added, len(pictures))]
            pictures += [(name, content) for name, (_, content) in zip(names, added, strict=True)]
            records.append({"text": text, "image": names if len(names) > 1 else names[0] if names else None})
    except Unusable as error:
        if not may_cut or len(records) < 2:
            raise
        cut = {f"cut short ({error})": 1}
    if len(records) < 2:
        raise Unusable("fewer than two turns")
    content = json.dumps({"kind": kind, "id": name, "turns": records}).encode()
    units = {"story": "stories", "dialog": "dialogues"}
    counts = {units[kind]: 1, "turns": len(records), "pictures": len(pictures), **cut}
    return Sample([(f"{key}.json", content), *pictures], counts)


# ---- VIST


def vist_jobs(file: Path, folders: list[Path]) -> Iterator[Job]:
    """The stories of a file of the raw or of the cleaned form.

    Of the raw form's two texts this takes `text`: in lower case, with spaces around punctuation, names as [male],
    [location] ... The released cleaned files hold it, so the released checkpoint learned from it.
    """
    content = read_json(file)
    try:
        if "annotations" in content:
            stories, fields = {}, ("worker_arranged_photo_order", "text", "photo_flickr_id")
            for annotation in content["annotations"]:
                stories.setdefault(str(annotation[0]["story_id"]), []).append(annotation[0])
            samples = chain.from_iterable(members.items() for members in chain.from_iterable(map(walk, folders)))
            places = {key: members[Member.PICTURE] for key, members in samples if Member.PICTURE in members}
        else:
            stories, fields = content, ("sequence_index", "caption", "image_id")
            mapping = read_json(file.with_name(file.name.replace("cleaned", "image_mapping")))
            places = {i: find_picture(folders, name) for i, name in mapping.items()}
    except (LookupError, TypeError):
        raise ValueError(f"{file}: neither annotations of VIST nor X_cleaned.json with X_image_mapping.json") from None
    for name, steps in stories.items():
        yield partial(vist_sample, name=name, steps=steps, fields=fields, places=places)


def vist_sample(key: str, name: str, steps: list, fields: tuple[str, str, str], places: dict[str, Path]) -> Sample:
    """A whole story in the order that its teller gave the pictures. fields: those of a step's order, text and picture.
    Raises Unusable."""
    steps = sorted(([step[field] for field in fields] for step in steps), key=lambda step: step[0])
    if not len(steps) == len({order for order, _, _ in steps}) == STEPS:
        raise Unusable("not five steps in a clear order")
    return interleaved_sample(key, "story", name, ((text, [places.get(str(picture))]) for _, text, picture in steps))


# ---- MMDialog, and your own stories and dialogues


def read_turn(turn: dict, folders: list[Path], max_words: int) -> tuple[str, list[Path | None]]:
    """The text and the pictures of a turn of at most `max_words` words (0: any number). Raises Unusable.

    White space separates words; the released code allows 50 tokens, until March 2024 20 words.
    """
    text = " ".join(part["__TEXT__"] for part in turn["turn"] if "__TEXT__" in part)
    media = [part["__MEDIA__"] for part in turn["turn"] if "__MEDIA__" in part]
    if max_words and len(text.split()) > max_words:
        raise Unusable("long turn")
    return text, [find_picture(folders, f"{name}.jpg") for name in media]


def mmdialog_sample(key: str, line: bytes, folders: list[Path], max_words: int) -> Sample:
    """A dialogue up to its first turn that cannot be used."""
    content = json.loads(line)
    turns = (read_turn(turn, folders, max_words) for turn in content["conversation"])
    return interleaved_sample(key, "dialog", str(content.get("conversation_id", "")), turns, may_cut=True)


def turns_sample(key: str, line: bytes, folders: list[Path]) -> Sample:
    """A story or dialogue, which counts as a whole. Raises Unusable."""
    content = json.loads(line)
    entries = ((turn["text"], turn.get("images", [])) for turn in content["turns"])
    turns = ((text, [find_picture(folders, name) for name in names]) for text, names in entries)
    return interleaved_sample(key, content.get("kind", "story"), str(content.get("id", "")), turns)


# ---- pictures and captions, your own and CC3M's


def list_jobs(path: Path, folders: list[Path]) -> Iterator[Job]:
    """Rows of a .csv or tab-separated file whose first line names the columns: "file" or "image_path", and "caption". A
    tab-separated file without names has caption and file, as in CC3M. Or a .jsonl of objects with both."""
    if path.suffix == ".jsonl":
        yield from line_jobs(listed_sample, path, folders)
        return
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file) if path.suffix == ".csv" else (line.rstrip("\r\n").split("\t") for line in file)
        try:
            names = ["file" if name == "image_path" else name for name in next(rows, [])]
            if path.suffix != ".csv" and "caption" not in names:
                names, rows = ["caption", "file"], chain([names], rows)
            if not {"file", "caption"} <= {*names}:
                raise ValueError(f"{path}: the first line should name the columns file and caption")
            for row in filter(any, rows):
                yield partial(listed_sample, line=dict(zip(names, row, strict=False)), folders=folders)
        except csv.Error as error:
            raise ValueError(f"{path}: not readable as CSV ({error})") from None


def listed_sample(key: str, line: bytes | dict, folders: list[Path]) -> Sample:
    row = json.loads(line) if isinstance(line, bytes) else line
    caption = row["caption"].encode("utf-8", "surrogateescape")
    return pair_sample(key, caption, find_picture(folders, row["file"]), row["file"])


def folder_jobs(folder: Path) -> Iterator[Job]:
    """KEY.jpg with KEY.txt, or with the caption in KEY.json."""
    for samples in walk(folder):
        for name, members in sorted(samples.items()):
            source = os.path.relpath(next(iter(members.values())).with_name(name), folder)
            yield partial(folder_sample, members=members, source=source)


def folder_sample(key: str, members: dict[Member, Path], source: str) -> Sample:
    caption = read_caption(lambda member: read_file(members[member], member) if member in members else None)
    return pair_sample(key, caption.encode(), members.get(Member.PICTURE), source)


def pair_sample(key: str, caption: bytes, picture: Path | None, source: str) -> Sample:
    """A pair with its caption as it was: batches.py cleans it in reading. Raises Unusable."""
    if not clean_caption(caption.decode("utf-8-sig")):
        raise Unusable("empty caption")
    ending, content = read_picture(picture)
    about = json.dumps({"source": source}).encode()
    return Sample([(f"{key}.{ending}", content), (f"{key}.txt", caption), (f"{key}.json", about)], {"pairs": 1})


# ---- the tar


def attempt(job: Job, key: str) -> Sample | str:
    """The sample, or the reason why there is none."""
    try:
        return job(key)
    except Unusable as error:
        return str(error)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # JSON of another form, or no UTF-8
        return "not in the form of the data set"


def make_samples(jobs: Iterable[Job], workers: int) -> Iterator[Sample | str]:
    """In the order of the jobs. Threads work a few jobs ahead: Pillow decodes without Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for number, job in enumerate(jobs):
            waiting.append(pool.submit(attempt, job, f"{number:09d}"))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def line_jobs(make_sample: Callable[..., Sample], path: Path, folders: list[Path]) -> Iterator[Job]:
    """A sample of each line that is not empty."""
    with open(path, "rb") as file:
        yield from (partial(make_sample, line=line, folders=folders) for line in file if line.strip())


def convert(kind: str, sources: list[Path], out: Path, max_words: int = 50, workers: int = 1) -> Report:
    """Write the tar `out`. sources: files of the data set, and folders that hold its pictures; without a folder the
    pictures lie beside each file. ValueError for what cannot be read."""
    files, folders = [path for path in sources if path.is_file()], [path for path in sources if path.is_dir()]
    for path in sources:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if path.resolve() == out.resolve():
            raise ValueError(f"--out {out}: is a source")
    readers = {"vist": vist_jobs, "cc3m": list_jobs, "pairs": list_jobs, "turns": partial(line_jobs, turns_sample)}
    readers["mmdialog"] = partial(line_jobs, partial(mmdialog_sample, max_words=max_words))
    if files:
        jobs = (readers[kind](path, folders or [path.parent]) for path in files)
    elif readers[kind] is list_jobs:
        jobs = map(folder_jobs, folders)
    else:
        raise ValueError(f"{sources[0]} is a folder: name the file of {kind} too")
    return write_samples(make_samples(chain.from_iterable(jobs), workers), out)


def pack_sources(kind: str, data: list[str] | None, out: Path, again: bool) -> list[str]:
    """Pack each folder of pictures and each list (.csv, .tsv, .jsonl) that --data names into a tar OUT-N.tar; N is a
    checksum of its path. A tar that is there already stays, so that a resumed run has the same data, unless `again`.
    Returns --data with these tars in their place."""
    tars = []
    for name in data or []:
        path = Path(os.path.expanduser(name))
        tar = Path(f"{out}-{zlib.crc32(os.fsencode(path.resolve()))}.tar")
        if path.suffix in (".csv", ".tsv", ".jsonl") or (path.is_dir() and not any(path.glob("*.tar"))):
            if again or not tar.exists():
                print(f"packing {path} into {tar}", flush=True)
                print(convert(kind, [path], tar, workers=min(8, os.cpu_count() or 1)))
            tars.append(str(tar))
        else:
            tars.append(name)
    return tars
