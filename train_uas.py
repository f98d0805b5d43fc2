"""Stage 1, unimodal alignment (paper section 3.3): from caption-picture pairs the vokens learn to carry a picture.

    python train_uas.py                                                # the miniature, on pictures of its drawn world
    python train_uas.py --weights weights --data cc3m-train-{0000..0575}.tar --out runs/cc3m
    python train_uas.py --weights weights --data cc3m-train-{0000..0575}.tar --out runs/cc3m --resume   # after a stop
    python data.py precompute cc3m-train-{0000..0575}.tar --weights weights --out features       # then --data features
    python sample.py --weights weights --checkpoint runs/cc3m --prompt "a lighthouse in a storm"

Trained are the voken rows of Vicuna's two embeddings and the feature mapper; all else is frozen. The loss is
0.01 L_text + L_LDM + 0.1 L_CAP. Defaults are the released run's: 2 epochs, batches of 48, AdamW, 2e-5 for the rows and
ten times that for the mapper, 1000 steps of warm-up, then linearly to zero.
"""

import argparse
import json
from functools import partial

import torch
from tqdm import tqdm

from cli import DTYPES, pick_device, run
from data import open_batches, uas_texts
from features import find_features, picture_size
from miniature.world import write_pairs
from minigpt5 import DROP_RATE, collate, few_lengths, load_minigpt5
from muon import Muon
from tars import expand
from training import (
    Meter,
    add_run_options,
    append_log,
    check_run_options,
    compiled_graphs,
    cut_log,
    draw_losses,
    drawn_data,
    learning_rate_factor,
    load_checkpoint,
    open_run,
    paint_samples,
    read_log,
    save_checkpoint,
    step_generator,
    total_steps,
)
from vae import preprocess_output

LONGEST = 256  # tokens of a row; a longer caption is cut at its end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="tars, folders, patterns, brace lists, http(s) addresses; default: drawn")
    add("--lr", type=float, default=2e-5, help="for the voken rows")
    add("--mapper-lr", type=float, help="for the mapper; default: ten times --lr, as released")
    add("--muon", type=float, metavar="LR", help="Muon for the mapper's matrices; default: AdamW for all, as released")
    add("--vokens", type=int, default=8, help="vokens of a picture")
    add("--no-cap", action="store_true", help="without L_CAP (the paper's ablation)")
    add_run_options(parser, out="runs/uas", epochs=2, batch_size=48)
    return check_run_options(parser, "train_uas")


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # the mapper's float32 products may use TF32
    torch.manual_seed(args.seed)
    out = open_run(args)
    log = out / "log.jsonl"

    size, captioned = picture_size(args.weights), not args.no_cap
    data = args.data or drawn_data(write_pairs, args, size)
    features = find_features(expand(data), args.weights)
    batches = open_batches(
        data,
        partial(preprocess_output, size=size),
        args.batch_size,
        features,
        seed=args.seed,
        workers=args.workers,
        max_bad=args.max_bad,
        group=args.group,
    )
    for note in batches.dataset.notes:
        print(note)
    total = total_steps(args, batches.dataset_size())

    encodes = captioned and "encoding" not in features
    dtype = DTYPES[args.dtype]
    model = load_minigpt5(args.weights, None, args.vokens, dtype, device, read_pictures=False, read_captions=encodes)
    if "moments" in features:
        model.vae.encoder = None
    rows_count, mapper_count = (sum(p.numel() for p in part.parameters()) for part in (model.vokens, model.mapper))
    print(f"trained: {rows_count:,} parameters in the voken rows, {mapper_count:,} in the mapper; all else is frozen")
    print(f"precomputed: {', '.join(features.made_with) or 'nothing'}")

    matrices = [p for p in model.mapper.parameters() if args.muon and p.dim() == 2]
    others = [p for p in model.mapper.parameters() if not args.muon or p.dim() != 2]
    groups = [
        {"params": list(model.vokens.parameters()), "lr": args.lr},
        {"params": others, "lr": args.mapper_lr or 10 * args.lr},
    ]
    optimizers = [torch.optim.AdamW(groups, eps=1e-8, fused=True)]  # weight decay 0.01, torch's default, as released
    optimizers += [Muon(matrices, args.muon)] if matrices else []
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["full_lr"] = group["lr"]

    start = 0
    if args.resume and (state := load_checkpoint(out, model, optimizers)):
        start = state["step"]
        batches.load_state_dict(state["data"])
        print(f"resumed from step {start}")
    cut_log(log, start)

    compiled = device.type == "cuda" if args.compile is None else args.compile
    if args.gradient_checkpointing:
        model.checkpoint_gradients()
    if compiled:
        model.compile_losses(args.batch_size)
    length = few_lengths if compiled else int  # of the rows: as it comes where nothing is compiled
    empty_caption = model.encode_captions([""] if encodes else features.empty_caption) if captioned else None
    drop_rate = 0.0 if args.no_cfg else DROP_RATE
    meter, shown = Meter(args.batch_size * args.accumulate), None

    bar = tqdm(range(start, total), initial=start, total=total, desc="uas", unit="step", dynamic_ncols=True)
    for step in bar:
        # ---- one step
        factor = learning_rate_factor(step, args.warmup, total)
        for group in groups:
            group["lr"] = factor * group["full_lr"]
        for micro in range(args.accumulate):
            batch = next(batches)
            plain = [model.tokenizer.plain(caption) for caption in batch["captions"]]
            pairs = [uas_texts(c, args.vokens, i) for c, i in zip(plain, batch["instructions"], strict=True)]
            rows = collate(model.tokenizer, pairs, model.queries, length, LONGEST).to(device)
            draws = model.draw(len(pairs), step_generator(args.seed, step, micro), drop_rate)
            pictures = batch["moments" if "moments" in features else "pixels"]
            posterior = None if args.no_ldm else model.encode_pictures(pictures)
            texts = batch["captions" if encodes else "encoding"] if captioned else None
            captions = (model.encode_captions(texts), empty_caption) if captioned else None
            losses = model.losses(rows, draws, posterior, captions, min_snr_gamma=args.min_snr_gamma)
            (losses["loss"] / args.accumulate).backward()
            meter.add(losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.steps += 1
        # ---- the step is done

        done = step + 1
        shown = shown or (rows, None, pictures, batch["captions"])
        if done % args.log_every == 0 or done == total:
            record = meter.line(done, optimizers[0], batches.bad, device)
            record |= {"graphs": compiled_graphs()} if compiled else {}
            append_log(log, record)
            bar.set_postfix({name: f"{record[name]:.4g}" for name in (*losses, "samples_per_s")})
        if args.sample_every and done % args.sample_every == 0:
            paint_samples(model, *shown, out / "samples.png")
            draw_losses(read_log(log), out / "losses.png")
        if done % args.save_every == 0 or done == total:
            state = {"data": batches.state_dict(), "arguments": json.loads(json.dumps(vars(args), default=str))}
            save_checkpoint(out, done, model, optimizers, state, "uas")
    batches.close()
    print(f"done: {total} steps, broken samples {dict(batches.bad) or 'none'}, see {out}")


if __name__ == "__main__":
    run(main)
