"""Answers in batches, the token sampler, segments; what the recordings of test_golden.py do not show."""

import argparse
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import assert_close
from PIL import Image
from random_weights import write_random_weights
from torch._dynamo.testing import CompileCounter

import generation
from common import cli, graphs
from common.images import to_tensor
from generation import Sampling, pick_tokens, prompt_ids, room_after, room_wanted, segments_of
from published.parts import load_minigpt5
from qformer import preprocess_input
from scheduler import SAMPLERS

PICTURE = "<Img><ImageHere></Img>"


@pytest.fixture(scope="module", params=[8, 1])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    weights = write_random_weights(tmp_path_factory.mktemp("weights"), small=True)
    model = load_minigpt5(weights, vokens=request.param).eval()
    with torch.no_grad():  # rows far from the mean, so that vokens are said now and then
        for rows in (model.vokens.input, model.vokens.output):
            rows.add_(0.5 * torch.randn(rows.shape))
    return model


def say(model, prompts, *rest):
    """`generation.say` of texts."""
    return generation.say(model, [prompt_ids(model, prompt) for prompt in prompts], *rest)


def answer(model, prompts, *rest):
    return generation.answer(model, [prompt_ids(model, prompt) for prompt in prompts], *rest)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def noise_picture(seed):
    torch.manual_seed(seed)
    return Image.effect_noise((40, 30 + seed), 90).convert("RGB")


def test_batched_answers_equal_single_ones(model):
    """Prompts of different lengths with 0, 1 and 2 pictures, sampled: the same ids, the same states and pictures."""
    prompts = [
        f"###Human: {PICTURE * n} {text} ###Assistant:" for n, text in ((1, "go on"), (0, "a"), (2, "and what then?"))
    ]
    pictures = [[noise_picture(0)], [], [noise_picture(1), noise_picture(2)]]
    sampling = Sampling(max_new_tokens=24, steps=3, top_p=0.99)
    whole = answer(model, prompts, pictures, sampling, generators(3))
    painted = 0
    for i, together in enumerate(whole):
        [alone] = answer(model, prompts[i : i + 1], pictures[i : i + 1], sampling, generators(3)[i : i + 1])
        assert [type(s) for s in together] == [type(s) for s in alone]
        assert [s for s in together if isinstance(s, str)] == [s for s in alone if isinstance(s, str)]
        for ours, expected in zip(together, alone, strict=True):
            if not isinstance(ours, str):
                painted += 1
                assert (to_tensor(ours) - to_tensor(expected)).abs().max() <= 1.01 / 255
    print(f"{painted} pictures in {len(prompts)} answers")
    assert painted >= 3

    size = model.image_encoder.vision_model.config.image_size
    pixels = [torch.stack([preprocess_input(p, size, pad=True) for p in given]) for given in pictures if given]
    together = say(model, prompts, torch.cat(pixels), sampling, generators(3))
    for i, own in ((0, pixels[0]), (1, None), (2, pixels[1])):
        [(ids, features)] = say(model, prompts[i : i + 1], own, sampling, generators(3)[i : i + 1])
        assert ids == together[i][0]
        assert not features.requires_grad  # no graph is kept of an answer
        if len(features):
            assert_close(together[i][1], features, 1e-5, f"voken features of prompt {i}")


def test_room_for_pictures_is_each_prompt_s_own(model, monkeypatch):
    """An answer of nothing but pictures has as many beside a longer prompt as alone."""
    monkeypatch.setattr(generation, "pick_tokens", lambda logits, *rest: logits.argmax(-1) * 0 + first)
    (first, *_), prompts = model.tokenizer.voken_ids, ["a", 40 * "a kite "]
    N = len(model.tokenizer.voken_ids)
    together = say(model, prompts, None, Sampling(max_new_tokens=24), generators(2))
    for i in range(2):
        [alone] = say(model, prompts[i : i + 1], None, Sampling(max_new_tokens=24), generators(1))
        assert len(alone[0]) == len(together[i][0]) == min(24, (24 + 8 * N) // N)


def test_long_answers_leave_half_of_all_positions(model):
    half, N = model.llama.config.max_position_embeddings // 2, len(model.tokenizer.voken_ids)
    assert [room_wanted(model, Sampling(max_new_tokens=n)) for n in (20, 10**6)] == [20 + N, half]


def test_a_prefix_takes_room(model):
    """Its five virtual tokens have positions of their own."""
    with_prefix = deepcopy(model)
    with_prefix.add_adapters(prefix={})
    assert room_after(with_prefix.eval(), [1]) == room_after(model, [1]) - 5
    longest = model.llama.config.max_position_embeddings - len(model.tokenizer.voken_ids) - 5
    prompt = " ".join(longest * "a")  # with <s> one token too many
    with pytest.raises(ValueError, match=f"the prompt has {longest + 1} tokens, room is for {longest}"):
        say(with_prefix, [prompt], None, Sampling(), generators(1))
    [(ids, _)] = say(with_prefix, [prompt[2:]], None, Sampling(max_new_tokens=1), generators(1))
    assert ids


def test_a_picture_at_the_very_end(model):
    """The last token allowed is [IMG0]: its picture is still painted."""
    sampling = Sampling(max_new_tokens=1, steps=2, force_image=True)
    [segments] = answer(model, ["a boat"], [[]], sampling, generators(1))
    assert len(segments) == 1 and isinstance(segments[0], Image.Image)


def test_segments(model):
    tokenizer = model.tokenizer
    image, last = tokenizer.voken_ids[0], tokenizer.voken_ids[-1]
    ids = [*tokenizer.encode("the kite"), image, *tokenizer.encode("it drifts"), image, *tokenizer.encode("###")]
    first, second = Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))
    assert segments_of(model, ids, iter([first, second])) == ["the kite", first, "it drifts", second]
    assert segments_of(model, [*tokenizer.encode("words ###")], iter(())) == ["words"]
    assert segments_of(model, [tokenizer.eos_id], iter(())) == []
    if last != image:
        assert segments_of(model, [last, *tokenizer.encode("stray vokens are left out")], iter(())) == [
            "stray vokens are left out"
        ]


def picks(logits, said, sampling, chances):
    """pick_tokens for one row of logits and many chances."""
    logits = torch.tensor(logits).expand(len(chances), -1)
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    seen[:, said] = True
    return pick_tokens(logits, seen, chances, sampling)


def test_pick_tokens():
    """Penalty before temperature, top k and top p, in the order of the released code's library."""
    logits, some = [3.0, 2.0, 1.0, -1.0, -2.0], torch.rand(400, generator=torch.Generator().manual_seed(0))
    greedy = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert picks(logits, [4], greedy, some[:1]).tolist() == [0]
    assert picks(logits, [0], greedy, some[:1]).tolist() == [1]  # 3 / 2 < 2
    assert picks([-1.0, -1.5], [0], greedy, some[:1]).tolist() == [1]  # -1 * 2 < -1.5
    drawn = set(picks(logits, [4], Sampling(top_p=0.9, top_k=50), some).tolist())
    assert drawn == {0, 1, 2}  # 0.66 + 0.24 = 0.90 of the mass is not yet over 0.9
    assert set(picks(logits, [4], Sampling(top_p=1.0, top_k=2), some).tolist()) == {0, 1}
    ends = torch.tensor([0.0, 1 - 2**-24])  # the least and the greatest number that torch.rand gives
    assert picks(logits, [4], Sampling(top_p=0.01), ends).tolist() == [0, 0]
    assert picks(logits, [4], Sampling(top_p=0.9), ends).tolist() == [0, 2]
    assert picks(logits, [4], Sampling(top_p=1.0), ends).tolist() == [0, 4]
    unchanged = Sampling(temperature=2.0, top_p=1.0, repetition_penalty=1.0)
    counts = torch.bincount(picks(logits, [4], unchanged, torch.linspace(0, 1, 4000)), minlength=5)
    assert (counts / 4000 - (torch.tensor(logits) / 2).softmax(-1)).abs().max() < 1e-3


def test_every_sampler_has_its_option(capsys):
    parser = argparse.ArgumentParser()
    cli.add_sampling_options(parser, Sampling)
    for name in SAMPLERS:
        assert Sampling.of(vars(parser.parse_args(["--sampler", name]))).sampler == name
    with pytest.raises(SystemExit):
        parser.parse_args(["--sampler", "euler"])
    assert "invalid choice: 'euler'" in capsys.readouterr().err


def test_compiled_answers(model, monkeypatch):
    """The same answers as without torch.compile, every shape compiled once, whatever the prompt."""
    counters = {}

    def traced(function, **options):
        counters.setdefault(function, CompileCounter())
        return torch.compile(function, backend=counters[function], fullgraph=True, dynamic=False)

    traced = cache(traced)
    monkeypatch.setattr(generation, "compiled", traced)
    monkeypatch.setattr(graphs, "compiled", traced)
    graphs.lasting_cache.cache_clear()
    sampling = Sampling(max_new_tokens=24, steps=3, top_p=0.99)
    for prompts in (["a red boat", "and what then?"], ["the kite drifts", "a"], ["go on with a longer prompt", "so"]):
        said = [say(model, prompts, None, s, generators(2)) for s in (sampling, replace(sampling, compile=True))]
        for (ids, features), (compiled_ids, compiled_features) in zip(*said, strict=True):
            assert compiled_ids == ids
            if len(features):
                assert_close(compiled_features, features, 1e-5, "voken features")
    features, latents = (
        torch.randn(2, *model.mapper.fc[0].weight.shape[1:])[:, None],
        model.sample_latents(2, *generators(1)),
    )
    features = features.expand(-1, len(model.tokenizer.voken_ids), -1)
    for guidance in (7.5, 1.0):
        plain = replace(sampling, guidance=guidance)
        for _ in range(2):
            painted = generation.paint(model, features, replace(plain, compile=True), latents)
        assert_close(painted, generation.paint(model, features, plain, latents), 1e-5, "pixels")
    counts = sorted(counter.frame_count for counter in counters.values())
    print(f"compiled graphs: {counts}")
    assert counts == [1, 1, 2]  # the token, the decoder, the UNet with and without guidance


def test_compiled_pictures_are_painted_one_by_one(model, monkeypatch):
    """Each number of pictures at once would be compiled; they are the same pictures."""
    painted, paint = [], generation.paint
    plain = Sampling(max_new_tokens=4, steps=2, temperature=0, force_image=True)

    def note(model, features, sampling, latents, watch):
        painted.append(len(features))
        return paint(model, features, plain, latents)

    monkeypatch.setattr(generation, "paint", note)
    monkeypatch.setattr(generation, "compiled_step", lambda function, *inputs: function(*inputs))
    both = [answer(model, ["a", "b"], [[], []], replace(plain, compile=c), generators(2)) for c in (False, True)]
    assert painted[0] >= 2 and painted[1:] == [1] * painted[0]
    pictures = [[to_tensor(s) for words in said for s in words if not isinstance(s, str)] for said in both]
    for ours, expected in zip(*pictures, strict=True):
        assert (ours - expected).abs().max() <= 1.01 / 255


def test_pictures_are_padded_or_cropped(model, monkeypatch):
    padded = []

    def note(picture, size, pad):
        padded.append(pad)
        return preprocess_input(picture, size, pad)

    monkeypatch.setattr(generation, "preprocess_input", note)
    for pad in (True, False):
        answer(model, [PICTURE], [[noise_picture(0)]], Sampling(max_new_tokens=1), generators(1), pad)
    assert padded == [True, False]


def test_places_and_pictures_must_agree(model):
    with pytest.raises(ValueError, match="1 pictures for 0 places"):
        answer(model, ["no place"], [[noise_picture(0)]], Sampling(), generators(1))
    with pytest.raises(ValueError, match="the prompt has"):
        answer(model, ["word " * 3000], [[]], Sampling(), generators(1))


def test_words_first(model, monkeypatch):
    """The picture of a description is that of a bare caption with the same noise; other answers stay as they were."""
    said = [["it sails.", "(a small boat)"], ["hello"], ["(a big [IMG0] boat)"]]
    real, asked = generation.answer, []

    def fake(model, prompts, *rest, **options):
        asked.append((prompts, rest))
        return [list(segments) for segments in said] if len(asked) == 2 else real(model, prompts, *rest, **options)

    monkeypatch.setattr(generation, "answer", fake)
    prompts, sampling = ["a", "b", "c"], Sampling(words_first=True, steps=2, sampler="ddim")
    boat, hello, escaped = generation.answer(
        model, [prompt_ids(model, p) for p in prompts], [[]] * 3, sampling, generators(3)
    )
    assert hello == ["hello"] and boat[0] == "it sails." and len(boat) == 2 and len(escaped) == 1
    assert boat[1].info["description"] == "a small boat"
    alone = Sampling(force_image=True, max_new_tokens=1, temperature=0, steps=2, sampler="ddim")
    ((expected,),) = real(model, [prompt_ids(model, "a small boat")], [[]], alone, generators(1))
    assert_close(to_tensor(boat[1]), to_tensor(expected), 1e-5)
    assert len(asked[2][0]) == 2 and model.tokenizer.voken_ids[0] not in asked[2][0][1]
    assert not asked[1][1][1].words_first
