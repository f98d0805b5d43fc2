"""Tars, pictures and captions: what fuzz.py feeds to the readers of data.

A family is (what can be wrong, read). read(what, random numbers, empty folder) makes that input, reads it as the
commands do and returns "used" or "skipped"; it raises `Wrong` where the result is not right.
"""

import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
from bad_files import BAD_PICTURES, BAD_TEXTS, LIMIT, cut, flip, real_bomb
from bad_tars import BAD_TARS, CONTENT_CHANGED, COUNT, MUST_SAY, member, pair_members, picture, story_members, whole
from PIL import Image
from random_weights import GOLDEN_TOKENIZERS

import sample
from common.collate import collate
from common.images import preprocess_output, resize_and_crop
from common.page import write_answer
from common.tokenizer import Tokenizer
from prompts import STORY_REQUESTS, dialog_source, story_source, uas_texts
from published.clip_tokenizer import ClipTokenizer
from tars.batches import Batches, PairData, decode
from tars.index import Unusable, read_index
from tars.precomputed import Precomputed, marker_bytes, read_marker
from tars.stories import StoryData

QUERIES = 4  # positions that an input picture takes
small = partial(preprocess_output, size=8)


class Wrong(AssertionError):
    """A result that is not right, without a word."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN_TOKENIZERS / "tokenizer.model")


@cache
def clip_tokenizer() -> ClipTokenizer:
    folder = Path(tempfile.mkdtemp())
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(GOLDEN_TOKENIZERS / f"clip_{name}", folder / name)
    loaded = ClipTokenizer(folder)
    shutil.rmtree(folder)
    return loaded


# ---- tars: pairs, stories, precomputed pairs, and the index that lies beside a tar

BAD_INDICES = ("index changed", "index cut", "index of other numbers", "index of other types", "index is a bomb")


def read_tar(what: str, rng: Random, folder: Path) -> str:
    path = folder / "x.tar"
    if what in BAD_INDICES:
        path.write_bytes(whole(rng.choice((pair_members, story_members))()))
        bad_index(what, rng, path)
        return merge(read_pairs(path, exact=False), read_stories(path))
    kind = rng.choice(("pairs", "pairs", "stories", "precomputed"))
    members = {"pairs": pair_members, "stories": story_members, "precomputed": precomputed_members}[kind]()
    path.write_bytes(BAD_TARS[what](rng, members))
    read_marker(str(path))
    if kind == "stories":
        outcome = read_stories(path)
    elif kind == "precomputed":
        outcome = read_pairs(path, False, precomputed())
    else:
        outcome = read_pairs(path, what not in CONTENT_CHANGED | {"block of zeros"})
    require(outcome == "skipped" or what not in MUST_SAY, "samples are missing, and nothing says so")
    require(outcome == "used" or what != "nothing", "good samples were skipped")
    return outcome


def merge(*outcomes: str) -> str:
    return "used" if set(outcomes) == {"used"} else "skipped"


def outcome_of(data, samples: list) -> str:
    return "skipped" if any(isinstance(found, str) for found in samples) else "used"


def read_pairs(path: Path, exact: bool, given: Precomputed | None = None) -> str:
    data = PairData([str(path)], small, given) if given else PairData([str(path)], small)
    samples = [data[i] for i in range(min(len(data), 2 * COUNT))]
    for found in samples:
        if exact and not isinstance(found, str) and found["key"][0] == "0":
            matches(found["caption"], found["pixels"])
    if not all(isinstance(found, str) for found in samples):
        next(tars_batches(path, given))
    return outcome_of(data, samples)


def tars_batches(path: Path, given: Precomputed | None):
    return Batches(PairData([str(path)], small, given) if given else PairData([str(path)], small), 2)


def matches(caption: str, pixels: torch.Tensor) -> None:
    """`pair_members` gives picture n the caption "Number n."."""
    red, green = pixels[:2, 0, 0].tolist()
    number = round(red / 40)
    require(abs(red - number * 40) < 9 and abs(255 - green - red) < 9, "a colour that no picture has")
    require(caption == f"number {number}", f"picture {number} has the caption {caption[:80]!r}")


def read_stories(path: Path) -> str:
    data = StoryData([str(path)], tokenizer(), QUERIES, small, small, limit=256)
    items = range(len(data)) if len(data) < 20 else (0, len(data) // 2, len(data) - 1)
    samples = [data.sample(i, n) for n, i in enumerate(items, 1)]
    good = [found for found in samples if not isinstance(found, str)]
    if good:
        fits_together(data.collate(good))
    return outcome_of(data, samples)


def fits_together(batch: dict) -> None:
    """As many placeholders as input pictures, as many runs of vokens as output pictures."""
    rows = collate(tokenizer(), batch["pairs"], QUERIES, limit=256)
    inputs, outputs = (0 if batch[name] is None else len(batch[name]) for name in ("inputs", "outputs"))
    require((rows.ids == tokenizer().image_id).sum() == inputs * QUERIES, "placeholders and pictures differ in number")
    require(len(rows.picture_sequences) == outputs, "vokens and pictures differ in number")
    require(sum((rows.ids == i).sum() for i in tokenizer().voken_ids) == 8 * outputs, "stray vokens")


@cache
def precomputed() -> Precomputed:
    names = {"moments": (2, 4, 2, 2), "encoding": (3, 5)}
    return Precomputed(dict.fromkeys(names, "id"), names, empty_caption=torch.zeros(1, 3, 5))


def precomputed_members() -> list[bytes]:
    tensors = {name: torch.ones(shape) for name, shape in precomputed().shapes.items()}
    content = safetensors.torch.save(tensors)
    members = [
        part
        for i in range(COUNT)
        for part in (member(f"{i:05}.safetensors", content), member(f"{i:05}.txt", b"Words."))
    ]
    return [member(".precomputed.safetensors", marker_bytes(precomputed())), member("readme", b""), *members]


def bad_index(what: str, rng: Random, path: Path) -> None:
    index = read_index(str(path))._asdict()
    place = Path(f"{path}.index.npz")
    if what in ("index changed", "index cut"):
        content = place.read_bytes()
        return void(place.write_bytes(flip(rng, content) if what == "index changed" else cut(rng, content)))
    name = rng.choice([name for name in index if name != "stamp"])
    if what == "index of other numbers" and index[name].size:
        values = index[name].copy()
        for _ in range(rng.choice((1, 3, 9))):
            number = np.array(rng.choice((-1, -5, 0, 1, 3, 9, 100, 2**40, 2**62)))
            values.flat[rng.randrange(values.size)] = number.astype(values.dtype)  # wraps around where it is too large
        if rng.random() < 0.3:
            values.flat[rng.randrange(values.size)] = np.array(-7).astype(values.dtype)
        index[name] = values
    elif what == "index of other types":
        odd = (
            np.zeros(3),
            np.array("x"),
            np.array([["a"]]),
            np.zeros((0, 0), np.int64),
            np.int64(5),
            np.array(index[name])[..., None],
        )
        index[name] = rng.choice(
            (
                *odd,
                np.atleast_1d(index[name])[:-1],
                np.zeros(index[name].shape, np.float32),
                index["table"],
                index["turns"],
            )
        )
    if what == "index is a bomb":
        index["keys"] = np.zeros(5_000_000 if rng.random() < 0.1 else 1000, np.bytes_)
    (np.savez_compressed if what == "index is a bomb" else np.savez)(place, **index)
    return None


def void(_: object) -> None:
    return None


# ---- pictures


def read_bad_picture(what: str, rng: Random, folder: Path) -> str:
    content = real_bomb(rng) if what == "many pixels" else BAD_PICTURES[what](rng)
    try:
        image = decode(content)
    except Unusable as error:
        require(not what.startswith("valid"), f"a good picture was refused: {error}")
        return "skipped"
    require(image.mode == "RGB" and image.width * image.height <= LIMIT, f"{image.mode} of {image.size}")
    require("\\x89" not in what and content[:4] not in (b"%!PS", b"SIMP", b"%PDF"), "not a format for pictures")
    if what.startswith("valid"):
        upright(image, what)
    square = resize_and_crop(image, 32, rng.random() < 0.5)
    require(square.size == (32, 32), f"{square.size}")
    return "used"


def upright(image: Image.Image, what: str) -> None:
    """Its upper left corner is red, its lower right one blue; grey: darker there."""
    (r, g, b), (r2, g2, b2) = image.getpixel((8, 8)), image.getpixel((40, 24))
    require(image.size == (48, 32), f"{image.size}, not turned upright")
    grey = any(mode in what for mode in ("grey", "16 bit", "PNG L", "PNG 1"))
    if "PNG 1" not in what:
        require(r > r2 + 20 if grey else r > 180 and b < 80 and b2 > 180 and r2 < 80, f"{what}: {r, g, b} {r2, g2, b2}")


# ---- captions and other texts


def read_bad_text(what: str, rng: Random, folder: Path) -> str:
    made = BAD_TEXTS[what](rng)
    raw = made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")
    text = raw.decode("utf-8", "surrogateescape")
    as_json = json.dumps({"caption": text if isinstance(made, bytes) else made}).encode()
    reader = rng.choice((read_caption, read_story, say))
    return reader(made if isinstance(made, str) else text, raw, as_json, rng, folder)


def read_caption(text: str, raw: bytes, as_json: bytes, rng: Random, folder: Path) -> str:
    """Stage 1: as a caption file or in JSON, on to the rows of a batch and to Stable Diffusion's tokenizer."""
    words = member("x.txt", raw) if rng.random() < 0.5 else member("x.json", as_json)
    (folder / "x.tar").write_bytes(whole([member("x.png", picture(1)), words]))
    found = PairData([str(folder / "x.tar")], small)[0]
    if isinstance(found, str):
        return "skipped"
    no_injection([uas_texts(tokenizer().escape(found["caption"]), 8, rng.choice((None, 3)))], 0, 8)
    ids, mask = clip_tokenizer()([found["caption"]])
    require(ids.shape == mask.shape == (1, 77), f"{ids.shape}")
    found["caption"].encode()
    return "used"


def no_injection(pairs: list[tuple[str, str]], placeholders: int, vokens: int, limit: int = 256) -> None:
    ids = collate(tokenizer(), pairs, QUERIES, limit=limit).ids
    special = ids >= tokenizer().base_vocabulary
    require((ids == tokenizer().image_id).sum() == placeholders * QUERIES, "a text brought placeholders")
    require(special.sum() == placeholders * QUERIES + vokens, "a text brought vokens")
    require((ids == tokenizer().bos_id).sum() == len(pairs), "a text brought <s>")
    require((ids == tokenizer().eos_id).sum() == 0 or len(pairs) > 1, "a text brought </s>")


def read_story(text: str, raw: bytes, as_json: bytes, rng: Random, folder: Path) -> str:
    """Stage 2: as the text of a turn, of one or of all, perhaps of very many."""
    kind, count = rng.choice(("story", "dialog")), rng.choice((2, 3, 5, 3000))
    words = text if len(text) < 1000 or count < 9 else text[:50]
    turns = [{"text": f"step {k}", "image": rng.choice(("x.0.png", ["x.0.png"]))} for k in range(count)]
    for k in rng.choice(([count - 1], [0], range(count))):
        turns[k]["text"] = words
    members = [member("x.json", json.dumps({"kind": kind, "turns": turns}).encode()), member("x.0.png", picture(1))]
    (folder / "x.tar").write_bytes(whole(members))
    return read_stories(folder / "x.tar")


def say(text: str, raw: bytes, as_json: bytes, rng: Random, folder: Path) -> str:
    """sample.py --prompt and --chat: what reaches the model, and the page that is written."""
    text = text.encode("utf-8", "replace").decode()[:20_000]
    conversation = sample.Session(SimpleNamespace(tokenizer=tokenizer(), system=None), sample.Sampling(), 0)
    image = Image.new("RGB", (4, 4))
    for k in range(3):
        conversation.turns.append(conversation.user_turn(text, (image,) * k))
    turns, heard = conversation.turns, 3
    sources = [
        (turns[0].text, 0),
        (dialog_source(turns, 3), heard),
        (story_source(turns, STORY_REQUESTS["text+image"][0]), heard),
    ]
    sources.append((story_source([], STORY_REQUESTS["image"][0].format(turns[0].text)), 0))
    for source, pictures in sources:
        no_injection([(source, "")], pictures, 0, limit=10**9)
    write_answer([("you", [text]), ("model", [text, image])], text, 0, folder)
    page = (folder / "index.html").read_text(encoding="utf-8")
    counts = page.count("<p>"), page.count("<figure>")
    require("<script" not in page.lower() and counts == (2, 1), "a text brought HTML")
    return "used"


DATA_FAMILIES = {
    "tars": ((*BAD_TARS, *BAD_INDICES), read_tar),
    "pictures": ((*BAD_PICTURES, "many pixels"), read_bad_picture),
    "captions": (tuple(BAD_TEXTS), read_bad_text),
}
