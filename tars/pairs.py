"""Tars of captions and pictures into batches for stage 1 (UAS, section 3.3 of the paper, on CC3M).

    python -m tars cc3m cc3m_val.tsv --out cc3m-val.tar          # datasets.py: the published data sets into tars
    python -m tars precompute cc3m-val.tar --out stored.tar      # precompute.py: frozen parts' tensors for pictures

    batches = open_pairs(["cc3m-train-{0000..0575}.tar"], partial(vae.preprocess_output, size=512), batch_size=48)
    batch = next(batches)

    batch["pixels"]        (B, 3, size, size) uint8. Of precomputed tars instead "moments" (B, 2, C, h, w)
                           and perhaps "encoding" (B, S, Dc): see precomputed.py
    batch["captions"]      B strings, cleaned; batch["keys"] beside them
    batch["instructions"]  B times None or the number of a request phrasing, for `prompts.uas_texts`
    batch["bad"]           Counter of the reasons of broken samples met for the first time

Left out: the released code's random horizontal flip of pictures.
"""

import json
from collections.abc import Callable
from functools import partial

import numpy as np
from torch.utils.data import default_collate

from prompts import UAS_REQUESTS, clean_caption
from tars.batches import Batches, Broken, TarData
from tars.index import Member, TarIndex, Unusable, decode, expand, max_bytes, read_member
from tars.precomputed import NOTHING, Precomputed, read_tensors

TENSORS = ("pixels", "moments", "encoding")  # what is stacked of samples


def read_caption(read: Callable[[int], bytes | None]) -> str:
    """The caption of KEY.txt, else that in KEY.json, as it is. read: member -> bytes or None. Raises Unusable."""
    text = read(Member.TEXT)
    try:
        if text is not None:
            return text.decode("utf-8-sig")
        content = json.loads(read(Member.JSON) or b"{}")
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise Unusable("no caption")
        if len(content["caption"].encode()) > max_bytes(Member.TEXT):  # encode() fails at half an emoji, "\\ud83d"
            raise Unusable("too large")
    except UnicodeError:
        raise Unusable("caption not UTF-8") from None
    except (ValueError, RecursionError):
        raise Unusable("broken JSON") from None
    return content["caption"]


class PairData(TarData):
    """Pairs as samples {"key", "caption", "pixels", "instruction"}.

    transform: RGB picture -> tensor, as vae.preprocess_output. precomputed: tensors that take the place of "pixels".
    """

    unit = "pair"

    def __init__(self, tars: list[str], transform: Callable, precomputed: Precomputed = NOTHING):
        super().__init__(tars)
        self.transform, self.precomputed = transform, precomputed

    def __getitem__(self, i: int) -> dict | Broken:
        return self.sample(i, None)

    def items(self, index: TarIndex) -> int:
        return len(index.table)

    def choose(self, bits: np.random.PCG64) -> int | None:
        """One sample in 100 becomes an instruction, in one of the phrasings."""
        chosen, phrase = bits.random_raw() % 100 == 0, bits.random_raw() % len(UAS_REQUESTS)
        return phrase if chosen else None

    def sample(self, i: int, choice: int | None) -> dict | Broken:
        tar, row = self.place(i)
        index = self.indices[tar]
        key, read = index.key(row), partial(read_member, self.tars[tar], index.table[row])
        try:
            if "moments" in self.precomputed:
                tensors = read_tensors(read(Member.TENSORS), self.precomputed, self.precomputed.made_with)
            else:
                tensors = {"pixels": self.transform(decode(read(Member.PICTURE)))}
            caption = clean_caption(read_caption(read))
            if not caption:
                raise Unusable("empty caption")
        except Unusable as error:
            return Broken(key, str(error))
        except OSError:
            return Broken(key, "tar not readable")
        return {"key": key, "caption": caption, "instruction": choice, **tensors}

    def collate(self, samples: list[dict]) -> dict:
        """default_collate stacks in the memory that a worker shares with the main process: no second copy."""
        return {
            "captions": [sample["caption"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "instructions": [sample["instruction"] for sample in samples],
            **{name: default_collate([sample[name] for sample in samples]) for name in TENSORS if name in samples[0]},
        }


def open_pairs(
    data: list[str], transform: Callable, batch_size: int, precomputed: Precomputed = NOTHING, **options
) -> Batches:
    """What the user named (see `tars.index.expand`) -> its batches. precomputed: what `find_precomputed` finds in these
    tars; `options` are those of `Batches`."""
    return Batches(PairData(expand(data), transform, precomputed), batch_size, **options)
