"""Fine-tuned Stable Diffusion, the paper's baseline on VIST: the UNet learns to paint a story's step from its words.

    python baselines/train_sd.py --data stories.tar --out runs/sd                 # pictures, or precomputed features
    python baselines/train_sd.py --data stories.tar --out runs/sd --resume
    torchrun --nproc-per-node 4 baselines/train_sd.py --weights weights --data vist-train.tar --out runs/sd \\
        --batch-size 2 --accumulate 4 --gradient-checkpointing         # the paper's 32 samples a step, on four GPUs
    python baselines/stable_diffusion.py --data stories-test.tar --last --checkpoint runs/sd --answers sd-stories

The condition is the frozen text encoder's encoding of the step's text after those of earlier steps, as many as there is
room for (`fitting_text`). In half of the samples it is that of the step's text alone, so that one UNet serves
both settings; one condition in ten is the empty text. The loss is L_LDM (Eq. 3, weighted by min-SNR as in stage 1,
unless --min-snr-gamma is 0). The whole UNet is trained, in float32 whatever --dtype says: its weights, gradients and
moments take 16 bytes a parameter, 14 GB at the published size. Options, folder, log and checkpoints are those of
train_uas.py and train_mls.py.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DTYPES, run as run_command  # isort: skip

import torch
from torch import Tensor

from baselines.stable_diffusion import StableDiffusion, fitting_text
from common.images import preprocess_output
from miniature.world import write_stories
from minigpt5 import DROP_RATE, send
from prompts import Example, Turn
from tars.index import Unusable
from tars.precomputed import Precomputed
from tars.stories import StoryData
from trainer.compiled import checkpoint_gradients
from trainer.options import RATE, read_run_options
from trainer.run import Run


class StorySteps(StoryData):
    """The steps of stories, as samples of a text and its picture."""

    escape = staticmethod(str)  # no language model reads the texts

    def __init__(self, tars: list[str], tokenizer, to_output, precomputed: Precomputed):
        super().__init__(tars, self, 0, None, to_output, tasks=["image"], precomputed=precomputed)
        self.clip_tokenizer = tokenizer

    def fit(self, kind: str, turns: list[Turn], task: str, phrase: int) -> Example:
        if kind != "story" or not all(step.text and step.pictures for step in turns):
            raise Unusable("step without text or picture" if kind == "story" else "no story")
        texts = [step.text for step in (turns if phrase % 2 else turns[-1:])]
        return Example(fitting_text(texts, self.clip_tokenizer), "", (), turns[-1].pictures[:1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="interleaved tars of stories; default: drawn stories")
    add("--lr", type=RATE, default=1e-5, help="learning rate of the UNet")
    refused = ("no_ldm", "compile", "val")
    return read_run_options(parser, "train_sd", out="runs/sd", epochs=4, batch_size=32, refused=refused)


def main() -> None:
    args = arguments()
    run = Run(args, "sd", StableDiffusion.save_trained, StableDiffusion.load_trained)
    model = StableDiffusion(args.weights, DTYPES[args.dtype], run.device, torch.float32)
    # The gradients' buffer holds them in the usual order of memory, so the UNet's weights must be in no other one.
    model.unet.to(memory_format=torch.contiguous_format).requires_grad_(True)
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    trained = list(model.unet.parameters())
    print(f"trained: {sum(p.numel() for p in trained):,} parameters, the whole UNet")
    optimizer = torch.optim.AdamW(trained, lr=args.lr, eps=1e-8, fused=True)  # weight decay 0.01, torch's default

    tars, _, precomputed = run.find_tars("turns", write_stories)
    options = {"to_output": partial(preprocess_output, size=run.size), "precomputed": precomputed}
    [batches] = run.open_tars(partial(StorySteps, tokenizer=model.tokenizer, **options), tars)

    def losses_of(samples: dict, generators: list[torch.Generator]) -> dict[str, Tensor]:
        noise = model.sample_noise(range(args.batch_size), generators, 0.0 if args.no_cfg else DROP_RATE)
        noise = send(noise, run.device)
        drop = noise.drop.tolist()
        texts = ["" if dropped else text for (text, _), dropped in zip(samples["pairs"], drop, strict=True)]
        mean, log_variance = model.encode_pictures(samples["outputs"])
        latents = model.vae.sample(mean.float(), log_variance.float(), noise.latent_noise)
        ldm_loss = model.ldm_loss(model.encode(texts), latents, noise, args.min_snr_gamma).mean()  # Eq. 3
        return {"loss": ldm_loss, "ldm_loss": ldm_loss}

    # Before a step this sets the learning rates, afterwards it logs and saves.
    for step in run.steps(model, [optimizer], batches, None, losses_of):
        for samples, generators in run.batches(step):  # as many as --accumulate says
            losses = losses_of(samples, generators)
            run.backward(losses)
        run.optimizer_step()


if __name__ == "__main__":
    run_command(main)
