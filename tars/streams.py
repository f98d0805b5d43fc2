"""Caption-picture tars behind http(s) into batches for stage 1: read in order, shuffled through a buffer.

    url 0 --> its samples in order --+
    url 1 --> ...                    +--> buffer of 1000 --> a full batch --> batch["pixels"] and so on, as in data.py

Where tars lie on a disk, data.py reads them at random instead, with the same batches for any number of workers. Tars of
precomputed features are read there alone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from torch.utils.data import IterableDataset, get_worker_info

from tars.index import StreamRefused, shuffled, stream_tars, streamed
from tars.pairs import (
    TRIES,
    Batches,
    Broken,
    collate,
    describe,
    draw_instruction,
    epoch_order,
    make_sample,
    random_bits,
    tally,
)


class StreamPairs:
    """Tars behind http(s) as endless batches, for `StreamBatches`. len() is the number of tars.

    The row of positions holds tars here, epoch after epoch in shuffled order; they are dealt in turn to slots, one slot
    per rank and worker. Each slot shuffles its samples through a buffer that is emptied between two epochs.
    """

    def __init__(self, urls: list[str], transform: Callable, buffer: int = 1000):
        self.urls, self.transform, self.buffer, self.notes = list(urls), transform, buffer, []

    def __len__(self) -> int:
        return len(self.urls)

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.urls).encode()).hexdigest()[:16]

    def url(self, seed: int, tar: int) -> str:
        epoch, place = divmod(tar, len(self))
        return self.urls[epoch_order(len(self), seed, epoch)[place]]

    def batches(self, batch_size: int, seed: int, slots: int, slot: int, tar: int, byte: int) -> Iterator[dict]:
        """Endless full batches of one slot; the cursor of each is (slot, tar position, byte) that reading has come to.

        Ends with an {"error": ...} in place of a batch, as an exception would lose its one line in a worker.
        """
        cursor, usable, barren, chosen, bad, seen = [tar, byte], tar, Counter(), [], Counter(), 0
        raw = stream_tars(partial(self.url, seed), tar, byte, slots)
        items = shuffled(raw, random_bits(2, seed, tar, byte), self.buffer, len(self), cursor)
        try:
            for tar, end, key, parts in items:
                sample = make_sample(key, partial(streamed, parts), self.transform)
                seen += tar < len(self)
                if isinstance(sample, Broken):
                    bad.update([sample.reason] if tar < len(self) or sample.reason == "stream cut" else [])
                    barren.update([sample.reason])
                    if sum(barren.values()) > TRIES or tar > usable + 2 * len(self) + slots:  # two shuffled epochs
                        raise ValueError(f"no usable pair in {self.url(seed, tar)}: {describe(barren)}")
                    continue
                chosen.append({**sample, "instruction": draw_instruction(random_bits(1, seed, tar, end))})
                usable, barren = tar, Counter()
                if len(chosen) == batch_size:
                    yield {**collate(chosen), **tally(bad, seen, (slot, *cursor))}
                    chosen, bad, seen = [], Counter(), 0
        except (ValueError, StreamRefused) as error:
            yield {"error": str(error), **tally(bad, seen)}


class StreamSource(IterableDataset):
    """What a worker runs: the batches of its own slot."""

    def __init__(self, batches: Callable, starts: list[tuple[int, int, int]]):
        self.batches, self.starts = batches, starts

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        return self.batches(*self.starts[worker.id if worker else 0])


class StreamBatches(Batches):
    """`Batches` of a StreamPairs; here the batches do depend on the number of ranks and workers.

    To resume means: each slot opens the tar that it was reading at the first sample not yet read. Nothing is repeated;
    what lay in shuffle buffers and in unfinished batches is passed over. With another number of slots, or in a rank
    whose own state was not saved, the tars from the earliest unfinished one on are read from their fronts.
    """

    def dataset_size(self) -> None:
        return None

    def go_to(self, state: dict) -> None:
        workers, first = max(self.workers, 1), state["epoch"] * self.size + state["position"]
        self.slots = self.world_size * workers
        known = state["cursors"] if state.get("slots") == self.slots else []
        own = range(self.rank * workers, (self.rank + 1) * workers)
        self.cursors = {slot: (first + (slot - first) % self.slots, 0) for slot in own}
        self.cursors |= {slot: (tar, byte) for slot, tar, byte in known if slot in self.cursors}

    def place(self) -> dict:
        epoch, position = divmod(min(tar for tar, _ in self.cursors.values()), self.size)
        cursors = [[slot, *cursor] for slot, cursor in self.cursors.items()]
        return {"epoch": epoch, "position": position, "slots": self.slots, "cursors": cursors}

    def advance(self, cursor: tuple[int, int, int]) -> None:
        self.cursors[cursor[0]] = cursor[1:]

    def source(self) -> dict:
        batches, starts = self.dataset.batches, [(slot, *cursor) for slot, cursor in self.cursors.items()]
        return {"dataset": StreamSource(partial(batches, self.batch_size, self.seed, self.slots), starts)}
