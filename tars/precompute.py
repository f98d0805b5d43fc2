"""What training would compute from each picture and caption in every epoch, computed once and stored in tars.

    python -m tars precompute cc3m-train-*.tar --weights weights --out precomputed
    python train_uas.py --weights weights --data precomputed --out runs/cc3m

    source                           computed                                           kept of the source
    picture of a pair                moments (2, C, h, w) of its latents, by the VAE    its caption, cleaned
    caption                          encoding (S, Dc), by the text encoder
    picture of a story or dialogue   moments; queries (Q, D), by the image encoder      its JSON

Everything is stored in 16 bit, or as --store says. A sample is a function of the source, the weights and the dtypes
alone, and the samples keep the source's order; those that cannot be used are left out and counted. A tar that is whole
and was made of the same source with the same options is kept: a stopped command goes on. What trains, and what is
random (dropped pictures, the noise of the latents and of the diffusion), stays as it was: the losses are those of the
source but for the rounding. precomputed.py has the format.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from common.cli import make_folder
from common.files import fingerprint
from common.images import preprocess_output
from minigpt5 import encode_captions
from published.clip_tokenizer import ClipTokenizer
from published.parts import frozen_dtypes, load_image_encoder, load_text_encoder, load_vae, picture_size
from qformer import preprocess_input
from tars.batches import PairData, Reader, TarData, decode
from tars.index import Member, expand, read_index
from tars.precomputed import MARKER, Precomputed, identity, marker_bytes, read_marker
from tars.stories import read_turns
from tars.writer import Sample, write_samples

STORE = {"fp16": torch.float16, "fp32": torch.float32}


class WholeStories(TarData):
    """The stories and dialogues of a tar, each whole: {"key", "json", "numbers" of its n pictures, "inputs" and
    "outputs" (n, 3, H, W) if there are any}."""

    def __init__(self, tar: str, to_input: Callable, to_output: Callable):
        super().__init__([tar])
        self.to_input, self.to_output = to_input, to_output

    def read_item(self, key: str, read: Reader, kind: int, item: int, choice: None) -> dict:
        content, pixels = read(Member.JSON), {}
        _, turns = read_turns(content, key, str)
        members = sorted({member for turn in turns for member in turn.pictures})
        images = [decode(read(member)) for member in members]
        if images:  # Unlike torch.stack, default_collate puts what a worker makes into shared memory: `split_broken`.
            pixels["inputs"] = default_collate(list(map(self.to_input, images)))
            pixels["outputs"] = default_collate(list(map(self.to_output, images)))
        return {"key": key, "json": content, "numbers": [member - Member.NUMBERED for member in members], **pixels}


class Encoders:
    """The frozen parts that a kind of tar needs, and what they make of pictures and captions."""

    def __init__(self, stories: bool, captions: bool, weights: Path, dtype: torch.dtype | None, store: str, device):
        language, painting = frozen_dtypes(weights, dtype, device)
        sd = weights / "stable-diffusion"
        self.device, self.store, self.size = device, STORE[store], picture_size(weights)
        self.vae = load_vae(sd / "vae", painting, device)
        latent = (self.vae.config.latent_channels, *[self.size // self.vae.config.downsampling] * 2)
        shapes, empty_caption = {"moments": (2, *latent)}, None
        if stories:
            self.image_encoder = load_image_encoder(weights, language, device)
            queries, width = self.image_encoder.query_tokens.shape[1], self.image_encoder.llama_proj.out_features
            shapes["queries"] = queries, width
        elif captions:
            self.text_encoder = load_text_encoder(sd / "text_encoder", language, device)
            self.tokenizer = ClipTokenizer(sd / "tokenizer")
            empty_caption = self.encodings([""])
            shapes["encoding"] = tuple(empty_caption.shape[1:])
        made_with = {name: identity(weights, name) for name in shapes}
        types = f"{store} of {language}, {painting}"
        self.precomputed = Precomputed(made_with, shapes, types, empty_caption=empty_caption)

    def stored(self, x: Tensor) -> Tensor:
        """A tensor as the tar holds it. ValueError where 16 bit cannot hold it."""
        x = x.to("cpu", self.store).contiguous()
        if not x.isfinite().all():
            raise ValueError("a number is too large for 16 bit, or not finite; --store fp32 holds large ones")
        return x

    def moments(self, pictures: Tensor) -> Tensor:
        """uint8 (M, 3, H, W) -> (M, 2, C, h, w)."""
        return self.stored(torch.stack(self.vae.encode(pictures.to(self.device)), 1))

    def queries(self, pixels: Tensor) -> Tensor:
        """(P, 3, H, W), normalised -> (P, Q, D)."""
        return self.stored(self.image_encoder(pixels.to(self.device)))

    def encodings(self, captions: list[str]) -> Tensor:
        """B captions -> (B, S, Dc)."""
        return self.stored(encode_captions(self.text_encoder, self.tokenizer, captions))


def split_broken(pairs: PairData, samples: list[dict | str]) -> tuple[list[str], dict | None]:
    """Why some of the samples are broken, and a batch of the others. A worker's `collate` puts its tensors into shared
    memory: where there is too little of it, the error is raised here and reaches the main process. In the thread of the
    worker's queue it would leave the main process waiting for ever."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    return [sample for sample in samples if isinstance(sample, str)], pairs.collate(good) if good else None


def pair_samples(encoders: Encoders, tar: str, batch_size: int, workers: int) -> Iterator[Sample | str]:
    pairs = PairData([tar], partial(preprocess_output, size=encoders.size))
    for broken, batch in DataLoader(pairs, batch_size, num_workers=workers, collate_fn=partial(split_broken, pairs)):
        yield from broken
        if batch is None:
            continue
        tensors = {"moments": encoders.moments(batch["pixels"])}
        if "encoding" in encoders.precomputed.shapes:
            tensors["encoding"] = encoders.encodings(batch["captions"])
        for i, (key, caption) in enumerate(zip(batch["keys"], batch["captions"], strict=True)):
            content = safetensors.torch.save({name: tensor[i].clone() for name, tensor in tensors.items()})
            yield Sample([(f"{key}.txt", caption.encode()), (f"{key}.safetensors", content)], {"pairs": 1})


def story_samples(encoders: Encoders, tar: str, batch_size: int, workers: int) -> Iterator[Sample | str]:
    side = encoders.image_encoder.vision_model.config.image_size
    stories = WholeStories(tar, partial(preprocess_input, size=side), partial(preprocess_output, size=encoders.size))
    for story in DataLoader(stories, batch_size=None, num_workers=workers):
        if isinstance(story, str):
            yield story
            continue
        tensors, numbers, key = {}, story["numbers"], story["key"]
        if numbers:
            queries = torch.cat([encoders.queries(part) for part in story["inputs"].split(batch_size)])
            moments = torch.cat([encoders.moments(part) for part in story["outputs"].split(batch_size)])
            tensors |= {f"{k}.queries": tensor.clone() for k, tensor in zip(numbers, queries, strict=True)}
            tensors |= {f"{k}.moments": tensor.clone() for k, tensor in zip(numbers, moments, strict=True)}
        members = [(f"{key}.json", story["json"]), (f"{key}.safetensors", safetensors.torch.save(tensors))]
        yield Sample(members, {"stories and dialogues": 1, "pictures": len(numbers)})


def is_made(out: Path, precomputed: Precomputed) -> bool:
    """Whether a tar is there already and whole, of the same source, weights and options."""
    with suppress(ValueError, OSError):  # it is no tar, or one whose marker cannot be read
        return read_marker(str(out))[:4] == precomputed[:4] and bool(read_index(str(out)))  # a fifth follows from these
    return False


def precompute(sources: list[str], out: Path, batch_size: int, workers: int, **options) -> None:
    """Precompute each tar that the user named (see `tars.index.expand`) into `out`, a folder if there are several, and
    print a report of each. `options` are those of `Encoders`."""
    tars = expand(sources)
    folder = make_folder(out) if len(tars) > 1 or out.is_dir() else None
    if folder and len({Path(tar).name for tar in tars}) < len(tars):
        raise ValueError(f"--out {out}: two sources have the same name, give each a folder of its own")
    load_encoders = lru_cache(maxsize=1)(partial(Encoders, **options))  # tars of a kind follow one another
    for tar in tars:
        made, index = folder / Path(tar).name if folder else out, read_index(tar)
        if made.exists() and made.samefile(tar):
            raise ValueError(f"--out {made} is the source")
        stories = bool(index.turns.any())
        encoders = load_encoders(stories)
        precomputed = encoders.precomputed._replace(made_of=fingerprint([tar], os.stat(tar).st_mtime_ns))
        report = "there already, of the same source and weights"
        if not is_made(made, precomputed):
            first = Sample([(MARKER, marker_bytes(precomputed))], {})
            samples = (story_samples if stories else pair_samples)(encoders, tar, batch_size, workers)
            report = write_samples(chain([first], samples), made, 1 + len(index.table))
        print(f"{report}\n{made}: {made.stat().st_size:,} bytes", flush=True)
