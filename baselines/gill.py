"""GILL (Koh et al. 2023, arXiv 2305.17216), the paper's baseline on CC3M: vokens learn the caption's encoding.

    python baselines/gill.py --data cc3m.tar --out runs/gill --weights weights    # default: drawn pairs, the miniature
    python baselines/stable_diffusion.py --data held-out.tar --checkpoint runs/gill --answers gill-pairs

It has the same frozen language model and vokens as MiniGPT-5, but a mapper and a loss of its own: the mapper learns
Stable Diffusion's encoding of the caption, without the diffusion model's loss and without dropped conditions. Pictures
are guided against the empty caption's encoding.

    caption, [IMG0]..[IMGN-1]          (B, T)      collate
    states at the vokens, embeddings   (B, N, D)   each voken's own state, where MiniGPT-5 takes the one before it
    conditioning                       (B, S, Dc)  GillMapper of their sum
    L = MSE to the caption's encoding + 0.01 L_text

Left out: what else GILL learns, which is to read pictures, to retrieve them, and to choose between retrieval and
generation. Here [IMG0] is forced, not sampled. The loss is the paper's; the released code has its square root.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DTYPES, run as run_command  # isort: skip

import torch
from torch import Tensor, nn

from common.collate import collate
from mapper import Attention, Transformer
from miniature.world import write_pairs
from minigpt5 import TEXT_WEIGHT, MiniGPT5, Vokens, send
from prompts import uas_texts
from published.clip_tokenizer import ClipTokenizer
from published.loading import matching_tensors, rows_of, save_safetensors, tensor_slices
from published.parts import config_of, frozen_dtypes, load_llama, load_text_encoder, load_tokenizer
from trainer.compiled import checkpoint_gradients
from trainer.options import RATE, VOKENS, read_run_options
from trainer.run import Run

HEADS, WIDTH = 4, 512  # of its mapper
MAX_TOKENS = 256  # of a sequence, as in stage 1


class GillMapper(nn.Module):
    """Features (B, N, D) -> conditioning (B, S, Dc): narrower than MiniGPT-5's, with a linear layer at either end. The
    names are those of GILL's released checkpoints."""

    def __init__(self, llm_width: int, conditioning_width: int, tokens: int, width: int = WIDTH):
        super().__init__()
        self.fc = nn.Linear(llm_width, width)
        self.tfm = Transformer(width)
        self.query_embs = nn.Parameter(torch.randn(1, tokens, width))
        self.model = nn.Linear(width, conditioning_width)
        for module in self.modules():
            if isinstance(module, Attention):
                module.heads = HEADS

    def forward(self, features: Tensor) -> Tensor:
        return self.model(self.tfm.decoder(self.query_embs, self.tfm.encoder(self.fc(features))))


class Gill(nn.Module):
    """The language model, its vokens and the mapper. `encode` turns texts into Stable Diffusion's conditioning, in the
    place of its text encoder."""

    hidden_states, text_loss, states = MiniGPT5.hidden_states, MiniGPT5.text_loss, MiniGPT5.voken_features
    lora = prefix = None

    def __init__(self, weights: Path, dtype: torch.dtype | None, device: torch.device, vokens: int, width: int):
        super().__init__()
        sd, llm_dtype = weights / "stable-diffusion", frozen_dtypes(weights, dtype, device)[0]
        self.device, self.tokenizer = device, load_tokenizer(weights / "vicuna", vokens)
        self.llama = load_llama(weights / "vicuna", llm_dtype, device)
        self.vokens = Vokens(self.llama, vokens, self.tokenizer.base_vocabulary)
        tokens = config_of("text encoder", sd / "text_encoder" / "config.json").max_position_embeddings
        conditioning = config_of("unet", sd / "unet" / "config.json").cross_attention_dim
        self.mapper = GillMapper(self.llama.config.hidden_size, conditioning, tokens, width).to(device)

    def text_loss_and_conditioning(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> L_text, conditioning (B, S, Dc)."""
        texts = [uas_texts(self.tokenizer.escape(text), len(self.tokenizer.voken_ids)) for text in texts]
        batch = send(collate(self.tokenizer, texts, 0, limit=MAX_TOKENS), self.device)
        embeddings = self.vokens.embed(self.llama, batch.ids)  # (B, T, D)
        hidden = self.hidden_states(embeddings, batch.targets)
        previous = (batch.targets - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        text_loss = self.text_loss(hidden.gather(1, previous), batch.labels)
        positions = batch.picture_sequences, batch.picture_starts + 1
        return text_loss, self.mapper(self.states(hidden, *positions) + self.states(embeddings, *positions))

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        return self.text_loss_and_conditioning(texts)[1]

    # ---- what a run saves and loads

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save_trained(self, trained: dict[str, nn.Parameter], path: Path, stage: str) -> None:
        save_safetensors(trained, path, {"stage": stage})

    @torch.no_grad()
    def load_trained(self, path: Path) -> None:
        """In place: an optimiser may hold the parameters. Raises WeightsError."""
        trained = self.trained_parameters()
        for name, tensor in matching_tensors(trained, [path]).items():
            trained[name].copy_(tensor)


def load_gill(weights: Path, checkpoint: Path, dtype: torch.dtype | None, device: torch.device) -> Gill:
    """A run's GILL, with the numbers of vokens and the width that it was trained with. Raises WeightsError."""
    tensors = tensor_slices(checkpoint)
    vokens = rows_of(tensors, "vokens.input", range(2, 1025), checkpoint) - 1
    width = rows_of(tensors, "mapper.fc.weight", range(HEADS, 1 << 14, HEADS), checkpoint)
    gill = Gill(weights, dtype, device, vokens, width)
    gill.load_trained(checkpoint)
    return gill.eval()


# ---- training


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", help="captioned pictures, as train_uas.py takes them; default: drawn pictures")
    add("--lr", type=RATE, default=1e-3, help="learning rate")
    add("--vokens", type=VOKENS, default=8, help="vokens of a picture")
    add("--width", type=int, default=WIDTH, help="width of the mapper")
    refused = ("no_cfg", "no_ldm", "compile")
    args = read_run_options(parser, "train_gill", out="runs/gill", epochs=2, batch_size=48, refused=refused)
    if args.width < HEADS or args.width % HEADS:
        parser.error(f"--width must be a multiple of the mapper's {HEADS} heads")
    return args


def main() -> None:
    args = arguments()
    run = Run(args, "gill", Gill.save_trained, Gill.load_trained)
    batches, held_out = run.open_pairs(write_pairs)
    model = Gill(args.weights, DTYPES[args.dtype], run.device, args.vokens, args.width)
    sd, dtype = args.weights / "stable-diffusion", frozen_dtypes(args.weights, DTYPES[args.dtype], run.device)[0]
    text_encoder, tokenizer = load_text_encoder(sd / "text_encoder", dtype, run.device), ClipTokenizer(sd / "tokenizer")
    trained = list(model.trained_parameters().values())
    print(f"trained: {sum(p.numel() for p in trained):,} parameters in the voken rows and the mapper")
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)  # as GILL's code

    def losses_of(samples: dict, generators: list[torch.Generator]) -> dict[str, Tensor]:
        text_loss, conditioning = model.text_loss_and_conditioning(samples["captions"])
        # Stable Diffusion's own encoding, without the padding mask
        target = text_encoder(tokenizer(samples["captions"])[0].to(run.device)).float()
        cap_loss = (conditioning - target).square().mean()
        return {"loss": cap_loss + TEXT_WEIGHT * text_loss, "cap_loss": cap_loss, "text_loss": text_loss}

    # Before a step this sets the learning rates, afterwards it logs, saves and validates.
    for step in run.steps(model, [optimizer], batches, held_out, losses_of):
        for samples, generators in run.batches(step):  # as many as --accumulate says
            losses = losses_of(samples, generators)
            run.backward(losses)
        run.optimizer_step()


if __name__ == "__main__":
    run_command(main)
