"""MiniGPT-5 put together (arXiv 2310.02239, section 3): a frozen language model that reads pictures and asks for
pictures, a frozen diffusion model that makes them, and what trains between the two.

One training sample, from its tokens to the losses; a prompt follows the same path up to the conditioning:

    token ids                        (B, T)          common/collate.py: the source, then [IMG0]..[IMGN-1] ###
    embeddings                       (B, T, D)       MiniGPT5.embed: input pictures stand over their placeholders
    hidden states                    (B, T, D)       MiniGPT5.hidden_states: Vicuna
    voken features                   (M, N, D)       MiniGPT5.voken_features: the states that predict the vokens
    conditioning                     (M, S, Dc)      mapper: takes the place of Stable Diffusion's text encoding
    predicted noise                  (M, C, h, w)    UNet
    L = 0.01 L_text + 1.0 L_LDM + 0.1 L_CAP          MiniGPT5.losses

B batch, T tokens, L target tokens, N vokens of a picture, M output pictures in the batch, P input pictures, Q query
embeddings of an input picture, S conditioning tokens, D and Dc widths of the language and of the diffusion model,
C latent channels, h w latent height and width. Answers are made in generation.py, weights are loaded by published/.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.collate import IGNORE, Batch
from common.tokenizer import Tokenizer
from llama import GrowingKVCache, Llama
from lora import Prefix, add_lora
from mapper import VokenMapper
from prompts import System
from qformer import ImageEncoder
from scheduler import NoiseSchedule
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

TEXT_WEIGHT, LDM_WEIGHT, CAP_WEIGHT = 0.01, 1.0, 0.1  # section 3.3
DROP_RATE = 0.1  # share of pictures whose voken features are replaced by zeros, for classifier-free guidance


class Noise(NamedTuple):
    """Everything random in the losses of M pictures."""

    drop: Tensor  # (M,) bool: whether the voken features are replaced by zeros
    latent_noise: Tensor  # (M, C, h, w) standard normal, samples the latents from the autoencoder's posterior
    epsilon: Tensor  # (M, C, h, w) standard normal, of Eq. 3
    timesteps: Tensor  # (M,)


def send(x: Tensor | tuple, device: torch.device) -> Tensor | tuple:
    """A tensor, or the tensors of a named tuple, on `device`. A GPU copies from pinned memory while the host goes on;
    from other memory it would wait until the GPU has finished everything before."""
    if isinstance(x, tuple):
        return type(x)(*(send(tensor, device) for tensor in x))
    if x.device == device or device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@torch.no_grad()
def encode_captions(encoder: TextEncoder, tokenizer: Callable, captions: list[str]) -> Tensor:
    """Captions -> (B, S, Dc), the target of L_CAP. As in the released code the text encoder gets the padding mask;
    Stable Diffusion itself gives it none."""
    device = next(encoder.parameters()).device
    return encoder(*(send(tensor, device) for tensor in tokenizer(captions)))


class Vokens(nn.Module):
    """The trained embedding rows of n vokens and the image placeholder, for the input and for the output.

    Token ids go on after the tokenizer's base vocabulary V: [IMG0] is V, the placeholder V + n. A published table may
    have more rows than the tokenizer has pieces (Vicuna v0's padding token). Its rows from V on are unused.
    """

    def __init__(self, llama: Llama, vokens: int, base_vocabulary: int, start: list[int] | None = None):
        """Every row is initialised to the mean of the language model's rows, in float32 and on their device. With
        `start`, token ids, the vokens' rows are these tokens'; the last is repeated where they are too few."""
        super().__init__()
        self.base = base_vocabulary
        tables = llama.model.embed_tokens.weight.detach(), llama.lm_head.weight.detach()
        means = (table[:base_vocabulary].mean(0, dtype=torch.float32) for table in tables)
        self.input, self.output = (nn.Parameter(mean.repeat(vokens + 1, 1)) for mean in means)
        if start:
            ids = (start + start[-1:] * vokens)[:vokens]
            for rows, table in zip((self.input, self.output), tables, strict=True):
                rows.data[:-1] = table[ids].float()

    def embed(self, llama: Llama, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D) in the frozen table's dtype."""
        old = F.embedding(ids.clamp(max=self.base - 1), llama.model.embed_tokens.weight)
        new = F.embedding((ids - self.base).clamp(min=0), self.input).to(old.dtype)
        return torch.where((ids >= self.base)[..., None], new, old)

    def logits(self, llama: Llama, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits of all V + n + 1 tokens in float32: every new token takes part in the softmax."""
        old = llama.lm_head(hidden)[..., : self.base]
        new = F.linear(hidden, self.output.to(hidden.dtype))
        return torch.cat([old, new], dim=-1).float()


class MiniGPT5(nn.Module):
    """All parts. The encoders of input pictures and of captions may be None where a command does not need them."""

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
        start_as: str | None = None,
        adapters: dict | None = None,
    ):
        """start_as: the vokens' rows start as those of this text's tokens. adapters: options of `add_adapters`."""
        super().__init__()
        self.tokenizer, self.clip_tokenizer, self.schedule = tokenizer, clip_tokenizer, schedule
        self.llama, self.unet, self.vae = llama, unet, vae
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        width = llama.config.hidden_size
        start = tokenizer.encode_plain(start_as) if start_as else None
        self.vokens = Vokens(llama, len(tokenizer.voken_ids), tokenizer.base_vocabulary, start)
        self.mapper = VokenMapper(width, unet.config.cross_attention_dim, condition_tokens)
        self.lora, self.prefix = [], None  # stage 2's adapters, see add_adapters
        self.lora_for_words = False  # after `train_mls.py --words-first`: a picture's vokens are read without LoRA
        self.virtual_tokens = 0  # positions that a prefix takes before every sequence
        # How many embeddings stand for an input picture; 1 where no picture is read.
        self.queries = image_encoder.query_tokens.shape[1] if image_encoder else 1
        # A released checkpoint also has Vicuna's tables as they were in its training, the sentences that open its
        # prompts, and the special token that they begin with.
        self.tables: dict[str, Tensor] = {}
        self.system: System | None = None
        self.first_token: str | None = None
        # After a training with --no-cfg, guidance goes against the empty caption. Its encoding (1, S, Dc) is made when
        # it is first asked for, since the text encoder has to be loaded for it.
        self.guides_against_empty_caption = False
        self.empty_caption: Callable[[], Tensor] | None = None
        self.add_adapters(**(adapters or {}))

    @property
    def device(self) -> torch.device:
        return self.vokens.input.device

    # ---- 3.1 and 3.2.1: what the language model reads, and what it says with vokens

    def embed(self, ids: Tensor, inputs: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D). `inputs` are the batch's input pictures in the order of their placeholders: pixels
        (P, 3, H, W) as qformer.preprocess_input makes them, or their query embeddings (P, Q, D)."""
        embeddings = self.vokens.embed(self.llama, ids)
        if inputs is None:
            return embeddings
        inputs = send(inputs, self.device)
        if inputs.dim() == 4:
            with torch.no_grad():
                inputs = self.image_encoder(inputs)  # (P, Q, D)
        is_placeholder = (ids == self.tokenizer.image_id)[..., None]
        return embeddings.masked_scatter(is_placeholder, inputs.to(embeddings.dtype))

    def hidden_states(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """embeddings (B, T, D), positions of the targets (B, L) -> the language model's hidden states (B, T, D).

        In stage 1 nothing before the vokens trains. The sources are therefore read first, without gradients, and the
        targets continue them: only L positions are differentiated. The gradients are exactly the same.
        """
        B, T, D = embeddings.shape
        if self.lora or self.prefix:  # stage 2: its adapters train at every position
            return self.llama(embeddings, cache=self.prefix.growing_cache(B, embeddings.dtype) if self.prefix else None)
        L = targets.shape[1]
        indices = targets[..., None].expand(-1, -1, D)
        is_source = torch.arange(T - L, device=targets.device) < targets[:, :1]  # (B, T - L)
        cache = GrowingKVCache(B, targets.device)
        with torch.no_grad():
            source = self.llama(embeddings[:, : T - L], is_source.long(), cache)  # (B, T - L, D)
        target = self.llama(embeddings.gather(1, indices), cache=cache)  # (B, L, D)
        return F.pad(source, (0, 0, 0, L)).scatter(1, indices, target)

    def voken_features(self, hidden: Tensor, sequences: Tensor, starts: Tensor) -> Tensor:
        """hidden (B, T, D) -> (M, N, D): the states that predict [IMG0]..[IMGN-1], each one position before its voken.
        sequences, starts (M,): the sequence of each picture, and the position before its [IMG0]."""
        offsets = torch.arange(len(self.tokenizer.voken_ids), device=hidden.device)
        return hidden[sequences[:, None], starts[:, None] + offsets].float()

    # ---- 3.3: the losses

    def text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """L_text: hidden (B, L, D), the states that predict the tokens `labels` (B, L)."""
        logits = self.vokens.logits(self.llama, hidden)  # (B, L, V'): of the V' ids, the vokens' included
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    def ldm_loss(self, conditioning: Tensor, latents: Tensor, noise: Noise, gamma: float) -> Tensor:
        """L_LDM (Eq. 3) of each picture (M,). The released code weights it by min(SNR, gamma) / SNR; with gamma 0 it is
        the paper's."""
        noisy, target = self.schedule.add_noise(latents, noise.epsilon, noise.timesteps)
        predicted = self.unet(noisy, noise.timesteps, conditioning).float()
        return self.schedule.snr_weight(noise.timesteps, gamma) * (predicted - target).square().mean((1, 2, 3))

    def cap_loss(self, conditioning: Tensor, encodings: tuple[Tensor, Tensor], drop: Tensor) -> Tensor:
        """L_CAP of each picture (M,): the distance to the caption's encoding (M, S, Dc), or to the empty
        caption's (1, S, Dc) where the picture's features were dropped."""
        target = torch.where(drop[:, None, None], encodings[1], encodings[0])
        return (conditioning - target).square().mean((1, 2))

    def picture_losses(
        self,
        features: Tensor,
        noise: Noise,
        weights: Tensor,
        posterior: tuple[Tensor, Tensor] | None,
        encodings: tuple[Tensor, Tensor] | None,
        gamma: float,
    ) -> dict[str, Tensor]:
        """Voken features (M, N, D) -> "ldm_loss" and "cap_loss", where their inputs are given."""
        features = features.masked_fill(noise.drop[:, None, None], 0.0)  # the unconditional branch of guidance
        conditioning, losses = self.mapper(features), {}  # (M, S, Dc)
        if posterior is not None:
            latents = self.vae.sample(posterior[0].float(), posterior[1].float(), noise.latent_noise)
            losses["ldm_loss"] = (weights * self.ldm_loss(conditioning, latents, noise, gamma)).sum()
        if encodings is not None:
            losses["cap_loss"] = (weights * self.cap_loss(conditioning, encodings, noise.drop)).sum()
        return losses

    def losses(
        self,
        batch: Batch,
        noise: Noise | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        encodings: tuple[Tensor, Tensor] | None = None,
        inputs: Tensor | None = None,
        min_snr_gamma: float = 5.0,
        text_weight: float = TEXT_WEIGHT,
    ) -> dict[str, Tensor]:
        """{"loss", "text_loss", "ldm_loss", "cap_loss"}; the last two only where their inputs are given.

        batch and noise may still be on the host. noise: of the M output pictures, None where there are none; posterior:
        mean and log variance of their latents; encodings: those of their captions (M, S, Dc) and of the empty one
        (1, S, Dc); inputs: see `embed`.
        """
        batch, noise = send(batch, self.device), noise and send(noise, self.device)
        hidden = self.hidden_states(self.embed(batch.ids, inputs), batch.targets)  # (B, T, D)
        predicting = (batch.targets - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        text_loss = self.text_loss(hidden.gather(1, predicting), batch.labels)
        losses = {"loss": text_weight * text_loss, "text_loss": text_loss}
        if noise is not None:
            features = self.voken_features(hidden, batch.picture_sequences, batch.picture_starts)  # (M, N, D)
            weights = batch.picture_weights
            losses |= self.picture_losses(features, noise, weights, posterior, encodings, min_snr_gamma)
        for name, weight in (("ldm_loss", LDM_WEIGHT), ("cap_loss", CAP_WEIGHT)):
            if name in losses:
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses

    # ---- what the losses compare with, and their random numbers

    def encode_captions(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or their precomputed encodings -> (B, S, Dc) float32, the target of L_CAP."""
        if isinstance(captions, list):
            return encode_captions(self.text_encoder, self.clip_tokenizer, captions).float()
        return send(captions, self.device).float()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (M, C, h, w) of the latents' posterior: from pictures (M, 3, H, W), as bytes or as
        floats in [-1, 1], or from both as precomputed, (M, 2, C, h, w)."""
        pictures = send(pictures, self.device)
        return pictures.unbind(1) if pictures.dim() == 5 else self.vae.encode(pictures)

    def sample_noise(
        self, sequences: Iterable[int], generators: list[torch.Generator], drop_rate: float = DROP_RATE
    ) -> Noise:
        """The random numbers of a step's M pictures, on the generators' device. sequences: that of each picture, as in
        `Batch.picture_sequences`; every sequence has a generator of its own."""
        noise, steps = [], len(self.schedule.alphas_cumprod)
        for sequence, pictures in Counter(sequences).items():
            options = {"generator": generators[sequence], "device": generators[sequence].device}
            drop = torch.rand(pictures, **options) < drop_rate
            latent_noise, epsilon = (self.sample_latents(pictures, generators[sequence]) for _ in range(2))
            noise.append((drop, latent_noise, epsilon, torch.randint(steps, (pictures,), **options)))
        return Noise(*map(torch.cat, zip(*noise, strict=True)))

    def sample_latents(self, pictures: int, generator: torch.Generator) -> Tensor:
        """Standard normal (M, C, h, w), on the generator's device."""
        size = self.unet.config.sample_size
        shape = (pictures, self.unet.config.in_channels, size, size)
        return torch.randn(shape, generator=generator, device=generator.device)

    # ---- what trains

    def add_adapters(self, lora: dict | None = None, prefix: dict | None = None) -> None:
        """Add stage 2's adapter to the language model. lora: options of `lora.add_lora`; prefix: of `lora.Prefix`."""
        if lora is not None:
            self.lora = add_lora(self.llama.model, **lora)
        if prefix is not None:
            self.prefix = Prefix(self.llama.config, **prefix).to(self.device)
            self.virtual_tokens = self.prefix.embedding.num_embeddings

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: the new embedding rows, the mapper under its published names, the adapters. Stage 2
        freezes some of it."""
        vokens = {f"vokens.{name}": parameter for name, parameter in self.vokens.named_parameters()}
        lora = {name: parameter for name, parameter in self.llama.named_parameters() if "lora_" in name}
        prefix = {f"prefix_encoder.{n}": p for n, p in self.prefix.named_parameters()} if self.prefix else {}
        return {**vokens, **dict(self.mapper.named_parameters()), **lora, **prefix}
