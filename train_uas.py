"""Stage 1, unimodal alignment (paper section 3.3): from caption-picture pairs the vokens learn to carry a picture.

    python train_uas.py                                                # the miniature, on pictures of its drawn world
    python train_uas.py --weights weights --data cc3m-train-*.tar --out runs/cc3m
    python train_uas.py --weights weights --data cc3m-train-*.tar --out runs/cc3m --resume   # after a stop
    python -m tars precompute cc3m-train-*.tar --weights weights --out features       # then --data features
    python sample.py --weights weights --checkpoint runs/cc3m --prompt "a lighthouse in a storm"

The mapper trains, and so do nine embedding rows beside each of Vicuna's two tables (minigpt5.Vokens); everything else
is frozen. The loss is 0.01 L_text + L_LDM + 0.1 L_CAP. The defaults are the paper's and, where it is silent, the
released code's: 2 epochs, batches of 48, AdamW with learning rate 2e-5 for the embedding rows and ten times that for
the mapper, warm-up over 1000 steps, then linearly to zero. The miniature has its own defaults, in
WEIGHTS/minigpt5/config.json.
"""

import argparse
from pathlib import Path

from common.cli import DTYPES, run as run_command  # isort: skip

import torch
from torch import Tensor

from common.collate import collate
from miniature.world import write_pairs
from minigpt5 import DROP_RATE
from prompts import uas_texts
from published.loading import given_checkpoint
from published.parts import load_minigpt5
from trainer.compiled import bucket_length, checkpoint_gradients, compile_losses
from trainer.log import Preview
from trainer.muon import Muon
from trainer.options import RATE, VOKENS, read_run_options
from trainer.run import Run

MAX_TOKENS = 256  # of a sequence; a longer caption is cut at its end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    about = "tars, folders of them; folders of KEY.jpg with KEY.txt; a .csv or .jsonl (tars/datasets.py)"
    add("--data", nargs="+", help=f"{about}; default: drawn pictures")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from vokens and mapper of this checkpoint or run")
    add("--lr", type=RATE, default=2e-5, help="learning rate of the vokens' embedding rows")
    add("--output-lr", type=RATE, help="learning rate of their output embedding rows; default: --lr")
    add("--mapper-lr", type=RATE, help="learning rate of the mapper; default: ten times --lr")
    add("--muon", type=RATE, metavar="LR", help="learning rate of Muon for the mapper's matrices; 0 or none: AdamW")
    add("--vokens", type=VOKENS, default=8, help="vokens of a picture")
    add("--start-as", metavar="TEXT", help="the vokens start as the embeddings of this text; default: the tables' mean")
    add("--no-cap", action="store_true", help="train without L_CAP (an ablation of the paper)")
    args = read_run_options(parser, "train_uas", out="runs/uas", epochs=2, batch_size=48)
    if args.no_ldm and args.no_cap:
        parser.error("--no-ldm and --no-cap leave the mapper nothing to learn from")
    return args


def main() -> None:
    args = arguments()
    run = Run(args, "uas")

    # ---- data
    batches, held_out = run.open_pairs(write_pairs)  # those of --data and --val; without --data drawn ones
    precomputed = batches.dataset.precomputed
    print(f"precomputed tensors: {', '.join(precomputed.made_with) or 'none'}")
    picture_key = "moments" if "moments" in precomputed.shapes else "pixels"
    caption_key = "encoding" if "encoding" in precomputed.shapes else "captions"

    # ---- model, of which the voken rows and the mapper train
    encodes_captions = caption_key == "captions" and not args.no_cap
    parts = {"read_pictures": False, "read_captions": encodes_captions, "start_as": args.start_as}
    init = given_checkpoint(args.init) if args.init else None
    model = load_minigpt5(args.weights, init, args.vokens, DTYPES[args.dtype], run.device, **parts)
    model.guides_against_empty_caption = args.no_cfg  # zeros are not learned then
    if picture_key == "moments":
        model.vae.encoder = None
    empty = [""] if encodes_captions else precomputed.empty_caption
    empty_encoding = None if args.no_cap else model.encode_captions(empty)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.vokens, model.mapper)]
    print("trained: {:,} parameters in the voken rows, {:,} in the mapper; all else is frozen".format(*counts))
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    if run.compiled:
        compile_losses(model)
    model.train()  # some voken features are then replaced by zeros (DROP_RATE); the frozen parts have no dropout

    # ---- optimisers
    matrices = [p for p in model.mapper.parameters() if args.muon and p.dim() == 2]
    others = [p for p in model.mapper.parameters() if not args.muon or p.dim() != 2]
    groups = [
        {"params": [model.vokens.input], "lr": args.lr},
        {"params": [model.vokens.output], "lr": args.lr if args.output_lr is None else args.output_lr},
        {"params": others, "lr": 10 * args.lr if args.mapper_lr is None else args.mapper_lr},
    ]
    optimizers = [torch.optim.AdamW(groups, eps=1e-8, fused=True)]  # weight decay 0.01, torch's default, as released
    optimizers += [Muon(matrices, args.muon)] if matrices else []

    # ---- losses
    round_length = bucket_length if run.compiled else int

    def losses_of(samples: dict, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """The losses of some caption-picture pairs: loss = 0.01 text_loss + ldm_loss (Eq. 3) + 0.1 cap_loss."""
        captions = map(model.tokenizer.escape, samples["captions"])
        texts = [uas_texts(c, args.vokens, i) for c, i in zip(captions, samples["instructions"], strict=True)]
        batch = collate(model.tokenizer, texts, model.queries, round_length, limit=MAX_TOKENS)
        run.preview = run.preview or Preview(batch, None, samples[picture_key], samples["captions"])
        drop_rate = DROP_RATE if model.training and not args.no_cfg else 0.0
        noise = model.sample_noise(batch.picture_sequences.tolist(), generators, drop_rate)
        posterior = None if args.no_ldm else model.encode_pictures(samples[picture_key])
        encodings = None if args.no_cap else (model.encode_captions(samples[caption_key]), empty_encoding)
        return model.losses(batch, noise, posterior, encodings, min_snr_gamma=args.min_snr_gamma)

    # ---- training
    # Before a step this sets the learning rates, afterwards it logs, paints samples, saves and validates.
    for step in run.steps(model, optimizers, batches, held_out, losses_of):
        for samples, generators in run.batches(step):  # as many as --accumulate says
            losses = losses_of(samples, generators)
            run.backward(losses)
        run.optimizer_step()


if __name__ == "__main__":
    run_command(main)
