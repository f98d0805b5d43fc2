"""Fine-tuned Stable Diffusion, the paper's baseline on VIST: the UNet learns to draw a story's step from its words.

    python baselines/train_sd.py --data stories.tar --out runs/sd                 # pictures, or precomputed features
    python baselines/train_sd.py --data stories.tar --out runs/sd --resume
    python baselines/stable_diffusion.py --data stories-test.tar --last --checkpoint runs/sd --answers sd-stories

The condition is the frozen text encoder's of the step's text after those of earlier steps, as many as it has room for
(`stable_diffusion.told`); in half of the samples, so that one UNet serves both, of the step's text alone. The
loss is L_LDM (Eq. 3; weighted by min-SNR, as in stage 1, unless --min-snr-gamma is 0) with the UNet unfrozen; one
condition in ten is the empty text. Options, folder, log and
checkpoints are those of train_uas.py and train_mls.py.
"""

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines.stable_diffusion import StableDiffusion, told
from common.cli import DTYPES, pick_device, run
from miniature.world import write_stories
from minigpt5 import DROP_RATE
from prompts import Example, Turn
from published.parts import picture_size
from tars.batches import Batches, describe
from tars.index import Unusable, expand
from tars.precomputed import Precomputed, find_precomputed
from tars.stories import StoryData
from trainer.log import Meter, append_log, cut_log, draw_losses, read_log
from trainer.processes import Gradients, World
from trainer.run import (
    add_run_options,
    check_run_options,
    draw_pictures,
    drawn_data,
    go_on,
    learning_rate_factor,
    load_checkpoint,
    open_run,
    resume_command,
    run_state,
    save_checkpoint,
    stop_if_nonfinite,
    stop_signals,
    total_steps,
)
from vae import preprocess_output


class DrawnSteps(StoryData):
    """The steps of stories, as samples of a text and its picture."""

    def __init__(self, tars: list[str], tokenizer, to_output, features: Precomputed):
        super().__init__(tars, self, 0, None, to_output, weights={"image": 1.0}, precomputed=features)
        self.clip_tokenizer = tokenizer

    def plain(self, text: str) -> str:
        """Nothing in a story is special to Stable Diffusion."""
        return text

    def fit(self, kind: str, turns: list[Turn], task: str, phrase: int) -> Example:
        if kind != "story" or not all(step.text and step.pictures for step in turns):
            raise Unusable("step without text or picture" if kind == "story" else "no story")
        texts = [step.text for step in turns]
        return Example(told(texts if phrase % 2 else texts[-1:], self.clip_tokenizer), "", (), turns[-1].pictures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="interleaved tars of stories; default: drawn")
    add("--lr", type=float, default=1e-5, help="for the UNet")
    add_run_options(parser, out="runs/sd", epochs=4, batch_size=32)
    args = check_run_options(parser, "train_sd")
    unused = [name for name in ("no_ldm", "compile", "gradient_checkpointing", "val") if getattr(args, name)]
    unused += ["sample_every"] if args.sample_every not in (0, parser.get_default("sample_every")) else []
    if unused or args.accumulate > 1:
        parser.error(f"--{'accumulate' if not unused else unused[0].replace('_', '-')} is not for this baseline")
    return args


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # the UNet's products may use TF32
    torch.manual_seed(args.seed)
    world = World(device)
    if world.size > 1:
        raise ValueError("this baseline trains in one process")
    out = open_run(args, world)
    log, size = out / "log.jsonl", picture_size(args.weights)
    data = args.data or drawn_data(write_stories, args, size)
    features = find_precomputed(expand(data), args.weights)
    model = StableDiffusion(args.weights, DTYPES[args.dtype], device)
    # Gradients' buffer has its parts in the usual order of memory, so parameters must not be in another one.
    model.unet.to(torch.float32, memory_format=torch.contiguous_format).requires_grad_(True)
    steps = DrawnSteps(expand(data), model.tokenizer, partial(preprocess_output, size=size), features)
    options = {"seed": args.seed, "workers": args.workers, "max_bad": args.max_bad}
    batches = Batches(steps, args.batch_size, **options)
    total = total_steps(args, len(batches.dataset), 1)
    trained = list(model.unet.parameters())
    print(f"trained: {sum(p.numel() for p in trained):,} parameters, the whole UNet")

    optimizer = torch.optim.AdamW(trained, lr=args.lr, eps=1e-8, fused=True)  # weight decay 0.01
    gradients, meter = Gradients(trained, [optimizer], world), Meter(args.batch_size)
    state = load_checkpoint(out, model, [optimizer]) if args.resume else None
    start = go_on(state, args, batches, meter, gradients)
    cut_log(log, start)
    drop_rate, done = 0.0 if args.no_cfg else DROP_RATE, start

    bar = tqdm(range(start, total), "sd", total, initial=start, unit="step")
    with stop_signals() as asked, closing(batches), bar:
        for step in bar:
            # ---- one step
            optimizer.param_groups[0]["lr"] = args.lr * learning_rate_factor(step, args.warmup, total)
            batch = next(batches)
            draws = draw_pictures(model, range(args.batch_size), drop_rate, args.seed, step, 0)
            drop = draws.drop.tolist()
            texts = ["" if dropped else text for (text, _), dropped in zip(batch["pairs"], drop, strict=True)]
            mean, log_variance = model.encode_pictures(batch["outputs"])
            latents = model.vae.sample(mean.float(), log_variance.float(), draws.posterior)
            loss = model.ldm_loss(model.encode(texts), latents, draws, args.min_snr_gamma).mean()  # Eq. 3
            gradients.backward(loss)
            meter.add({"loss": loss, "ldm_loss": loss})
            gradients.step()
            meter.steps += 1
            # ---- the step is done

            done, stopping = step + 1, bool(asked)
            if done % args.log_every == 0 or done == total:
                append_log(log, meter.line(done, optimizer, batches.bad, gradients))
                stop_if_nonfinite(gradients, args.max_nonfinite, done, out)
                draw_losses(read_log(log), out / "losses.png")
            if done % args.save_every == 0 or done == total or stopping:
                save_checkpoint(out, done, model, [optimizer], run_state(args, batches, meter, gradients), "sd")
            if stopping:
                break
    if done < total:
        print(f"stopped after step {done} of {total}; to go on: {resume_command()}")
    else:
        print(f"done: {total} steps, broken samples: {describe(batches.bad)}, see {out}")


if __name__ == "__main__":
    run(main)
