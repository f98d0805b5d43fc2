"""Precomputed features: what frozen parts make of pictures and captions, in tars that training reads in their place.

`python -m tars precompute` (precompute.py) writes such tars. KEY.safetensors beside a sample's words holds

    of a pair                  moments (2, C, h, w)         mean and log variance of the latents: the noise stays free
                               encoding (S, Dc)             of the caption, all positions: L_CAP compares all
    of a story or dialogue     k.moments, k.queries (Q, D)  of its picture k as an output and as an input

and the tar's first member, which no reader takes for a sample, says with which weights, in which number types and of
which tar that was made: training with other weights is refused, and a mixture is. C channels, h w latent height and
width, S conditioning tokens, Dc D widths, Q query embeddings.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from published.loading import tensor_files
from published.parts import picture_size
from tars.index import FEATURES, Unusable, is_url, most_bytes, open_tar

MARKER = ".precomputed.safetensors"  # name of the first member
PAGES = 64  # of a file of weights that are looked at


class Features(NamedTuple):
    """Which features the samples of a tar have, by name: what its first member says."""

    made_with: dict[str, str]  # the identity of the weights
    shapes: dict[str, tuple[int, ...]]
    types: str = ""  # of the numbers that are stored, and of those that they were computed in
    made_of: str = ""  # the source, as it was then
    empty_caption: Tensor | None = None  # (1, S, Dc)

    def __contains__(self, name: str) -> bool:
        return name in self.made_with


NONE = Features({}, {})


# ---- which weights


def fingerprint(files: Iterable[Path], *settings: object) -> str:
    """A short name of files and settings, from the files' sizes and some pages of each: the same for copies, another
    one after any training."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // PAGES)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def identity(weights: Path, feature: str) -> str:
    """Of all files that a feature depends on."""
    sd, blip2 = weights / "stable-diffusion", weights / "blip2"
    if feature == "moments":
        return fingerprint([sd / "vae" / "config.json", *tensor_files(sd / "vae")], picture_size(weights))
    if feature == "encoding":
        names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        words = [path for name in names if (path := sd / "tokenizer" / name).exists()]
        return fingerprint([sd / "text_encoder" / "config.json", *tensor_files(sd / "text_encoder"), *words])
    tensors = tensor_files(blip2, ("vision_model.", "qformer.", "query_tokens"))
    return fingerprint([blip2 / "config.json", *tensors, weights / "minigpt4" / "llama_proj.safetensors"])


# ---- the first member of a tar


def marker_bytes(features: Features) -> bytes:
    tensors = {} if features.empty_caption is None else {"empty_caption": features.empty_caption.contiguous()}
    described = {name: json.dumps(value) for name, value in features._asdict().items() if name != "empty_caption"}
    return safetensors.torch.save(tensors, described)


def read_marker(path: str) -> Features:
    """NONE where nothing is precomputed. ValueError for a marker that cannot be read."""
    try:
        with open(path, "rb") as file, open_tar(file, "r:") as tar:
            member = tar.next()
            if member is None or member.name != MARKER or not member.isreg():
                return NONE
            content = tar.extractfile(member).read() if member.size <= most_bytes(FEATURES) else b""
    except (OSError, tarfile.TarError):  # what is wrong with a tar is told when it is indexed
        return NONE
    try:
        tensors = safetensors.torch.load(content)
        described = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        made_with, shapes, types, made_of = (json.loads(described[name]) for name in Features._fields[:4])
        if "moments" not in made_with or made_with.keys() != shapes.keys():
            raise ValueError
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        return Features(made_with, shapes, types, made_of, tensors.get("empty_caption"))
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: {MARKER} cannot be read, precompute this tar again") from None


def find_features(tars: list[str], weights: Path) -> Features:
    """What is precomputed in all of the tars; streamed ones have pictures. ValueError where the tars differ, and where
    they were made with other weights."""
    found = [NONE if is_url(tar) else read_marker(tar) for tar in tars]
    for tar, features in zip(tars, found, strict=True):
        if features[:3] != found[0][:3]:  # each tar has a source of its own
            raise ValueError(f"{tars[0]} and {tar}: precomputed with different weights or options, or only one of them")
    for name, made_with in found[0].made_with.items():
        if made_with != identity(weights, name):
            raise ValueError(f"{tars[0]}: its {name} were precomputed with other weights than {weights}, or sizes")
    return found[0]


# ---- samples


def read_features(content: bytes | None, features: Features, names: Iterable[str]) -> dict[str, Tensor]:
    """KEY.safetensors -> its tensors `names`, in 16 bit or float32. Raises Unusable."""
    if content is None:
        raise Unusable("no features")
    try:
        stored = safetensors.torch.load(content)
        tensors = {name: stored[name] for name in names}
    except (SafetensorError, KeyError):
        raise Unusable("broken features") from None
    for name, tensor in tensors.items():
        if tensor.shape != features.shapes.get(name.rpartition(".")[2]) or not tensor.is_floating_point():
            raise Unusable("broken features")
    return tensors
