"""qformer.py against transformers' BLIP-2, with the weights passed through a saved folder in the published layout."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close, randomise, shapes
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, T5Config
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import qformer as ours
from published.loading import WeightsError
from published.parts import load_image_encoder

TINY_VISION = {
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TINY_QFORMER = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 24,
    "vocab_size": 11,
}
TINY_TEXT = {
    "d_model": 8,
    "d_ff": 8,
    "d_kv": 4,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "vocab_size": 40,
}
# The numbers of Salesforce/blip2-flan-t5-xxl's config.json that the image side needs; the T5 is as small as it gets.
FULL_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
FULL_QFORMER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
LLM_WIDTH = 20


def blip2(vision: dict, qformer: dict, num_query_tokens: int) -> Blip2ForConditionalGeneration:
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision).to_dict(),
        qformer_config=Blip2QFormerConfig(**qformer).to_dict(),
        text_config=T5Config(**TINY_TEXT).to_dict(),
        num_query_tokens=num_query_tokens,
    )
    return Blip2ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def reference():
    model = randomise(blip2(TINY_VISION, TINY_QFORMER, num_query_tokens=5), scale=0.3)
    with torch.no_grad():  # small inputs of the norms make a wrong epsilon show, ln_vision's too
        model.query_tokens.mul_(1e-4)
        for parameter in model.vision_model.embeddings.parameters():
            parameter.mul_(1e-2)
        for layer in model.vision_model.encoder.layers:
            for parameter in (*layer.self_attn.projection.parameters(), *layer.mlp.fc2.parameters()):
                parameter.mul_(1e-2)
    # Its config has one epsilon for the whole vision tower. BLIP-2's own code, which MiniGPT-4 and 5 run, has 1e-5 in
    # this norm alone, and so have we.
    model.vision_model.post_layernorm.eps = 1e-5
    return model


@pytest.fixture
def weights(reference, tmp_path):
    return save(reference, tmp_path, max_shard_size="1GB")


def save(model, root: Path, max_shard_size: str) -> Path:
    model.save_pretrained(root / "blip2", safe_serialization=True, max_shard_size=max_shard_size)
    (root / "minigpt4").mkdir()
    projection = torch.nn.Linear(model.config.qformer_config.hidden_size, LLM_WIDTH)
    tensors = {f"llama_proj.{name}": tensor.data for name, tensor in projection.named_parameters()}
    save_file(tensors, root / "minigpt4" / "llama_proj.safetensors")
    return root


@torch.no_grad()
def expected(reference, projection: dict, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    vision = reference.vision_model(pixels, output_hidden_states=True)
    queries = reference.query_tokens.expand(len(pixels), -1, -1)
    out = reference.qformer(query_embeds=queries, encoder_hidden_states=vision.last_hidden_state).last_hidden_state
    return {
        "before ln_vision": reference.vision_model.encoder(reference.vision_model.embeddings(pixels)).last_hidden_state,
        "after ln_vision": vision.last_hidden_state,
        "Q-Former": out,
        "projection": out @ projection["llama_proj.weight"].T + projection["llama_proj.bias"],
    }


def actual(model: ours.ImageEncoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    picture = model.vision_model(pixels)
    return {
        "before ln_vision": model.vision_model.encoder(model.vision_model.embeddings(pixels)),
        "after ln_vision": picture,
        "Q-Former": model.qformer(model.query_tokens.expand(len(pixels), -1, -1), picture),
        "projection": model(pixels),
    }


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards with an index"])
def test_equals_transformers(reference, tmp_path, shard):
    weights = save(reference, tmp_path, shard)
    assert (weights / "blip2" / "model.safetensors.index.json").exists() == (shard == "10KB")
    model = load_image_encoder(weights)
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    projection = load_file(weights / "minigpt4" / "llama_proj.safetensors")
    found, wanted = actual(model, pixels), expected(reference, projection, pixels)
    assert found["projection"].shape == (3, 5, LLM_WIDTH)
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-5, name)


def test_only_the_shards_that_hold_the_image_side_are_read(reference, tmp_path):
    weights = save(reference, tmp_path, "10KB")
    index = json.loads((weights / "blip2" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if not key.startswith("language_")}
    unneeded = set(index.values()) - needed
    assert unneeded
    for file in unneeded:
        (weights / "blip2" / file).unlink()
    load_image_encoder(weights)


def test_text_half_of_a_qformer_is_left_out_and_anything_else_stops(weights):
    file = weights / "blip2" / "model.safetensors"
    tensors = load_file(file)
    extra = {
        "qformer.embeddings.position_ids": torch.arange(4)[None],
        "qformer.embeddings.word_embeddings.weight": torch.zeros(7, 16),
        "qformer.encoder.layer.1.intermediate.dense.weight": torch.zeros(40, 16),
        "qformer.encoder.layer.1.output.dense.weight": torch.zeros(16, 40),
        "qformer.encoder.layer.1.output.LayerNorm.bias": torch.zeros(16),
    }
    save_file({**tensors, **extra}, file)
    load_image_encoder(weights)

    save_file({**tensors, "qformer.encoder.layer.9.output_query.dense.bias": torch.zeros(16)}, file)
    with pytest.raises(WeightsError, match=r"unexpected tensor qformer\.encoder\.layer\.9\.output_query"):
        load_image_encoder(weights)

    del tensors["query_tokens"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"tensor query_tokens \(1, 5, 16\) is missing"):
        load_image_encoder(weights)


def test_missing_projection_is_one_line(weights):
    (weights / "minigpt4" / "llama_proj.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"llama_proj\.safetensors: no such file$"):
        load_image_encoder(weights)


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        theirs = blip2(FULL_VISION, FULL_QFORMER, num_query_tokens=32)
        model = ours.ImageEncoder(ours.VisionConfig(), ours.QFormerConfig())
    wanted = {name: shape for name, shape in shapes(theirs).items() if not name.startswith("language_")}
    found = shapes(model)
    assert found.pop("llama_proj.weight") == (4096, 768)
    assert found.pop("llama_proj.bias") == (4096,)
    assert found == wanted
    assert len(list(model.buffers())) == 0
    pixels = torch.empty(2, 3, 224, 224, device="meta")
    assert model(pixels).shape == (2, 32, 4096)
    assert model.vision_model(pixels).shape == (2, 257, 1408)


def test_defaults_are_the_published_config():
    for config, published in ((ours.VisionConfig(), FULL_VISION), (ours.QFormerConfig(), FULL_QFORMER)):
        fields = {k: v for k, v in vars(config).items() if k != "num_query_tokens"}
        assert fields == {k: published[k] for k in fields}


def test_trains_from_nothing_and_in_bfloat16():
    """The miniature trains these same classes: default initialisation is finite and every parameter has a gradient."""
    torch.manual_seed(0)
    vision = ours.VisionConfig(**TINY_VISION)
    qformer = ours.QFormerConfig(**{k: v for k, v in TINY_QFORMER.items() if k != "vocab_size"}, num_query_tokens=5)
    model = ours.ImageEncoder(vision, qformer, LLM_WIDTH)
    pixels = torch.randn(2, 3, 28, 28)
    out = model(pixels)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    low = model.bfloat16()(pixels)
    assert low.dtype == torch.bfloat16
    assert_close(low, out, 0.05, "bfloat16")


def test_preprocess_input():
    """A grey picture: every channel is (grey - mean) / std; padding brings in white, cropping does not."""
    image = Image.new("RGB", (60, 40), (51, 51, 51))
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    cropped = ours.preprocess_input(image, 28)
    assert cropped.shape == (3, 28, 28) and cropped.dtype == torch.float32
    torch.testing.assert_close(cropped, ((0.2 - mean) / std).view(3, 1, 1).expand(3, 28, 28))
    padded = ours.preprocess_input(image, 28, pad=True)
    torch.testing.assert_close(padded[:, 0], ((1.0 - mean) / std).view(3, 1).expand(3, 28))
    torch.testing.assert_close(padded[:, 14], cropped[:, 14])
    assert ours.preprocess_input(image).shape == (3, 224, 224)
