"""The parts of bench/gpu.py that measure the published sizes.

| part    | what                                                                                           |
| ------- | ---------------------------------------------------------------------------------------------- |
| reckon  | memory of the measured steps, counted from shapes alone (reckon.py); on the CPU, beside others |
| words   | tokens per second: not compiled, compiled, compiled with 8-bit matrices                        |
| picture | voken features to 512 x 512 pixels: not compiled, compiled, the diffusers pipeline             |
| stage-1 | training from precomputed tensors: in 22 GB, at the paper's batch, the released recipe         |
| stage-2 | training on sequences of 1,024 tokens                                                          |

In a part the figures that cost least come first and those that must be compiled last: what is cut off is lost.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from bench import reckon
from bench.common import difference
from bench.gpu_rows import PROMPT, Setup, gigabytes
from bench.steps import Ours, make_batches, step_of
from bench.unfiled import shared_with_libraries, sizes
from generation import Sampling, paint, prompt_ids, say
from minigpt5 import MiniGPT5, send
from published.int8 import to_int8
from trainer.compiled import checkpoint_gradients, compile_losses, count_graphs

CAP = 22e9  # bytes: what a program finds free on a GPU of 24 GB


# ---- counted from shapes


def count_memory(setup: Setup) -> None:
    """GB of the steps that stage_1, stage_2 and picture measure, under the same names."""
    configs = sizes(setup.size)[:3]
    for what, (stage, checkpointing, batch, tokens) in MEMORY.items():
        with setup.rows.attempt(what):
            model = reckon.published_stack(*configs)
            if stage == 2:
                model.add_adapters(lora={})
            if checkpointing:
                checkpoint_gradients(model)
            if stage:
                step = reckon.step_of(model, *small(setup, batch, tokens), captioned=stage == 1)
                kept = reckon.kept_of(model, model.llama, model.unet)
            else:
                model.requires_grad_(False)
                step = reckon.picture_of(model, steps=6)  # more need no more memory
                kept = reckon.size_of(model.parameters())
            setup.rows.add(what, (kept + reckon.reckon(step).peak) / 1e9, "GB")


MEMORY = {  # name -> stage (0: a picture), with gradient checkpointing, batch, tokens of a sequence
    "memory, stage 1, batch 8, gradient checkpointing": (1, True, 8, 32),
    "memory, stage 1, batch 48": (1, False, 48, 32),
    "memory, stage 2, batch 8, gradient checkpointing": (2, True, 8, reckon.STORY),
    "memory, a picture": (0, False, 1, 0),
}
MEMORY_8, MEMORY_48, MEMORY_STORY, MEMORY_PICTURE = MEMORY
MEMORY_PARTS = "picture", "stage-1", "stage-2"  # the parts that measure them


def small(setup: Setup, batch: int, tokens: int) -> tuple[int, int]:
    return (min(batch, 2), min(tokens, 24)) if setup.is_tiny else (batch, tokens)


# ---- words


def words(setup: Setup) -> None:
    """One prompt is answered. Speed is that of the tokens after the first one."""
    model, rows, tokens = setup.stack(), setup.rows, 4 if setup.is_tiny else 128
    model.tokenizer.stops = []  # random words end nowhere
    prompt, picture = prompt_ids(model, PROMPT), model.tokenizer.voken_ids[0]

    def speak(seed: int, compiled: bool, limit: int = tokens) -> list[int]:
        sampling = Sampling(max_new_tokens=limit, compile=compiled)
        return say(model, [prompt], None, sampling, [torch.Generator().manual_seed(seed)])[0][0]

    seed = next(seed for seed in range(100) if picture not in speak(seed, False))  # whose answer is words alone
    expected = speak(seed, False)
    for what, compiled, int8 in (("", False, False), (", compiled", True, False), (", 8 bits, compiled", True, True)):
        with rows.attempt(f"decoding{what}"):
            if int8:
                model.llama = to_int8(model.llama, setup.dtype, setup.device)
            begin, before = time.perf_counter(), count_graphs()
            said = speak(seed, compiled)
            warmup = time.perf_counter() - begin
            rounds = 3 if compiled else 1
            whole, first = (setup.time(partial(speak, seed, compiled, limit), rounds) for limit in (tokens, 1))
            same = next((i for i, (a, b) in enumerate(zip(said, expected, strict=True)) if a != b), tokens)
            note = f"warm-up {warmup:.0f} s, {count_graphs() - before} graphs"
            note += f"; the first {same} of {tokens} tokens as not compiled" if compiled else ""
            rows.add(f"decoding{what}", (tokens - 1) / max(whole - first, 1e-9), "tokens/s", note=note)
            rows.add(f"prompt to first token{what}", first, "s")
            memory = setup.peak(partial(speak, seed, compiled))
            rows.add(f"memory, words{what}", memory, "GB", note=f"language model {gigabytes(model.llama):.1f} GB")
            if not int8:
                setup.profile(f"8 tokens{what}", partial(speak, seed, compiled, 8))


# ---- a picture


def picture(setup: Setup) -> None:
    """Voken features become pixels, with guidance. Its strength makes roundings larger, so pictures are compared after
    4 steps."""
    model, rows, took = setup.stack(), setup.rows, {}
    features = torch.randn(1, 8, model.llama.config.hidden_size, device=setup.device)
    latents = send(model.sample_latents(1, torch.Generator().manual_seed(0)), setup.device)
    samplings = {"PNDM, 50 steps": Sampling(), "DPM, 20 steps": Sampling(sampler="dpm", steps=20)}
    if setup.is_tiny:
        samplings = {name: replace(sampling, steps=2) for name, sampling in samplings.items()}
    fifty, four = samplings["PNDM, 50 steps"], Sampling(steps=4)

    def draw(sampling: Sampling, compiled: bool = False) -> torch.Tensor:
        return paint(model, features, replace(sampling, compile=compiled), latents)

    def measure(what: str, call: Callable, rounds: int) -> None:
        begin, before = time.perf_counter(), count_graphs()
        call()
        warmup, graphs = time.perf_counter() - begin, count_graphs() - before
        took[what] = setup.time(call, rounds)
        rows.add(what, took[what], "s", note=f"warm-up {warmup:.0f} s, {graphs} graphs")

    with rows.attempt("a picture is finite and not black"):
        pixels = draw(fifty)
        mean, deviation = pixels.mean().item(), pixels.std().item()
        if not pixels.isfinite().all() or deviation < 1e-3:
            raise ValueError(f"mean {mean:.1e}, deviation {deviation:.1e}")
        note = f"mean {mean:.2f}, {pixels.shape[-1]} x {pixels.shape[-2]} pixels"
        rows.add("a picture is finite and not black: deviation", deviation, "", note=note)
    for name, sampling in samplings.items():
        with rows.attempt(f"picture, {name}"):
            measure(f"picture, {name}", partial(draw, sampling), rounds=1)
    with rows.attempt(MEMORY_PICTURE):
        rows.add(MEMORY_PICTURE, setup.peak(partial(draw, fifty)), "GB")
    setup.profile("a picture of 4 steps", partial(draw, four))
    for name, sampling in samplings.items():
        with rows.attempt(f"picture, {name}, compiled"):
            measure(f"picture, {name}, compiled", partial(draw, sampling, True), rounds=5)
    with rows.attempt("picture, compiled: difference"):
        figure = difference(draw(four, True), draw(four), 2)
        rows.add("picture, compiled: difference", figure, "", note="from not compiled, relative")
    setup.profile("a picture of 4 steps, compiled", partial(draw, four, True))
    with rows.attempt("picture, diffusers"), shared_with_libraries(model):
        from bench.sample import Libraries

        folder = setup.folder / "weights"
        libraries = Libraries(folder, model.tokenizer, model.vokens, model.mapper, setup.dtype)
        measure("picture, diffusers", partial(libraries.paint, features, fifty, latents), rounds=1)
        ours = (draw(four) / 2 + 0.5).clamp(0, 1)
        figure = difference(ours, libraries.paint(features, four, latents), 2)
        rows.add("picture, diffusers: difference", figure, "", note="from ours, relative")
        other = libraries.compiled(folder, setup.dtype, "reduce-overhead")  # max-autotune takes many minutes
        measure("picture, diffusers, compiled", partial(other.paint, features, fifty, latents), rounds=5)
    for name in ("", ", compiled"):
        ours, peer = (took.get(f"picture, {what}{name}") for what in ("PNDM, 50 steps", "diffusers"))
        if ours and peer:
            rows.add(f"picture: speed against diffusers{name}", peer / ours, "times")


# ---- training


@contextmanager
def little_memory(setup: Setup) -> Iterator[None]:
    """What a GPU of 24 GB has free."""
    if setup.device.type != "cuda":
        yield
        return
    total = torch.cuda.mem_get_info(setup.device)[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), setup.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setup.device)


@contextmanager
def checkpointed(model: MiniGPT5) -> Iterator[None]:
    """Gradient checkpointing for a while."""
    checkpoint_gradients(model)
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("forward", None)


def stage_1(setup: Setup) -> None:
    rows, speeds = setup.rows, {}
    model = setup.stack(captions=True)
    few, many = (2, 3) if setup.is_tiny else (8, 48)
    with torch.no_grad():
        batches = {size: make_batches(model, size, 2) for size in (few, many)}
    left_out = gigabytes(model.vae, model.text_encoder)  # which bench/reckon.py does not count

    def measure(what: str, contender, size: int) -> Callable:
        begin, before = time.perf_counter(), count_graphs()
        step = step_of(contender, batches[size], model)
        for _ in batches[size]:  # every length once
            step()
        warmup, graphs = time.perf_counter() - begin, count_graphs() - before
        speeds[what] = size / setup.time(step, 6)
        rows.add(what, speeds[what], "samples/s", note=f"warm-up {warmup:.0f} s, {graphs} graphs")
        return step

    what = "stage 1, batch 8, gradient checkpointing, in 22 GB"
    with rows.attempt(what), little_memory(setup), checkpointed(model):
        step = measure(what, Ours(model, precomputed=True, compiled=False), few)
        rows.add(MEMORY_8, setup.peak(step) - left_out, "GB", note=f"without {left_out:.1f} GB of other frozen parts")
    with rows.attempt("stage 1, batch 48"):
        step = measure("stage 1, batch 48", Ours(model, precomputed=True, compiled=False), many)
        rows.add(MEMORY_48, setup.peak(step) - left_out, "GB", note=f"without {left_out:.1f} GB of other frozen parts")
        setup.profile("a step of stage 1, batch 48", step)
    step = None
    for what, size in (("stage 1, batch 48, released recipe", many), ("stage 1, batch 8, released recipe", few)):
        with rows.attempt(what), shared_with_libraries(model):
            from bench.uas import Released

            measure(what, Released(setup.folder / "weights", model, setup.dtype), size)
        if what in speeds:
            break  # the smaller batch only where the larger one takes too much memory
    for parameter in model.parameters():
        parameter.grad = None
    with rows.attempt("stage 1, batch 48, compiled"):
        compile_losses(model)
        step = measure("stage 1, batch 48, compiled", Ours(model, precomputed=True, compiled=True), many)
        setup.profile("a step of stage 1, batch 48, compiled", step)
    recipe = speeds.get("stage 1, batch 48, released recipe", speeds.get("stage 1, batch 8, released recipe"))
    for what in ("stage 1, batch 48", "stage 1, batch 48, compiled"):
        if recipe and what in speeds:
            rows.add(f"{what}: speed against the released recipe", speeds[what] / recipe, "times")


def stage_2(setup: Setup) -> None:
    model, rows = setup.stack(), setup.rows
    batch, tokens = small(setup, *MEMORY[MEMORY_STORY][2:])
    model.add_adapters(lora={})
    checkpoint_gradients(model)
    with rows.attempt("stage 2, batch 8, gradient checkpointing"):
        forward_and_backward = reckon.step_of(model, batch, tokens, captioned=False)
        trained = [p for p in model.trained_parameters().values() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-5, eps=1e-8, fused=True)

        def step() -> None:
            forward_and_backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        speed = batch / setup.time(step)
        rows.add("stage 2, batch 8, gradient checkpointing", speed, "samples/s", note=f"{tokens:,} tokens a sequence")
        note = f"without {gigabytes(model.vae):.1f} GB of the autoencoder"
        rows.add(MEMORY_STORY, setup.peak(step) - gigabytes(model.vae), "GB", note=note)
        setup.profile("a step of stage 2", step)
