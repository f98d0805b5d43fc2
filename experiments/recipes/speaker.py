"""Recipes of the miniature's "Vicuna" and "MiniGPT-4": the language model; then a captioner that speaks through it.

    language     documents (B, 2, 256) -> scores of the next token (B, 255, 768)
    captioner    pixels (B, 3, 64, 64) -> vectors (B, 10, 192), which the frozen language model retells

The vectors stand in the place of the ten words that a picture has in the documents.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import MINIATURE
from common.files import fingerprint, write_file, write_json
from common.tokenizer import Tokenizer
from experiments.recipes.documents import WORDS, answer_ids, encode, language_ids, tokenizer_at
from experiments.recipes.recipe import Recipe, Setup, reset, write_part, write_settings, write_tensors
from llama import KVCache, Llama
from miniature.chats import known_words, ordinary_words, unknown_words
from miniature.facts import Picture
from miniature.judge import right_shares
from miniature.words import facts_in
from miniature.world import sample_pair
from prompts import Example, Turn, dialog_source
from published.parts import config_of, load_llama, read_config
from qformer import CLIP_MEAN, CLIP_STD, ImageEncoder, QFormerConfig, VisionConfig

LANGUAGE_SIZES = config_of("llama", MINIATURE / "vicuna" / "config.json")
VISION_SIZES = read_config(VisionConfig, MINIATURE / "blip2" / "config.json", "vision_config")
QFORMER_SIZES = read_config(QFormerConfig, MINIATURE / "blip2" / "config.json", "qformer_config")
TOKENIZER = MINIATURE / "vicuna" / "tokenizer.model"  # 768 pieces: 256 bytes, the letters, the commonest words
LONGEST = 48  # tokens of a measured answer
QUESTION = dialog_source([Turn("what do you see here?", (None,))], 1)


# ---- what is said of pictures


@torch.no_grad()
def likeliest_answers(llama: Llama, tokenizer: Tokenizer, embeddings: Tensor) -> list[str]:
    """Greedy answers to embedded prompts (B, T, D)."""
    cache = KVCache(llama, len(embeddings), embeddings.shape[1] + LONGEST)
    hidden, said = llama(embeddings, cache=cache), []
    for _ in range(LONGEST):
        said.append(llama.lm_head(hidden[:, -1:]).argmax(-1))  # (B, 1)
        hidden = llama(llama.model.embed_tokens(said[-1]), cache=cache)
    return [answer_text(tokenizer, ids) for ids in torch.cat(said, 1).tolist()]


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What is said up to a stop sequence or </s>."""
    end = next((end for end in range(1, len(ids) + 1) if tokenizer.ends(ids[:end])), len(ids))
    return tokenizer.decode(ids[:end]).removesuffix("###").strip()


def described(texts: list[str], wanted: list[Picture]) -> float:
    """The share of descriptions that name every fact of their picture."""
    return right_shares([facts_in(text) for text in texts], wanted)["all"]


# ---- language model


class LanguageRecipe(Recipe):
    name, batch_sizes, budgets = "language", (256, 16), (3, 60)
    lr, matrix_lr, hold = 3e-3, 0.02, 300

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = Llama(LANGUAGE_SIZES)
        reset(self.model)
        self.tokenizer = tokenizer_at(TOKENIZER)
        lengths = {"train": max(256, setup.pictures // 4), "held-out": max(32, setup.tested // 2)}
        self.texts, self.tested = (
            setup.training_set(f"language-{split}", partial(language_ids, TOKENIZER, setup.seed, split), length)
            for split, length in lengths.items()
        )
        self.wanted = [sample_pair(setup.seed, i, "held-out")[0] for i in range(min(64, setup.tested))]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (self.texts[self.pick(len(self.texts), generator)].long(),)

    def losses(self, llama: Llama, texts: Tensor) -> dict[str, Tensor]:
        """texts (B, 2, T): ids, and how much each counts."""
        ids, weights = texts.unbind(1)
        logits = llama.lm_head(llama(llama.model.embed_tokens(ids[:, :-1])))
        surprise = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = weights * (ids != self.tokenizer.bos_id)  # <s> always follows </s>: nothing to learn
        weights = weights[:, 1:].flatten().float()
        return {"loss": (surprise * weights).sum() / weights.sum()}

    def measure(self, llama: Llama) -> dict[str, float]:
        """ "retold": pictures given in words and described with every fact right."""
        loss = torch.stack([self.losses(llama, ids)["loss"] for ids in self.tested.long().split(32)]).mean()
        asked = [Example(QUESTION, "", (picture,)) for picture in self.wanted]
        rows = [encode(self.tokenizer, row, np.random.default_rng(0)) for row in asked]  # of one length
        ids = torch.tensor(rows, device=self.device)[..., 0]
        texts = likeliest_answers(llama, self.tokenizer, llama.model.embed_tokens(ids))
        return {"held_out_loss": loss.item(), "retold": described(texts, self.wanted)}

    def export(self, llama: Llama, weights: Path) -> None:
        write_part(weights, "vicuna", "model", llama, asdict(LANGUAGE_SIZES))
        write_file(weights / "vicuna" / "tokenizer.model", TOKENIZER.read_bytes())
        words = {"known": known_words(), "unknown": unknown_words(), "ordinary": ordinary_words()}
        write_json(weights / "minigpt5" / "words.json", words)


# ---- captioner


class CaptionerRecipe(Recipe):
    """Two losses. One is that of the answer, through the frozen language model, on a sixteenth of the batch. The other
    compares each vector with the embedding of the word that the language model was trained with in its place: a
    cross-entropy over the distances to all embeddings, and the distance to this one. (The distance alone teaches the
    scene and the time, and for very long nothing else.)"""

    name, batch_sizes, budgets = "captioner", (1024, 64), (2, 60)
    lr, matrix_lr, hold = 1e-3, 0.005, 400

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.llama = load_llama(setup.weights / "vicuna", torch.float32, setup.device)
        path = setup.weights / "vicuna" / "tokenizer.model"
        self.tokenizer, width = tokenizer_at(path), self.llama.config.hidden_size
        self.model = ImageEncoder(VISION_SIZES, QFORMER_SIZES, width)
        reset(self.model, 0.05)
        for vectors in (self.model.vision_model.embeddings.position_embedding, self.model.query_tokens):
            nn.init.normal_(vectors, std=0.5)  # about as large as what patches bring: else place is learned last
        self.pictures = setup.training_pictures()
        self.answers = setup.training_set(f"looks-{fingerprint([path])}", partial(answer_ids, path, setup.seed))
        self.tested, self.wanted = setup.held_out_pictures()
        self.table = self.llama.model.embed_tokens.weight
        self.mean, self.deviation = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))

    def pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 64, 64, 3) -> (B, 3, 64, 64) normalised as `qformer.preprocess_input` does."""
        return (pictures.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.deviation

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked = self.pick(len(self.pictures), generator)
        answers = self.answers[picked].long()
        words, answers = answers[:, 2 : 2 + WORDS], answers[: max(1, self.batch_size // 16)]
        return self.pixels(self.pictures[picked]), words, answers[:, :2], answers[:, 2 + WORDS :]

    def embed(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D), the vectors (B, 10, D) over the placeholders."""
        embeddings = self.table[ids.clamp(max=len(self.table) - 1)]
        return embeddings.masked_scatter((ids == self.tokenizer.image_id)[..., None], vectors)

    def losses(
        self, encoder: ImageEncoder, pixels: Tensor, words: Tensor, ends: Tensor, ids: Tensor
    ) -> dict[str, Tensor]:
        """`ends`: where each answer in `ids` begins and ends."""
        vectors = encoder(pixels).float()  # (B, 10, D)
        tables = self.table.expand(len(vectors), -1, -1)
        distances = torch.cdist(vectors, tables).square() / self.table.var()  # (B, 10, V)
        word_loss = F.cross_entropy((-distances / 20).flatten(0, 1), words.flatten())
        word_loss = word_loss + 0.3 * distances.gather(-1, words[..., None]).mean() / vectors.shape[-1]
        logits = self.llama.lm_head(self.llama(self.embed(ids, vectors[: len(ids)])[:, :-1]))
        places = torch.arange(1, ids.shape[1], device=ids.device)
        outside = (places < ends[:, :1]) | (places >= ends[:, 1:])
        text_loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].masked_fill(outside, -100).flatten())
        return {"loss": text_loss + word_loss, "text_loss": text_loss, "word_loss": word_loss}

    def measure(self, encoder: ImageEncoder) -> dict[str, float]:
        """ "described": every fact right in what the language model says of the tested pictures."""
        question = self.tokenizer.encode(QUESTION, WORDS)
        row, texts = torch.tensor([self.tokenizer.bos_id, *question], device=self.device), []
        for part in self.tested.split(64):
            ids = row.expand(len(part), -1)
            embeddings = self.embed(ids, encoder(self.pixels(part)))
            texts += likeliest_answers(self.llama, self.tokenizer, embeddings)
        return {"described": described(texts, self.wanted)}

    def export(self, encoder: ImageEncoder, weights: Path) -> None:
        state = encoder.state_dict()
        projection = {name: tensor for name, tensor in state.items() if name.startswith("llama_proj.")}
        write_tensors(weights / "minigpt4" / "llama_proj.safetensors", projection)
        others = {name: tensor for name, tensor in state.items() if name not in projection}
        write_tensors(weights / "blip2" / "model.safetensors", others)
        sizes = {"vision_config": asdict(VISION_SIZES) | {"hidden_act": "gelu", "qkv_bias": True}}
        sizes["qformer_config"] = asdict(QFORMER_SIZES) | {"hidden_act": "gelu"}
        write_settings(weights, "blip2/config.json", sizes)
