"""Words, pictures and first answers: ours against what transformers and diffusers give, with the same weights.

    python bench/sample.py                                           # miniature; with a GPU also full size
    python bench/sample.py --steps 20 --no-compile --starts 0

| row                    | ours                            | peer                                                     |
| ---------------------- | ------------------------------- | -------------------------------------------------------- |
| words                  | generation.say, one prompt      | LlamaForCausalLM.generate, the same sampling             |
| picture                | generation.paint                | nn.Transformer mapper, then StableDiffusionPipeline with |
|                        |                                 | prompt_embeds; eager, and its UNet and VAE compiled      |
| prompt to picture      | generation.answer               | both libraries, joined as the released code joins them   |
| start to first picture | python sample.py, a new process | the same with the two libraries, a new process           |

Everything is drawn with one seed, one prompt and one picture at a time. Checked before: equal words without sampling
(in 16 bit, equal states), equal pictures (there without guidance). "Cold" starts have the weights' files dropped from
the page cache, not the libraries' own.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import diffusers
import torch
from PIL import Image
from torch import Tensor

from bench import peers
from bench.common import Report, agree, alternate, exact_products, parser, rows_of, start
from common.cli import read_arguments, run
from common.images import to_image
from common.page import save_image
from common.tokenizer import Tokenizer
from generation import Sampling, answer, paint, prompt_ids, say
from mapper import VokenMapper
from minigpt5 import MiniGPT5, Vokens, dtype_of, send
from published.parts import load_minigpt5

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "transformers, diffusers"
PROMPT = "a small red boat with a white sail on the calm sea at night"


def open_pipeline(weights: Path, dtype: torch.dtype, device: torch.device) -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline(
        unet=peers.peer_unet(weights, dtype, device),
        vae=peers.peer_vae(weights, dtype, device),
        scheduler=diffusers.PNDMScheduler.from_pretrained(weights / "stable-diffusion" / "scheduler"),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Libraries:
    """The same stack from transformers, diffusers and torch.nn.Transformer."""

    def __init__(self, weights: Path, tokenizer: Tokenizer, vokens: Vokens, mapper: VokenMapper, dtype: torch.dtype):
        self.tokenizer, self.device = tokenizer, vokens.input.device
        self.llama = peers.peer_llama_with_vokens(weights, tokenizer, vokens, dtype)
        self.mapper = peers.PeerMapper(mapper).eval().requires_grad_(False)
        self.pipeline = open_pipeline(weights, dtype, self.device)

    def compiled(self, weights: Path, dtype: torch.dtype, mode: str | None = None) -> "Libraries":
        """With a pipeline of its own, compiled as diffusers' documentation advises, or in another mode."""
        other, mode = copy.copy(self), mode or ("max-autotune" if self.device.type == "cuda" else "default")
        other.pipeline = pipeline = open_pipeline(weights, dtype, self.device)
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)
        return other

    def embed(self, ids: list[int]) -> Tensor:
        return self.llama.get_input_embeddings()(torch.tensor([ids], device=self.device))

    @torch.no_grad()
    def say(self, sampling: Sampling) -> list[int]:
        """As many ids as there may be: nothing stops them."""
        embeddings = self.embed([self.tokenizer.bos_id, *self.tokenizer.encode(PROMPT)])
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        ids = self.llama.generate(
            inputs_embeds=embeddings,
            attention_mask=embeddings.new_ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=None,
            pad_token_id=self.tokenizer.eos_id,
            **(drawn if sampling.temperature else {}),
        )
        return ids[0].tolist()

    @torch.no_grad()
    def paint(self, features: Tensor, sampling: Sampling, latents: Tensor) -> Tensor:
        dtype = self.pipeline.unet.dtype
        without, given = (self.mapper(x).to(dtype) for x in (torch.zeros_like(features), features))
        return self.pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=without,
            latents=latents.to(dtype),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="pt",
            callback_on_step_end=begin_step,
        ).images

    @torch.no_grad()
    def answer(self, sampling: Sampling) -> Image.Image:
        """The prompt is read, the vokens continue it, their picture is drawn."""
        embeddings = self.embed([self.tokenizer.bos_id, *self.tokenizer.encode(PROMPT)])
        read = self.llama.model(inputs_embeds=embeddings, use_cache=True)
        vokens = self.embed(self.tokenizer.voken_ids)
        said = self.llama.model(inputs_embeds=vokens, past_key_values=read.past_key_values).last_hidden_state
        features = torch.cat([read.last_hidden_state[:, -1:], said[:, :-1]], dim=1).float()
        unet = self.pipeline.unet.config
        latents = torch.randn(1, unet.in_channels, unet.sample_size, unet.sample_size, generator=generator())
        return to_image(self.paint(features, sampling, latents.to(self.device))[0] * 2 - 1)


def begin_step(_pipeline, _step: int, _timestep: Tensor, tensors: dict) -> dict:
    """Compiled, the UNet's last output may be overwritten now. Once ours has said so, torch no longer finds out by
    itself."""
    torch.compiler.cudagraph_mark_step_begin()
    return tensors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(model: MiniGPT5, libraries: Libraries, args: argparse.Namespace) -> dict[str, Callable]:
    """Answers of --tokens tokens, without stops and pictures."""
    model.tokenizer.stops = []

    def ours(seed: int, sampling: Sampling) -> list[int]:
        return say(model, [prompt_ids(model, PROMPT)], None, sampling, [generator(seed)])[0][0]

    with torch.no_grad(), exact_products():
        prompt = libraries.embed([model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)])
        states = libraries.llama.model(inputs_embeds=prompt).last_hidden_state
        agree("words", model.llama(prompt), states, dtype_of(model.llama))
    likeliest = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=min(args.tokens, 8))
    said, expected = ours(0, likeliest), libraries.say(likeliest)
    if said != expected and dtype_of(model.llama) == torch.float32:  # in 16 bit the likeliest two may change places
        raise ValueError(f"words: ours says {said}, transformers {expected}")
    sampling = Sampling(max_new_tokens=args.tokens, compile=args.compile)
    picture = model.tokenizer.voken_ids[0]
    seed = next((seed for seed in range(20) if picture not in ours(seed, sampling)), None)
    if seed is None:
        raise ValueError("words: every seed brings a picture")
    return {"ours": partial(ours, seed, sampling), "transformers": partial(libraries.say, sampling)}


# ---- a new process


def command(who: str, weights: Path, out: Path, args: argparse.Namespace) -> list[str]:
    ours = [str(ROOT / "sample.py"), "--prompt", PROMPT, "--force-image", "--max-new-tokens", "1", "--out", str(out)]
    ours += ["--sampler", "pndm", "--guidance", str(Sampling.guidance)]
    peer = [__file__, "--libraries-alone", str(out / "peer.png")]
    same = ["--weights", str(weights), "--steps", str(args.steps), "--device", args.device, "--dtype", args.dtype]
    return [sys.executable, *(ours if who == "ours" else peer), *same]


def first_picture(who: str, weights: Path, cold: bool, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds from a process's start to its end with a picture written, and the most memory that it had, in GB."""
    for file in weights.rglob("*") if cold else ():
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryDirectory() as out:
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        begin = time.perf_counter()
        process = subprocess.Popen(
            command(who, weights, Path(out), args), env=os.environ | threads, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status or not list(Path(out).glob("*.png")):
            raise ValueError(f"{who}: no picture from a new process")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def libraries_alone(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """What the peer's process does."""
    tokenizer = Tokenizer(args.weights / "vicuna" / "tokenizer.model")
    mapper = peers.mapper_of(args.weights, device)
    rows = torch.randn(len(tokenizer.voken_ids) + 1, mapper.fc[0].in_features, device=device)
    vokens = SimpleNamespace(input=0.02 * rows, output=0.02 * rows)  # untrained, as far as the peer reads them
    libraries = Libraries(args.weights, tokenizer, vokens, mapper, dtype)
    save_image(libraries.answer(Sampling(steps=args.steps)), args.libraries_alone)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, ("miniature",), rounds=5)
    add = options.add_argument
    add("--tokens", type=int, default=64, help="length of an answer in words")
    add("--steps", type=int, default=50, help="denoising steps of a picture")
    add("--starts", type=int, default=3, help="new processes of each, cold and warm; 0: none")
    add("--compile", action=argparse.BooleanOptionalAction, help="ours, and a second pipeline; default: on a GPU")
    add("--libraries-alone", type=Path, help=argparse.SUPPRESS)
    args = read_arguments(options, argv)
    if min(args.tokens, args.steps) < 1 or args.starts < 0:
        options.error("--tokens and --steps are at least 1, --starts at least 0")
    device, dtype = start(args)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.libraries_alone:
        return libraries_alone(args, device, dtype)
    report = Report("sample", args, device)
    for size in args.sizes:
        with peers.weights_of(size, args) as weights:
            measure(report, size, weights, args, device, dtype)
            if args.starts:
                measure_starts(report, size, weights, args)


def measure(report: Report, size: str, weights: Path, args, device: torch.device, dtype: torch.dtype) -> None:
    model = load_minigpt5(weights, None, 8, dtype, device, read_pictures=False).eval()
    libraries = Libraries(weights, model.tokenizer, model.vokens, model.mapper, dtype)
    times = alternate(words(model, libraries, args), args.rounds, device, args.clock)
    report.add(rows_of("words", size, times, args.tokens, "tokens/s", tokens=args.tokens))

    sampling = Sampling(steps=args.steps, force_image=True, max_new_tokens=1, compile=args.compile)
    features = torch.randn(1, 8, model.llama.config.hidden_size, generator=generator()).to(device)
    latents = send(model.sample_latents(1, generator()), device)
    checked = sampling if dtype == torch.float32 else replace(sampling, guidance=1.0)  # which makes roundings larger
    with exact_products():
        picture = (paint(model, features, checked, latents) / 2 + 0.5).clamp(0, 1)
        figure = agree("picture", picture, libraries.paint(features, checked, latents), dtype)
    contenders = {"ours": partial(paint, model, features, sampling, latents)}
    contenders["diffusers"] = partial(libraries.paint, features, sampling, latents)
    if args.compile:
        contenders["diffusers, compiled"] = partial(
            libraries.compiled(weights, dtype).paint, features, sampling, latents
        )
    times = alternate(contenders, args.rounds, device, args.clock)
    report.add(rows_of("picture", size, times, steps=args.steps, difference=figure))

    contenders = {"ours": lambda: answer(model, [prompt_ids(model, PROMPT)], [[]], sampling, [generator()])}
    contenders[LIBRARIES] = partial(libraries.answer, sampling)
    times = alternate(contenders, args.rounds, device, args.clock)
    report.add(rows_of("prompt to picture", size, times, steps=args.steps))


def measure_starts(report: Report, size: str, weights: Path, args: argparse.Namespace) -> None:
    for what, cold in (("cold", True), ("warm", False)):
        starts = {name: [] for name in ("ours", LIBRARIES)}
        for _ in range(args.starts):
            for name, figures in starts.items():
                figures.append(first_picture(name, weights, cold, args))
        times = {name: [seconds for seconds, _ in figures] for name, figures in starts.items()}
        ours, peer = (max(memory for _, memory in figures) for figures in starts.values())
        more = {"steps": args.steps, "ours_memory_gb": ours, "peer_memory_gb": peer}
        report.add(rows_of(f"start to first picture, {what}", size, times, **more))


if __name__ == "__main__":
    run(main)
