"""Tars as training data: captions and pictures for stage 1, the order of training, and its exact resumption.

    data = PairData(expand(["cc3m-train-*.tar"]), partial(images.preprocess_output, size=512))
    batches = Batches(data, batch_size=48)
    batch = next(batches)

    batch["pixels"]        (B, 3, size, size) uint8. Of precomputed tars instead "moments" (B, 2, C, h, w)
                           and perhaps "encoding" (B, S, Dc): see precomputed.py
    batch["captions"]      B strings, cleaned; batch["keys"] beside them
    batch["instructions"]  B times None or the number of a request phrasing, for `prompts.uas_texts`
    batch["bad"]           how many samples are broken, by the reason; counted in the first epoch only

The order is one endless sequence of positions, epoch after epoch, each epoch a permutation of all items; at every step
the ranks take their blocks off its front. With batch_size 2 and world_size 2, ten items:

    position   0 1 2 3   4 5 6 7   8 9 | 10 11   ...      rank 0 gets positions 0 1, then 4 5, then 8 9 ...
    item       7 0 3 9   1 8 2 4   6 5 |  3  8   ...      rank 1 gets positions 2 3, then 6 7, then 10 11 ...

Another item takes the place of a broken one; (seed, position) says which. So every batch is full and is a function of
(seed, position) alone: it is the same for any number of workers, ranks stay in step, and one number is enough to
resume, even with another number of ranks. The price: a good item is seen twice for each broken one.

An item is a pair here, a turn of a story or dialogue in stories.py. The released code also flips pictures at random.
"""

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from common.files import TO_END
from common.images import ImageError, read_image
from common.texts import clean_caption
from prompts import UAS_REQUESTS
from tars.index import MAX_BYTES, Member, TarIndex, Unusable, read_index
from tars.precomputed import NOTHING, Precomputed, read_tensors

MIN_COUNTED = 1000  # max_bad is a share of at least so many samples: two broken pairs of four need not stop a trial
MAX_TRIES = 1000  # broken samples in a row after which the data count as unusable
ORDER, SAMPLE = 0, 1  # purposes of the random streams: an epoch's permutation, all that is random about a sample
Reader = Callable[[int], bytes | None]  # a `Member` of one sample -> its bytes, None where it has none


# ---- random numbers: raw PCG64 output only, which numpy promises to keep from version to version


def random_bits(purpose: int, *place: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([purpose, *place]))


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) of that epoch: int64 (n,), read-only."""
    order = np.argsort(random_bits(ORDER, seed, epoch).random_raw(n), kind="stable")
    order.setflags(write=False)
    return order


# ---- members


def read_member(path: str, row: np.ndarray, member: int) -> bytes | None:
    """The bytes of one member of the sample that is `row` of a table, None where it has none. Raises Unusable.

    Opens the tar each time (some 20 us): open files could run out, and would be shared between forked workers.
    """
    offset, size = (int(x) for x in row[member]) if member < len(row) else (-1, -1)
    if offset < 0 or size < 0:
        return None
    if size > MAX_BYTES[min(member, Member.NUMBERED)]:
        raise Unusable("too large")
    with suppress(OSError), open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
        if len(content) == size:
            return content
    raise Unusable("tar not readable")


def decode(content: bytes | None) -> Image.Image:
    """The bytes of a picture member -> RGB picture. Raises Unusable."""
    if not content:
        raise Unusable("no picture" if content is None else "empty picture")
    try:
        return read_image(content)
    except ImageError as error:
        raise Unusable(error.reason) from None


def read_caption(read: Reader) -> str:
    """The caption of KEY.txt, else that in KEY.json, as it is. Raises Unusable."""
    text = read(Member.TEXT)
    try:
        if text is None:
            text = json.loads(read(Member.JSON) or b"{}")["caption"].encode()  # fails at half an emoji, "\\ud83d"
        if len(text) > MAX_BYTES[Member.TEXT]:
            raise Unusable("too large")
        return text.decode("utf-8-sig")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # JSON of another form, or no UTF-8
        raise Unusable("no caption") from None


# ---- items


def describe(bad: dict[str, int]) -> str:
    """Counts by reason in words, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(bad).most_common()) or "none"


class TarData(Dataset):
    """Tars as one list of items. A subclass says what these are:

    count_items(index)                         how many items each sample of a tar has, at least one
    choose(bits)                               what is random about the sample at a position; an item that takes the
                                               place of a broken one keeps it
    read_item(key, read, kind, item, choice)   an item of a sample, which is a PAIR, STORY or DIALOG; raises Unusable
    collate(samples)                           a batch

    Holds no open file, so it may be forked and pickled. ValueError for a tar that cannot be read
    whole, and where there is no item at all. With several ranks on a machine let one build it first: the others
    then find the cached indices.
    """

    def __init__(self, tars: list[str]):
        self.tars = list(tars)
        self.indices = [read_index(tar) for tar in tqdm(self.tars, "index", leave=False, delay=2, unit="tar")]
        self.first_samples = np.cumsum([0, *(len(index.table) for index in self.indices)])  # of each tar, then the end
        self.first_items = np.cumsum(np.concatenate([[0], *map(self.count_items, self.indices)]))  # of each sample
        self.name = self.tars[0] + (f" and {len(self.tars) - 1} more" if len(self.tars) > 1 else "")
        if not len(self):
            raise ValueError(f"{self.name}: no picture, caption or JSON in it")

    def __len__(self) -> int:
        return int(self.first_items[-1])

    def __getitem__(self, i: int) -> dict | str:
        return self.sample(i, None)

    def identity(self) -> dict[str, str]:
        """Hashes by which a resumed run recognises its data: of the samples' keys in their order and, since other data
        may have the same keys, of the samples' sizes and of some bytes of each tar."""
        keys, contents = hashlib.sha256(), hashlib.sha256()
        for index in self.indices:
            keys.update(b"".join([*index.keys, b"\n"]))
            contents.update(index.stamp[[1, 3]].tobytes() + index.table.tobytes())
        return {"digest": keys.hexdigest()[:16], "contents": contents.hexdigest()[:16]}

    def count_items(self, index: TarIndex) -> np.ndarray:
        return np.ones(len(index.table), np.int64)

    def sample(self, i: int, choice: object) -> dict | str:
        """Item i as a sample; for a broken one a short reason to count it under, never an exception."""
        sample = int(np.searchsorted(self.first_items, i, side="right")) - 1
        tar = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        index, row, item = self.indices[tar], sample - int(self.first_samples[tar]), i - int(self.first_items[sample])
        key, read = index.key(row), partial(read_member, self.tars[tar], index.table[row])
        try:
            return self.read_item(key, read, index.kinds[row], item, choice)
        except Unusable as error:
            return str(error)


class PairData(TarData):
    """Pairs as samples {"key", "caption", "pixels", "instruction"}.

    transform: RGB picture -> tensor, as images.preprocess_output. precomputed: tensors that take the place of "pixels".
    """

    def __init__(self, tars: list[str], transform: Callable, precomputed: Precomputed = NOTHING):
        super().__init__(tars)
        self.transform, self.precomputed = transform, precomputed

    def choose(self, bits: np.random.PCG64) -> int | None:
        """One sample in 100 becomes an instruction, in one of the phrasings."""
        chosen, phrase = bits.random_raw() % 100 == 0, bits.random_raw() % len(UAS_REQUESTS)
        return phrase if chosen else None

    def read_item(self, key: str, read: Reader, kind: int, item: int, choice: int | None) -> dict:
        if self.precomputed.shapes:
            tensors = read_tensors(read(Member.TENSORS), self.precomputed, self.precomputed.shapes)
        else:
            tensors = {"pixels": self.transform(decode(read(Member.PICTURE)))}
        caption = clean_caption(read_caption(read))
        if not caption:
            raise Unusable("empty caption")
        return {"key": key, "caption": caption, "instruction": choice, **tensors}

    def collate(self, samples: list[dict]) -> dict:
        """default_collate stacks in the memory that a worker shares with the main process: no second copy."""
        names = [name for name in ("pixels", "moments", "encoding") if name in samples[0]]
        return {
            "captions": [sample["caption"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "instructions": [sample["instruction"] for sample in samples],
            **{name: default_collate([sample[name] for sample in samples]) for name in names},
        }


# ---- batches


def ignore_signals(worker: int) -> None:
    """A signal to stop may reach all processes of a run, and more than once: from a terminal, from a scheduler, and
    from torchrun, which passes it on. The main process decides when its workers end, see `Batches.close`."""
    for number in (*TO_END, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Batches(Dataset):
    """Endless full batches of one rank, made by `workers` processes (0: in this one), in the order above.

    `bad` and `seen` count this rank's share of the first epoch: a broken item counts once, on one rank. ValueError
    where no item can be used, and where more are broken than `max_bad` times those seen, or times MIN_COUNTED while
    fewer are seen.
    """

    def __init__(self, dataset: TarData, batch_size: int, seed=0, rank=0, world_size=1, workers=0, max_bad=0.01):
        self.dataset, self.size = dataset, len(dataset)
        self.batch_size, self.seed, self.max_bad = batch_size, seed, max_bad
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.data = {"seed": seed, "size": self.size, **dataset.identity()}
        self.position, self.bad, self.seen = 0, Counter(), 0
        self.loader = None  # the running DataLoader's iterator

    def __next__(self) -> dict:
        if self.loader is None:
            options = {"num_workers": self.workers, "worker_init_fn": ignore_signals}
            options["pin_memory"] = torch.cuda.is_initialized()
            self.loader = iter(DataLoader(self, batch_size=None, sampler=self.places(), **options))
        batch = next(self.loader)
        self.bad.update(batch["bad"])
        self.seen += batch.pop("seen")
        error, broken = batch.get("error"), sum(self.bad.values())
        if error is None and broken > self.max_bad * max(self.seen, MIN_COUNTED):
            what = f"{broken:,} of {self.seen:,} samples are broken, over --max-bad {self.max_bad:g}"
            error = f"{what}: {describe(self.bad)}"
        if error:
            self.close()
            raise ValueError(error)
        self.position += self.batch_size * self.world_size
        return batch

    def __getitem__(self, places: list[tuple[int, int]]) -> dict:
        """The batch that a worker makes of these (position, item). "bad" and "seen" are counted in the first epoch
        only; "error" is there in place of samples where none can be used."""
        data, samples, bad, seen = self.dataset, [], Counter(), 0
        for position, item in places:
            bits, tried = random_bits(SAMPLE, self.seed, position), Counter()
            choice = data.choose(bits)
            sample = data.sample(item, choice)
            if position < self.size:
                seen += 1
                bad.update([sample] if isinstance(sample, str) else [])
            while isinstance(sample, str):
                tried[sample] += 1
                if tried.total() > MAX_TRIES:
                    error = f"no usable sample in {data.name}: {describe(tried)}"
                    return {"error": error, "bad": dict(bad), "seen": seen}
                sample = data.sample(bits.random_raw() % self.size, choice)
            samples.append(sample)
        # pinning calls update() on a mapping, which would double the counts of a Counter
        return {**data.collate(samples), "bad": dict(bad), "seen": seen}

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's share of step after step: (position, item) of each sample."""
        n, first = self.size, self.position + self.rank * self.batch_size
        while True:
            epochs = [(p, *divmod(p, n)) for p in range(first, first + self.batch_size)]
            yield [(p, int(epoch_order(n, self.seed, epoch)[i])) for p, epoch, i in epochs]
            first += self.batch_size * self.world_size

    def close(self) -> None:
        """End the workers. The next batch, if one is asked for, starts new ones where this one stopped."""
        workers, self.loader = getattr(self.loader, "_workers", []), None  # torch itself would wait 5 s for them
        for worker in workers:
            worker.kill()
        with suppress(RuntimeError):  # torch raises one for a killed worker while an error holds the loader
            for worker in workers:
                worker.join(1)

    def state_dict(self) -> dict:
        """Where to go on after the last batch handed out, whatever the workers have prefetched: plain values.

        "epoch" and "position" are the same on all ranks, "bad" and "seen" are this rank's. Sum these two over the ranks
        before saving: in loading, rank 0 takes them over and the others start from zero.
        """
        epoch, position = divmod(self.position, self.size)
        return {**self.data, "epoch": epoch, "position": position, "bad": dict(self.bad), "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly there; workers, batch_size and world_size may differ. ValueError for other data or seed."""
        for name, ours in self.data.items():
            if state.get(name, ours) != ours:
                raise ValueError(f"cannot resume: the checkpoint's data has {name} {state[name]}, this run's {ours}")
        self.close()
        self.bad = Counter(state["bad"] if self.rank == 0 else {})
        self.seen = state["seen"] if self.rank == 0 else 0
        self.position = state["epoch"] * self.size + state["position"]
