"""Trains every frozen part of the miniature from nothing, on pictures and words of the drawn world, and the two
networks that evaluate it.

    python experiments/pretrain.py --weights runs/weights           # all parts, each for its recipe's minutes
    python experiments/pretrain.py --weights runs/weights --parts vae judge --minutes 60
    python experiments/pretrain.py --weights runs/weights --parts vae --minutes 0   # write what there is so far
    python experiments/pretrain.py --parts pairing                  # the miniature's CLIP, beside the shipped weights

The two tokenizers are the shipped ones. Parts, in the order in which they need one another:

| part      | becomes                                      | learns                                                |
| --------- | -------------------------------------------- | ----------------------------------------------------- |
| judge     | judge.safetensors                            | to read every fact off a picture; measures the others |
| pairing   | pairing.safetensors                          | which picture a text goes with; measures as CLIP does |
| vae       | stable-diffusion/vae                         | to draw pictures again from their latents             |
| text      | stable-diffusion/text_encoder, tokenizer     | to read the facts off captions                        |
| diffusion | stable-diffusion/unet, scheduler             | to draw what captions say, in the latents             |
| language  | vicuna                                       | captions, stories, conversations                      |
| captioner | blip2, minigpt4                              | to put a picture into words for the language model    |

Each part has a budget of training time. After a stop it resumes from its newest checkpoint. All random numbers of a
step come from (seed, step), so that a run in pieces equals one in one piece. When its time is up, the part's averaged
weights are written to `--weights`, in the published layout and 16 bit.
"""

import argparse
import copy
import os
import re
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import FROM_1, MINIATURE, add_device_option, can_compile  # isort: skip
from common.cli import make_folder, read_arguments, run  # isort: skip

import torch
from torch import nn

from common.files import atomic_write
from experiments.recipes.judge import JudgeRecipe
from experiments.recipes.painter import AutoencoderRecipe, DiffusionRecipe, TextRecipe
from experiments.recipes.pairing import PairingRecipe
from experiments.recipes.recipe import Recipe, Setup, write_settings
from experiments.recipes.speaker import CaptionerRecipe, LanguageRecipe
from trainer.log import append_log, cut_log, plot_losses, read_log
from trainer.muon import Muon
from trainer.processes import stop_signals
from trainer.run import step_generator

RECIPES = (JudgeRecipe, PairingRecipe, AutoencoderRecipe, TextRecipe, DiffusionRecipe, LanguageRecipe, CaptionerRecipe)
PARTS = {recipe.name: recipe for recipe in RECIPES}
WARMUP = 100  # steps
SAVE_SECONDS = 300  # between two checkpoints, each with a line of the log
EMA_GAMMA = 9  # of a power-function average (Karras et al. 2024): its mean age is an 11th of the steps so far
OUTER = re.compile(r"embed|lm_head|conv_in\b|conv_out\b|query_tokens|look\b")  # matrices that are not Muon's


# ---- optimiser


def optimizers_of(recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in recipe.model.named_parameters():
        (matrices if parameter.dim() > 1 and not OUTER.search(name) else others).append(parameter)
    fused = others[0].device.type == "cuda"
    return [
        torch.optim.AdamW(others, recipe.lr, (0.9, 0.99), weight_decay=0.0, fused=fused),
        Muon(matrices, recipe.matrix_lr),
    ]


def rate_factor(step: int, hold: int) -> float:
    """Linear warm-up, then 1 until step `hold`, then falling as 1 / sqrt(step): needs no known end."""
    return min((step + 1) / WARMUP, 1.0, (hold / (step + 1)) ** 0.5)


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, step: int) -> None:
    """Moving mean over a share of all steps so far (Karras et al. 2024, power function averages)."""
    share = 1 - (1 - 1 / (step + 1)) ** (EMA_GAMMA + 1)
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)


# ---- checkpoints


def save(path: Path, recipe: Recipe, averaged: nn.Module, optimizers: list, step: int, seconds: float) -> None:
    state = {"model": recipe.model.state_dict(), "averaged": averaged.state_dict(), "step": step}
    state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "seconds": seconds}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def restore(path: Path, recipe: Recipe, averaged: nn.Module, optimizers: list) -> tuple[int, float]:
    """Fill everything from a checkpoint; returns step and seconds trained, zeros where there is none."""
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        recipe.model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
    except Exception as error:  # of many kinds, for what is no checkpoint
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this part; remove it to start anew ({reason})") from None
    return state["step"], state["seconds"]


# ---- the loop


def train(recipe: Recipe, setup: Setup, minutes: float, last_step: int | None = None) -> nn.Module | None:
    """Train a part until its minutes are used up (or `last_step` is done); its averaged weights, None if stopped."""
    folder = make_folder(setup.runs / recipe.name)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    recipe.model.to(setup.device).train()
    averaged = copy.deepcopy(recipe.model).eval().requires_grad_(False)
    optimizers = optimizers_of(recipe)
    step, seconds = restore(checkpoint, recipe, averaged, optimizers)
    if step == 0 and minutes <= 0:
        raise ValueError(f"{folder}: nothing is trained yet, so nothing is written")
    cut_log(log, step)
    size = sum(p.numel() for p in recipe.model.parameters())
    print(f"{recipe.name}: {size:,} parameters, step {step}, {seconds / 60:.1f} of {minutes:g} minutes used")

    on_gpu = setup.device.type == "cuda"
    losses_of = torch.compile(recipe.losses) if can_compile(setup.device) else recipe.losses
    parameters = list(recipe.model.parameters())
    sums, logged, saved, started, begun = {}, step, seconds, seconds, time.perf_counter()

    def measure() -> None:
        """Log losses and figures."""
        record = {"step": step, "seconds": round(seconds, 1)}
        record |= {name: round(value.item() / (step - logged), 6) for name, value in sums.items()}
        with torch.no_grad():
            record |= {name: round(value, 5) for name, value in recipe.measure(averaged).items()}
        append_log(log, record)
        plot_losses(read_log(log), folder / "losses.png")
        print(f"{recipe.name}: " + ", ".join(f"{name} {value:g}" for name, value in record.items()), flush=True)

    with stop_signals() as asked:
        while not asked and seconds < 60 * minutes and step != last_step:
            # ---- one step
            generator = step_generator(setup.seed, step, 0)
            factor = rate_factor(step, recipe.hold)
            for optimizer, rate in zip(optimizers, (recipe.lr, recipe.matrix_lr), strict=True):
                optimizer.param_groups[0]["lr"] = factor * rate
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=on_gpu):
                losses = losses_of(recipe.model, *recipe.batch(generator))
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average(averaged, recipe.model, step)
            # ---- the step is done

            step += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
            seconds = started + time.perf_counter() - begun
            if seconds - saved > SAVE_SECONDS:
                measure()
                save(checkpoint, recipe, averaged, optimizers, step, seconds)
                sums, logged, saved = {}, step, seconds
        save(checkpoint, recipe, averaged, optimizers, step, seconds)
    if asked:
        print(f"{recipe.name}: stopped after step {step}; the same command continues")
        return None
    if step > logged:
        measure()
    return averaged


# ---- command line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--minutes", type=float, help="training time of each part, over all runs; default: its recipe's")
    add("--out", type=Path, default=Path("runs/miniature"), help="folder of checkpoints, logs, training sets")
    add("--weights", type=Path, default=MINIATURE, help="where finished parts go, beside those that they build on; "
        "needed, except for --parts pairing")  # fmt: skip
    add("--pictures", type=FROM_1, default=1 << 17, help="different pictures to train on (12 kB each)")
    add("--workers", type=FROM_1, default=os.cpu_count(), help="processes that draw them")
    add("--seed", type=int, default=0, help="0 or more")
    add_device_option(parser)
    args = read_arguments(parser, argv)
    if args.weights == MINIATURE and args.parts != ["pairing"]:
        parser.error("--weights is needed: finished parts would overwrite the shipped ones")
    torch.set_float32_matmul_precision("high")
    if not (args.weights / "minigpt5" / "config.json").exists():  # the defaults of the commands that use the weights
        write_settings(args.weights, "minigpt5/config.json", {})
    setup = Setup(make_folder(args.out), args.weights, args.device, args.seed, args.pictures, args.workers)
    for part in [part for part in PARTS if part in args.parts]:
        torch.manual_seed(args.seed)
        recipe = PARTS[part](setup)
        averaged = train(recipe, setup, recipe.minutes if args.minutes is None else args.minutes)
        if averaged is None:
            return
        recipe.export(averaged, args.weights)
        print(f"{part}: written to {args.weights}")


if __name__ == "__main__":
    run(main)
