"""Every component, forward and where gradients pass through it backward, against transformers, diffusers and
torch.nn.Transformer with the same weights.

    python bench/components.py                                       # miniature and half size; with a GPU also full
    python bench/components.py --sizes half --parts unet vae

| row                            | what is timed                                                                      |
| ------------------------------ | ---------------------------------------------------------------------------------- |
| text encoder, image encoder    | forward; captions with their padding mask, as in training                          |
| llama                          | forward over prompts; then with the gradient of its inputs at all positions        |
| llama, vokens alone            | ours: as stage 1 trains, prompts without gradient, then N positions with it        |
| mapper                         | forward; then with the gradients of its parameters                                 |
| unet                           | forward; then with the gradient of the conditioning                                |
| vae                            | encode; decode                                                                     |

Before it is timed each pair is compared: outputs and gradients have to agree. Neither side is compiled.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench import peers
from bench.common import Report, agree, alternate, exact_products, parser, rows_of, start
from common.cli import read_arguments, run
from llama import GrowingKVCache
from published.clip_tokenizer import ClipTokenizer
from published.parts import config_of, load_image_encoder, load_llama, load_text_encoder, load_unet, load_vae

BATCH = {"tiny": (2, 2), "miniature": (8, 8), "half": (4, 1), "full": (16, 8)}  # of words, of pictures
PROMPT, VOKENS = 24, 8  # tokens of a caption and its picture
CAPTION = "a small red boat with a white sail on the calm sea at night, two stars above it and a hill behind"
Case = tuple[str, str, Callable, Callable]  # row, name of the peer, ours, peer; both return what is compared


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_gradient(call: Callable) -> Callable:
    return torch.no_grad()(call)


def with_gradient(call: Callable, wanted: list[Tensor], towards: Tensor) -> Callable:
    """call() and the gradients of `wanted`, for the loss whose own gradient is `towards`."""

    def forward_and_backward() -> tuple[Tensor, ...]:
        output = call()
        return output, *torch.autograd.grad(output, wanted, towards.to(output))

    return forward_and_backward


def text_encoder(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    folder = weights / "stable-diffusion"
    ours, peer = (
        load_text_encoder(folder / "text_encoder", dtype, device),
        peers.peer_text_encoder(weights, dtype, device),
    )
    ids, mask = (t.to(device) for t in ClipTokenizer(folder / "tokenizer")([CAPTION] * batch))
    calls = (lambda: ours(ids, mask), lambda: peer(ids, mask).last_hidden_state)
    yield "text encoder forward", "transformers", *map(without_gradient, calls)


def image_encoder(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours = load_image_encoder(weights, dtype, device)
    peer = peers.PeerImageEncoder(weights).to(device, dtype).eval().requires_grad_(False)
    size = ours.vision_model.config.image_size
    pixels = normal(batch, 3, size, size).to(device, dtype)
    yield "image encoder forward", "transformers", *map(without_gradient, (lambda: ours(pixels), lambda: peer(pixels)))


def llama(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours, peer = load_llama(weights / "vicuna", dtype, device), peers.peer_llama(weights, dtype, device).model
    T, D = PROMPT + VOKENS, ours.config.hidden_size
    embeddings = (ours.model.embed_tokens.weight.std() * normal(batch, T, D).to(device)).to(dtype)

    def published() -> Tensor:
        return peer(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    yield "llama forward", "transformers", *map(without_gradient, (lambda: ours(embeddings), published))
    embeddings.requires_grad_(True)
    towards = normal(batch, T, D, seed=1).to(device)
    calls = (lambda: ours(embeddings), published)
    yield "llama backward", "transformers", *(with_gradient(call, [embeddings], towards) for call in calls)

    vokens = embeddings.detach()[:, PROMPT:].clone().requires_grad_(True)
    towards = towards[:, PROMPT:]
    is_prompt = torch.ones(batch, PROMPT, dtype=torch.long, device=device)

    def ours_continued() -> Tensor:
        cache = GrowingKVCache(batch, device)
        with torch.no_grad():
            ours(embeddings[:, :PROMPT], is_prompt, cache)
        return ours(vokens, cache=cache)

    def published_whole() -> Tensor:
        whole = torch.cat([embeddings[:, :PROMPT], vokens], dim=1)  # as released: all positions carry a gradient
        return peer(inputs_embeds=whole, use_cache=False).last_hidden_state[:, PROMPT:]

    calls = (ours_continued, published_whole)
    yield "llama backward, vokens alone", "transformers", *(with_gradient(call, [vokens], towards) for call in calls)


def mapper(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours = peers.mapper_of(weights, device)  # in float32 always, as everything that trains
    peer = peers.PeerMapper(ours)
    features = normal(batch, VOKENS, ours.fc[0].in_features).to(device)
    calls = (lambda: ours(features), lambda: peer(features))
    ours.eval()
    peer.eval()
    yield "mapper forward", "nn.Transformer", *map(without_gradient, calls)
    ours.train()
    peer.train()
    towards = normal(batch, *ours.t2i_decoder_prompt.shape[1:], seed=1).to(device)
    parameters = [list(ours.parameters()), [dict(peer.named_parameters())[name] for name, _ in ours.named_parameters()]]
    both = (with_gradient(*pair, towards) for pair in zip(calls, parameters, strict=True))
    yield "mapper backward", "nn.Transformer", *both


def unet(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours, peer = (
        load_unet(weights / "stable-diffusion" / "unet", dtype, device),
        peers.peer_unet(weights, dtype, device),
    )
    config, tokens = ours.config, peers.mapper_of(weights, device).t2i_decoder_prompt.shape[1]
    latents = normal(batch, config.in_channels, config.sample_size, config.sample_size).to(device, dtype)
    condition = normal(batch, tokens, config.cross_attention_dim, seed=1).to(device, dtype)
    steps = torch.linspace(1, 999, batch, device=device).long()
    calls = (lambda: ours(latents, steps, condition), lambda: peer(latents, steps, condition).sample)
    yield "unet forward", "diffusers", *map(without_gradient, calls)
    condition.requires_grad_(True)
    towards = normal(*latents.shape, seed=2).to(device)
    yield "unet backward", "diffusers", *(with_gradient(call, [condition], towards) for call in calls)


def vae(weights: Path, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours = load_vae(weights / "stable-diffusion" / "vae", dtype, device)
    peer = peers.peer_vae(weights, dtype, device)
    config, scale = ours.config, ours.config.scaling_factor
    size = config_of("unet", weights / "stable-diffusion" / "unet" / "config.json").sample_size
    side = size * config.downsampling
    pixels = normal(batch, 3, side, side).to(device, dtype)
    latents = normal(batch, config.latent_channels, size, size).to(device, dtype)

    def published() -> tuple[Tensor, Tensor]:
        posterior = peer.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    yield "vae encode", "diffusers", *map(without_gradient, (lambda: ours.encode(pixels), published))
    calls = (lambda: ours.decode(latents), lambda: peer.decode(latents / scale).sample)
    yield "vae decode", "diffusers", *map(without_gradient, calls)


WORDS = {"text_encoder": text_encoder, "llama": llama, "mapper": mapper}
PICTURES = {"image_encoder": image_encoder, "unet": unet, "vae": vae}
PARTS = WORDS | PICTURES


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, ("miniature", "half"))
    options.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    args = read_arguments(options, argv)
    device, dtype = start(args)
    report = Report("components", args, device)
    for size in args.sizes:
        with peers.weights_of(size, args) as weights:
            for part in args.parts:
                batch = BATCH[size][part in PICTURES]
                for what, name, ours, peer in PARTS[part](weights, batch, dtype, device):
                    with exact_products():
                        results, kind = (ours(), peer()), torch.float32 if part == "mapper" else dtype
                        gradients = len(results[0]) - 1 if "backward" in what else 0
                        figure = agree(what, *results, kind, gradients=gradients)
                    times = alternate({"ours": ours, name: peer}, args.rounds, device, args.clock)
                    report.add(rows_of(what, size, times, difference=figure, batch=batch))


if __name__ == "__main__":
    run(main)
