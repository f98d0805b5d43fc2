"""Stable Diffusion alone, the paper's text-to-image baseline: a text is drawn through the frozen text encoder.

    python baselines/stable_diffusion.py --data held-out.tar --answers sd-pairs                       # zero-shot
    python baselines/train_sd.py --data stories.tar --out runs/sd
    python baselines/stable_diffusion.py --data stories-test.tar --last --context texts --checkpoint runs/sd \\
        --answers sd-stories                                                                          # fine-tuned
    python train_mls.py --data stories.tar --no-uas --words-only --tasks text+image --out runs/teller
    python -m evaluation --data stories-test.tar --task text+image --last --checkpoint runs/teller \\
        --out told.json                                    # two stages: MiniGPT-4, fine-tuned for this step, tells it,
    python baselines/stable_diffusion.py --data stories-test.tar --task text+image --last \\
        --words told-answers --answers two-stages          # Stable Diffusion draws these words; --checkpoint as above
    python -m evaluation --data held-out.tar --answers sd-pairs --out sd-pairs.json

The text of a case (evaluation/cases.py) that is drawn:

    without --words   a pair's caption; of a story's step its text, after as many earlier ones as there is room for
    with --words      the words that the other system answered, which stay the answer's words; in a dialogue only the
                      description after "picture:" (divter.py), and no picture where there is none

It cannot read the pictures of earlier steps: --context has "none" and "texts" only. With a checkpoint of gill.py, GILL
reads the text in the text encoder's place.

    captions -> encoding (B, S, Dc), noise (B, C, h, w) -> latents (B, C, h, w) -> pixels (B, 3, H, W)
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DTYPES, add_model_options, add_picture_options, read_arguments, run  # isort: skip

import torch
from torch import Tensor, nn

from baselines.divter import split_description
from baselines.gill import Gill, load_gill
from common.files import fingerprint
from common.images import to_image
from evaluation import cases
from generation import Sampling, denoise, split
from minigpt5 import MiniGPT5
from prompts import TASKS
from published.clip_tokenizer import ClipTokenizer
from published.loading import given_checkpoint, tensor_slices
from published.parts import frozen_dtypes, load_schedule, load_text_encoder, load_unet, load_vae


class StableDiffusion(nn.Module):
    """The published parts in the folder `weights`. A checkpoint of train_sd.py replaces the UNet's weights, one of
    gill.py the function `encode_prompts`, which makes the conditioning (B, S, Dc) of texts."""

    sample_noise, sample_latents, ldm_loss = MiniGPT5.sample_noise, MiniGPT5.sample_latents, MiniGPT5.ldm_loss
    encode_pictures = MiniGPT5.encode_pictures
    save_trained, load_trained = Gill.save_trained, Gill.load_trained

    def __init__(self, weights: Path, dtype: torch.dtype | None = None, device="cpu", unet_dtype=None):
        """dtype: of the frozen parts; unet_dtype: of the UNet, where it trains and should have another one."""
        super().__init__()
        folder, (text_dtype, paint_dtype) = weights / "stable-diffusion", frozen_dtypes(weights, dtype, device)
        self.device, self.tokenizer = torch.device(device), ClipTokenizer(folder / "tokenizer")
        self.text_encoder = load_text_encoder(folder / "text_encoder", text_dtype, device)
        self.unet = load_unet(folder / "unet", unet_dtype or paint_dtype, device)
        self.vae = load_vae(folder / "vae", paint_dtype, device)
        self.schedule = load_schedule(folder / "scheduler", device)
        self.encode_prompts = self.encode

    def encode(self, texts: list[str]) -> Tensor:
        """Texts -> (B, S, Dc). No mask: Stable Diffusion reads the padding, too."""
        return self.text_encoder(self.tokenizer(texts)[0].to(self.device))

    @torch.inference_mode()
    def paint(self, texts: list[str], latents: Tensor, sampling: Sampling) -> Tensor:
        """Texts and noise (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1], guided against the empty text."""
        conditioning = torch.cat([self.encode([""] * len(texts)).float(), self.encode_prompts(texts).float()])
        latents = denoise(self.unet, self.schedule, latents.to(self.device), conditioning, sampling)
        return self.vae.decode(latents).float()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.unet.named_parameters())


# ---- the texts that are drawn


def fitting_text(texts: list[str], tokenizer: ClipTokenizer) -> str:
    """The last of `texts` after as many of the earlier ones as the text encoder can read in full."""
    for first in range(len(texts)):
        text = " ".join(texts[first:])
        if len(tokenizer.encode(text)) <= tokenizer.length - 2:
            return text
    return texts[-1]


def text_of(case: cases.Case, context: str, model: StableDiffusion) -> str:
    before = [turn.text for turn in case.before] if context == "texts" else []
    return fitting_text([*before, case.turn.text], model.tokenizer)


def words_and_description(case: cases.Case, folder: Path) -> tuple[str, str | None]:
    """The words of another system's answer, and the text to draw, None where there is nothing to draw."""
    answer = cases.read_answer(folder, case.key)
    words = split(answer.segments)[0] if answer else ""
    return split_description(words) if case.task == "reply" else (words, words or None)


# ---- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cases.add_case_options(parser, ["none", "texts"])
    add_model_options(parser)
    add("--answers", type=Path, required=True, metavar="DIR", help="folder to write, for evaluation's --answers")
    add("--words", type=Path, metavar="DIR", help="answers of another system, whose words are drawn")
    add("--checkpoint", type=Path, help="a run of train_sd.py or of gill.py; default: as published")
    add_picture_options(parser, Sampling, against="the empty text")
    return read_arguments(parser)


def main() -> None:
    args = arguments()
    device, sampling = args.device, Sampling.of(vars(args))
    given, _, data = cases.given_cases(args)
    context = args.context if given[0].task in TASKS else "both"  # as `python -m evaluation` has it
    if args.words:  # they were answered with a context of their own
        context = cases.check_settings(args.words, {"task": given[0].task}).get("context", "both")
    elif given[0].task not in ("caption", "image"):
        raise ValueError(f"{', '.join(args.data)}: words are wanted; --words names answers that have them")
    model = StableDiffusion(args.weights, DTYPES[args.dtype], device).eval()
    path = given_checkpoint(args.checkpoint) if args.checkpoint else None
    if path and "mapper.fc.weight" in tensor_slices(path):
        model.encode_prompts = load_gill(args.weights, path, DTYPES[args.dtype], device).encode
    elif path:
        model.load_trained(path)
    settings = {"task": given[0].task, "context": context, "data": data, "words": args.words and str(args.words)}
    settings |= {name: getattr(args, name) for name in ("seed", "steps", "guidance", "sampler")}
    settings |= {"checkpoint": path and f"{path.parent.name}/{path.name}", "trained": path and fingerprint([path])}
    cases.open_answers(args.answers, settings, args.data)
    for batch in cases.unanswered(given, args.answers, args.batch_size):
        parts = {case.key: words_and_description(case, args.words) if args.words else
                 ("", text_of(case, args.context, model)) for case in batch}  # fmt: skip
        noise = [model.sample_latents(1, cases.generator_of(args.seed, k)) for k, (_, text) in parts.items() if text]
        texts = [text for _, text in parts.values() if text]
        pictures = map(to_image, model.paint(texts, torch.cat(noise), sampling) if texts else ())
        for key, (words, text) in parts.items():
            cases.write_answer(args.answers, key, ([words] if words else []) + ([next(pictures)] if text else []))
    print(f"{len(given):,} cases are answered, see {args.answers}")


if __name__ == "__main__":
    run(main)
