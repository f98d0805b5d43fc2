"""Answers in batches, the token sampler, segments; what the recordings of test_golden.py do not show."""

import pytest
import torch
from common import assert_close
from PIL import Image
from random_weights import write_random_weights

from generation import Sampling, answer, pick_token, say, segments_of
from images import to_tensor
from minigpt5 import load_minigpt5
from qformer import preprocess_input

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
        if len(features):
            assert_close(together[i][1], features, 1e-5, f"voken features of prompt {i}")


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
    assert segments_of(model, ids, [first, second]) == ["the kite", first, "it drifts", second]
    assert segments_of(model, [*tokenizer.encode("words ###")], []) == ["words"]
    assert segments_of(model, [tokenizer.eos_id], []) == []
    if last != image:
        assert segments_of(model, [last, *tokenizer.encode("stray vokens are left out")], []) == [
            "stray vokens are left out"
        ]


def test_pick_token():
    """Penalty before temperature, top k and top p, in the order of the released code's library."""
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0, -2.0])
    greedy = Sampling(temperature=0.0, repetition_penalty=2.0)
    generator = torch.Generator().manual_seed(0)
    assert pick_token(logits, [4], greedy, generator) == 0
    assert pick_token(logits, [0], greedy, generator) == 1  # 3 / 2 < 2
    assert pick_token(torch.tensor([-1.0, -1.5]), [0], greedy, generator) == 1  # -1 * 2 < -1.5
    drawn = {pick_token(logits, [4], Sampling(top_p=0.9, top_k=50), generator) for _ in range(300)}
    assert drawn == {0, 1, 2}  # 0.66 + 0.24 = 0.90 of the mass is not yet over 0.9
    assert {pick_token(logits, [4], Sampling(top_p=1.0, top_k=2), generator) for _ in range(200)} == {0, 1}
    assert {pick_token(logits, [4], Sampling(top_p=0.01), generator) for _ in range(50)} == {0}
    counts = torch.bincount(
        torch.tensor(
            [
                pick_token(logits, [4], Sampling(temperature=2.0, top_p=1.0, repetition_penalty=1.0), generator)
                for _ in range(4000)
            ]
        )
    )
    assert (counts / 4000 - (logits / 2).softmax(-1)).abs().max() < 0.03


def test_places_and_pictures_must_agree(model):
    with pytest.raises(ValueError, match="1 pictures for 0 places"):
        answer(model, ["no place"], [[noise_picture(0)]], Sampling(), generators(1))
    with pytest.raises(ValueError, match="the prompt has"):
        answer(model, ["word " * 3000], [[]], Sampling(), generators(1))
