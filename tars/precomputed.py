"""Precomputed tensors: what frozen parts make of pictures and captions, in tars that training reads in their place.

`python -m tars precompute` (precompute.py) writes such tars. KEY.safetensors beside a sample's texts holds

    of a pair                  moments (2, C, h, w)         mean and log variance of the latents: sampling stays random
                               encoding (S, Dc)             of the caption, at all positions: L_CAP compares all
    of a story or dialogue     k.moments, k.queries (Q, D)  of its picture k as an output and as an input

and the tar's first member, which no reader takes for a sample, says with which weights, in which dtypes and of which
tar these were made. Training refuses tensors of other weights, and a mixture. C channels, h w latent height and width,
S conditioning tokens, Q query embeddings, Dc and D their widths.
"""

import json
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from common.files import fingerprint
from published.loading import tensor_files
from published.parts import picture_size
from tars.index import MAX_BYTES, Header, Member, Unusable

MARKER = ".precomputed.safetensors"  # name of the first member


class Precomputed(NamedTuple):
    """Which tensors the samples of a tar have, by name: what its first member says."""

    made_with: dict[str, str]  # the identity of the weights
    shapes: dict[str, tuple[int, ...]]
    types: str = ""  # the dtypes that are stored, and those that they were computed in
    made_of: str = ""  # the fingerprint of the source
    empty_caption: Tensor | None = None  # (1, S, Dc)


NOTHING = Precomputed({}, {})


def identity(weights: Path, name: str) -> str:
    """The fingerprint of all files that the tensors "moments", "encoding" or "queries" depend on."""
    sd, blip2 = weights / "stable-diffusion", weights / "blip2"
    if name == "moments":
        return fingerprint([sd / "vae" / "config.json", *tensor_files(sd / "vae")], picture_size(weights))
    if name == "encoding":
        names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        words = [path for file in names if (path := sd / "tokenizer" / file).exists()]
        return fingerprint([sd / "text_encoder" / "config.json", *tensor_files(sd / "text_encoder"), *words])
    tensors = tensor_files(blip2, ("vision_model.", "qformer.", "query_tokens"))
    return fingerprint([blip2 / "config.json", *tensors, weights / "minigpt4" / "llama_proj.safetensors"])


def marker_bytes(precomputed: Precomputed) -> bytes:
    empty_caption = precomputed.empty_caption
    tensors = {} if empty_caption is None else {"empty_caption": empty_caption.contiguous()}
    metadata = {name: json.dumps(value) for name, value in precomputed._asdict().items() if name != "empty_caption"}
    return safetensors.torch.save(tensors, metadata)


def read_marker(path: str) -> Precomputed:
    """NOTHING where the tar holds no precomputed tensors. ValueError for a marker that cannot be read."""
    content = None
    with suppress(Exception), tarfile.open(path, "r:", tarinfo=Header) as tar:  # its index says what is wrong
        header = tar.next()
        if header.name == MARKER and header.isreg():
            content = tar.extractfile(header).read() if header.size <= MAX_BYTES[Member.TENSORS] else b""
    if content is None:
        return NOTHING
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        made_with, shapes, types, made_of = (json.loads(metadata[name]) for name in Precomputed._fields[:4])
        if "moments" not in made_with or made_with.keys() != shapes.keys():
            raise ValueError
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        return Precomputed(made_with, shapes, types, made_of, tensors.get("empty_caption"))
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: {MARKER} cannot be read, precompute this tar again") from None


def find_precomputed(tars: list[str], weights: Path) -> Precomputed:
    """What all of the tars hold. ValueError where they differ, and where they were made with other weights."""
    markers = [read_marker(tar) for tar in tars]
    for tar, precomputed in zip(tars, markers, strict=True):
        if precomputed[:3] != markers[0][:3]:  # the rest differs: each tar has a source of its own
            raise ValueError(f"{tars[0]} and {tar}: one is not precomputed, or they differ in weights or options")
    for name, made_with in markers[0].made_with.items():
        if made_with != identity(weights, name):
            raise ValueError(f"{tars[0]}: its {name} were precomputed with other weights or sizes than {weights}")
    return markers[0]


def read_tensors(content: bytes | None, precomputed: Precomputed, names: Iterable[str]) -> dict[str, Tensor]:
    """KEY.safetensors -> its tensors `names`, in 16 bit or float32. Raises Unusable."""
    stored = {}
    with suppress(SafetensorError):
        stored = safetensors.torch.load(content or b"")
    for name in names:
        shape, tensor = precomputed.shapes.get(name.rpartition(".")[2]), stored.get(name)
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            raise Unusable("no tensors, or broken ones")
    return {name: stored[name] for name in names}
