"""Stage 2, multimodal learning (paper section 3.3): stories and dialogues teach when and what to say and to show.

    python train_mls.py                                                # the miniature, on stories of its drawn world
    python train_mls.py --weights weights --data vist-train.tar --uas runs/cc3m --out runs/vist
    python train_mls.py --weights weights --data mmdialog-train.tar --uas runs/cc3m --out runs/chat --prefix
    python sample.py --weights weights --checkpoint runs/vist --prompt "we had a barbecue." --image a.jpg --turns 1

Starts from a run of stage 1, or with --no-uas from untrained vokens. What trains: an adapter of Vicuna (LoRA, or with
--prefix virtual tokens), the voken rows and the mapper's transformer; the mapper's MLP and queries stay as stage 1 left
them. The loss is 0.01 L_text + L_LDM, over three tasks: the next picture for a text, the text for a picture, or both.
Defaults are the paper's: 4 epochs, batches of 32, AdamW at 2e-5. The miniature has its own, in
WEIGHTS/minigpt5/config.json, with L_text at weight 1.
"""

import argparse
import re
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import DTYPES, can_compile, pick_device, run
from lora import TARGETS
from miniature.world import write_stories
from minigpt5 import DROP_RATE, TEXT_WEIGHT, Batch, collate
from prompts import SPEAKERS, TASKS
from published.checkpoints import find_checkpoint, given_checkpoint
from published.parts import load_minigpt5, picture_size
from qformer import preprocess_input
from tars.batches import describe
from tars.index import expand
from tars.precomputed import find_precomputed
from tars.stories import checked_weights, open_stories
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
    step_generator,
    stop_if_nonfinite,
    stop_signals,
    total_steps,
)
from vae import preprocess_output


def names(text: str) -> tuple[str, ...]:
    """ "q_proj,v_proj" -> ("q_proj", "v_proj")."""
    return tuple(name.strip() for name in text.split(","))


def task_weights(text: str) -> dict[str, float]:
    """ "image=2,text=1" -> {"image": 2.0, "text": 1.0}."""
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=WEIGHT,...") from None


def words_of(source: str, target: str) -> str:
    """What stands above a picture in samples.png: the answer's words, or else the request."""
    request = re.split(r"\n|###\w+:", source.removesuffix(SPEAKERS[1]).strip())[-1].strip()
    return re.sub(r"\[IMG\d+\]|###", "", target).strip() or request


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="interleaved tars, as `python -m tars vist|mmdialog` writes them; default: drawn")
    add("--uas", type=Path, help="stage 1's run or checkpoint to start from; default: WEIGHTS/minigpt5's, if any")
    add("--no-uas", action="store_true", help="start from untrained vokens and mapper (the paper's ablation)")
    add("--prefix", action="store_true", help="prefix tuning in the place of LoRA")
    add("--lora-rank", type=int, default=8, metavar="R", help="alpha is twice the rank")
    add("--lora-targets", type=names, default=TARGETS, metavar="NAME,...",
        help=f"the linear layers of Vicuna that LoRA is added to; default: {','.join(TARGETS)}")  # fmt: skip
    add("--tasks", type=task_weights, default=dict.fromkeys(TASKS, 1.0), metavar="TASK=WEIGHT,...",
        help=f"share of each task among a story's steps, of {', '.join(TASKS)}; default: all alike")  # fmt: skip
    add("--blind-history", type=float, default=0.0, metavar="SHARE",
        help="share of story steps whose history keeps its texts and loses its pictures; default: 0")  # fmt: skip
    add("--text-weight", type=float, default=TEXT_WEIGHT, help="of L_text in the loss; L_LDM has 1")
    add("--freeze-mapper", action="store_true", help="all of it; default: its transformer trains, as released")
    add("--lr", type=float, default=2e-5, help="for the voken rows and the mapper")
    add("--adapter-lr", type=float, help="for LoRA or the prefix; default: --lr")
    add("--vokens", type=int, default=8, help="vokens of a picture, where it starts from no stage 1")
    add("--max-tokens", type=int, default=2048, help="longest row; the oldest steps of a history are left out")
    add_run_options(parser, out="runs/mls", epochs=4, batch_size=32)
    args = check_run_options(parser, "train_mls")
    if args.uas and args.no_uas:
        parser.error("--uas and --no-uas exclude each other")
    if args.lora_rank < 1:
        parser.error("--lora-rank must be at least 1")
    if not 0 <= args.text_weight < float("inf"):
        parser.error("--text-weight must be 0 or more")
    if not 0 <= args.blind_history <= 1:
        parser.error("--blind-history must be from 0 to 1")
    checked_weights(args.tasks)  # now, not when the data have been drawn
    return args


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # the mapper's and the adapters' float32 products may use TF32
    torch.manual_seed(args.seed)
    world = World(device)
    out = open_run(args, world)
    log = out / "log.jsonl"
    shipped = None if args.no_uas else find_checkpoint(args.weights / "minigpt5")
    first = given_checkpoint(args.uas) if args.uas else shipped

    size = picture_size(args.weights)
    with world.first():
        data = args.data or drawn_data(write_stories, args, size)
    features = find_precomputed(expand(data) + (expand(args.val) if args.val else []), args.weights)

    sees = "queries" not in features
    parts = {"read_pictures": sees}
    model = load_minigpt5(args.weights, first, args.vokens, DTYPES[args.dtype], device, **parts)
    if args.shard:
        model.shard()
    if not sees:
        model.vae.encoder, model.queries = None, features.shapes["queries"][0]
    if model.lora or model.prefix:
        raise ValueError(f"{first}: stage 2 starts from a checkpoint of stage 1, this one has an adapter already")
    lora = {"targets": args.lora_targets, "rank": args.lora_rank, "alpha": 2 * args.lora_rank}
    model.add_adapters(**({"prefix": {}} if args.prefix else {"lora": lora}))
    model.mapper.requires_grad_(not (args.no_ldm or args.freeze_mapper))  # without L_LDM no loss reaches it
    model.mapper.fc.requires_grad_(False)
    model.mapper.t2i_decoder_prompt.requires_grad_(False)
    trained = {name: p for name, p in model.trained_parameters().items() if p.requires_grad}
    print(f"stage 1: {first or 'none, vokens and mapper are untrained'}")
    kind = "the prefix" if args.prefix else f"{len(model.lora)} LoRA layers"
    mapper = "" if args.no_ldm or args.freeze_mapper else " and mapper transformer"
    print(f"trained: {sum(p.numel() for p in trained.values()):,} parameters in {kind}, voken rows{mapper}")
    print(f"precomputed: {', '.join(features.made_with) or 'nothing'}")
    if args.shard:
        own, whole = weights_held(model.llama, model.unet)
        print(f"sharded: each process holds {own:,} of the {whole:,} bytes of Vicuna and UNet")

    side = model.image_encoder.vision_model.config.image_size if sees else None
    limit = min(args.max_tokens, model.llama.config.max_position_embeddings - model.virtual_tokens)
    with world.first():  # it leaves the indices of the tars to the other ranks
        open_data = partial(
            open_stories,
            tokenizer=model.tokenizer,
            queries=model.queries,
            to_input=partial(preprocess_input, size=side),  # cropped, as released; what is to be drawn is padded
            to_output=partial(preprocess_output, size=size),
            batch_size=args.batch_size,
            limit=limit,
            weights=args.tasks,
            precomputed=features,
            blind=args.blind_history,
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

    adapter = {name: p for name, p in trained.items() if "lora_" in name or "prefix_" in name}
    others = [p for name, p in trained.items() if name not in adapter]
    adapter_lr = args.lr if args.adapter_lr is None else args.adapter_lr
    groups = [{"params": list(adapter.values()), "lr": adapter_lr}, {"params": others, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8, fused=True)  # weight decay 0.01
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]
    gradients = Gradients(trained.values(), [optimizer], world)
    meter = Meter(world.size * args.batch_size * args.accumulate)
    if world.size > 1:
        print(f"{world.size} processes; each step adds up {gradients.flat.nbytes:,} bytes of them: gradients and loss")
    state = load_checkpoint(out, model, [optimizer]) if args.resume else None
    start = go_on(state, args, batches, meter, gradients)
    if world.rank == 0:
        cut_log(log, start)

    compiled = can_compile(device) and not args.shard if args.compile is None else args.compile
    if args.gradient_checkpointing:
        model.checkpoint_gradients()
    if compiled:
        model.compile_losses(args.batch_size)
    round_length = bucket_length if compiled else int  # of the rows: as it comes where nothing is compiled
    drop_rate = 0.0 if args.no_cfg else DROP_RATE
    done, shown = start, None
    model.train()  # LoRA's dropout; the frozen parts have none

    def forward(batch: dict, step: int, micro: int = 0, drop_rate: float = 0.0) -> tuple[dict, Batch]:
        """The losses of one forward pass of a step, and its rows."""
        place = micro * world.size + world.rank  # of this batch among those of the step
        torch.manual_seed(step_generator(args.seed, step, place, 1).initial_seed())  # of the dropout
        rows = collate(model.tokenizer, batch["pairs"], model.queries, round_length, limit=limit)
        draws = posterior = None
        if batch["outputs"] is not None:
            places = (args.seed, step, place * args.batch_size)
            draws = draw_pictures(model, rows.picture_rows.tolist(), drop_rate, *places)
            posterior = None if args.no_ldm else model.encode_pictures(batch["outputs"])
        elif args.shard:  # the other ranks may have pictures, and need this one's part of the UNet
            draws = model.sample_noise(0, torch.Generator()).to(device)
            posterior = None if args.no_ldm else (draws.noise, draws.noise)
        rows, weights = rows.to(device), {"min_snr_gamma": args.min_snr_gamma, "text_weight": args.text_weight}
        return model.losses(rows, draws, posterior, inputs=batch["inputs"], **weights), rows

    look = {"unit": "step", "dynamic_ncols": True, "disable": world.rank > 0}
    bar = tqdm(range(start, total), "mls", total, initial=start, **look)
    with stop_signals() as asked, closing(batches), one_line_peer_errors(), bar:
        for step in bar:
            # ---- one step
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * learning_rate_factor(step, args.warmup, total)
            for micro in range(args.accumulate):
                batch = next(batches)
                losses, rows = forward(batch, step, micro, drop_rate)
                gradients.backward(losses["loss"] / args.accumulate)
                meter.add(losses)
            gradients.step()
            meter.steps += 1
            # ---- the step is done

            done, stopping = step + 1, world.any(bool(asked))
            if shown is None and batch["outputs"] is not None:
                shown = (rows, batch["inputs"], batch["outputs"], [words_of(*pair) for pair in batch["pairs"]])
            if done % args.log_every == 0 or done == total:
                record = meter.line(done, optimizer, batches.bad, gradients)
                record |= {"graphs": compiled_graphs()} if compiled else {}
                if world.rank == 0:
                    append_log(log, record)
                bar.set_postfix({name: f"{record[name]:.4g}" for name in (*losses, "samples_per_s") if name in record})
                stop_if_nonfinite(gradients, args.max_nonfinite, done, out)
            if args.sample_every and done % args.sample_every == 0:
                if not world.any(shown is None) and (world.rank == 0 or args.shard):
                    paint_samples(model, *shown, None if world.rank else out / "samples.png")
                if world.rank == 0:
                    draw_losses(read_log(log), out / "losses.png")
            if done % args.save_every == 0 or done == total or stopping:
                state = run_state(args, batches, meter, gradients)
                if world.rank == 0:
                    save_checkpoint(out, done, model, [optimizer], state, "mls")
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
