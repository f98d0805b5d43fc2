"""LoRA and prefix tuning against peft."""

import peft
import pytest
import torch
import transformers
from helpers import assert_close, randomise

from llama import KVCache
from lora import Prefix, add_lora
from published.parts import load_llama

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.fixture(params=[4, 2], ids=["4 key-value heads", "2 key-value heads"])
def pair(request, tmp_path):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=request.param)
    reference = randomise(transformers.LlamaForCausalLM(config))
    reference.save_pretrained(tmp_path)
    return load_llama(tmp_path), reference


def with_lora(pair, targets):
    """Ours and peft's with the same random A and B."""
    ours, reference = pair
    add_lora(ours, targets, rank=4, alpha=12)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), lora_dropout=0.05, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(reference, config)
    matrices = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.copy_(0.2 * torch.randn(matrix.shape, generator=generator))
        our_matrices = {n: p for n, p in ours.named_parameters() if "lora_" in n}
        for name, matrix in matrices.items():
            our_matrices[name.removeprefix("base_model.model.").replace(".default", "")].copy_(matrix)
    assert len(our_matrices) == len(matrices) == 2 * 3 * len(targets)
    return ours.eval(), wrapped.eval(), our_matrices, matrices


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj", "gate_proj")])
def test_lora(pair, targets):
    """Forward, gradients of A and B."""
    ours, wrapped, our_matrices, matrices = with_lora(pair, targets)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2))
    hidden = ours(x)
    expected = wrapped(inputs_embeds=x, output_hidden_states=True).hidden_states[-1]
    assert_close(hidden, expected, 1e-5, "hidden states")
    hidden.square().sum().backward()
    expected.square().sum().backward()
    for name, matrix in matrices.items():
        gradient = our_matrices[name.removeprefix("base_model.model.").replace(".default", "")].grad
        assert_close(gradient, matrix.grad, 1e-4, f"gradient of {name}")
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(our_matrices)


def test_lora_starts_at_nothing_and_drops_out(pair):
    ours, _ = pair
    x = torch.randn(1, 5, 64)
    before = ours(x)
    layers = add_lora(ours)
    assert torch.equal(ours.eval()(x), before)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B.weight)
    torch.manual_seed(0)
    assert not torch.equal(ours.train()(x), ours.train()(x))
    assert torch.equal(ours.eval()(x), ours.eval()(x))
    with pytest.raises(ValueError, match="no linear layer is named w_proj"):
        add_lora(ours, ("w_proj",))


def test_prefix(pair):
    """peft's prefix encoder gives the same keys and values; the training pass equals transformers' over them, forward
    and backward; decoding in pieces equals the training pass."""
    ours, reference = pair
    heads = ours.config.num_key_value_heads
    config = peft.PrefixTuningConfig(  # peft itself replaces width and heads by those of the keys
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        token_dim=heads * 16,
        num_transformer_submodules=1,
        num_attention_heads=heads,
        num_layers=3,
        encoder_hidden_size=24,
        prefix_projection=True,
    )
    encoder = randomise(peft.tuners.prefix_tuning.PrefixEncoder(config), scale=0.3)
    prefix = Prefix(ours.config, tokens=5, hidden=24)
    prefix.load_state_dict(encoder.state_dict())
    both = encoder(torch.arange(5)[None]).view(1, 5, 6, heads, 16)  # as peft reshapes it
    past = both.permute(2, 0, 3, 1, 4).split(2)
    keys, values = prefix()
    assert_close(keys, torch.stack([layer[0][0].transpose(0, 1) for layer in past]), 1e-6, "keys")
    assert_close(values, torch.stack([layer[1][0].transpose(0, 1) for layer in past]), 1e-6, "values")

    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    hidden = ours(x, cache=prefix.growing_cache(2, torch.float32))
    both = [tuple(y.expand(2, -1, -1, -1) for y in layer) for layer in past]
    cache = transformers.DynamicCache.from_legacy_cache(both)
    expected = reference.model(inputs_embeds=x, past_key_values=cache, position_ids=torch.arange(5, 14)[None])[0]
    assert_close(hidden, expected, 1e-5, "hidden states")
    hidden.square().sum().backward()
    expected.square().sum().backward()
    theirs = dict(encoder.named_parameters())
    for name, parameter in prefix.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, 1e-4, f"gradient of {name}")
    with torch.no_grad():
        cache = KVCache(ours, 2, 14)
        prefix.fill(cache)
        pieces = torch.cat([ours(piece, cache=cache) for piece in x.split([4, 1, 3, 1], dim=1)], dim=1)
    assert_close(pieces, expected, 1e-5, "decoding in pieces")
