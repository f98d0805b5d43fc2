"""The random numbers of a training step. Each sample and each batch has a generator of its own, which depends on the
seed and on its place in the run alone: a resumed run has the same ones, with whatever number of processes."""

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minigpt5 import DROP_RATE, Noise

NOISE, DROPOUT = 0, 1  # purposes of random streams


class Place(NamedTuple):
    """Where a batch stands in the run."""

    step: int
    batch: int  # among the batches of all forward passes and ranks of the step


def step_generator(seed: int, step: int, index: int, purpose: int = NOISE) -> torch.Generator:
    """The generator of one sample or batch of a step."""
    entropy = np.random.SeedSequence([seed, step, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) >> 1)


def sample_noise(args: argparse.Namespace, model: nn.Module, picture_sequences: Iterable[int], place: Place) -> Noise:
    """`model.sample_noise` for the pictures of a batch, sequence by sequence: a sample's random numbers are the same on
    whichever rank and in whichever forward pass it comes. picture_sequences: `Batch`'s, as a list. Like dropout,
    conditions are dropped in training mode only. args: those of `trainer.options`."""
    drop_rate = DROP_RATE if model.training and not args.no_cfg else 0.0
    noise = []
    for row, pictures in Counter(picture_sequences).items():
        generator = step_generator(args.seed, place.step, place.batch * args.batch_size + row)
        noise.append(model.sample_noise(pictures, generator, drop_rate))
    return Noise(*map(torch.cat, zip(*noise, strict=True)))


def seed_dropout(args: argparse.Namespace, place: Place) -> None:
    torch.manual_seed(step_generator(args.seed, *place, DROPOUT).initial_seed())
