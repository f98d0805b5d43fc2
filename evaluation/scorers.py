"""The networks whose features of pictures or texts `metrics.py` compares.

    network     its weights, by path                       library                 sees n pictures as  reads n texts as
    inception   weights-inception-2015-12-05-6726825d.pth  torch-fidelity          (n, 2048) (n, 1008)
    clip        folder of openai/clip-vit-large-patch14    transformers            (n, D)              (n, D)
    hps         HPS_v2_compressed.pt                       open_clip, ViT-H-14     (n, D)              (n, D)
    sbert       folder of all-MiniLM-L6-v2                 sentence-transformers                       (n, D)
    meteor      nltk_data folder with corpora/wordnet      nltk                                        compares words
    judge       miniature/judge.py                         none                    (n, 128) (n, 72)
    pairing     miniature/pairing.py                       none                    (n, 128)            (n, 128)

The released code takes CLIP ViT-L/14, for MM-Relevance ViT-B/32. The libraries are those of `pip install -e '.[eval]'`.
Nothing is downloaded: weights that are not at the given path raise `Unavailable`, whose message is the reason.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.images import resize_and_crop, to_tensor
from miniature.judge import WHOLE_SIZES, load_judge, read
from miniature.pairing import Pairing
from published.loading import load

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before the libraries are imported

SIDE = 256  # pixels of a side of the pictures that Inception gets, as in the released code; it resizes them to 299
JUDGED_SIDE = 64


class Unavailable(ValueError):
    """A metric that cannot be computed. The only argument is the reason, on one line."""


def pixels_of(pictures: list[Image.Image], side: int) -> Tensor:
    """(n, 3, side, side) in [0, 1]: the short side to `side`, then the middle."""
    return torch.stack([to_tensor(resize_and_crop(picture, side, pad=False)) for picture in pictures])


class Inception:
    """FID's Inception v3 with TensorFlow's weights: pooled features, and class probabilities without the bias."""

    def __init__(self, path: Path, device: torch.device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

        names = ["2048", "logits_unbiased"]
        self.net = Extractor("inception-v3-compat", names, feature_extractor_weights_path=str(path)).to(device)
        self.device = device

    def pictures(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        pixels = (255 * pixels_of(pictures, SIDE)).round().to(torch.uint8)
        features, logits = self.net(pixels.to(self.device))
        return {"inception": features.cpu(), "inception classes": logits.softmax(-1).cpu()}


class Clip:
    """A CLIP of transformers: pictures and texts in one space."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.net = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self.device = device

    def pictures(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return {"clip": self.net.get_image_features(pixels.to(self.device)).cpu()}

    def texts(self, texts: list[str]) -> Tensor:
        longest = self.net.config.text_config.max_position_embeddings
        ids = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return self.net.get_text_features(**ids.to(self.device)).cpu()


class PreferenceClip:
    """HPS v2: a CLIP that was tuned on people's choices; the score of a picture is its cosine with the prompt."""

    def __init__(self, path: Path, device: torch.device):
        import open_clip

        self.net, _, self.processor = open_clip.create_model_and_transforms("ViT-H-14", image_resize_mode="longest")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.net.load_state_dict(state.get("state_dict", state))
        self.net.to(device).eval()
        self.tokenizer, self.device = open_clip.get_tokenizer("ViT-H-14"), device

    def pictures(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        pixels = torch.stack([self.processor(picture) for picture in pictures])
        return {"hps": self.net.encode_image(pixels.to(self.device)).cpu()}

    def texts(self, texts: list[str]) -> Tensor:
        return self.net.encode_text(self.tokenizer(texts).to(self.device)).cpu()


class SentenceBert:
    """A model of sentence-transformers. The library imports the classes that modules.json names, also from files of the
    folder, so that only those of S-BERT are let through."""

    classes = re.compile(r"sentence_transformers\.(\w+\.)*(Transformer|Pooling|Normalize)")

    def __init__(self, folder: Path, device: torch.device):
        from sentence_transformers import SentenceTransformer

        modules = folder / "modules.json"
        for module in json.loads(modules.read_text(encoding="utf-8")):
            if not self.classes.fullmatch(module["type"]):
                raise Unavailable(f"{modules}: module type {module['type']!r:.80} is not supported")
        self.net = SentenceTransformer(str(folder), device=str(device), local_files_only=True)

    def texts(self, texts: list[str]) -> Tensor:
        return self.net.encode(texts, convert_to_tensor=True, show_progress_bar=False).cpu()


class Meteor:
    """nltk's METEOR: matches of words, of their stems and of WordNet's synonyms."""

    def __init__(self, folder: Path, device: torch.device):
        import nltk
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        nltk.data.path[:] = [str(folder)]
        try:
            wordnet.ensure_loaded()
        except LookupError:  # whose message has twenty lines
            raise Unavailable(f"{folder}: no corpora/wordnet in it") from None
        self.score, self.wordnet = single_meteor_score, wordnet

    def compare(self, answer: list[str], reference: list[str]) -> float:
        return self.score(reference, answer, wordnet=self.wordnet)


class WorldJudge:
    """The miniature's judge: features averaged over the picture, the joint probabilities of scene, time and number of
    things, and the facts that it reads. Its pictures have 64 pixels a side; others are resized."""

    def __init__(self, path: Path, device: torch.device):
        self.net, self.device = load_judge(path, device), device

    def pictures(self, pictures: list[Image.Image]) -> dict[str, Tensor | list]:
        pixels = (2 * pixels_of(pictures, JUDGED_SIDE) - 1).to(self.device)
        scene, time, number = (s.softmax(-1) for s in self.net(pixels)[1].split(WHOLE_SIZES, -1))
        return {
            "judge": self.net.features(pixels).mean((2, 3)).cpu(),
            "judge classes": torch.einsum("ns,nt,nc->nstc", scene, time, number).flatten(1).cpu(),
            "facts": read(self.net, pixels),
        }


class WorldPairing:
    """The miniature's pictures and texts in one space."""

    def __init__(self, path: Path, device: torch.device):
        self.net, self.device = load(Pairing, [path], dtype=torch.float32, device=device), device

    def pictures(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        pixels = 2 * pixels_of(pictures, JUDGED_SIDE) - 1
        return {"pairing": self.net.embed_pixels(pixels.to(self.device)).cpu()}

    def texts(self, texts: list[str]) -> Tensor:
        return self.net.embed_texts(texts).cpu()


OPENERS: dict[str, Callable] = {
    "inception": Inception,
    "clip": Clip,
    "hps": PreferenceClip,
    "sbert": SentenceBert,
    "meteor": Meteor,
    "judge": WorldJudge,
    "pairing": WorldPairing,
}


def open_network(name: str, path: Path | None, device: torch.device):
    """The network `name` with the weights at `path`. Raises Unavailable for any error of its library, too."""
    if path is None:
        raise Unavailable(f"--{name} is not given")
    if not path.exists():
        raise Unavailable(f"{name}: {path}: no such file or folder")
    try:
        return OPENERS[name](path, device)
    except ImportError as error:
        raise Unavailable(f"{error.name or error} is not installed: pip install -e '.[eval]'") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"{name}: {path}: {reason[0]}") from None


@torch.inference_mode()
def network_outputs(networks: dict, pictures: list[Image.Image]) -> list[dict]:
    """For each picture the outputs of all networks that see pictures: {"clip": (D,), "facts": ..., ...}."""
    outputs = {}
    for network in networks.values():
        if pictures and hasattr(network, "pictures"):
            outputs |= network.pictures(pictures)
    return [{name: values[i] for name, values in outputs.items()} for i in range(len(pictures))]
