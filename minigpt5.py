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

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import History, Llama, LlamaConfig, Tokenizer, Vokens, load_llama
from loading import WeightsError, matched, open_safetensors, read_config, save_safetensors, stored
from lora import Prefix, add_lora
from mapper import VokenMapper
from qformer import ImageEncoder, load_image_encoder
from scheduler import NoiseSchedule, load_schedule
from text_encoder import ClipTokenizer, TextConfig, TextEncoder, load_text_encoder
from unet import UNet, load_unet
from vae import VAE, load_vae

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
        return Rows(*(tensor.to(device, non_blocking=True) for tensor in self))


class Draws(NamedTuple):
    """All that is random in the picture losses of M pictures."""

    drop: Tensor  # (M,) bool: zeros in the place of the voken features
    posterior: Tensor  # (M, C, h, w) standard normal, picks the latent from the autoencoder's posterior
    noise: Tensor  # (M, C, h, w) standard normal, the diffusion noise
    timesteps: Tensor  # (M,)


def expand_placeholders(tokenizer: Tokenizer, ids: list[int], queries: int) -> list[int]:
    """Each placeholder id as often as a picture has query embeddings."""
    return [i for token in ids for i in [token] * (queries if token == tokenizer.image_id else 1)]


def collate(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], queries: int, multiple: int = 1, limit: int = 2048
) -> Rows:
    """(source, target) texts -> rows of <s> source target. Padded on the right, so that the longest source is followed
    by as many places as the longest target has tokens, and to a multiple of `multiple`.

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
    length = -(-(max(starts) + L) // multiple) * multiple
    padded = [row + [tokenizer.eos_id] * (length - len(row)) for row in rows]
    padded_labels = [label + [IGNORE] * (length - len(label)) for label in labels]
    where = torch.tensor(pictures, dtype=torch.long).reshape(-1, 2)
    targets = torch.tensor(starts)[:, None] + torch.arange(L)
    return Rows(torch.tensor(padded), torch.tensor(padded_labels), targets, where[:, 0], where[:, 1])


def type_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


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
        clip_tokenizer: ClipTokenizer | None = None,
    ):
        super().__init__()
        self.tokenizer, self.clip_tokenizer, self.schedule = tokenizer, clip_tokenizer, schedule
        self.llama, self.unet, self.vae = llama, unet, vae
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        width = llama.config.hidden_size
        self.vokens = Vokens(len(tokenizer.voken_ids), tokenizer.base_vocabulary, width)
        self.vokens.start_from_mean(llama)
        self.mapper = VokenMapper(width, unet.config.cross_attention_dim, condition_tokens)
        self.lora, self.prefix = [], None  # stage 2, see add_adapters

    @property
    def device(self) -> torch.device:
        return self.vokens.input.device

    @property
    def queries(self) -> int:
        """Embeddings that one input picture becomes; without the image encoder no picture can be read."""
        return self.image_encoder.query_tokens.shape[1] if self.image_encoder else 1

    @property
    def picture_size(self) -> int:
        """Side of an output picture in pixels."""
        return self.unet.config.sample_size * self.vae.config.downsampling

    def embed(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D). The pictures' query embeddings fill the placeholders in order of rows, then tokens;
        pixels (P, 3, H, W) are as qformer.preprocess_input makes them."""
        embeddings = self.vokens.embed(self.llama, ids)
        if pixels is not None:
            with torch.no_grad():
                pictures = self.image_encoder(pixels)  # (P, Q, D)
            embeddings = embeddings.masked_scatter(
                (ids == self.tokenizer.image_id)[..., None], pictures.to(embeddings.dtype)
            )
        return embeddings

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Captions -> (B, S, Dc) float32, Stable Diffusion's own encoding, target of L_CAP. As in the released code the
        encoder gets the padding mask, which Stable Diffusion does not give it."""
        ids, mask = (t.to(self.device) for t in self.clip_tokenizer(captions))
        return self.text_encoder(ids, mask).float()

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (M, 3, H, W) in [-1, 1] -> mean and log variance (M, C, h, w) of the latents' posterior."""
        return self.vae.encode(pixels.to(type_of(self.vae)))

    def draw(self, pictures: int, generator: torch.Generator, drop_rate: float = DROP_RATE) -> Draws:
        """The random numbers of one step, drawn on the generator's device and moved to the model's."""
        drop = torch.rand(pictures, generator=generator, device=generator.device) < drop_rate
        posterior, noise = self.draw_latents(pictures, generator), self.draw_latents(pictures, generator)
        steps = len(self.schedule.alphas_cumprod)
        timesteps = torch.randint(steps, (pictures,), generator=generator, device=generator.device)
        return Draws(drop.to(self.device), posterior, noise, timesteps.to(self.device))

    def draw_latents(self, pictures: int, generator: torch.Generator) -> Tensor:
        """Standard normal (M, C, h, w)."""
        size = self.unet.config.sample_size
        shape = (pictures, self.unet.config.in_channels, size, size)
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def read(self, rows: Rows, pixels: Tensor | None = None) -> Tensor:
        """Rows and their input pictures -> the language model's hidden states (B, T, D).

        Sources are read first, targets continue them. In stage 1 nothing before the vokens trains: the sources' keys
        and values are constants, and only the few positions of the targets are differentiated. This is exact.
        """
        embeddings = self.embed(rows.ids, pixels)  # (B, T, D)
        B, T, D = embeddings.shape
        L = rows.targets.shape[1]
        at = rows.targets[..., None].expand(-1, -1, D)
        is_source = torch.arange(T - L, device=self.device) < rows.targets[:, :1]  # (B, T - L)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.lora or self.prefix)):
            history = self.prefix.history(B, embeddings.dtype) if self.prefix else History(B, self.device)
            hidden = self.llama(embeddings[:, : T - L], is_source.long(), history)
        target = self.llama(embeddings.gather(1, at), cache=history)  # (B, L, D)
        return F.pad(hidden, (0, 0, 0, L)).scatter(1, at, target)

    def voken_features(self, hidden: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """hidden (B, T, D) -> (M, N, D): the states that predict [IMG0]..[IMGN-1]. The last voken's own is not used."""
        offsets = torch.arange(len(self.tokenizer.voken_ids), device=hidden.device)
        return hidden[rows[:, None], starts[:, None] + offsets].float()

    def ldm_loss(self, conditioning: Tensor, latents: Tensor, draws: Draws, gamma: float) -> Tensor:
        """Eq. 3, each picture weighted by min(SNR, gamma) / SNR as the released code does; gamma 0: the paper's."""
        noisy = self.schedule.add_noise(latents, draws.noise, draws.timesteps)
        dtype = type_of(self.unet)
        predicted = self.unet(noisy.to(dtype), draws.timesteps, conditioning.to(dtype)).float()
        target = self.schedule.target(latents, draws.noise, draws.timesteps)
        per_picture = (predicted - target).square().mean((1, 2, 3))
        return (self.schedule.snr_weight(draws.timesteps, gamma) * per_picture).mean()

    def losses(
        self,
        rows: Rows,
        draws: Draws | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        captions: tuple[Tensor, Tensor] | None = None,
        pixels: Tensor | None = None,
        min_snr_gamma: float = 5.0,
        ldm_weight: float = LDM_WEIGHT,
    ) -> dict[str, Tensor]:
        """{"loss", "text_loss", "ldm_loss", "cap_loss"}, the last two only where their inputs are given.

        posterior: mean and log variance of the M output pictures; captions: encodings of the M captions (M, S, Dc) and
        of the empty one (1, S, Dc), which a dropped picture is held to; pixels: the input pictures, if any.
        """
        hidden = self.read(rows, pixels)  # (B, T, D)
        before = (rows.targets - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = self.vokens.logits(self.llama, hidden.gather(1, before))  # (B, L, V'), what predicts the targets
        labels = rows.labels.gather(1, rows.targets)
        text_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        losses = {"loss": TEXT_WEIGHT * text_loss, "text_loss": text_loss}
        if draws is None:
            return losses

        features = self.voken_features(hidden, rows.picture_rows, rows.picture_starts)  # (M, N, D)
        features = features.masked_fill(draws.drop[:, None, None], 0.0)
        conditioning = self.mapper(features)  # (M, S, Dc)
        if ldm_weight:
            latents = self.vae.sample(posterior[0].float(), posterior[1].float(), draws.posterior)
            losses["ldm_loss"] = self.ldm_loss(conditioning, latents, draws, min_snr_gamma)  # Eq. 3
            losses["loss"] = losses["loss"] + ldm_weight * losses["ldm_loss"]
        if captions is not None:
            target = torch.where(draws.drop[:, None, None], captions[1], captions[0])
            losses["cap_loss"] = F.mse_loss(conditioning, target)
            losses["loss"] = losses["loss"] + CAP_WEIGHT * losses["cap_loss"]
        return losses

    def add_adapters(self, lora: dict | None = None, prefix: dict | None = None) -> None:
        """Stage 2's change of the language model: the options of `add_lora`, or those of `Prefix`."""
        if lora is not None:
            self.lora = add_lora(self.llama, **lora)
        if prefix is not None:
            self.prefix = Prefix(self.llama.config, **prefix).to(self.device)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: the voken rows, the mapper under its published names, the adapters."""
        rows = {f"vokens.{name}": parameter for name, parameter in self.vokens.named_parameters()}
        lora = {name: parameter for name, parameter in self.llama.named_parameters() if "lora_" in name}
        prefix = {f"prefix_encoder.{n}": p for n, p in self.prefix.named_parameters()} if self.prefix else {}
        return {**rows, **dict(self.mapper.named_parameters()), **lora, **prefix}

    def save_trained(self, path: Path, stage: str) -> None:
        metadata = {"format": "minigpt5", "stage": stage, "vokens": str(len(self.tokenizer.voken_ids))}
        if self.lora:
            metadata["lora_alpha"] = str(self.lora[0].scale * self.lora[0].lora_A.out_features)
        save_safetensors(self.trained_parameters(), path, metadata)

    @torch.no_grad()
    def load_trained(self, path: Path) -> None:
        """Take a checkpoint's tensors; the model must have the adapters that it has.

        A converted released checkpoint may also bring the old rows of the two tables as its training left them (AdamW's
        weight decay shrank them, and the released model runs with the shrunk ones): whole, or as one factor.
        """
        trained = self.trained_parameters()
        for name, tensor in matched(trained, [path], lambda key: None if key in TABLES else key).items():
            trained[name].copy_(tensor)  # in place: an optimiser may hold these
        metadata, tensors = checkpoint_contents(path)
        for key, factor in TABLES.items():
            table = self.llama.get_submodule(key.removesuffix(".weight"))
            weight = table.weight
            if key in tensors:
                replaced = tensors[key][:].to(weight.device, weight.dtype)
                if replaced.shape[1:] != weight.shape[1:] or len(replaced) < self.tokenizer.base_vocabulary:
                    raise WeightsError(f"{path}: {key} has shape {tuple(replaced.shape)}, too small a table")
                table.weight = nn.Parameter(replaced, requires_grad=False)
            elif factor in metadata:
                table.weight = nn.Parameter(weight * float(metadata[factor]), requires_grad=False)


TABLES = {"model.embed_tokens.weight": "embed_scale", "lm_head.weight": "head_scale"}


def checkpoint_contents(path: Path) -> tuple[dict[str, str], dict]:
    """Metadata and {name: slice} of a checkpoint. WeightsError if it is none."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    tensors = {name: tensor for name, _, _, tensor in stored([path])}
    if "vokens.input" not in tensors:
        raise WeightsError(f"{path}: tensor vokens.input is missing, this is no checkpoint of MiniGPT-5")
    return metadata, tensors


def checkpoint_adapters(path: Path) -> dict:
    """The options of `MiniGPT5.add_adapters` for the adapters that a checkpoint holds."""
    metadata, tensors = checkpoint_contents(path)
    matrices = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    adapters = {}
    if matrices:
        rank = next(iter(matrices.values())).get_shape()[0]
        targets = tuple(sorted({name.split(".")[-3] for name in matrices}))
        adapters["lora"] = {"targets": targets, "rank": rank, "alpha": float(metadata.get("lora_alpha", 2 * rank))}
    if "prefix_encoder.embedding.weight" in tensors:
        sizes = [tensors[f"prefix_encoder.{n}.weight"].get_shape()[0] for n in ("embedding", "transform.0")]
        adapters["prefix"] = dict(zip(("tokens", "hidden"), sizes, strict=True))
    return adapters


def load_minigpt5(
    weights: Path,
    checkpoint: Path | None = None,
    vokens: int = 8,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    read_pictures: bool = True,
    read_captions: bool = False,
) -> MiniGPT5:
    """The stack in the folder `weights` (README, "Weights"), with the trained parts of `checkpoint` or untrained ones.

    dtype None: bfloat16 on a GPU. On a CPU, whose bfloat16 convolutions are far slower than float32 ones, float32,
    except that the language model and the image encoder stay in bfloat16 where they are too big for that. Without
    read_pictures the image encoder, without read_captions the text encoder is left out.
    """
    weights = Path(weights)
    if not weights.is_dir():
        raise WeightsError(f"{weights}: no such folder")
    diffusion = weights / "stable-diffusion"
    on_gpu = torch.device(device).type != "cpu"
    width = read_config(LlamaConfig, weights / "vicuna" / "config.json").hidden_size
    painting = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    language = dtype or (torch.bfloat16 if on_gpu or width >= 2048 else torch.float32)

    if checkpoint:
        vokens = checkpoint_contents(checkpoint)[1]["vokens.input"].get_shape()[0] - 1
    tokenizer = Tokenizer(weights / "vicuna" / "tokenizer.model", vokens)
    model = MiniGPT5(
        tokenizer,
        load_llama(weights / "vicuna", language, device),
        load_unet(diffusion / "unet", painting, device),
        load_vae(diffusion / "vae", painting, device),
        load_schedule(diffusion / "scheduler").to(device),
        read_config(TextConfig, diffusion / "text_encoder" / "config.json").max_position_embeddings,
        load_image_encoder(weights, language, device) if read_pictures else None,
        load_text_encoder(diffusion / "text_encoder", language, device) if read_captions else None,
        ClipTokenizer(diffusion / "tokenizer") if read_captions else None,
    )
    model.vokens.to(device)
    model.mapper.to(device)
    if checkpoint:
        model.add_adapters(**checkpoint_adapters(checkpoint))
        model.load_trained(checkpoint)
    return model
