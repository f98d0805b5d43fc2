"""Answers: the language model's words, and a picture wherever it says [IMG0].

    prompt_ids -> token ids            (T,)             <s> and the prompt, Q placeholders for each input picture
    say        -> ids, voken features  (M, N, D)        an answer's tokens, and the features of its M pictures
    paint      -> pixels               (M, 3, H, W)     denoised under the mapper's conditioning
    answer     -> text and pictures in order

The prompts of a batch may differ in length and in their pictures. Each has a random generator of its own, so that its
answer is the same alone and in a batch.

B prompts, T tokens, N vokens of a picture, M output and P input pictures, Q query embeddings of an input picture,
D width of the language model, C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

import lora
from common.graphs import compiled, compiled_step, lasting_cache
from common.images import to_image
from llama import KVCache
from minigpt5 import MiniGPT5, dtype_of
from prompts import DESCRIPTION, description_in
from qformer import preprocess_input
from scheduler import SAMPLERS, NoiseSchedule

MAX_PICTURES = 8  # an answer has room for the vokens of so many
Segments = list[str | Image.Image]  # an answer: text and pictures in order
# A function, called with ids= (the first prompt's answer so far) after every token, and after every denoising step
# with done= (the number of steps so far), steps= (of how many) and latents= (M, C, h, w).
Watch = Callable[..., None]


@dataclass
class Sampling:
    """How an answer is sampled. The defaults are the released code's. ValueError for values out of range."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 2.0
    max_new_tokens: int = 256
    force_image: bool = False  # begin with a picture
    words_first: bool = False  # say what a picture shows, then paint that
    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5  # 1: no guidance
    empty_caption: bool | None = None  # guide against its encoding, else against zeros; None: as it was trained
    compile: bool = False  # torch.compile the token step, the UNet and the decoder
    samplers = tuple(sorted(SAMPLERS))  # what `sampler` may be (without an annotation this is no field)

    def __post_init__(self):
        if not 0 < self.top_p <= 1 or self.temperature < 0 or self.repetition_penalty <= 0:
            raise ValueError("top-p is in (0, 1], temperature at least 0, repetition-penalty above 0")
        if min(self.max_new_tokens, self.steps, self.top_k) < 1:
            raise ValueError("max-new-tokens, steps and top-k are at least 1")

    @classmethod
    def of(cls, options: dict) -> "Sampling":
        """A Sampling with these options; names that are no fields of it are ignored."""
        return cls(**{name: value for name, value in options.items() if name in cls.__dataclass_fields__})


# ---- prompts


def prompt_ids(model: MiniGPT5, prompt: str) -> list[int]:
    """Token ids of <s> and the prompt; each <ImageHere> is repeated for the query embeddings of its picture."""
    return [model.tokenizer.bos_id, *model.tokenizer.encode(prompt, model.queries)]


def room_after(model: MiniGPT5, ids: list[int]) -> int:
    """Positions that are left for the answer to a prompt, the vokens of its pictures among them."""
    return model.llama.config.max_position_embeddings - model.virtual_tokens - len(ids)


def room_wanted(model: MiniGPT5, sampling: Sampling) -> int:
    """Positions that a prompt should leave free: the longest answer and a picture, but at most half of the context."""
    longest = sampling.max_new_tokens + len(model.tokenizer.voken_ids)
    return min(longest, model.llama.config.max_position_embeddings // 2)


# ---- words


def pick_tokens(logits: Tensor, seen: Tensor, chances: Tensor, sampling: Sampling) -> Tensor:
    """The next ids (B,) from the logits (B, V') of all V' ids: repetition penalty on the ids marked in `seen` (B, V'),
    temperature, top k, top p, then inverse-CDF sampling with the uniform numbers `chances` (B,)."""
    penalty = sampling.repetition_penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = (logits / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]))
    cumulative = scores.softmax(-1).cumsum(-1)
    cutoff = (cumulative < sampling.top_p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)  # first to reach top p
    choice = (cumulative < chances[:, None] * cumulative.gather(-1, cutoff)).sum(-1, keepdim=True)
    return order.gather(-1, choice)[:, 0]


def pad_right(sequences: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token sequences -> ids (B, T) padded on the right, and the mask (B, T) that is 1 on tokens."""
    T = max(map(len, sequences))
    ids = torch.tensor([ids + [fill] * (T - len(ids)) for ids in sequences], device=device)
    return ids, torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in sequences], device=device)


def read(
    model: MiniGPT5,
    cache: KVCache,
    ids: Tensor,
    mask: Tensor,
    seen: Tensor,
    chances: Tensor,
    sampling: Sampling,
    pixels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and mask (B, T), which continue what the cache holds -> hidden states (B, T, D), those of each sequence's
    last token (B, D), and the ids (B,) that these predict."""
    states = model.llama(model.embed(ids, pixels), mask, cache)
    last = states[cache.batch[:, 0], (mask.sum(1) - 1).clamp(min=0)]
    return states, last, pick_tokens(model.vokens.logits(model.llama, last), seen, chances, sampling)


@dataclass
class Decoding:
    """The state of one prompt's decoding: its answer so far."""

    length: int  # positions that prompt and answer take so far
    limit: int  # positions that they may take
    ids: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (N, D) of each picture
    active: bool = True  # until the answer has ended


@torch.inference_mode()
def say(
    model: MiniGPT5,
    prompts: list[list[int]],
    pixels: Tensor | None,
    sampling: Sampling,
    generators: list[torch.Generator],
    watch: Watch | None = None,
) -> list[tuple[list[int], Tensor]]:
    """`prompts` (token ids) -> each answer's words: (token ids, voken features (M, N, D) of its M pictures).

    pixels: all input pictures in order, as `MiniGPT5.embed` takes them. When [IMG0] is sampled, all N vokens are fed at
    once and [IMG0] alone is recorded; text goes on after the last one. An answer ends with </s>, with "###", after
    max_new_tokens sampled tokens, of which [IMG0] is one, or when another N positions do not fit into max_new_tokens +
    MAX_PICTURES * N or into the model's context. The stop ids stay in the answer. The repetition penalty is on <s> and
    the answer's ids, not on the prompt's. ValueError for a prompt that leaves no room.
    """
    tokenizer, positions = model.tokenizer, model.llama.config.max_position_embeddings
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, positions))
    vokens, N = tokenizer.voken_ids, len(tokenizer.voken_ids)
    longest, room = max(map(len, prompts)), positions - model.virtual_tokens - N  # room for a prompt
    if longest > room:
        raise ValueError(f"the prompt has {longest} tokens, room is for {room}")
    longest_answer = sampling.max_new_tokens + MAX_PICTURES * N  # in positions
    lengths = [model.virtual_tokens + len(ids) for ids in prompts]
    answers = [Decoding(length, limit=min(length + longest_answer, positions)) for length in lengths]

    cache = open_cache(model, len(prompts), max(answer.limit for answer in answers), sampling)
    device = cache.device
    chances = torch.zeros(sampling.max_new_tokens, len(prompts), device=device)
    if sampling.temperature:  # at 0 no random number is used up, so that a picture's noise is the generator's first
        columns = [torch.rand(len(chances), generator=g, device=g.device) for g in generators]
        chances = torch.stack(columns, 1).to(device)
    seen = torch.zeros(len(prompts), tokenizer.vocabulary, dtype=torch.bool, device=device)
    seen[:, tokenizer.bos_id] = tokenizer.bos_id != tokenizer.eos_id  # a penalty on </s> would lengthen the answers

    ids, mask = pad_right(prompts, tokenizer.eos_id, device)
    hidden, picked = read(model, cache, ids, mask, seen, chances[0], sampling, pixels)[1:]
    if sampling.force_image:
        picked = torch.full_like(picked, vokens[0])
    for number in range(1, sampling.max_new_tokens + 1):
        seen.scatter_(1, picked[:, None], True)
        next_ids = [[] for _ in prompts]  # what the model reads next: nothing where an answer has ended
        for i, (answer, token) in enumerate(zip(answers, picked.tolist(), strict=True)):  # waits for the device
            if answer.active:
                answer.ids.append(token)
                next_ids[i] = vokens if token == vokens[0] else [token]
                answer.length += len(next_ids[i])
                answer.active = not tokenizer.ends(answer.ids) and answer.length + N <= answer.limit
        with_picture = [i for i, ids in enumerate(next_ids) if vokens[0] in ids]  # the answers that begin one now
        if watch:
            watch(ids=answers[0].ids)
        is_last = number == sampling.max_new_tokens or not any(answer.active for answer in answers)
        if is_last and not with_picture:
            break
        if not sampling.compile:
            cache.used = max(answer.length for answer in answers)
        ids, mask = pad_right(next_ids, tokenizer.eos_id, device)
        step = partial(compiled_step, read) if sampling.compile and not with_picture else read
        states, last, picked = step(model, cache, ids, mask, seen, chances[number % len(chances)], sampling)
        for i in with_picture:  # the state that predicted [IMG0], then those of [IMG0]..[IMGN-2]
            answers[i].features.append(torch.cat([hidden[i : i + 1], states[i, : N - 1]]).float())
        if is_last:  # this pass was for a picture's features: its token, and the chance reused for it, do not count
            break
        hidden = last
    empty = torch.empty(0, N, model.llama.config.hidden_size, device=device)
    return [(answer.ids, torch.stack(answer.features) if answer.features else empty) for answer in answers]


# ---- pictures


@torch.inference_mode()
def paint(model: MiniGPT5, features: Tensor, sampling: Sampling, latents: Tensor, watch: Watch | None = None) -> Tensor:
    """Voken features (M, N, D) and noise (M, C, h, w) -> pixels (M, 3, H, W), about [-1, 1].

    The unconditional branch of classifier-free guidance has zeros in the place of the features or, with
    `empty_caption`, Stable Diffusion's encoding of the empty caption in the place of the mapper's output.
    """
    unet, decode = model.unet, model.vae.decode
    if sampling.compile:
        unet, decode = compiled(unet, replayed=True), compiled(decode)
    guided, empty_caption = sampling.guidance != 1, sampling.empty_caption
    conditioning = model.mapper(torch.cat([torch.zeros_like(features), features]) if guided else features)
    if guided and (model.guides_against_empty_caption if empty_caption is None else empty_caption):
        conditioning[: len(features)] = model.empty_caption()
    return decode(denoise(unet, model.schedule, latents.to(conditioning.device), conditioning, sampling, watch)).float()


def denoise(
    unet: Callable,
    schedule: NoiseSchedule,
    latents: Tensor,
    conditioning: Tensor,
    sampling: Sampling,
    watch: Watch | None = None,
) -> Tensor:
    """Noise (M, C, h, w) -> latents. conditioning: (M, S, Dc), or with guidance (2 M, S, Dc), the unconditional ones
    first: each step then goes `guidance` times as far from the unconditional prediction to the other one."""
    sampler = SAMPLERS[sampling.sampler](schedule, sampling.steps)
    guided = len(conditioning) > len(latents)
    for index, timestep in enumerate(sampler.timesteps):
        x = torch.cat([latents, latents] if guided else [latents])
        prediction = unet(x, timestep, conditioning).to(torch.float32, copy=True)  # a CUDA graph overwrites its output
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + sampling.guidance * (conditional - unconditional)
        latents = sampler.step(prediction, index, latents)
        if watch:
            watch(done=index + 1, steps=len(sampler.timesteps), latents=latents)
    return latents


# ---- both


def split(segments: Segments) -> tuple[str, tuple[Image.Image, ...]]:
    """An answer's words and its pictures."""
    words = " ".join(segment for segment in segments if isinstance(segment, str))
    return words, tuple(segment for segment in segments if not isinstance(segment, str))


def segments_of(model: MiniGPT5, ids: list[int], pictures: Iterator[Image.Image]) -> Segments:
    """The text of `ids`, with the next of the pictures in the place of every [IMG0], without other special tokens."""
    tokenizer, segments, text = model.tokenizer, [], []
    for i in [*ids, tokenizer.eos_id]:
        if i not in (tokenizer.voken_ids[0], tokenizer.eos_id):
            text.append(i)
            continue
        words = tokenizer.decode(text).strip().removesuffix("###").strip()
        segments += [words] if words else []
        segments += [next(pictures)] if i == tokenizer.voken_ids[0] else []
        text = []
    return segments


def answer(
    model: MiniGPT5,
    prompts: list[list[int]],
    pictures: list[list[Image.Image]],
    sampling: Sampling,
    generators: list[torch.Generator],
    pad: bool = True,
    watch: Watch | None = None,
) -> list[Segments]:
    """The answers to prompts (token ids of `prompt_ids`) and their input pictures: text and pictures in order.

    With `pad` the pictures are made square by white padding, as the released demo does for its users, else by cropping,
    as in training and evaluation. ValueError where a prompt has not one <ImageHere> for each of its pictures.
    """
    if sampling.words_first:
        sampling = replace(sampling, words_first=False)
        answers = answer(model, prompts, pictures, sampling, generators, pad, watch)
        return paint_described(model, answers, sampling, generators, watch)
    for ids, inputs in zip(prompts, pictures, strict=True):
        places = ids.count(model.tokenizer.image_id) // model.queries
        if places != len(inputs):
            raise ValueError(f"{len(inputs)} pictures for {places} places in the prompt")
    pixels = None
    if any(pictures):
        if model.image_encoder is None:
            raise ValueError("these weights have no image encoder (the folder blip2), so they cannot read pictures")
        size = model.image_encoder.vision_model.config.image_size
        pixels = torch.stack([preprocess_input(picture, size, pad) for inputs in pictures for picture in inputs])
        pixels = pixels.to(model.device, dtype_of(model.image_encoder))
    replies = say(model, prompts, pixels, sampling, generators, watch)
    counts = [len(features) for _, features in replies]
    outputs = []
    if sum(counts):
        latents = [model.sample_latents(n, generator) for n, generator in zip(counts, generators, strict=True)]
        features, latents = torch.cat([features for _, features in replies]), torch.cat(latents)
        at_once = 1 if sampling.compile else len(features)  # another batch size would be recompiled
        for part, noise in zip(features.split(at_once), latents.split(at_once), strict=True):
            outputs += map(to_image, paint(model, part, sampling, noise, watch))
    remaining = iter(outputs)
    return [segments_of(model, ids, remaining) for ids, _ in replies]


def paint_described(
    model: MiniGPT5, answers: list[Segments], sampling: Sampling, generators: list[torch.Generator], watch: Watch | None
) -> list[Segments]:
    """Words first: in the answers, whose words are there already, a picture takes the place of its description in
    parentheses: "it turns blue. (a boat that is ...)". Its vokens are read after the description alone, as in stage 1
    after a caption, without LoRA that was trained for words alone. The picture's `info` holds the description."""
    descriptions = [description_in(split(segments)[0]) for segments in answers]
    indices = [i for i, description in enumerate(descriptions) if description]
    if not indices:
        return answers
    captions = [prompt_ids(model, descriptions[i]) for i in indices]
    alone = replace(sampling, force_image=True, temperature=0.0, max_new_tokens=1)  # a picture and no words
    with lora.disabled(model.lora) if model.lora_for_words else nullcontext():
        outputs = answer(model, captions, [[]] * len(captions), alone, [generators[i] for i in indices], watch=watch)
    for i, (picture,) in zip(indices, outputs, strict=True):
        picture.info["description"] = descriptions[i]
        words = DESCRIPTION.sub("", split(answers[i])[0], count=1).strip()
        answers[i] = [words, picture] if words else [picture]
    return answers


# ---- the cache


def open_cache(model: MiniGPT5, batch: int, slots: int, sampling: Sampling) -> KVCache:
    """An empty key-value cache, or one that holds the prefix of prefix tuning."""
    if sampling.compile:  # every size is compiled, so sizes are 256, 512, 1024 ... slots
        cache = lasting_cache(KVCache, model.llama, batch, max(256, 1 << (slots - 1).bit_length()))
        cache.lengths.zero_()
    else:
        cache = KVCache(model.llama, batch, slots)
    if model.prefix:
        model.prefix.fill(cache)
    return cache
