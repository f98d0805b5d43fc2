"""Caption-picture tars into batches for stage 1 (UAS, section 3.3 of the paper, on CC3M).

    python -m tars cc3m cc3m_val.tsv --out cc3m-val.tar          # the published data sets into tars: published.py
    python -m tars precompute cc3m-val.tar --out features.tar    # frozen features for pictures: precompute.py

The training order is one endless row of positions, epoch after epoch, each epoch a permutation of all pairs; at every
step the ranks take their blocks off its front. With batch_size 2 and world_size 2, ten pairs:

    position   0 1 2 3   4 5 6 7   8 9 | 10 11   ...      rank 0 gets positions 0 1, then 4 5, then 8 9 ...
    pair       7 0 3 9   1 8 2 4   6 5 |  3  8   ...      rank 1 gets positions 2 3, then 6 7, then 10 11 ...

A broken pair's place is filled by another one, drawn by (seed, position). So every batch is full, has the same shape
and is a function of (seed, position) alone: equal for any number of workers, ranks in step, and one number is enough
to resume, even with another number of ranks. The price: a good pair is seen twice for each broken one.
Tars behind http(s) cannot be read at random: streams.py reads them through a shuffle buffer.

Batches of rows of like length have less padding: with group 8 each run of 8 batches is sorted by length, cut anew and
put in random order again. To resume exactly the samples of a step must then be as many as before. A run that ends
within such a group has seen some of the next epoch in the place of the last samples of its own.

    batches = open_batches(["cc3m-train-{0000..0575}.tar"], partial(vae.preprocess_output, size=512), batch_size=48)
    batch = next(batches)

    batch["pixels"]        (B, 3, size, size) uint8. Of precomputed tars instead "moments" (B, 2, C, h, w)
                           and perhaps "encoding" (B, S, Dc): see features.py
    batch["captions"]      B strings, cleaned; batch["keys"] beside them
    batch["instructions"]  B times None or the number of a request phrasing, for `uas_texts`
    batch["bad"]           Counter of the reasons of broken samples met for the first time

Left out: the released code's random horizontal flip of pictures.
"""

import hashlib
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from common.images import ImageError, read_image
from tars.features import NONE, Features, read_features
from tars.index import (
    FEATURES,
    JSON,
    PICTURE,
    TEXT,
    TarIndex,
    Unusable,
    expand,
    is_url,
    most_bytes,
    read_index,
    read_member,
)

BAD_OF = 1000  # samples that max_bad is a share of, at least: two broken pairs of four need not stop a trial
TENSORS = ("pixels", "moments", "encoding")  # of a sample, that are stacked
TRIES = 1000  # broken samples in a row before the data counts as unusable

SYSTEM = "You will be able to generate image according to command."
REQUESTS = (
    "draw this for me:",
    "please make a picture of",
    "show me what this looks like:",
    "I would like to see an image of",
    "paint the following scene:",
    "create a photo that fits these words:",
    "turn this description into an image:",
)


# ---- texts


def clean_caption(text: str) -> str:
    """The released code's cleaning: lower case, .!"()*#:;~ to spaces, white space to single spaces."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split())


def uas_texts(caption: str, vokens: int = 8, instruction: int | None = None) -> tuple[str, str]:
    """Caption -> (source, target) of stage 1; `instruction` is the number of a request phrasing, None the bare caption.

    Special tokens in the caption are not escaped here: pass it through `Tokenizer.plain` first.
    """
    source = caption
    if instruction is not None:
        source = f"{SYSTEM}###Human: {REQUESTS[instruction]} {caption} ###Assistant:"
    return source, "".join(f"[IMG{i}]" for i in range(vokens)) + " ###"


# ---- random numbers: raw PCG64 output only, which numpy promises to keep from version to version


def random_bits(purpose: int, *place: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([purpose, *place]))


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) of that epoch: int64 (n,), read-only."""
    order = np.argsort(random_bits(0, seed, epoch).random_raw(n), kind="stable")
    order.setflags(write=False)
    return order


def draw_instruction(bits: np.random.PCG64) -> int | None:
    """One sample in 100 becomes an instruction, in one of the phrasings."""
    chosen, phrase = bits.random_raw() % 100 == 0, bits.random_raw() % len(REQUESTS)
    return phrase if chosen else None


# ---- samples


class Broken(NamedTuple):
    """A sample that cannot be used; `reason` is a short name to count it under."""

    key: str
    reason: str


def make_sample(
    key: str, read: Callable[[int], bytes | None], transform: Callable, features: Features = NONE
) -> dict | Broken:
    """{"key", "caption", "pixels" or else what `features` names} from read(PICTURE | TEXT | JSON | FEATURES) -> bytes,
    None where there is no such member."""
    try:
        tensors = None if "moments" not in features else read_features(read(FEATURES), features, features.made_with)
        image = decode(read(PICTURE)) if tensors is None else None
        caption = clean_caption(read_caption(read))
        if not caption:
            raise Unusable("empty caption")
    except Unusable as error:
        return Broken(key, str(error))
    except OSError:
        return Broken(key, "tar not readable")
    return {"key": key, "caption": caption, **(tensors or {"pixels": transform(image)})}


def decode(content: bytes | None) -> Image.Image:
    """A picture member -> RGB picture. Raises Unusable."""
    if not content:
        raise Unusable("no picture" if content is None else "empty picture")
    try:
        return read_image(content)
    except ImageError as error:
        raise Unusable(error.reason) from None


def read_caption(read: Callable[[int], bytes | None]) -> str:
    text, content = read(TEXT), None
    try:
        if text is not None:
            return text.decode("utf-8-sig")
        content = json.loads(read(JSON) or b"{}")
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise Unusable("no caption")
        if len(content["caption"].encode()) > most_bytes(TEXT):  # which fails at a lone surrogate, "\\ud83d" in JSON
            raise Unusable("too large")
    except UnicodeError:
        raise Unusable("caption not UTF-8") from None
    except (ValueError, RecursionError):
        raise Unusable("broken JSON") from None
    return content["caption"]


def describe(bad: dict[str, int]) -> str:
    """Counts by reason in words, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(bad).most_common()) or "none"


def collate(samples: list[dict]) -> dict:
    """One batch. default_collate stacks in the memory that a worker shares with the main process: no second copy."""
    return {
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
        "instructions": [sample["instruction"] for sample in samples],
        **{name: default_collate([sample[name] for sample in samples]) for name in TENSORS if name in samples[0]},
    }


def tally(bad: Counter, seen: int, cursor: object = None) -> dict:
    """What a batch says about its making. A Counter would be doubled by DataLoader's pinning, which calls update()."""
    return {"bad": dict(bad), "seen": seen, "cursor": cursor}


# ---- local tars


class TarData(Dataset):
    """Local tars as one list of items; subclasses say what an item is and how batches are made of them.

    Holds no open file: it may be forked and pickled. `notes` says which tars are damaged. ValueError for a tar that
    cannot be read and where there is no item at all. With several ranks on a machine let one build it first: the others
    then find the cached indices.
    """

    unit = "sample"

    def __init__(self, tars: list[str]):
        self.tars = list(tars)
        self.indices = [read_index(tar) for tar in tqdm(self.tars, "index", leave=False, delay=2, unit="tar")]
        self.ends = np.cumsum([self.items(index) for index in self.indices])
        self.name = self.tars[0] + (f" and {len(self.tars) - 1} more" if len(self.tars) > 1 else "")
        if not len(self):
            raise ValueError(f"{self.name}: no picture, caption or JSON in it")
        notes = zip(self.tars, (index.note.tobytes().decode("utf-8", "replace") for index in self.indices), strict=True)
        self.notes = [f"{tar}: {note}" for tar, note in notes if note]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def digest(self) -> str:
        """Of the samples' keys in their order: other data have another one."""
        return hashlib.sha256(b"".join(index.keys.tobytes() + b"\n" for index in self.indices)).hexdigest()[:16]

    def place(self, i: int) -> tuple[int, int]:
        """Item -> (tar, item in that tar)."""
        tar = int(np.searchsorted(self.ends, i, side="right"))
        return tar, i - int(self.ends[tar - 1] if tar else 0)

    def items(self, index: TarIndex) -> int:
        """How many items a tar has."""
        raise NotImplementedError

    def draw(self, bits: np.random.PCG64) -> object:
        """What is random in the sample at a position; a replacement for a broken item takes it over."""
        raise NotImplementedError

    def length(self, i: int, draw: object) -> float:
        """About how long the row of that sample will be, in any unit, without reading it."""
        raise NotImplementedError

    def sample(self, i: int, draw: object) -> dict | Broken:
        """Item i as a sample; a broken one is a `Broken`, never an exception."""
        raise NotImplementedError

    def collate(self, samples: list[dict]) -> dict:
        """Samples -> batch."""
        raise NotImplementedError


class PairData(TarData):
    """Pairs as samples {"key", "caption", "pixels", "instruction"}.

    transform: RGB picture -> tensor, as vae.preprocess_output. features: what is there in the place of "pixels".
    """

    unit = "pair"

    def __init__(self, tars: list[str], transform: Callable, features: Features = NONE):
        super().__init__(tars)
        self.transform, self.features = transform, features

    def __getitem__(self, i: int) -> dict | Broken:
        return self.sample(i, None)

    def items(self, index: TarIndex) -> int:
        return len(index.table)

    def draw(self, bits: np.random.PCG64) -> int | None:
        return draw_instruction(bits)

    def length(self, i: int, draw: int | None) -> float:
        """The caption's bytes and those of the request around it."""
        tar, row = self.place(i)
        sizes = self.indices[tar].table[row, 1::2]  # of the members, kind by kind
        return max(sizes[TEXT], sizes[JSON] if sizes[TEXT] < 0 else 0) + (0 if draw is None else len(SYSTEM) + 50)

    def sample(self, i: int, draw: int | None) -> dict | Broken:
        tar, row = self.place(i)
        index = self.indices[tar]
        read = partial(read_member, self.tars[tar], index.table[row])
        sample = make_sample(index.key(row), read, self.transform, self.features)
        return sample if isinstance(sample, Broken) else {**sample, "instruction": draw}

    def collate(self, samples: list[dict]) -> dict:
        return collate(samples)


class WholeBatches(Dataset):
    """What a worker runs: [(position, item), ...] -> one full batch."""

    def __init__(self, data: TarData, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, places: list[tuple[int, int]]) -> dict:
        n, samples, bad, seen = len(self.data), [], Counter(), 0
        for position, item in places:
            bits, tries = random_bits(1, self.seed, position), 0
            draw = self.data.draw(bits)
            sample = self.data.sample(item, draw)
            if position < n:
                seen += 1
                bad.update([sample.reason] if isinstance(sample, Broken) else [])
            while isinstance(sample, Broken):
                tries += 1
                if tries > TRIES:
                    return {"error": self.no_sample(), **tally(bad, seen)}
                sample = self.data.sample(bits.random_raw() % n, draw)
            samples.append(sample)
        return {**self.data.collate(samples), **tally(bad, seen)}

    def no_sample(self) -> str:
        draw = self.data.draw(random_bits(1, self.seed, 0))
        samples = (self.data.sample(i, draw) for i in range(min(len(self.data), TRIES)))
        bad = Counter(sample.reason for sample in samples if isinstance(sample, Broken))
        return f"no usable {self.data.unit} in {self.data.name}: {describe(bad)}"


def outlive_signals(worker: int) -> None:
    """A signal to stop may reach all processes of a run, and more than once: from a terminal, from a scheduler, and
    from torchrun, which passes it on. When a worker ends is up to its main process, see `Batches.close`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """Endless full batches of one rank, made by `workers` processes (0: in this one). The file's head has the order.

    dataset: a TarData. `bad` and `seen` count this rank's share of the first pass over it: a broken item counts once,
    on one rank. ValueError where more than `max_bad` of them, or of BAD_OF, are broken, and where none can be used.
    group: among how many batches rows are sorted by length; 1: not at all.
    """

    def __init__(self, dataset, batch_size: int, seed=0, rank=0, world_size=1, workers=0, max_bad=0.01, group=1):
        self.dataset, self.batch_size, self.seed, self.max_bad = dataset, batch_size, seed, max_bad
        self.group = group
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.size, self.digest = len(dataset), dataset.digest()
        self.bad, self.seen, self.loaded = Counter(), 0, None
        self.go_to({"epoch": 0, "position": 0})

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        if self.loaded is None:
            options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_initialized()}
            options["worker_init_fn"] = outlive_signals
            self.loaded = iter(DataLoader(**self.source(), batch_size=None, **options))
        batch = next(self.loaded)
        batch["bad"] = Counter(batch["bad"])
        self.bad.update(batch["bad"])
        self.seen += batch.pop("seen")
        error, broken = batch.get("error"), sum(self.bad.values())
        if error is None and broken > self.max_bad * max(self.seen, BAD_OF):
            what = f"{broken:,} of {self.seen:,} samples are broken, over --max-bad {self.max_bad:g}"
            error = f"{what}: {describe(self.bad)}"
        if error:
            self.close()
            raise ValueError(error)
        self.advance(batch.pop("cursor"))
        return batch

    def close(self) -> None:
        """End the workers. The next batch, if one is asked for, starts new ones where this one stopped."""
        workers, self.loaded = getattr(self.loaded, "_workers", []), None  # torch asks them to end, and waits 5 s
        for worker in workers:
            worker.kill()  # one that waits for a server, maybe in vain

    def state_dict(self) -> dict:
        """Where to go on after the last batch handed out, whatever the workers have prefetched: plain values.

        "epoch" and "position" are the same on all ranks, "bad" and "seen" are this rank's. Sum these two over the ranks
        before saving: in loading, rank 0 takes them over and the others start from zero.
        """
        same = {"seed": self.seed, "size": self.size, "digest": self.digest}
        return {**same, **self.place(), "bad": dict(self.bad), "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly there; workers may be others, and without groups batch_size and world_size too.

        ValueError for other data or seed.
        """
        for name, ours in (("seed", self.seed), ("size", self.size), ("digest", self.digest)):
            if state.get(name, ours) != ours:
                raise ValueError(f"cannot resume: the checkpoint's data has {name} {state[name]}, this run's {ours}")
        self.close()
        self.bad = Counter(state["bad"] if self.rank == 0 else {})
        self.seen = state["seen"] if self.rank == 0 else 0
        self.go_to(state)

    def dataset_size(self) -> int | None:
        """The number of pairs, None where tars are streamed."""
        return self.size

    def go_to(self, state: dict) -> None:
        self.position = state["epoch"] * self.size + state["position"]

    def place(self) -> dict:
        return {"epoch": self.position // self.size, "position": self.position % self.size}

    def advance(self, cursor: object) -> None:
        self.position += self.batch_size * self.world_size

    def source(self) -> dict:
        """The DataLoader's dataset, whose items are whole batches, and its sampler."""
        return {"dataset": WholeBatches(self.dataset, self.seed), "sampler": self.places()}

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's share of step after step: (position, item) of each sample."""
        step, at = self.batch_size * self.world_size, self.position
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            first = at if self.group == 1 else at - at % (self.group * step)
            steps = self.steps(first, step)
            yield from (places[own] for places in steps[(at - first) // step :])
            at = first + self.group * step

    def steps(self, first: int, size: int) -> list[list[tuple[int, int]]]:
        """The places of the `group` steps from position `first` on."""
        numbers = [(p, *divmod(p, self.size)) for p in range(first, first + self.group * size)]
        places = [(p, int(epoch_order(self.size, self.seed, epoch)[k])) for p, epoch, k in numbers]
        if self.group == 1:
            return [places]
        draws = (self.dataset.draw(random_bits(1, self.seed, position)) for position, _ in places)
        lengths = [self.dataset.length(item, draw) for (_, item), draw in zip(places, draws, strict=True)]
        rows = np.argsort(lengths, kind="stable").reshape(self.group, size)
        shuffled = np.argsort(random_bits(3, self.seed, first).random_raw(self.group), kind="stable")
        return [[places[k] for k in rows[row]] for row in shuffled]


# ---- what the commands use


def open_batches(
    data: list[str], transform: Callable, batch_size: int, features: Features = NONE, **options
) -> Batches:
    """What the user named (see `tars.expand`) -> its batches. features: what `find_features` finds in these tars;
    `options` are those of `Batches`."""
    tars = expand(data)
    remote = [tar for tar in tars if is_url(tar)]
    if not remote:
        return Batches(PairData(tars, transform, features), batch_size, **options)
    if len(remote) < len(tars):
        raise ValueError(f"{remote[0]} is streamed, {(set(tars) - set(remote)).pop()} is not: give only one of the two")
    from tars.streams import StreamBatches, StreamPairs  # which imports this file

    return StreamBatches(StreamPairs(tars, transform), batch_size, **options)
