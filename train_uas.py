"""Stage 1, unimodal alignment (paper section 3.3): from caption-picture pairs the vokens learn to carry a picture.

    python train_uas.py --weights weights --data cc3m-train-{0000..0575}.tar --out runs/uas
    python train_uas.py --weights weights --data cc3m.tar --out runs/uas --resume       # go on after a stop
    python sample.py --weights weights --checkpoint runs/uas --prompt "a lighthouse in a storm"

Trained are the voken rows of Vicuna's two embeddings and the feature mapper; all else is frozen. The loss is
0.01 L_text + L_LDM + 0.1 L_CAP. Defaults are the released run's: 2 epochs, batches of 48, AdamW, 2e-5 for the rows and
ten times that for the mapper, 1000 steps of warm-up, then linearly to zero.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cli import DTYPES, make_folder, pick_device, run
from data import open_batches, uas_texts
from generation import Sampling, paint
from images import to_image
from minigpt5 import DROP_RATE, MiniGPT5, Rows, collate, load_minigpt5
from training import (
    append_log,
    checkpoint_folders,
    cut_log,
    draw_grid,
    draw_losses,
    learning_rate_factor,
    load_checkpoint,
    peak_memory,
    read_log,
    save_checkpoint,
    step_generator,
)
from vae import preprocess_output

LONGEST = 256  # tokens of a row; a longer caption is cut at its end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="tars, folders of tars, patterns, brace lists, http(s) addresses")
    add("--weights", type=Path, default=Path("weights"), help="folder of the published layout (README, Weights)")
    add("--out", type=Path, default=Path("runs/uas"), help="folder of the run")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, or start")
    add("--epochs", type=float, default=2, help="passes over the data")
    add("--steps", type=int, help="optimiser steps in all; overrides --epochs")
    add("--batch-size", type=int, default=48, help="pairs of one forward pass")
    add("--accumulate", type=int, default=1, help="forward passes of one optimiser step")
    add("--lr", type=float, default=2e-5, help="for the voken rows; the mapper learns at ten times this")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up")
    add("--vokens", type=int, default=8, help="vokens of a picture")
    add("--no-cfg", action="store_true", help="never drop the condition (the paper's ablation)")
    add("--no-cap", action="store_true", help="without L_CAP")
    add("--no-ldm", action="store_true", help="without L_LDM")
    add(
        "--min-snr-gamma",
        type=float,
        default=5.0,
        help="weight min(SNR, gamma)/SNR as the released code; 0: as the paper",
    )
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=4, help="processes that read pictures; 0: none")
    add("--max-bad", type=float, default=0.01, help="stop when more than this share of the samples is broken")
    add("--save-every", type=int, default=1000, help="steps between checkpoints; the last step always has one")
    add("--sample-every", type=int, default=1000, help="steps between samples.png; 0: never")
    add("--log-every", type=int, default=10, help="steps between lines of log.jsonl, which hold means over them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU (README, Memory)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the step; default: on a GPU")
    args = parser.parse_args()
    for name in ("batch_size", "accumulate", "save_every", "log_every", "vokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


@torch.no_grad()
def paint_samples(model: MiniGPT5, captions: list[str], pixels: torch.Tensor, seed: int, path: Path) -> None:
    """The first captions' real pictures above what their vokens paint, with the same noise every time."""
    pairs = [uas_texts(model.tokenizer.plain(caption), len(model.tokenizer.voken_ids)) for caption in captions]
    rows = collate(model.tokenizer, pairs, model.queries)
    hidden = model.llama(model.embed(rows.ids.to(model.device)))
    features = model.voken_features(hidden, rows.picture_rows.to(model.device), rows.picture_starts.to(model.device))
    sampling = Sampling(sampler="dpm", steps=20)
    latents = model.draw_latents(len(features), torch.Generator().manual_seed(seed))
    painted = paint(model, features, sampling, latents)
    draw_grid(
        [(c, [to_image(real), to_image(ours)]) for c, real, ours in zip(captions, pixels, painted, strict=True)], path
    )


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # the mapper's float32 products may use TF32
    torch.manual_seed(args.seed)
    out = make_folder(args.out)
    if checkpoint_folders(out) and not args.resume:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, another --out starts anew")

    model = load_minigpt5(
        args.weights,
        vokens=args.vokens,
        dtype=DTYPES[args.dtype],
        device=device,
        read_pictures=False,
        read_captions=not args.no_cap,
    )
    rows_count, mapper_count = (sum(p.numel() for p in part.parameters()) for part in (model.vokens, model.mapper))
    print(f"trained: {rows_count:,} parameters in the voken rows, {mapper_count:,} in the mapper; all else is frozen")

    batches = open_batches(
        args.data,
        partial(preprocess_output, size=model.picture_size),
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        max_bad=args.max_bad,
    )
    for note in batches.dataset.notes:
        print(note)
    per_step = args.batch_size * args.accumulate
    if args.steps is None and batches.dataset_size() is None:
        raise ValueError("--steps is needed: streamed tars do not tell how many pairs they hold")
    total = args.steps or max(1, round(args.epochs * batches.dataset_size() / per_step))

    optimizer = torch.optim.AdamW(  # weight decay 0.01, torch's default, as released
        [
            {"params": list(model.vokens.parameters()), "lr": args.lr},
            {"params": list(model.mapper.parameters()), "lr": 10 * args.lr},
        ],
        eps=1e-8,
        fused=device.type == "cuda",
    )
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]

    start, log = 0, out / "log.jsonl"
    if args.resume and (state := load_checkpoint(out, model, optimizer)):
        start = state["step"]
        batches.load_state_dict(state["data"])
        print(f"resumed from step {start}")
    cut_log(log, start)

    compiled = device.type == "cuda" if args.compile is None else args.compile
    losses_of = torch.compile(model.losses) if compiled else model.losses
    empty_caption = None if args.no_cap else model.encode_captions([""])
    drop_rate = 0.0 if args.no_cfg else DROP_RATE
    shown, sums, clock, logged = None, {}, time.perf_counter(), start

    bar = tqdm(range(start, total), initial=start, total=total, desc="uas", unit="step", dynamic_ncols=True)
    for step in bar:
        # ---- one step
        factor = learning_rate_factor(step, args.warmup, total)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]
        for micro in range(args.accumulate):
            batch = next(batches)
            generator = step_generator(args.seed, step, micro)
            plain = [model.tokenizer.plain(caption) for caption in batch["captions"]]
            pairs = [uas_texts(c, args.vokens, i) for c, i in zip(plain, batch["instructions"], strict=True)]
            rows = collate(model.tokenizer, pairs, model.queries, multiple=16, limit=LONGEST)
            rows = Rows(*(t.to(device, non_blocking=True) for t in rows))
            draws = model.draw(len(pairs), generator, drop_rate)
            posterior = None if args.no_ldm else model.encode_pictures(batch["pixels"].to(device, non_blocking=True))
            captions = None if args.no_cap else (model.encode_captions(batch["captions"]), empty_caption)
            losses = losses_of(
                rows, draws, posterior, captions, min_snr_gamma=args.min_snr_gamma, ldm_weight=float(not args.no_ldm)
            )
            (losses["loss"] / args.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- the step is done

        done = step + 1
        shown = shown or (batch["captions"][:4], batch["pixels"][:4])
        if done % args.log_every == 0 or done == total:
            steps = done - logged
            record = {"step": done, **{n: v.item() / (steps * args.accumulate) for n, v in sums.items()}}
            seconds = time.perf_counter() - clock
            record |= {"lr": optimizer.param_groups[1]["lr"], "samples_per_s": round(steps * per_step / seconds, 3)}
            record |= {"bad": dict(batches.bad), "memory_gb": round(peak_memory(device), 2)}
            append_log(log, record)
            bar.set_postfix({n: f"{record[n]:.4f}" for n in sums} | {"samples/s": record["samples_per_s"]})
            sums, clock, logged = {}, time.perf_counter(), done
        if args.sample_every and done % args.sample_every == 0:
            paint_samples(model, *shown, args.seed, out / "samples.png")
            draw_losses(read_log(log), out / "losses.png")
            clock = time.perf_counter()
        if done % args.save_every == 0 or done == total:
            state = {"data": batches.state_dict(), "arguments": json.loads(json.dumps(vars(args), default=str))}
            save_checkpoint(out, done, model, optimizer, state, "uas")
    batches.close()
    print(f"done: {total} steps, broken samples {dict(batches.bad) or 'none'}, see {out}")


if __name__ == "__main__":
    run(main)
