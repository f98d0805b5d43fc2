"""MiniGPT-5 put together: pictures into the prompt, the losses of both stages, what trains and how it is loaded.

Follows arXiv 2310.02239 section 3. Every part is frozen but the voken rows and the feature mapper, and in stage 2 an
adapter of the language model. Answers are in generation.py. One training sample:

    caption ids, [IMG0]..[IMGN-1], ###   (B, T)          collate
    embeddings                           (B, T, D)       MiniGPT5.embed, input pictures over their placeholders
    hidden states                        (B, T, D)       Vicuna
    voken features                       (M, N, D)       the states that predict the vokens: one position before each
    conditioning                         (M, S, Dc)      mapper, in the place of Stable Diffusion's text encoding
    predicted noise                      (M, C, h, w)    UNet

B batch, T tokens, N vokens of a picture, M pictures in the batch, S conditioning tokens, D and Dc widths of the
language and of the diffusion model, C latent channels, h w latent height and width.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama import History, Llama, Vokens
from lora import Prefix, add_lora
from mapper import VokenMapper
from qformer import ImageEncoder
from scheduler import NoiseSchedule
from text_encoder import TextEncoder
from tokenizer import Tokenizer
from trainer.processes import shard
from unet import Downsample, ResBlock, SpatialTransformer, UNet, Upsample
from vae import VAE, to_pixels

TEXT_WEIGHT, LDM_WEIGHT, CAP_WEIGHT = 0.01, 1.0, 0.1  # L = 0.01 L_text + 1.0 L_LDM + 0.1 L_CAP, section 3.3
DROP_RATE = 0.1  # pictures trained with zeros for voken features, so that sampling has an unconditional branch
IGNORE = -100  # label of a position that takes no part in L_text


class Rows(NamedTuple):
    """A batch of token rows, padded on the right, and where its pictures are."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), IGNORE where nothing is learned
    targets: Tensor  # (B, L) positions of the target, padded with those that follow it
    picture_rows: Tensor  # (M,) row of each output picture
    picture_starts: Tensor  # (M,) position before its [IMG0]

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(send(tensor, device) for tensor in self))


class Draws(NamedTuple):
    """All that is random in the picture losses of M pictures."""

    drop: Tensor  # (M,) bool: zeros in the place of the voken features
    posterior: Tensor  # (M, C, h, w) standard normal, picks the latent from the autoencoder's posterior
    noise: Tensor  # (M, C, h, w) standard normal, the diffusion noise
    timesteps: Tensor  # (M,)

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(send(tensor, device) for tensor in self))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device. To a GPU through pinned memory: from other memory the host would wait until the GPU has done all
    that it was given."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def bucket_length(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320 ...: every shape costs a compilation."""
    step = 1 << max(4, length.bit_length() - 3)
    return -(-length // step) * step


def padded(x: Tensor, length: int, dim: int = 0, value: int = 0) -> Tensor:
    """x with `value` after its end along `dim`, up to `length`."""
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, length - x.shape[dim]], value=value)


def expand_placeholders(tokenizer: Tokenizer, ids: list[int], queries: int) -> list[int]:
    """Each placeholder id as often as a picture has query embeddings."""
    return [i for token in ids for i in [token] * (queries if token == tokenizer.image_id else 1)]


def collate(
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    queries: int,
    round_length: Callable[[int], int] = int,
    limit: int = 2048,
) -> Rows:
    """(source, target) texts -> rows of <s> source target. Padded on the right, so that the longest source is followed
    by as many places as the longest target has tokens; `round_length` (`bucket_length`, or none) then makes it longer.

    Learned are the target's tokens but for [IMG1]..[IMGN-2]: of the vokens only the first, which says that a picture
    belongs here, and the last, with which text goes on. A source is cut at its end so that a row has at most `limit`
    tokens. Source and target are encoded apart: each piece gets its own leading space.
    """
    rows, labels, pictures, starts = [], [], [], []
    inner = set(tokenizer.voken_ids[1:-1])
    for row, (source, target) in enumerate(pairs):
        target_ids = expand_placeholders(tokenizer, tokenizer.encode(target), queries)
        source_ids = expand_placeholders(tokenizer, tokenizer.encode(source), queries)
        source_ids = [tokenizer.bos_id, *source_ids][: limit - len(target_ids)]
        learned = [IGNORE if i in inner or i == tokenizer.image_id else i for i in target_ids]
        rows.append(source_ids + target_ids)
        starts.append(len(source_ids))
        labels.append([IGNORE] * len(source_ids) + learned)
        pictures += [(row, at - 1) for at, label in enumerate(labels[-1]) if label == tokenizer.voken_ids[0]]
    L = max(len(row) - start for row, start in zip(rows, starts, strict=True))
    T = round_length(max(starts) + L)
    rows = [row + [tokenizer.eos_id] * (T - len(row)) for row in rows]
    labels = [label + [IGNORE] * (T - len(label)) for label in labels]
    where = torch.tensor(pictures, dtype=torch.long).reshape(-1, 2)
    targets = torch.tensor(starts)[:, None] + torch.arange(L)
    return Rows(torch.tensor(rows), torch.tensor(labels), targets, where[:, 0], where[:, 1])


def type_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@torch.no_grad()
def encode_captions(encoder: TextEncoder, tokenizer: Callable, captions: list[str]) -> Tensor:
    """Captions -> (B, S, Dc), Stable Diffusion's own encoding. As in the released code the encoder gets the padding
    mask, which Stable Diffusion does not give it."""
    device = next(encoder.parameters()).device
    return encoder(*(send(tensor, device) for tensor in tokenizer(captions)))


def recomputed(layer: Callable, *inputs) -> Tensor:
    """What `layer` makes of its inputs; computed again when gradients are, so that only the inputs are kept."""
    return checkpoint(layer, *inputs, use_reentrant=False) if torch.is_grad_enabled() else layer(*inputs)


class MiniGPT5(nn.Module):
    """The parts and their sizes. Parts that a command does not need may be None."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        llama: Llama,
        unet: UNet,
        vae: VAE,
        schedule: NoiseSchedule,
        condition_tokens: int,
        image_encoder: ImageEncoder | None = None,
        text_encoder: TextEncoder | None = None,
        clip_tokenizer: Callable | None = None,
    ):
        super().__init__()
        self.tokenizer, self.clip_tokenizer, self.schedule = tokenizer, clip_tokenizer, schedule
        self.llama, self.unet, self.vae = llama, unet, vae
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        width = llama.config.hidden_size
        if image_encoder and (wide := image_encoder.llama_proj.out_features) != width:  # `embed` would not notice
            raise ValueError(f"llama_proj makes vectors {wide} wide, but the language model reads {width}")
        if (pieces := tokenizer.base_vocabulary) > (rows := llama.config.vocab_size):
            raise ValueError(f"the tokenizer has {pieces} pieces, but the language model {rows} embeddings")
        self.vokens = Vokens(len(tokenizer.voken_ids), tokenizer.base_vocabulary, width)
        self.vokens.start_from_mean(llama)
        self.mapper = VokenMapper(width, unet.config.cross_attention_dim, condition_tokens)
        self.lora, self.prefix = [], None  # stage 2, see add_adapters
        self.tables = {}  # name -> tensor, where a released checkpoint has other tables than Vicuna
        self.system = None  # the sentences that open a converted checkpoint's prompts, where they are not stories.py's
        self.queries = image_encoder.query_tokens.shape[1] if image_encoder else 1  # embeddings of an input picture
        self.compiled_for = 0  # see compile_losses

    @property
    def device(self) -> torch.device:
        return self.vokens.input.device

    @property
    def picture_size(self) -> int:
        """Side of an output picture in pixels."""
        return self.unet.config.sample_size * self.vae.config.downsampling

    @property
    def virtual_tokens(self) -> int:
        """Positions that a prefix takes before every row."""
        return self.prefix.embedding.num_embeddings if self.prefix else 0

    def embed(self, ids: Tensor, inputs: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D). The input pictures' query embeddings fill the placeholders in order of rows, then
        tokens. inputs: pixels (P, 3, H, W) as qformer.preprocess_input makes them, or query embeddings (P, Q, D)."""
        embeddings = self.vokens.embed(self.llama, ids)
        if inputs is not None:
            inputs = send(inputs, self.device)
            if inputs.dim() == 4:
                with torch.no_grad():
                    inputs = self.image_encoder(inputs)  # (P, Q, D)
            embeddings = embeddings.masked_scatter(
                (ids == self.tokenizer.image_id)[..., None], inputs.to(embeddings.dtype)
            )
        return embeddings

    def encode_captions(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or what was precomputed of them -> (B, S, Dc) float32, the target of L_CAP."""
        if isinstance(captions, list):
            return encode_captions(self.text_encoder, self.clip_tokenizer, captions).float()
        return send(captions, self.device).float()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (M, C, h, w) of the latents' posterior, from pictures (M, 3, H, W), bytes or numbers in
        [-1, 1], or from what was precomputed of them: both in one tensor (M, 2, C, h, w)."""
        pictures = send(pictures, self.device)
        if pictures.dim() == 5:
            return pictures.unbind(1)
        pixels = to_pixels(pictures) if pictures.dtype == torch.uint8 else pictures
        return self.vae.encode(pixels.to(type_of(self.vae)))

    def draw(self, pictures: int, generator: torch.Generator, drop_rate: float = DROP_RATE) -> Draws:
        """The random numbers of one step, on the generator's device."""
        drop = torch.rand(pictures, generator=generator, device=generator.device) < drop_rate
        posterior, noise = self.draw_latents(pictures, generator), self.draw_latents(pictures, generator)
        steps = len(self.schedule.alphas_cumprod)
        timesteps = torch.randint(steps, (pictures,), generator=generator, device=generator.device)
        return Draws(drop, posterior, noise, timesteps)

    def draw_latents(self, pictures: int, generator: torch.Generator) -> Tensor:
        """Standard normal (M, C, h, w), on the generator's device."""
        size = self.unet.config.sample_size
        shape = (pictures, self.unet.config.in_channels, size, size)
        return torch.randn(shape, generator=generator, device=generator.device)

    def read(self, rows: Rows, inputs: Tensor | None = None) -> Tensor:
        """Rows and their input pictures, as `embed` takes them -> the language model's hidden states (B, T, D)."""
        return MiniGPT5.hidden_states(self, self.embed(rows.ids, inputs), rows.targets)  # never the compiled one

    def hidden_states(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """embeddings (B, T, D), positions of the targets (B, L) -> (B, T, D).

        In stage 1 nothing before the vokens trains. So sources are read first, their keys and values are constants, and
        only the few positions of the targets, which continue them, are differentiated. This is exact.
        """
        B, T, D = embeddings.shape
        if self.lora or self.prefix:
            return self.llama(embeddings, cache=self.prefix.history(B, embeddings.dtype) if self.prefix else None)
        L = targets.shape[1]
        at = targets[..., None].expand(-1, -1, D)
        is_source = torch.arange(T - L, device=self.device) < targets[:, :1]  # (B, T - L)
        history = History(B, self.device)
        with torch.no_grad():
            source = self.llama(embeddings[:, : T - L], is_source.long(), history)
        target = self.llama(embeddings.gather(1, at), cache=history)  # (B, L, D)
        return F.pad(source, (0, 0, 0, L)).scatter(1, at, target)

    def voken_features(self, hidden: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """hidden (B, T, D) -> (M, N, D): the states that predict [IMG0]..[IMGN-1]. The last voken's own is not used."""
        offsets = torch.arange(len(self.tokenizer.voken_ids), device=hidden.device)
        return hidden[rows[:, None], starts[:, None] + offsets].float()

    def text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The states (B, L, D) that predict the labels (B, L), IGNORE among them."""
        logits = self.vokens.logits(self.llama, hidden)  # (B, L, V')
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    def ldm_loss(self, conditioning: Tensor, latents: Tensor, draws: Draws, gamma: float) -> Tensor:
        """Eq. 3, of each picture (M,), weighted by min(SNR, gamma) / SNR as the released code does; gamma 0: the
        paper's."""
        noisy = self.schedule.add_noise(latents, draws.noise, draws.timesteps)
        dtype = type_of(self.unet)
        predicted = self.unet(noisy.to(dtype), draws.timesteps, conditioning.to(dtype)).float()
        target = self.schedule.target(latents, draws.noise, draws.timesteps)
        return self.schedule.snr_weight(draws.timesteps, gamma) * (predicted - target).square().mean((1, 2, 3))

    def picture_losses(
        self,
        features: Tensor,
        draws: Draws,
        share: Tensor,
        posterior: tuple[Tensor, Tensor] | None,
        captions: tuple[Tensor, Tensor] | None,
        gamma: float,
    ) -> dict[str, Tensor]:
        """Voken features (M, N, D) -> "ldm_loss" and "cap_loss", where their inputs are given. share (M,): of each
        picture in the means."""
        features = features.masked_fill(draws.drop[:, None, None], 0.0)
        conditioning, losses = self.mapper(features), {}  # (M, S, Dc)
        if posterior is not None:
            latents = self.vae.sample(posterior[0].float(), posterior[1].float(), draws.posterior)
            losses["ldm_loss"] = (share * self.ldm_loss(conditioning, latents, draws, gamma)).sum()
        if captions is not None:
            target = torch.where(draws.drop[:, None, None], captions[1], captions[0])
            losses["cap_loss"] = (share * (conditioning - target).square().mean((1, 2))).sum()
        return losses

    def losses(
        self,
        rows: Rows,
        draws: Draws | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        captions: tuple[Tensor, Tensor] | None = None,
        inputs: Tensor | None = None,
        min_snr_gamma: float = 5.0,
        text_weight: float = TEXT_WEIGHT,
    ) -> dict[str, Tensor]:
        """{"loss", "text_loss", "ldm_loss", "cap_loss"}, the last two only where their inputs are given.

        posterior: mean and log variance of the M output pictures; captions: encodings of the M captions (M, S, Dc) and
        of the empty one (1, S, Dc), which a dropped picture is held to; inputs: the input pictures, if any. Draws of no
        picture differ from None in that mapper and UNet are gone through, with no effect (see parallel.shard).
        """
        hidden = self.hidden_states(self.embed(rows.ids, inputs), rows.targets)  # (B, T, D)
        before = (rows.targets - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        predicting, labels = hidden.gather(1, before), rows.labels.gather(1, rows.targets)
        if self.compiled_for:
            L = bucket_length(labels.shape[1])
            predicting, labels = padded(predicting, L, 1), padded(labels, L, 1, IGNORE)
        text_loss = self.text_loss(predicting, labels)
        losses = {"loss": text_weight * text_loss, "text_loss": text_loss}
        if draws is None:
            return losses

        features = self.voken_features(hidden, rows.picture_rows, rows.picture_starts)  # (M, N, D)
        M = len(features)
        share = torch.full((M,), 1 / max(1, M), device=self.device)
        # Pictures without a share fill up to a multiple of an eighth of the batch (few graphs), and to one at least.
        if self.compiled_for or not M:
            step = -(-self.compiled_for // 8) or 1
            fill = partial(padded, length=max(1, -(-M // step)) * step)
            features, share, draws = fill(features), fill(share), Draws(*map(fill, draws))
            posterior = posterior and tuple(map(fill, posterior))
            captions = captions and (fill(captions[0]), captions[1])
        losses |= self.picture_losses(features, draws, share, posterior, captions, min_snr_gamma)
        for name, weight in (("ldm_loss", LDM_WEIGHT), ("cap_loss", CAP_WEIGHT)):
            if name in losses:
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses if M else {name: losses[name] for name in ("loss", "text_loss")}

    def checkpoint_gradients(self) -> None:
        """Of the frozen networks that gradients pass through keep no more than each layer's input, and compute the
        layer again in the backward pass (arXiv 1604.06174): the same gradients, less memory, more work."""
        unet = self.unet
        halves = [(b.resnets, b.attentions) for b in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)]
        for layer in chain(self.llama.model.layers, *(layers for block in halves for layers in block)):
            layer.forward = partial(recomputed, layer.forward)

    def shard(self) -> None:
        """Leave this process its part of Vicuna's and the UNet's layers (see parallel.py): for training."""
        shard(self.llama, self.llama.model.layers, self.device)
        kinds = ResBlock | SpatialTransformer | Downsample | Upsample
        shard(self.unet, [m for m in self.unet.modules() if isinstance(m, kinds)], self.device)

    def compile_losses(self, batch_size: int) -> None:
        """Compile what the losses are made of, for batches of that size.

        In three parts, as each depends on one length alone: of the rows, of the targets, of the list of pictures. So
        there are as many graphs as lengths, not as many as combinations of them; and of each there are few.
        """
        torch._dynamo.config.cache_size_limit = 64  # graphs of a part
        self.compiled_for = batch_size
        for name in ("hidden_states", "text_loss", "picture_losses"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True))

    def add_adapters(self, lora: dict | None = None, prefix: dict | None = None) -> None:
        """Stage 2's change of the language model: the options of `add_lora`, or those of `Prefix`."""
        if lora is not None:
            self.lora = add_lora(self.llama.model, **lora)
        if prefix is not None:
            self.prefix = Prefix(self.llama.config, **prefix).to(self.device)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: the voken rows, the mapper under its published names, the adapters."""
        rows = {f"vokens.{name}": parameter for name, parameter in self.vokens.named_parameters()}
        lora = {name: parameter for name, parameter in self.llama.named_parameters() if "lora_" in name}
        prefix = {f"prefix_encoder.{n}": p for n, p in self.prefix.named_parameters()} if self.prefix else {}
        return {**rows, **dict(self.mapper.named_parameters()), **lora, **prefix}
