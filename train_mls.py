"""Stage 2, multimodal learning (paper section 3.3): stories and dialogues teach when and what to say and to show.

    python train_mls.py                                                # the miniature, on stories of its drawn world
    python train_mls.py --weights weights --data vist-train.tar --uas runs/cc3m --out runs/vist
    python train_mls.py --weights weights --data mmdialog-train.tar --uas runs/cc3m --out runs/chat --prefix
    python sample.py --weights weights --checkpoint runs/vist --prompt "we had a barbecue." --image a.jpg --turns 1

It starts from a run of stage 1. An adapter of Vicuna (LoRA, or virtual tokens with --prefix), the voken rows and the
mapper's transformer are trained; the mapper's MLP and learned queries stay as stage 1 left them, and with --no-uas are
trained, too. The loss is 0.01 L_text + L_LDM over three tasks: a picture for a text, a text for a picture, or both as
the next step. The defaults are the paper's: 4 epochs, batches of 32, AdamW with learning rate 2e-5. The miniature has
its own defaults, in WEIGHTS/minigpt5/config.json, with weight 1 for L_text.
"""

import argparse
from functools import partial
from pathlib import Path

from common.cli import DTYPES, number, run as run_command  # isort: skip

import torch
from torch import Tensor

from common.collate import collate
from common.images import preprocess_output
from lora import TARGETS
from miniature.world import write_stories
from minigpt5 import DROP_RATE, TEXT_WEIGHT
from prompts import TASKS, WORDS_FIRST_SYSTEM
from published.loading import MAX_RANK, find_checkpoint, given_checkpoint
from published.parts import load_minigpt5
from qformer import preprocess_input
from tars.stories import StoryData
from trainer.compiled import bucket_length, checkpoint_gradients, compile_losses, pad_pictures
from trainer.log import Preview, picture_title
from trainer.muon import Muon
from trainer.options import RATE, SHARE, VOKENS, read_run_options
from trainer.run import Run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    about = "tars of stories or dialogues, or .jsonl lists of them (tars/datasets.py); default: drawn stories"
    add("--data", nargs="+", help=about)
    add("--uas", type=Path, help="stage 1's run or checkpoint to start from; default: WEIGHTS/minigpt5's, if any")
    add("--no-uas", action="store_true", help="start from untrained vokens and mapper (an ablation of the paper)")
    add("--prefix", action="store_true", help="prefix tuning instead of LoRA")
    rank = number(1, MAX_RANK)
    add("--lora-rank", type=rank, default=8, metavar="R", help="rank of LoRA's matrices; alpha is twice the rank")
    add("--lora-targets", type=lambda text: tuple(map(str.strip, text.split(","))), default=TARGETS, metavar="NAME,...",
        help=f"the linear layers of Vicuna that LoRA is added to; default: {','.join(TARGETS)}")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks to train on steps of stories; default: all")
    add("--blind-history", type=SHARE, default=0.0, metavar="SHARE",
        help="share of story steps whose history has its texts without its pictures")  # fmt: skip
    add("--words-only", action="store_true",
        help="train on the words of the answers without their pictures: the paper's fine-tuned MiniGPT-4")  # fmt: skip
    about = "train LoRA alone, on dialogues that describe their pictures in parentheses; implies --words-only"
    add("--words-first", action="store_true", help=about)
    add("--text-weight", type=number(0.0), default=TEXT_WEIGHT, help="weight of L_text in the loss; L_LDM has weight 1")
    add("--freeze-mapper", action="store_true", help="else its transformer trains; with --no-uas, all of it")
    add("--lr", type=RATE, default=2e-5, help="learning rate of the voken rows and the mapper")
    add("--muon", type=RATE, metavar="LR", help="learning rate of Muon for the mapper's matrices; 0 or none: AdamW")
    add("--adapter-lr", type=RATE, help="learning rate of LoRA or the prefix; default: --lr")
    add("--vokens", type=VOKENS, default=8, help="vokens of a picture, where there is no stage 1 to start from")
    add("--start-as", metavar="TEXT", help="with --no-uas: the vokens start as the embeddings of this text")
    add("--max-tokens", type=int, default=2048, help="longest sequence; a longer history loses its oldest steps")
    args = read_run_options(parser, "train_mls", out="runs/mls", epochs=4, batch_size=32)
    if args.uas and args.no_uas:
        parser.error("--uas and --no-uas exclude each other")
    if args.start_as and not args.no_uas:
        parser.error("--start-as is for --no-uas: stage 1 has trained the vokens' rows")
    if args.words_first and (args.prefix or not args.data):
        parser.error("--words-first trains LoRA, not a prefix, and needs --data: drawn stories describe no pictures")
    if args.words_only and "image" in args.tasks:
        parser.error("--words-only leaves nothing of the task image: give --tasks text text+image, or one of them")
    args.words_only |= args.words_first
    return args


def main() -> None:
    args = arguments()
    run = Run(args, "mls")
    default = None if args.no_uas else find_checkpoint(args.weights / "minigpt5")
    stage_1 = given_checkpoint(args.uas) if args.uas else default

    # ---- tars, before the model: encoders whose outputs are precomputed are not loaded
    *tars, precomputed = run.find_tars("turns", write_stories)  # of --data, and of --val
    is_precomputed = "queries" in precomputed.shapes
    print(f"precomputed tensors: {', '.join(precomputed.made_with) or 'none'}")

    # ---- model, of which the adapter, the voken rows and the mapper's transformer train
    reads_pictures = not (is_precomputed or (args.words_first and not (args.weights / "blip2").is_dir()))
    model = load_minigpt5(args.weights, stage_1, args.vokens, DTYPES[args.dtype], run.device, reads_pictures,
                          start_as=args.start_as)  # fmt: skip
    if model.lora or model.prefix:
        raise ValueError(f"{stage_1}: stage 2 starts from a checkpoint of stage 1, this one has an adapter already")
    if is_precomputed:
        model.vae.encoder, model.queries = None, precomputed.shapes["queries"][0]
    lora = {"targets": args.lora_targets, "rank": args.lora_rank, "alpha": 2 * args.lora_rank}
    model.add_adapters(lora=None if args.prefix else lora, prefix={} if args.prefix else None)
    trains_mapper = not (args.no_ldm or args.freeze_mapper or args.words_only)  # without L_LDM no loss reaches it
    model.mapper.requires_grad_(trains_mapper)
    if stage_1:  # its MLP and queries stay as they are; without stage 1 they train, too
        model.mapper.fc.requires_grad_(False)
        model.mapper.t2i_decoder_prompt.requires_grad_(False)
    model.vokens.requires_grad_(not args.words_first)
    model.lora_for_words = args.words_first
    if trains_mapper:  # else guidance stays as stage 1 has it
        model.guides_against_empty_caption = args.no_cfg
    trained = {name: p for name, p in model.trained_parameters().items() if p.requires_grad}
    print(f"stage 1: {stage_1 or 'none, vokens and mapper are untrained'}")
    kind = "the prefix" if args.prefix else f"{len(model.lora)} LoRA layers"
    names = [kind, *["voken rows"] * (not args.words_first)]
    names += ["the mapper's transformer" if stage_1 else "the whole mapper"] * trains_mapper
    count = sum(parameter.numel() for parameter in trained.values())
    print(f"trained: {count:,} parameters in {', '.join(names)}; all else is frozen")
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    if run.compiled:
        compile_losses(model)
    model.train()  # LoRA's dropout; the frozen parts have none

    # ---- batches
    side = model.image_encoder.vision_model.config.image_size if reads_pictures else None  # of an input picture
    limit = min(args.max_tokens, model.llama.config.max_position_embeddings - model.virtual_tokens)
    open_stories = partial(
        StoryData,
        tokenizer=model.tokenizer,
        queries=model.queries,
        to_input=partial(preprocess_input, size=side) if side else None,  # cropped, as released
        to_output=partial(preprocess_output, size=run.size),  # padded
        limit=limit,
        tasks=[task for task in TASKS if task in args.tasks],
        precomputed=precomputed,
        blind=args.blind_history,
        words_only=args.words_only,
        system=WORDS_FIRST_SYSTEM if args.words_first else None,
    )
    batches, held_out = run.open_tars(open_stories, *tars)

    # ---- optimiser
    adapter = [p for name, p in trained.items() if "lora_" in name or "prefix_" in name]
    matrices = [p for p in model.mapper.parameters() if args.muon and p.requires_grad and p.dim() == 2]
    with_own_rate = {id(p) for p in (*adapter, *matrices)}
    others = [p for p in trained.values() if id(p) not in with_own_rate]
    adapter_lr = args.lr if args.adapter_lr is None else args.adapter_lr
    groups = [{"params": adapter, "lr": adapter_lr}, {"params": others, "lr": args.lr}]
    groups = [group for group in groups if group["params"]]  # --words-first trains LoRA alone
    optimizers = [torch.optim.AdamW(groups, eps=1e-8, fused=True)]  # weight decay 0.01, torch's default
    optimizers += [Muon(matrices, args.muon)] if matrices else []

    # ---- losses
    round_length = bucket_length if run.compiled else int
    multiple = -(-args.batch_size // 8)  # when compiled, the pictures of a batch are padded to a multiple of this

    def losses_of(samples: dict, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """The losses of some samples: loss = --text-weight * text_loss, with pictures + ldm_loss (Eq. 3)."""
        batch = collate(model.tokenizer, samples["ids"], model.queries, round_length, round_length, limit=limit)
        noise = posterior = None
        if samples["outputs"] is not None:
            if run.preview is None:
                titles = [picture_title(*pair) for pair in samples["pairs"]]
                run.preview = Preview(batch, samples["inputs"], samples["outputs"], titles)
            drop_rate = DROP_RATE if model.training and not args.no_cfg else 0.0
            noise = model.sample_noise(batch.picture_sequences.tolist(), generators, drop_rate)
            posterior = None if args.no_ldm else model.encode_pictures(samples["outputs"])
            if run.compiled:
                batch, noise, posterior = pad_pictures(batch, noise, posterior, multiple)
        weights = {"min_snr_gamma": args.min_snr_gamma, "text_weight": args.text_weight}
        return model.losses(batch, noise, posterior, inputs=samples["inputs"], **weights)

    # ---- training
    # Before a step this sets the learning rates, afterwards it logs, paints samples, saves and validates.
    for step in run.steps(model, optimizers, batches, held_out, losses_of):
        for samples, generators in run.batches(step):  # as many as --accumulate says
            losses = losses_of(samples, generators)
            run.backward(losses)
        run.optimizer_step()


if __name__ == "__main__":
    run_command(main)
