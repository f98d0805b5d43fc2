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
dialogue the human has the first turn, then the assistant. KEY is the sample's number in its source. Every picture is
decoded once, to see that it can be, then copied byte for byte. Few samples are in memory at a time, and the tar does
not depend on the number of threads.
"""

import csv
import json
import os
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
    try:
        if not path.is_file():  # a pipe would block
            raise Unusable("not a file")
        if path.stat().st_size > MAX_BYTES[member]:
            raise Unusable("too large")
        return path.read_bytes()
    except OSError:
        raise Unusable("file not readable") from None


def walk(folder: Path) -> Iterator[dict[str, dict[Member, Path]]]:
    """Of each folder below, links to folders followed, the members of every key. A folder that is reached twice counts
    once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        found = {}
        for name in sorted(names, reverse=True):
            key, _, ending = name.rpartition(".")
            if ending.lower() in ENDINGS and not name.startswith("."):
                found.setdefault(key, {})[ENDINGS[ending.lower()]] = Path(root, name)
        yield found


def interleaved(key: str, kind: str, name: str, turns: Iterable[tuple[str, list[Path | None]]]) -> Sample:
    """Texts with their pictures, up to the first turn that cannot be used: then `cut` of the sample says why."""
    written, pictures, cut = [], [], None
    try:
        for text, paths in turns:
            if len(pictures) + len(paths) > MAX_PICTURES:
                raise Unusable("too many pictures")
            added = [read_picture(path) for path in paths]
            names = [f"{key}.{i}.{ending}" for i, (ending, _) in enumerate(added, len(pictures))]
            pictures += [(name, content) for name, (_, content) in zip(names, added, strict=True)]
            written.append({"text": text, "image": names if len(names) > 1 else names[0] if names else None})
    except Unusable as error:
        cut = str(error)
    content = json.dumps({"kind": kind, "id": name, "turns": written}).encode()
    unit = "stories" if kind == "story" else "dialogues"
    counts = {unit: 1, "turns": len(written), "pictures": len(pictures)}
    return Sample([(f"{key}.json", content), *pictures], counts, cut)


# ---- VIST

RAW_FIELDS = ("worker_arranged_photo_order", "text", "photo_flickr_id")  # of a step's order, text and picture
CLEANED_FIELDS = ("sequence_index", "caption", "image_id")


def vist_jobs(file: Path, folders: list[Path]) -> Iterator[Job]:
    """The stories of a file of the raw or of the cleaned form.

    Of the raw form's two texts this takes `text`: in lower case, with spaces around punctuation, names as [male],
    [location] ... The released cleaned files hold it, so the released checkpoint learned from it.
    """
    content = read_json(file)
    if isinstance(content.get("annotations"), list):
        stories, fields = raw_stories(content["annotations"]), RAW_FIELDS
        found = chain.from_iterable(map(walk, folders))
        places = {key: m[Member.PICTURE] for members in found for key, m in members.items() if Member.PICTURE in m}
    elif content and all(isinstance(steps, list) for steps in content.values()):
        stories, fields = content, CLEANED_FIELDS
        beside = file.with_name(file.name.replace("cleaned", "image_mapping"))
        if beside == file:
            raise ValueError(f"{file}: should be called X_cleaned.json, with X_image_mapping.json beside it")
        mapping = read_json(beside)
        places = {i: find_picture(folders, name) for i, name in mapping.items() if isinstance(name, str)}
    else:
        raise ValueError(f"{file}: neither the raw form of VIST (annotations) nor the cleaned one (stories by id)")
    for name, steps in stories.items():
        yield partial(vist_sample, name=name, steps=steps, fields=fields, places=places)


def raw_stories(annotations: list) -> dict[str, list]:
    """Story -> its annotations. One that belongs to no story stands alone."""
    stories = {}
    for number, annotation in enumerate(annotations):
        step = annotation[0] if isinstance(annotation, list) and len(annotation) == 1 else None
        known = isinstance(step, dict) and isinstance(step.get("story_id"), str | int)
        name = str(step["story_id"]) if known else f"annotation {number}"
        stories.setdefault(name, []).append(step if known else None)
    return stories


def vist_sample(key: str, name: str, steps: list, fields: tuple[str, str, str], places: dict[str, Path]) -> Sample:
    """A whole story in the order that its teller gave the pictures. Raises Unusable."""
    told = []
    for step in steps:
        order, text, picture = map(step.get, fields) if isinstance(step, dict) else (None, None, None)
        if type(order) is not int or not isinstance(text, str) or not isinstance(picture, str | int):
            raise Unusable("broken annotation")
        told.append((order, text, places.get(str(picture))))
    if len(told) != STEPS:
        raise Unusable("fewer than five steps" if len(told) < STEPS else "more than five steps")
    if len({order for order, _, _ in told}) < STEPS:
        raise Unusable("order not clear")
    if not all(text.strip() for _, text, _ in told):
        raise Unusable("empty text")
    told.sort(key=lambda step: step[0])
    story = interleaved(key, "story", name, ((text, [path]) for _, text, path in told))
    if story.cut:
        raise Unusable(story.cut)
    return story


# ---- MMDialog


def read_turn(turn: object, folders: list[Path], max_words: int) -> tuple[str, list[Path | None]]:
    """The text and the pictures of a turn of at most `max_words` words (0: any number). Raises Unusable.

    White space separates words; the released code allows 50 tokens, until March 2024 20 words.
    """
    try:
        text = " ".join(part["__TEXT__"] for part in turn["turn"] if "__TEXT__" in part)
        media = [str(part["__MEDIA__"]) for part in turn["turn"] if "__MEDIA__" in part]
    except (LookupError, TypeError):
        raise Unusable("broken turn") from None
    if not text.strip():
        raise Unusable("empty text")
    if max_words and len(text.split()) > max_words:
        raise Unusable("long turn")
    return text, [find_picture(folders, f"{name}.jpg") for name in media]


def mmdialog_sample(key: str, line: bytes, folders: list[Path], max_words: int) -> Sample:
    """A dialogue up to its first turn that cannot be used. Raises Unusable where not even two turns are left."""
    content = read_object(line)
    if not isinstance(content.get("conversation"), list):
        raise Unusable("no conversation")
    turns = (read_turn(turn, folders, max_words) for turn in content["conversation"])
    dialogue = interleaved(key, "dialog", str(content.get("conversation_id", "")), turns)
    if dialogue.counts["turns"] < 2:
        raise Unusable(f"{dialogue.cut} in the first two turns" if dialogue.cut else "fewer than two turns")
    return dialogue


# ---- your own stories and dialogues, pictures and captions


def read_object(line: bytes | str) -> dict:
    """A line of JSON. Raises Unusable."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("broken JSON") from None
    if not isinstance(content, dict):
        raise Unusable("no JSON object")
    return content


def turns_sample(key: str, line: bytes, folders: list[Path]) -> Sample:
    """A story or dialogue, which counts as a whole. Raises Unusable."""
    content, told = read_object(line), []
    kind, turns = content.get("kind", "story"), content.get("turns")
    if kind not in ("story", "dialog") or not isinstance(turns, list) or len(turns) < 2:
        raise Unusable("no kind, or fewer than two turns")
    for turn in turns:
        text, names = (turn.get("text"), turn.get("images", [])) if isinstance(turn, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise Unusable("empty text")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Unusable("images are no list of files")
        told.append((text, [find_picture(folders, name) for name in names]))
    sample = interleaved(key, kind, str(content.get("id", "")), told)
    if sample.cut:
        raise Unusable(sample.cut)
    return sample


def list_jobs(path: Path, folders: list[Path]) -> Iterator[Job]:
    """Lines of a CSV whose first one names the columns "file" and "caption", or JSON objects with these names."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.DictReader(file) if path.suffix == ".csv" else file
        if path.suffix == ".csv" and not {"file", "caption"} <= {*(lines.fieldnames or ())}:
            raise ValueError(f"{path}: the first line should name the columns file and caption")
        yield from (partial(listed_sample, line=line, folders=folders) for line in lines if line != "\n")


def listed_sample(key: str, line: str | dict, folders: list[Path]) -> Sample:
    content = read_object(line) if isinstance(line, str) else line
    name, caption = content.get("file"), content.get("caption")
    if not isinstance(name, str) or not isinstance(caption, str):
        raise Unusable("no file or no caption")
    return cc3m_sample(key, caption.encode("utf-8", "surrogateescape"), find_picture(folders, name), name)


# ---- CC3M


def tsv_jobs(tsv: Path, folders: list[Path]) -> Iterator[Job]:
    """Lines of caption and picture; a first line that says "caption" names the columns."""
    caption, picture = 0, 1
    with open(tsv, "rb") as file:
        for number, line in enumerate(file):
            cells = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\t")
            if number == 0 and b"caption" in cells and len(cells) > 1:
                caption = cells.index(b"caption")
                picture = cells.index(b"image_path") if b"image_path" in cells else int(caption == 0)
            elif line.strip():
                row = {i: cell.decode("utf-8", "surrogateescape") for i, cell in enumerate(cells)}
                line = {"file": row.get(picture), "caption": row.get(caption)}
                yield partial(listed_sample, line=line, folders=folders)


def folder_jobs(folder: Path) -> Iterator[Job]:
    """KEY.jpg with KEY.txt, or with the caption in KEY.json."""
    for found in walk(folder):
        for name in sorted(found):
            source = os.path.relpath(next(iter(found[name].values())).with_name(name), folder)
            yield partial(folder_sample, members=found[name], source=source)


def folder_sample(key: str, members: dict[Member, Path], source: str) -> Sample:
    caption = read_caption(lambda member: read_file(members[member], member) if member in members else None)
    return cc3m_sample(key, caption.encode(), members.get(Member.PICTURE), source)


def cc3m_sample(key: str, caption: bytes, picture: Path | None, source: str) -> Sample:
    """A pair with its caption as it was: batches.py cleans it in reading. Raises Unusable."""
    try:
        if not clean_caption(caption.decode("utf-8-sig")):
            raise Unusable("empty caption")
    except UnicodeDecodeError:
        raise Unusable("caption not UTF-8") from None
    if len(caption) > MAX_BYTES[Member.TEXT]:
        raise Unusable("too large")
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


def make_samples(jobs: Iterable[Job], workers: int) -> Iterator[Sample | str]:
    """In the order of the jobs. Threads work a few jobs ahead: Pillow decodes without Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for number, job in enumerate(jobs):
            waiting.append(pool.submit(attempt, job, f"{number:09d}"))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def line_jobs(make_sample: Callable[..., Sample], path: Path, folders: list[Path]) -> Iterator[Job]:
    """A sample of each line that is not empty."""
    with open(path, "rb") as file:
        yield from (partial(make_sample, line=line, folders=folders) for line in file if line.strip())


FILES = {"vist": "story-in-sequence.json or cleaned.json", "mmdialog": "conversations.txt", "turns": ".jsonl"}


def convert(kind: str, sources: list[Path], out: Path, max_words: int = 50, workers: int = 1) -> Report:
    """Write the tar `out`. sources: files of the data set, and folders that hold its pictures; without a folder the
    pictures lie beside each file. ValueError for what cannot be read."""
    files, folders = [path for path in sources if path.is_file()], [path for path in sources if path.is_dir()]
    for path in sources:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    if kind in FILES and not files:
        raise ValueError(f"{sources[0]} is a folder: name the {FILES[kind]} file too")
    readers = {"vist": vist_jobs, "cc3m": tsv_jobs, "pairs": list_jobs, "turns": partial(line_jobs, turns_sample)}
    readers["mmdialog"] = partial(line_jobs, partial(mmdialog_sample, max_words=max_words))
    if files:
        read = readers[kind]
        jobs = ((tsv_jobs if path.suffix == ".tsv" else read)(path, folders or [path.parent]) for path in files)
    else:
        jobs = map(folder_jobs, folders)
    return write_samples(make_samples(chain.from_iterable(jobs), workers), out)


def packed(kind: str, data: list[str] | None, out: Path) -> list[str]:
    """What --data names, with a tar OUT-0.tar, OUT-1.tar ... in the place of each folder of pictures and of each list
    (.csv, .tsv, .jsonl). A tar that is there already is taken as it is, so that a run goes on with the same data."""
    tars = []
    for number, name in enumerate(data or []):
        path, tar = Path(os.path.expanduser(name)), Path(f"{out}-{number}.tar")
        if path.suffix in (".csv", ".tsv", ".jsonl") or (path.is_dir() and not any(path.glob("*.tar"))):
            if not tar.exists():
                print(f"packing {path} into {tar}", flush=True)
                print(convert(kind, [path], tar, workers=min(8, os.cpu_count() or 1)))
            tars.append(str(tar))
        else:
            tars.append(name)
    return tars
