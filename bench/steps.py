"""One training step of stage 1 as train_uas.py takes it, on batches as tars/ makes them: what is timed."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from common.collate import collate
from minigpt5 import MiniGPT5, Noise, send
from prompts import uas_texts
from train_uas import MAX_TOKENS
from trainer.compiled import bucket_length
from trainer.run import step_generator
from vae import to_pixels

LR, GAMMA = 2e-5, 5.0
CAPTION = "a small red boat with white sails lies on the calm sea at night while two stars shine over a dark hill"


def make_batches(model: MiniGPT5, size: int, number: int = 4) -> list[dict]:
    """Batches as tars/ makes them, in the host's memory: random pictures, captions of 8 to 20 words, and what
    `python -m tars precompute` would store in their place."""
    generator, batches = torch.Generator().manual_seed(0), []
    for n in range(number):
        captions = [" ".join(CAPTION.split()[: 8 + (5 * n + 3 * i) % 13]) for i in range(size)]
        side = model.unet.config.sample_size * model.vae.config.downsampling
        shape = (size, 3, side, side)
        pictures = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        moments = [torch.stack(model.encode_pictures(part), 1).cpu() for part in pictures.split(8)]
        batch = {"captions": captions, "pictures": pictures, "moments": torch.cat(moments)}
        batch["pixels"] = to_pixels(pictures)  # as the released code's loader has them
        batches.append({**batch, "encoding": model.encode_captions(captions).cpu()})
    return batches


def optimizer_of(rows: list[nn.Parameter], mapper: list[nn.Parameter], fused: bool | None) -> torch.optim.AdamW:
    groups = [{"params": rows, "lr": LR}, {"params": mapper, "lr": 10 * LR}]
    return torch.optim.AdamW(groups, eps=1e-8, fused=fused)


class Ours:
    """The step of train_uas.py. `precomputed`: from "moments" and "encoding", not from pictures and words."""

    def __init__(self, model: MiniGPT5, precomputed: bool, compiled: bool):
        self.model, self.empty = model, model.encode_captions([""])
        self.pictures, self.texts = ("moments", "encoding") if precomputed else ("pictures", "captions")
        self.round_length = bucket_length if compiled else int
        self.optimizer = optimizer_of(list(model.vokens.parameters()), list(model.mapper.parameters()), fused=True)

    def backward(self, batch: dict, draws: Noise) -> Tensor:
        model = self.model
        pairs = [uas_texts(model.tokenizer.escape(caption)) for caption in batch["captions"]]
        rows = collate(model.tokenizer, pairs, model.queries, self.round_length, limit=MAX_TOKENS)
        posterior = model.encode_pictures(batch[self.pictures])
        captions = (model.encode_captions(batch[self.texts]), self.empty)
        loss = model.losses(send(rows, model.device), draws, posterior, captions, min_snr_gamma=GAMMA)["loss"]
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        return [self.model.vokens.input.grad, self.model.vokens.output.grad, self.model.mapper.t2i_decoder_prompt.grad]


def step_of(contender, batches: list[dict], model: MiniGPT5) -> Callable[[], None]:
    """A call is one step, on one batch after the other. `contender` has `backward` and an `optimizer`, as `Ours`."""
    numbers, size = count(), len(batches[0]["captions"])

    def step() -> None:
        i = next(numbers)
        noise = model.sample_noise([0] * size, [step_generator(0, i, 0)])
        contender.backward(batches[i % len(batches)], send(noise, model.device))
        contender.optimizer.step()
        contender.optimizer.zero_grad(set_to_none=True)

    return step
