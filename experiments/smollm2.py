"""SmolLM2 behind the vokens (docs/language-models.md): where its stage 1 starts, and its mapper.

    python experiments/smollm2.py start --weights smol --captions pairs.tar --out runs/smollm2/start.safetensors
    python experiments/smollm2.py mapper --weights smol --checkpoint runs/smollm2/uas --data features.tar --n 17408 \
        --steps 700 1200 4000 1700 --out runs/smollm2/mapper.safetensors

`start` writes the checkpoint from which stage 1 starts. Its mapper is the miniature's, but the first layer has another
input width. It is fitted by ridge regression, so that from SmolLM2's states it makes what the miniature's makes of its
own language model's states for the same captions. `train_uas.py --init` then trains it with the vokens' rows.

`mapper`: SmolLM2 takes most of a step of stage 1. Here the vokens' rows stay as stage 1 left them, so that their
features of some captions are computed once. The mapper alone goes on, in four parts: it imitates the conditioning that
the miniature makes of the same captions; it trains with the losses of stage 1; with L_LDM and imitation, which takes
the place of L_CAP; and, with `--descriptions` more texts, so that the UNet predicts under its conditioning what it
predicts under the miniature's.
"""

import argparse
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import MINIATURE, run  # isort: skip

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.collate import collate
from common.images import preprocess_output
from miniature.facts import random_stream, sample_picture
from miniature.paint import draw
from miniature.wishes import wish
from miniature.words import describe
from minigpt5 import CAP_WEIGHT, MiniGPT5
from prompts import uas_texts
from published.loading import given_checkpoint, save_trained, shipped_checkpoint
from published.parts import load_minigpt5, picture_size
from tars.batches import Batches, PairData
from tars.index import expand
from tars.precomputed import find_precomputed
from trainer.muon import Muon

START_AS = " kind colour size place scene time"  # of the vokens: what their states should tell
RIDGE = 1e-3  # of the states' mean square
BATCH, LR, MUON_LR, IMITATION_WEIGHT, DISTILLATION_WEIGHT = 32, 5e-4, 0.01, 0.3, 10.0  # of `mapper`
DESCRIPTIONS, JITTER = 301, 302  # purposes of random streams


def read_captions(tar: Path, n: int) -> list[str]:
    with tarfile.open(tar) as opened:
        texts = (member for member in opened if member.name.endswith(".txt"))
        return [opened.extractfile(member).read().decode() for member in islice(texts, n)]


def miniature() -> MiniGPT5:
    return load_minigpt5(MINIATURE, shipped_checkpoint(MINIATURE / "minigpt5", ()), read_pictures=False).eval()


@torch.no_grad()
def voken_features(model: MiniGPT5, captions: list[str]) -> Tensor:
    """(B, N, D) of each caption."""
    parts = []
    for first in range(0, len(captions), 32):
        texts = [uas_texts(model.tokenizer.escape(caption)) for caption in captions[first : first + 32]]
        batch = collate(model.tokenizer, texts, model.queries)
        hidden = model.hidden_states(model.embed(batch.ids), batch.targets)
        parts.append(model.voken_features(hidden, batch.picture_sequences, batch.picture_starts))
    return torch.cat(parts)


@torch.no_grad()
def start(weights: Path, captions: list[str], out: Path) -> None:
    teacher = miniature()
    model = load_minigpt5(weights, read_pictures=False, start_as=START_AS).eval()
    model.mapper.load_state_dict({n: p for n, p in teacher.mapper.state_dict().items() if n != "fc.0.weight"}, False)
    wanted = teacher.mapper.fc[0](voken_features(teacher, captions)).flatten(0, 1).double()
    states = voken_features(model, captions).flatten(0, 1).double()
    states = torch.cat([states, torch.ones(len(states), 1)], dim=1)  # and the bias
    held_out = len(states) // 8
    x, y = states[held_out:], wanted[held_out:]
    ridge = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1])
    layer = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    missed = (states[:held_out] @ layer - wanted[:held_out]).square().sum()
    explained = 1 - missed / (wanted[:held_out] - y.mean(0)).square().sum()
    model.mapper.fc[0].weight.copy_(layer[:-1].T)
    model.mapper.fc[0].bias.copy_(layer[-1])
    save_trained(model, model.trained_parameters(), out, "uas")
    print(f"{out}: {explained:.1%} of the variance of {held_out} held-out states explained")


def described(n: int, size: int) -> tuple[list[str], Tensor]:
    """Descriptions as words first writes them, most of two things, and pictures of them (n, 3, size, size)."""
    texts, pictures = [], []
    for i in range(n):
        rng = random_stream(0, i, DESCRIPTIONS)
        wished = rng.random() < 0.4
        picture = wish(rng)[1] if wished else sample_picture(rng, "train", 2 if rng.random() < 0.8 else 1)
        texts.append(describe(picture))
        jitter = int(random_stream(0, i, JITTER).integers(1 << 31))
        pictures.append(preprocess_output(draw(picture, jitter, size), size))
    return texts, torch.stack(pictures)


def fit(mapper: nn.Module, captions: int, steps: int, loss_of: Callable[[Tensor], Tensor]) -> None:
    """Train the mapper with the losses of random batches of so many captions; the rates fall to zero."""
    matrices, others = ([p for p in mapper.parameters() if (p.dim() == 2) == wanted] for wanted in (True, False))
    optimizers = [Muon(matrices, MUON_LR), torch.optim.AdamW(others, LR)]
    decay = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(steps)
    for step in (bar := tqdm(range(steps))):
        loss = loss_of(torch.randint(captions, (BATCH,), generator=generator))
        loss.backward()
        for optimizer in (*optimizers, *decay):
            optimizer.step()
        mapper.zero_grad()
        if step % 10 == 9:
            bar.set_postfix(loss=round(loss.item(), 4))


def train_mapper(
    weights: Path, checkpoint: Path, data: list[str], n: int, descriptions: int, steps: list[int], out: Path
) -> None:
    """`steps`: of the four parts."""
    teacher, model = miniature(), load_minigpt5(weights, given_checkpoint(checkpoint), read_pictures=False).eval()
    size = picture_size(weights)
    tars = expand(data)
    precomputed = find_precomputed(tars, weights)
    batches = Batches(PairData(tars, partial(preprocess_output, size=size), precomputed), BATCH)
    empty_caption = model.encode_captions(precomputed.empty_caption)
    read = [next(batches) for _ in tqdm(range(n // BATCH), "captions")]
    moments, encodings = (torch.cat([samples[name] for samples in read]) for name in ("moments", "encoding"))
    features = torch.cat([voken_features(model, samples["captions"]) for samples in tqdm(read, "features")])
    with torch.no_grad():
        wanted = [teacher.mapper(voken_features(teacher, samples["captions"])) for samples in tqdm(read, "miniature's")]
    wanted, mapper = torch.cat(wanted), model.mapper.requires_grad_(True)
    generator, mean = torch.Generator().manual_seed(0), torch.full((BATCH,), 1 / BATCH)

    def imitation(chosen: Tensor) -> Tensor:
        return (mapper(features[chosen]) - wanted[chosen]).square().mean()

    def distillation(chosen: Tensor) -> Tensor:
        noise = model.sample_noise(range(BATCH), [generator] * BATCH, 0.0)
        latents = model.vae.sample(*moments[chosen].float().unbind(1), noise.latent_noise)
        noisy, _ = model.schedule.add_noise(latents, noise.epsilon, noise.timesteps)
        with torch.no_grad():
            target = model.unet(noisy, noise.timesteps, wanted[chosen])
        missed = model.unet(noisy, noise.timesteps, mapper(features[chosen])) - target
        return DISTILLATION_WEIGHT * missed.square().mean() + IMITATION_WEIGHT * imitation(chosen)

    def ldm_and_cap(chosen: Tensor) -> tuple[Tensor, Tensor]:
        posterior, captions = moments[chosen].float().unbind(1), (encodings[chosen].float(), empty_caption)
        noise = model.sample_noise(range(BATCH), [generator] * BATCH)
        losses = model.picture_losses(features[chosen], noise, mean, posterior, captions, 0.0)
        return losses["ldm_loss"], losses["cap_loss"]

    fit(mapper, len(features), steps[0], imitation)
    fit(mapper, len(features), steps[1], lambda i: torch.stack(ldm_and_cap(i)) @ torch.tensor([1.0, CAP_WEIGHT]))
    fit(mapper, len(features), steps[2], lambda i: ldm_and_cap(i)[0] + IMITATION_WEIGHT * imitation(i))
    texts, pictures = described(descriptions, size)
    features = torch.cat([features, voken_features(model, texts)])
    with torch.no_grad():
        wanted = torch.cat([wanted, teacher.mapper(voken_features(teacher, texts))])
    moments = torch.cat([moments, *(torch.stack(model.encode_pictures(part), 1) for part in pictures.split(BATCH))])
    fit(mapper, len(features), steps[3], distillation)
    save_trained(model, model.trained_parameters(), out, "uas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "mapper"), help="what is made, see above")
    parser.add_argument("--weights", type=Path, default=Path("smol"), help="folder with SmolLM2 as language model")
    parser.add_argument("--captions", type=Path, help="tar of captions, as miniature/world.py writes them")
    parser.add_argument("--checkpoint", type=Path, help="run of stage 1 whose mapper goes on")
    parser.add_argument("--data", nargs="+", help="precomputed tars of pairs")
    parser.add_argument("--n", type=int, default=2048, help="captions")
    parser.add_argument("--steps", type=int, nargs=4, default=[700, 1200, 4000, 1700], help="of `mapper`'s four parts")
    parser.add_argument("--descriptions", type=int, default=12800, help="beside the captions, in `mapper`'s last part")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    args = parser.parse_args()
    if not (args.captions if args.what == "start" else args.checkpoint and args.data):
        parser.error("start needs --captions, mapper needs --checkpoint and --data")
    if args.what == "start":
        start(args.weights, read_captions(args.captions, args.n), args.out)
    else:
        train_mapper(args.weights, args.checkpoint, args.data, args.n, args.descriptions, args.steps, args.out)


if __name__ == "__main__":
    run(main)
