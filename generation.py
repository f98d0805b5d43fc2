"""Answers: the language model's words, and a picture wherever it says [IMG0].

    prompts                    texts with <ImageHere> for every picture that comes with them
    say -> ids, features       what each answer says; (M, N, D) voken features of the M pictures in it
    paint -> pixels            (M, 3, H, W), denoised under the mapper's conditioning
    answer                     text and pictures in turn

Prompts of a batch may differ in length and in their pictures. Each has a random generator of its own, so its answer is
the same alone and in a batch.

B prompts, T tokens, N vokens of a picture, M pictures, D width of the language model, S Dc conditioning.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from images import to_image
from llama import KVCache
from minigpt5 import MiniGPT5, expand_placeholders, type_of
from qformer import preprocess_input
from scheduler import SAMPLERS


@dataclass
class Sampling:
    """How an answer is drawn from the model: the released code's settings."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 2.0
    max_new_tokens: int = 256
    force_image: bool = False  # begin with a picture
    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5  # 1: no guidance


def pick_token(logits: Tensor, said: list[int], sampling: Sampling, generator: torch.Generator) -> int:
    """Sample the next id from logits (V,): repetition penalty over the ids in `said`, temperature, top k, top p."""
    logits = logits.float().cpu()
    seen = torch.tensor(sorted(set(said)))
    scores = logits[seen]
    penalty = sampling.repetition_penalty
    logits = logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, order = (logits / sampling.temperature).topk(min(sampling.top_k, len(logits)))
    probabilities = scores.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens: the first is always kept
    probabilities[before >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def padded(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (B, T) padded on the right, and the mask (B, T) of what is real."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (T - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def say(
    model: MiniGPT5,
    prompts: list[str],
    pixels: Tensor | None,
    sampling: Sampling,
    generators: list[torch.Generator],
) -> list[tuple[list[int], Tensor]]:
    """The words of each answer: (ids, voken features (M, N, D) of its M pictures).

    pixels: the prompts' pictures in order, as `MiniGPT5.embed` takes them. When [IMG0] is drawn all N vokens are fed at
    once and only [IMG0] is recorded; text goes on after the last one. An answer ends with </s>, with "###", after
    max_new_tokens or where the positions end; the stop ids stay in it. The repetition penalty counts <s> and what was
    said, not the prompt. ValueError for a prompt that leaves no room.
    """
    tokenizer, device, config = model.tokenizer, model.device, model.llama.config
    start, vokens, N = tokenizer.voken_ids[0], tokenizer.voken_ids, len(tokenizer.voken_ids)
    rows = [[tokenizer.bos_id, *expand_placeholders(tokenizer, tokenizer.encode(p), model.queries)] for p in prompts]
    virtual = model.prefix.embedding.num_embeddings if model.prefix else 0
    used = [virtual + len(row) for row in rows]
    slots = min(max(used) + sampling.max_new_tokens + 8 * N, config.max_position_embeddings)
    if max(used) + N > slots:
        raise ValueError(f"the prompt has {max(used) - virtual} tokens, room is for {slots - N - virtual}")
    cache = KVCache(config, len(rows), slots, type_of(model.llama), device)
    if model.prefix:
        model.prefix.fill(cache)

    ids, mask = padded(rows, tokenizer.eos_id, device)
    hidden = model.llama(model.embed(ids, pixels), mask, cache)
    hidden = hidden[torch.arange(len(rows)), mask.sum(1) - 1]  # (B, D), the state that predicts the next token
    answers = [([], []) for _ in rows]
    active = [True] * len(rows)
    for _ in range(sampling.max_new_tokens):
        logits = model.vokens.logits(model.llama, hidden)  # (B, V')
        fed, drawn = [[] for _ in rows], [False] * len(rows)
        for row, (said, features) in enumerate(answers):
            if not active[row]:
                continue
            forced = sampling.force_image and not features
            history = [tokenizer.bos_id, *said]
            said.append(start if forced else pick_token(logits[row], history, sampling, generators[row]))
            drawn[row] = said[-1] == start
            fed[row] = vokens if drawn[row] else said[-1:]
            used[row] += len(fed[row])
            active[row] = not tokenizer.ends(said) and used[row] + N <= slots
        if not any(active) and not any(drawn):
            break
        ids, mask = padded(fed, tokenizer.eos_id, device)
        following = model.llama(model.embed(ids), mask, cache)  # (B, N or 1, D)
        for row in [row for row in range(len(rows)) if drawn[row]]:
            answers[row][1].append(torch.cat([hidden[row : row + 1], following[row, : N - 1]]).float())
        hidden = following[torch.arange(len(rows)), (mask.sum(1) - 1).clamp(min=0)]
        if not any(active):
            break
    empty = torch.empty(0, N, config.hidden_size, device=device)
    return [(said, torch.stack(features) if features else empty) for said, features in answers]


@torch.no_grad()
def paint(model: MiniGPT5, features: Tensor, sampling: Sampling, latents: Tensor) -> Tensor:
    """Voken features (M, N, D) and noise (M, C, h, w) -> pixels (M, 3, H, W), about [-1, 1], guided against zeros."""
    guided, dtype = sampling.guidance != 1, type_of(model.unet)
    if guided:
        features = torch.cat([torch.zeros_like(features), features])
    conditioning = model.mapper(features).to(dtype)  # (2M or M, S, Dc)
    sampler = SAMPLERS[sampling.sampler](model.schedule, sampling.steps)
    for index, timestep in enumerate(sampler.timesteps):
        x = torch.cat([latents, latents]) if guided else latents
        prediction = model.unet(x.to(dtype), timestep, conditioning).float()
        if guided:
            without, given = prediction.chunk(2)
            prediction = without + sampling.guidance * (given - without)
        latents = sampler.step(prediction, index, latents)
    return model.vae.decode(latents.to(type_of(model.vae))).float()


def segments_of(model: MiniGPT5, ids: list[int], pictures: list[Image.Image]) -> list[str | Image.Image]:
    """What was said, with a picture in the place of every [IMG0]; other special tokens are left out."""
    tokenizer, segments, text = model.tokenizer, [], []
    remaining = iter(pictures)
    for i in [*ids, tokenizer.eos_id]:
        if i not in (tokenizer.voken_ids[0], tokenizer.eos_id):
            text.append(i)
            continue
        words = tokenizer.decode(text, skip_special=True).strip().removesuffix("###").strip()
        segments += [words] if words else []
        segments += [next(remaining)] if i == tokenizer.voken_ids[0] else []
        text = []
    return segments


def answer(
    model: MiniGPT5,
    prompts: list[str],
    pictures: list[list[Image.Image]],
    sampling: Sampling,
    generators: list[torch.Generator],
) -> list[list[str | Image.Image]]:
    """Text and pictures in turn, for each prompt. A prompt holds one <ImageHere> for each of its `pictures`."""
    for prompt, given in zip(prompts, pictures, strict=True):
        places = model.tokenizer.encode(prompt).count(model.tokenizer.image_id)
        if places != len(given):
            raise ValueError(f"{len(given)} pictures for {places} places in the prompt")
    pixels = None
    if any(pictures):
        size = model.image_encoder.vision_model.config.image_size
        pixels = torch.stack([preprocess_input(picture, size, pad=True) for given in pictures for picture in given])
        pixels = pixels.to(model.device, type_of(model.image_encoder))
    said = say(model, prompts, pixels, sampling, generators)
    counts = [len(features) for _, features in said]
    painted = iter([])
    if sum(counts):
        latents = [model.draw_latents(n, generator) for n, generator in zip(counts, generators, strict=True)]
        painted = iter(paint(model, torch.cat([features for _, features in said]), sampling, torch.cat(latents)))
    return [
        segments_of(model, ids, [to_image(next(painted)) for _ in range(n)])
        for (ids, _), n in zip(said, counts, strict=True)
    ]
