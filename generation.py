"""Answers: the language model's words, and a picture wherever it says [IMG0].

    prompts                    texts with <ImageHere> for every picture that comes with them
    say -> ids, features       what each answer says; (M, N, D) voken features of the M pictures in it
    paint -> pixels            (M, 3, H, W), denoised under the mapper's conditioning
    answer                     text and pictures in turn

Prompts of a batch may differ in length and in their pictures. Each has a random generator of its own, so its answer is
the same alone and in a batch.

B prompts, T tokens, N vokens of a picture, M pictures, D width of the language model, S Dc conditioning.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.images import to_image
from llama import KVCache, Llama
from minigpt5 import MiniGPT5, expand_placeholders, send, type_of
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
    compile: bool = False  # torch.compile for the token, the denoising step and the decoder


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=Sampling.steps, help="denoising steps of a picture")
    add("--guidance", type=float, default=Sampling.guidance, help="guidance against the zero-voken condition; 1: off")
    sampler = "what takes the noise out of a picture"
    add("--sampler", choices=sorted(SAMPLERS), default=Sampling.sampler, help=sampler)
    add("--temperature", type=float, default=Sampling.temperature, help="of the words; 0: always the likeliest")
    add("--top-p", type=float, default=Sampling.top_p, help="sample among the likeliest words of this mass; 1: off")
    penalty = "on words already said; 1: off"
    add("--repetition-penalty", type=float, default=Sampling.repetition_penalty, help=penalty)
    add("--max-new-tokens", type=int, default=Sampling.max_new_tokens, help="longest answer")
    add("--force-image", action="store_true", help="begin every answer with a picture")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """ValueError for values out of range."""
    if not 0 < args.top_p <= 1 or args.temperature < 0 or args.repetition_penalty <= 0:
        raise ValueError("--top-p is in (0, 1], --temperature at least 0, --repetition-penalty above 0")
    if min(args.max_new_tokens, args.steps) < 1:
        raise ValueError("--max-new-tokens and --steps are at least 1")
    return Sampling(**{name: value for name, value in vars(args).items() if name in Sampling.__dataclass_fields__})


@cache
def compiled(function: Callable, replayed: bool = False, **options: bool) -> Callable:
    """`function` by torch.compile, a graph for each shape. `replayed`: a GPU gets all its kernels at once (CUDA graph);
    what it returns is overwritten by the next call."""
    return torch.compile(function, dynamic=False, options={"triton.cudagraphs": replayed, **options})


def pick_tokens(logits: Tensor, said: Tensor, chances: Tensor, sampling: Sampling) -> Tensor:
    """The next ids (B,) from logits (B, V'): repetition penalty over the ids in `said` (B, V'), temperature, top k and
    top p. Uniform numbers `chances` (B,) decide: they are places in the cumulated probabilities."""
    penalty = sampling.repetition_penalty
    logits = torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = (logits / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]))
    mass = scores.softmax(-1).cumsum(-1)  # of a token and all likelier ones
    last = (mass < sampling.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)  # the first that reaches top p
    place = (mass < chances[:, None] * mass.gather(-1, last)).sum(-1, keepdim=True)
    return order.gather(-1, place)[:, 0]


def pad_rows(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (B, T) padded on the right, and the mask (B, T) of what is real."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (T - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    return ids, mask


def next_token(
    model: MiniGPT5, cache: KVCache, ids: Tensor, mask: Tensor, said: Tensor, chances: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Feed a token a row: ids and mask (B, 1) -> the state (B, D) that predicts the next one, and the next ids (B,)."""
    hidden = model.llama(model.embed(ids), mask, cache)[:, 0]
    return hidden, pick_tokens(model.vokens.logits(model.llama, hidden), said, chances, sampling)


def compiled_next_token(*inputs) -> tuple[Tensor, Tensor]:
    """`next_token` compiled. So is its attention: a ready-made kernel would keep most of a GPU idle for one query."""
    torch.compiler.cudagraph_mark_step_begin()
    with sdpa_kernel(SDPBackend.MATH):
        hidden, picked = compiled(next_token, replayed=True, coordinate_descent_tuning=True)(*inputs)
    return hidden.clone(), picked.clone()


@lru_cache(maxsize=1)
def lasting_cache(llama: Llama, batch: int, slots: int, device: torch.device) -> KVCache:
    """A cache for compiled steps, kept: a CUDA graph reads and writes where the cache lay when it was recorded."""
    cache = KVCache(llama.config, batch, slots, type_of(llama), device)
    for tensor in (*cache.keys, *cache.values, cache.lengths):
        torch._dynamo.mark_static_address(tensor, guard=False)
    return cache


def open_cache(model: MiniGPT5, batch: int, slots: int, sampling: Sampling) -> KVCache:
    """An empty cache, or one that holds the prefix."""
    if sampling.compile:  # of 256, 512, 1024 ... slots, as every size is compiled
        cache = lasting_cache(model.llama, batch, max(256, 1 << (slots - 1).bit_length()), model.device)
        cache.lengths.zero_()
    else:
        cache = KVCache(model.llama.config, batch, slots, type_of(model.llama), model.device)
    if model.prefix:
        model.prefix.fill(cache)
    return cache


@dataclass
class Answer:
    """An answer in the making."""

    used: int  # tokens so far, the prompt's among them
    slots: int  # tokens that it may have
    ids: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (N, D) of each picture
    active: bool = True


def prompt_ids(model: MiniGPT5, prompt: str) -> list[int]:
    """<s> and the prompt, each placeholder as often as a picture has query embeddings."""
    tokenizer = model.tokenizer
    return [tokenizer.bos_id, *expand_placeholders(tokenizer, tokenizer.encode(prompt), model.queries)]


def room_after(model: MiniGPT5, prompt: str) -> int:
    """Tokens that an answer can have, the vokens of its pictures among them."""
    return model.llama.config.max_position_embeddings - model.virtual_tokens - len(prompt_ids(model, prompt))


def room_wanted(model: MiniGPT5, sampling: Sampling) -> int:
    """Tokens that a prompt should leave: for the longest answer, whose last word may be a picture. But half of all are
    for what it answers."""
    longest = sampling.max_new_tokens + len(model.tokenizer.voken_ids)
    return min(longest, model.llama.config.max_position_embeddings // 2)


@torch.inference_mode()
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
    max_new_tokens, when it has used max_new_tokens + 8 N positions (eight pictures), or when there are no more; the
    stop ids stay in it. The repetition penalty counts <s> and what was said, not the prompt. ValueError for a prompt
    that leaves no room.
    """
    N, virtual = len(model.tokenizer.voken_ids), model.virtual_tokens
    rows = [prompt_ids(model, prompt) for prompt in prompts]
    most, more = model.llama.config.max_position_embeddings, sampling.max_new_tokens + 8 * N  # room for eight pictures
    answers = [Answer(used, min(used + more, most)) for used in (virtual + len(row) for row in rows)]
    longest = max(answer.used for answer in answers)
    if longest + N > most:
        raise ValueError(f"the prompt has {longest - virtual} tokens, room is for {most - N - virtual}")
    inputs = None
    if pixels is not None:
        inputs = model.image_encoder(pixels)  # (P, Q, D)
    decode(model, rows, inputs, answers, sampling, generators)
    empty = torch.empty(0, N, model.llama.config.hidden_size, device=model.device)
    return [(answer.ids, torch.stack(answer.features) if answer.features else empty) for answer in answers]


def decode(
    model: MiniGPT5,
    rows: list[list[int]],
    inputs: Tensor | None,
    answers: list[Answer],
    sampling: Sampling,
    generators: list[torch.Generator],
) -> None:
    """Continue the prompts' ids `rows` until every answer has ended."""
    tokenizer, device = model.tokenizer, model.device
    start, vokens, N = tokenizer.voken_ids[0], tokenizer.voken_ids, len(tokenizer.voken_ids)
    numbers = torch.arange(len(rows), device=device)
    all_real = torch.ones(len(rows), 1, dtype=torch.long, device=device)  # the mask of one token a row
    step = compiled_next_token if sampling.compile else next_token
    cache = open_cache(model, len(rows), max(answer.slots for answer in answers), sampling)
    chances = torch.zeros(sampling.max_new_tokens, len(rows), device=device)
    if sampling.temperature:  # else nothing is drawn, and the noise of pictures is each generator's first
        own = [torch.rand(len(chances), generator=g, device=g.device) for g in generators]
        chances = torch.stack(own, 1).to(device)
    said = torch.zeros(len(rows), len(tokenizer), dtype=torch.bool, device=device)
    said[:, tokenizer.bos_id] = True

    ids, mask = pad_rows(rows, tokenizer.eos_id, device)
    hidden = model.llama(model.embed(ids, inputs), mask, cache)[numbers, mask.sum(1) - 1]  # (B, D)
    picked = pick_tokens(model.vokens.logits(model.llama, hidden), said, chances[0], sampling)  # (B,)
    if sampling.force_image:
        picked = torch.full_like(picked, start)
    for position in range(1, sampling.max_new_tokens + 1):
        said.scatter_(1, picked[:, None], True)
        fed, drawn = [[] for _ in rows], []
        for row, token in enumerate(picked.tolist()):  # here the host waits for the device, and nowhere else
            answer = answers[row]
            if answer.active:
                answer.ids.append(token)
                fed[row] = vokens if token == start else [token]
                drawn += [row] if token == start else []
                answer.used += len(fed[row])
                answer.active = not tokenizer.ends(answer.ids) and answer.used + N <= answer.slots
        last = position == sampling.max_new_tokens or not any(answer.active for answer in answers)
        if last and not drawn:
            break
        if not sampling.compile:
            cache.limit_attention(max(answer.used for answer in answers))
        if all(len(row) == 1 for row in fed):
            ids, mask = picked[:, None], all_real
        else:
            ids, mask = pad_rows(fed, tokenizer.eos_id, device)
        if not drawn:
            hidden, picked = step(model, cache, ids, mask, said, chances[position], sampling)
            continue
        following = model.llama(model.embed(ids), mask, cache)  # (B, N, D)
        for row in drawn:
            answers[row].features.append(torch.cat([hidden[row : row + 1], following[row, : N - 1]]).float())
        if last:
            break
        hidden = following[numbers, (mask.sum(1) - 1).clamp(min=0)]
        picked = pick_tokens(model.vokens.logits(model.llama, hidden), said, chances[position], sampling)


@torch.inference_mode()
def paint(model: MiniGPT5, features: Tensor, sampling: Sampling, latents: Tensor) -> Tensor:
    """Voken features (M, N, D) and noise (M, C, h, w) -> pixels (M, 3, H, W), about [-1, 1], guided against zeros."""
    guided, dtype = sampling.guidance != 1, type_of(model.unet)
    latents = send(latents, model.device)
    unet, decode_latents = model.unet, model.vae.decode
    if sampling.compile:
        unet, decode_latents = compiled(unet, replayed=True), compiled(decode_latents)
    if guided:
        features = torch.cat([torch.zeros_like(features), features])
    sampler = SAMPLERS[sampling.sampler](model.schedule, sampling.steps)
    conditioning = model.mapper(features).to(dtype)
    for index, timestep in enumerate(sampler.timesteps):
        x = torch.cat([latents, latents] if guided else [latents])
        prediction = unet(x.to(dtype), timestep, conditioning).to(torch.float32, copy=True)
        if guided:
            without, given = prediction.chunk(2)
            prediction = without + sampling.guidance * (given - without)
        latents = sampler.step(prediction, index, latents)
    return decode_latents(latents).float()


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
    pad: bool = True,
) -> list[list[str | Image.Image]]:
    """Text and pictures in turn, for each prompt. A prompt holds one <ImageHere> for each of its `pictures`, which are
    made square by padding, as released for users, or else by cropping, as released in training and evaluation."""
    for prompt, given in zip(prompts, pictures, strict=True):
        places = model.tokenizer.encode(prompt).count(model.tokenizer.image_id)
        if places != len(given):
            raise ValueError(f"{len(given)} pictures for {places} places in the prompt")
    pixels = None
    if any(pictures):
        size = model.image_encoder.vision_model.config.image_size
        pixels = torch.stack([preprocess_input(picture, size, pad) for given in pictures for picture in given])
        pixels = pixels.to(model.device, type_of(model.image_encoder))
    said = say(model, prompts, pixels, sampling, generators)
    counts = [len(features) for _, features in said]
    painted = iter([])
    if sum(counts):
        latents = [model.draw_latents(n, generator) for n, generator in zip(counts, generators, strict=True)]
        features, latents = torch.cat([features for _, features in said]), torch.cat(latents)
        at_once = 1 if sampling.compile else len(features)  # another number would be compiled anew
        parts = zip(features.split(at_once), latents.split(at_once), strict=True)
        painted = chain.from_iterable(paint(model, part, sampling, noise) for part, noise in parts)
    return [
        segments_of(model, ids, [to_image(next(painted)) for _ in range(n)])
        for (ids, _), n in zip(said, counts, strict=True)
    ]
