"""Stage 1, unimodal alignment (paper section 3.3): from caption-picture pairs the vokens learn to carry a picture.

    python train_uas.py                                                # the miniature, on pictures of its drawn world
    python train_uas.py --weights weights --data cc3m-train-{0000..0575}.tar --out runs/cc3m
    python train_uas.py --weights weights --data cc3m-train-{0000..0575}.tar --out runs/cc3m --resume   # after a stop
    python -m tars precompute cc3m-train-{0000..0575}.tar --weights weights --out features       # then --data features
    python sample.py --weights weights --checkpoint runs/cc3m --prompt "a lighthouse in a storm"

Trained are the voken rows of Vicuna's two embeddings and the feature mapper; all else is frozen. The loss is
0.01 L_text + L_LDM + 0.1 L_CAP. Defaults are the released run's: 2 epochs, batches of 48, AdamW, 2e-5 for the rows and
ten times that for the mapper, 1000 steps of warm-up, then linearly to zero. The miniature has its own, in
WEIGHTS/minigpt5/config.json.
"""

import argparse
from contextlib import closing
from functools import partial

import torch
from tqdm import tqdm

from common.cli import DTYPES, can_compile, pick_device, run
from miniature.world import write_pairs
from minigpt5 import DROP_RATE, Batch, collate
from prompts import uas_texts
from published.parts import load_minigpt5, picture_size
from tars.batches import describe
from tars.index import expand
from tars.pairs import open_pairs
from tars.precomputed import find_precomputed
from trainer.log import (
    Meter,
    added,
    append_log,
    compiled_graphs,
    cut_log,
    draw_losses,
    paint_samples,
    read_log,
    validate,
)
from trainer.muon import Muon
from trainer.processes import Gradients, World, one_line_peer_errors, weights_held
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

LONGEST = 256  # tokens of a row; a longer caption is cut at its end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="tars, folders, patterns, brace lists; default: drawn")
    add("--lr", type=float, default=2e-5, help="for the voken rows")
    add("--output-lr", type=float, help="for those of the output embedding; default: --lr, as released")
    add("--mapper-lr", type=float, help="for the mapper; default: ten times --lr, as released")
    add("--muon", type=float, metavar="LR", help="Muon for the mapper's matrices; default: AdamW for all, as released")
    add("--vokens", type=int, default=8, help="vokens of a picture")
    add("--start-as", metavar="TEXT", help="rows of the vokens start as this text's pieces; default: the tables' mean")
    add("--no-cap", action="store_true", help="without L_CAP (the paper's ablation)")
    add_run_options(parser, out="runs/uas", epochs=2, batch_size=48)
    args = check_run_options(parser, "train_uas")
    if args.no_ldm and args.no_cap:
        parser.error("--no-ldm and --no-cap leave the mapper nothing to learn from")
    return args


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # the mapper's float32 products may use TF32
    torch.manual_seed(args.seed)
    world = World(device)
    out = open_run(args, world)
    log = out / "log.jsonl"

    size, captioned = picture_size(args.weights), not args.no_cap
    with world.first():  # it draws, and leaves the indices of the tars to the other ranks
        data = args.data or drawn_data(write_pairs, args, size)
        features = find_precomputed(expand(data) + (expand(args.val) if args.val else []), args.weights)
        open_data = partial(
            open_pairs,
            transform=partial(preprocess_output, size=size),
            batch_size=args.batch_size,
            precomputed=features,
            seed=args.seed,
            rank=world.rank,
            world_size=world.size,
            workers=args.workers,
            max_bad=args.max_bad,
        )
        batches, held_out = open_data(data), open_data(args.val) if args.val else None
    for opened in filter(None, (batches, held_out)):
        for note in opened.dataset.notes:
            print(note)
    total = total_steps(args, len(batches.dataset), world.size)

    encodes = captioned and "encoding" not in features
    dtype = DTYPES[args.dtype]
    parts = {"read_pictures": False, "read_captions": encodes}
    model = load_minigpt5(args.weights, None, args.vokens, dtype, device, **parts)
    if args.shard:
        model.shard()
    if "moments" in features:
        model.vae.encoder = None
    if args.start_as:
        model.vokens.start_as(model.llama, model.tokenizer.encode(args.start_as))
    rows_count, mapper_count = (sum(p.numel() for p in part.parameters()) for part in (model.vokens, model.mapper))
    print(f"trained: {rows_count:,} parameters in the voken rows, {mapper_count:,} in the mapper; all else is frozen")
    print(f"precomputed: {', '.join(features.made_with) or 'nothing'}")
    if args.shard:
        own, whole = weights_held(model.llama, model.unet)
        print(f"sharded: each process holds {own:,} of the {whole:,} bytes of Vicuna and UNet")

    matrices = [p for p in model.mapper.parameters() if args.muon and p.dim() == 2]
    others = [p for p in model.mapper.parameters() if not args.muon or p.dim() != 2]
    groups = [
        {"params": [model.vokens.input], "lr": args.lr},
        {"params": [model.vokens.output], "lr": args.lr if args.output_lr is None else args.output_lr},
        {"params": others, "lr": 10 * args.lr if args.mapper_lr is None else args.mapper_lr},
    ]
    optimizers = [torch.optim.AdamW(groups, eps=1e-8, fused=True)]  # weight decay 0.01, torch's default, as released
    optimizers += [Muon(matrices, args.muon)] if matrices else []
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["full_lr"] = group["lr"]

    gradients = Gradients([p for group in groups for p in group["params"]], optimizers, world)
    meter = Meter(world.size * args.batch_size * args.accumulate)
    if world.size > 1:
        print(f"{world.size} processes; each step adds up {gradients.flat.nbytes:,} bytes of them: gradients and loss")
    state = load_checkpoint(out, model, optimizers) if args.resume else None
    start = go_on(state, args, batches, meter, gradients)
    if world.rank == 0:
        cut_log(log, start)

    compiled = can_compile(device) and not args.shard if args.compile is None else args.compile
    if args.gradient_checkpointing:
        model.checkpoint_gradients()
    if compiled:
        model.compile_losses(args.batch_size)
    round_length = bucket_length if compiled else int  # of the rows: as it comes where nothing is compiled
    empty_caption = model.encode_captions([""] if encodes else features.empty_caption) if captioned else None
    drop_rate = 0.0 if args.no_cfg else DROP_RATE
    pictures = "moments" if "moments" in features else "pixels"
    texts = "captions" if encodes else "encoding"
    done, shown = start, None

    def forward(batch: dict, step: int, micro: int = 0, drop_rate: float = 0.0) -> tuple[dict, Batch]:
        """The losses of one forward pass of a step, and its rows."""
        plain = [model.tokenizer.plain(caption) for caption in batch["captions"]]
        pairs = [uas_texts(c, args.vokens, i) for c, i in zip(plain, batch["instructions"], strict=True)]
        rows = collate(model.tokenizer, pairs, model.queries, round_length, limit=LONGEST).to(device)
        place = (micro * world.size + world.rank) * args.batch_size  # of our first sample among the step's
        draws = draw_pictures(model, range(len(pairs)), drop_rate, args.seed, step, place)
        posterior = None if args.no_ldm else model.encode_pictures(batch[pictures])
        captions = (model.encode_captions(batch[texts]), empty_caption) if captioned else None
        return model.losses(rows, draws, posterior, captions, min_snr_gamma=args.min_snr_gamma), rows

    look = {"unit": "step", "dynamic_ncols": True, "disable": world.rank > 0}
    bar = tqdm(range(start, total), "uas", total, initial=start, **look)
    with stop_signals() as asked, closing(batches), one_line_peer_errors(), bar:
        for step in bar:
            # ---- one step
            factor = learning_rate_factor(step, args.warmup, total)
            for group in groups:
                group["lr"] = factor * group["full_lr"]
            for micro in range(args.accumulate):
                batch = next(batches)
                losses, rows = forward(batch, step, micro, drop_rate)
                gradients.backward(losses["loss"] / args.accumulate)
                meter.add(losses)
            gradients.step()
            meter.steps += 1
            # ---- the step is done

            done, stopping = step + 1, world.any(bool(asked))
            shown = shown or (rows, None, batch[pictures], batch["captions"])
            if done % args.log_every == 0 or done == total:
                record = meter.line(done, optimizers[0], batches.bad, gradients)
                record |= {"graphs": compiled_graphs()} if compiled else {}
                if world.rank == 0:
                    append_log(log, record)
                bar.set_postfix({name: f"{record[name]:.4g}" for name in (*losses, "samples_per_s") if name in record})
                stop_if_nonfinite(gradients, args.max_nonfinite, done, out)
            if args.sample_every and done % args.sample_every == 0:
                if world.rank == 0 or args.shard:
                    paint_samples(model, *shown, None if world.rank else out / "samples.png")
                if world.rank == 0:
                    draw_losses(read_log(log), out / "losses.png")
            if done % args.save_every == 0 or done == total or stopping:
                state = run_state(args, batches, meter, gradients)
                if world.rank == 0:
                    save_checkpoint(out, done, model, optimizers, state, "uas")
            if held_out is not None and (done % args.val_every == 0 or done == total):
                stops = asked if done < total else []  # the last ones are computed all the same
                record = validate(model, held_out, forward, args.val_batches, world, stops)
                if record and world.rank == 0:
                    append_log(log, {"step": done, **record})
                    bar.write(f"step {done}: " + ", ".join(f"{name} {value:.5g}" for name, value in record.items()))
            if stopping:
                break
    bad = describe(added(world.gather(dict(batches.bad))))
    world.end()
    if done < total:
        print(f"stopped after step {done} of {total}; to go on: {resume_command()}")
    else:
        print(f"done: {done} steps, broken samples: {bad}, see {out}")


if __name__ == "__main__":
    run(main)
