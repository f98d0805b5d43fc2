"""Texts -> token sequences of one length, as the model reads them in training.

B sequences, T tokens of the longest source and the longest target, L of that target, M output pictures, N vokens of a
picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.tokenizer import Tokenizer

IGNORE = -100  # label of a position that takes no part in L_text


class Batch(NamedTuple):
    """Token sequences, padded on the right, and the places of their output pictures."""

    ids: Tensor  # (B, T)
    targets: Tensor  # (B, L) positions of the target's tokens, and of padding after a shorter target
    labels: Tensor  # (B, L) what L_text learns there, IGNORE where it learns nothing
    picture_sequences: Tensor  # (M,) the sequence that each output picture belongs to
    picture_starts: Tensor  # (M,) the position that predicts its [IMG0]
    picture_weights: Tensor  # (M,) its weight in the mean over pictures: 1 / M, or 0 for padding


def collate(
    tokenizer: Tokenizer,
    pairs: list[tuple[str | list[int], str | list[int]]],
    queries: int,
    round_length: Callable[[int], int] = int,
    round_target: Callable[[int], int] = int,
    limit: int = 2048,
) -> Batch:
    """(source, target) texts, or their token ids -> sequences of <s>, source, target, at most `limit` tokens long.

    Source and target are tokenised separately, so each begins with sentencepiece's leading space, and <ImageHere>
    becomes `queries` ids. A source that is too long is cut at its end. Of the target, L_text learns all tokens but
    [IMG1]..[IMGN-2]: [IMG0] decides where a picture comes; [IMGN-1] is learned because the released code learns it,
    although it is never sampled. T holds the longest source and the longest target together (see
    `MiniGPT5.hidden_states`). `round_length` and `round_target` may round T and L up, so that a compiled step meets few
    shapes.
    """
    ignored = {*tokenizer.voken_ids[1:-1], tokenizer.image_id}
    sequences, labels, starts, pictures = [], [], [], []
    for row, pair in enumerate(pairs):
        source, target_ids = (tokenizer.encode(part, queries) if isinstance(part, str) else part for part in pair)
        source_ids = [tokenizer.bos_id, *source][: limit - len(target_ids)]
        sequences.append(source_ids + target_ids)
        labels.append([IGNORE if i in ignored else i for i in target_ids])
        starts.append(len(source_ids))
        pictures += [(row, len(source_ids) + k - 1) for k, i in enumerate(target_ids) if i == tokenizer.voken_ids[0]]
    longest = max(map(len, labels))
    T, L = round_length(max(starts) + longest), round_target(longest)
    ids = torch.tensor([ids + [tokenizer.eos_id] * (T - len(ids)) for ids in sequences])
    labels = torch.tensor([label + [IGNORE] * (L - len(label)) for label in labels])
    targets = (torch.tensor(starts)[:, None] + torch.arange(L)).clamp(max=T - 1)
    owners, before = torch.tensor(pictures, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Batch(ids, targets, labels, owners, before, torch.full((len(owners),), 1 / max(1, len(owners))))
