"""The training step: what goes into it, few shapes, no recompilation, no waiting for the GPU, nothing left on the host,
gradient checkpointing that is exact."""

import json
import random
from collections import defaultdict
from functools import partial

import pytest
import torch
from helpers import pairs, picture_bytes, write_tar
from test_commands import train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.collate import collate
from generation import Sampling, paint, prompt_ids, say
from minigpt5 import MiniGPT5, send
from published.parts import frozen_dtypes, load_minigpt5
from scheduler import SAMPLERS, NoiseSchedule, ScheduleConfig
from trainer.compiled import bucket_length, checkpoint_gradients, pad_pictures
from trainer.run import Meter, step_generator

VOKENS = "".join(f"[IMG{i}]" for i in range(8)) + " ###"
WORDS = "a big red boat on the sea at night two small dogs in it and the moon above".split()  # noqa: SIM905


def open_model(weights, adapter=None):
    """Of one seed; with LoRA's dropout, and its matrices as if trained."""
    torch.manual_seed(0)
    model = load_minigpt5(weights, read_pictures=False, read_captions=True)
    if adapter:
        model.add_adapters(**{adapter: {}})
    for name, parameter in model.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def texts(seed: int, batch: int, pictures: float = 1.0) -> list[tuple[str, str]]:
    """Captions of 1 to 60 words, and now and then a text in the place of a picture."""
    draw = random.Random(seed)
    samples = []
    for _ in range(batch):
        words, picture = draw.choices(WORDS, k=draw.randint(1, 60)), draw.random() < pictures
        samples.append((" ".join(words), VOKENS if picture else " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))))
    return samples


def losses_of(model, samples, seed: int = 0, padded: bool = False) -> dict:
    """As train_uas.py has them, or of a batch that is padded as stage 2's are where they are compiled."""
    round_length = bucket_length if padded else int
    batch = collate(model.tokenizer, samples, model.queries, round_length, round_length)
    M = len(batch.picture_sequences)
    pixels = torch.rand(M, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    noise, posterior = model.sample_noise([0] * M, [step_generator(0, seed, 0)]), model.encode_pictures(pixels)
    if padded:
        batch, noise, posterior = pad_pictures(batch, noise, posterior, multiple=4)
    captions = [samples[row][0] for row in batch.picture_sequences.tolist()]
    encoded = model.encode_captions(captions), model.encode_captions([""])
    torch.manual_seed(seed)  # of the dropout
    return model.losses(batch, noise, posterior, encoded)


def gradients(model, losses) -> dict:
    model.zero_grad(set_to_none=True)
    losses["loss"].backward()
    return {name: p.grad for name, p in model.trained_parameters().items() if p.grad is not None}


# ---- what goes into it


def test_long_sources_are_cut_and_targets_are_not(weights):
    tokenizer, source = load_minigpt5(weights, read_pictures=False).tokenizer, "a word " * 50
    target_ids = tokenizer.encode(VOKENS)
    source_ids = [tokenizer.bos_id, *tokenizer.encode(source)][: 20 - len(target_ids)]
    rows = collate(tokenizer, [(source, VOKENS)], 1, limit=20)
    assert rows.ids.tolist() == [source_ids + target_ids]


def test_long_sequences_are_not_padded_beyond_the_limit(weights):
    """Where the target's length is rounded up, too: its padding then has no positions of its own, and no labels."""
    tokenizer = load_minigpt5(weights, read_pictures=False).tokenizer
    batch = collate(tokenizer, [("a word " * 5000, VOKENS)], 1, bucket_length, bucket_length)
    assert batch.ids.shape[1] == 2048 and batch.targets.max() == 2047
    assert batch.targets.shape == batch.labels.shape and (batch.labels >= 0).sum() == len(tokenizer.encode(VOKENS)) - 6


def test_each_place_has_random_numbers_of_its_own():
    places = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert len({step_generator(*place).initial_seed() for place in places}) == 4


@pytest.mark.parametrize(
    ("width", "units", "expected"),
    [
        (2048, False, (torch.bfloat16, torch.float32)),
        (2048, True, (torch.bfloat16, torch.bfloat16)),
        (1024, True, (torch.float32, torch.float32)),  # the same pictures on every CPU
    ],
)
def test_dtypes_on_a_cpu(tmp_path, monkeypatch, width, units, expected):
    monkeypatch.setattr("published.parts.HAS_AMX", units)
    (tmp_path / "vicuna").mkdir()
    (tmp_path / "vicuna/config.json").write_text(json.dumps({"hidden_size": width}))
    assert frozen_dtypes(tmp_path, None, "cpu") == expected
    assert frozen_dtypes(tmp_path, torch.float32, "cpu") == (torch.float32, torch.float32)


# ---- few shapes


def test_bucket_length():
    lengths = [bucket_length(n) for n in range(1, 2049)]
    assert sorted(set(lengths))[:12] == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert len(set(lengths)) == 24 and lengths == sorted(lengths) and lengths[-1] == 2048
    assert all(n <= length < n + 16 or length < 1.25 * n for n, length in enumerate(lengths, 1))


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_padding_changes_nothing(weights, adapter):
    """Sequences, targets and the list of pictures are padded: the same losses and gradients."""
    samples = texts(1, 9, pictures=0.5)
    results = []
    for padded in (False, True):
        model = open_model(weights, adapter).eval()
        losses = losses_of(model, samples, padded=padded)
        results.append((losses, gradients(model, losses)))
    (losses, exact), (padded_losses, padded) = results
    assert losses.keys() == padded_losses.keys() and exact.keys() == padded.keys()
    worst = max(abs(padded_losses[name] / losses[name] - 1).item() for name in losses)
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst <= 1e-5
    for name, gradient in exact.items():
        assert (padded[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_a_stage_2_run_meets_few_shapes(weights):
    """200 batches of 16 samples with and without pictures: shapes of the compiled parts, which here compute nothing."""
    model, met = open_model(weights, "lora"), defaultdict(set)

    def hidden_states(embeddings, targets):
        met["hidden_states"].add(embeddings.shape)
        return embeddings

    def text_loss(hidden, labels):
        met["text_loss"].add((hidden.shape, labels.shape))
        return hidden.sum()

    def picture_losses(features, noise, weights, posterior, captions, gamma):
        shapes = [x.shape for x in (features, *noise, weights, *posterior)]
        assert len({shape[0] for shape in shapes}) == 1 and abs(weights.sum() - 1) < 1e-6
        met["picture_losses"].add(tuple(shapes))
        return {"ldm_loss": features.sum()}

    model.hidden_states, model.text_loss, model.picture_losses = hidden_states, text_loss, picture_losses
    exact = set()
    for seed in range(200):
        samples = texts(seed, 16, pictures=0.67)
        batch = collate(model.tokenizer, samples, model.queries, bucket_length, bucket_length)
        M = len(batch.picture_sequences)
        noise, posterior = (
            model.sample_noise([0] * M, [step_generator(0, seed, 0)]),
            torch.zeros(2, M, 4, 16, 16).unbind(),
        )
        model.losses(*pad_pictures(batch, noise, posterior, multiple=2))
        unpadded = collate(model.tokenizer, samples, 8)
        exact.add((unpadded.ids.shape[1], unpadded.targets.shape[1], M))
    counts = {name: len(shapes) for name, shapes in met.items()}
    print(f"{len(exact)} combinations of lengths, {counts} shapes")
    assert len(exact) > 100 and all(count <= 8 for count in counts.values())


def test_no_recompilation(monkeypatch, weights, tmp_path):
    """train_uas.py --compile over three epochs, its graphs run as they are: one for the pictures' losses, one for the
    text's, and one whenever a length is met for the first time; and the losses of no compilation."""
    tar = {}
    for i, words in enumerate((2, 14, 3, 15, 2, 13, 2, 14)):
        tar |= {f"{i}.png": picture_bytes(i), f"{i}.txt": " ".join(WORDS[:words]).encode()}
    tar = write_tar(tmp_path / "x.tar", tar)
    options = ("--steps", 12)
    exact = train(monkeypatch, weights, tar, tmp_path / "eager", *options)
    assert "graphs" not in exact[0]
    lengths = []
    read = MiniGPT5.embed
    monkeypatch.setattr(
        MiniGPT5, "embed", lambda model, ids, *rest: lengths.append(ids.shape[1]) or read(model, ids, *rest)
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    log = train(monkeypatch, weights, tar, tmp_path / "compiled", *options, "--compile")
    graphs = [record["graphs"] for record in log]
    print(f"lengths {lengths}, graphs {graphs}")
    assert graphs == [2 + len(set(lengths[:step])) for step in range(1, 13)]
    assert len(set(lengths)) > 1
    for ours, expected in zip(log, exact, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)


# ---- no waiting for the GPU


class NoReading(TorchDispatchMode):
    """Fails at what makes the host wait for a GPU: values and sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        indices = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices)
        if masks or any(name.startswith(waiting) for waiting in self.WAITING):
            raise AssertionError(f"{name} waits for the GPU")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_no_value_is_read_in_a_step(weights, adapter):
    model = open_model(weights, adapter)
    optimizer, meter = torch.optim.AdamW(model.trained_parameters().values(), fused=True), Meter()
    samples = texts(0, 4)
    rows = collate(model.tokenizer, samples, model.queries)
    captions = model.encode_captions([words for words, _ in samples]), model.encode_captions([""])
    draws, pixels = model.sample_noise([0] * 4, [step_generator(0, 0, 0)]), torch.zeros(4, 3, 32, 32)
    with NoReading():
        losses = model.losses(rows, draws, model.encode_pictures(pixels), captions)
        losses["loss"].backward()
        meter.add(losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for waits in (lambda: losses["loss"].item(), lambda: rows.ids[rows.ids > 3], lambda: bool(draws.drop.any())):
        with pytest.raises(AssertionError, match="waits"), NoReading():
            waits()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and --gpu")
def test_no_waiting_on_a_gpu(weights):
    device = torch.device("cuda", torch.cuda.current_device())
    model = load_minigpt5(weights, device=device, read_pictures=False, read_captions=True)
    optimizer, meter = torch.optim.AdamW(model.trained_parameters().values(), fused=True), Meter()
    samples, empty = texts(0, 4), model.encode_captions([""])

    def step():
        rows = send(collate(model.tokenizer, samples, model.queries), device)
        draws, captions = (
            model.sample_noise([0] * 4, [step_generator(0, 0, 0)]),
            model.encode_captions([text for text, _ in samples]),
        )
        losses = model.losses(
            rows, send(draws, device), model.encode_pictures(torch.zeros(4, 3, 32, 32)), (captions, empty)
        )
        losses["loss"].backward()
        meter.add(losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- nothing on the host


class OneDevice(TorchDispatchMode):
    """Fails where a tensor in the host's memory meets one on the device: a GPU would refuse, or wait for the host."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        tensors = [x for x in tree_leaves((arguments, options)) if torch.is_tensor(x) and x.dim()]
        moves = function.name().startswith(("aten::_to_copy", "aten::copy_"))
        if len({tensor.device for tensor in tensors}) > 1 and not moves:
            raise AssertionError(f"{function.name()} of {', '.join(str(tensor.device) for tensor in tensors)}")
        return function(*arguments, **(options or {}))


@pytest.fixture
def meta(monkeypatch):
    """A device that every machine has beside its host: tensors on it have shapes and no values. What an answer's host
    reads from it: the schedule, then words, of which each answer's first is [IMG0] and all others are piece 5."""
    alphas, read = NoiseSchedule(ScheduleConfig()).alphas_cumprod.tolist(), []

    def values(tensor):
        if tensor.is_floating_point():
            return alphas
        read.append(len(tensor))
        return [5 if len(read) > 1 else 512] * len(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "tolist", values)
    return torch.device("meta")


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_nothing_of_a_step_is_left_on_the_host(weights, adapter, meta):
    model = load_minigpt5(weights, dtype=torch.bfloat16, read_captions=True).to(meta).train()
    model.schedule = NoiseSchedule(model.schedule.config, meta)
    if adapter:
        model.add_adapters(**{adapter: {}})
    optimizer, meter = torch.optim.AdamW(model.trained_parameters().values(), foreach=True), Meter()
    samples = [(f"{words} <ImageHere>", target) for words, target in texts(0, 4)]
    with OneDevice():
        rows = send(collate(model.tokenizer, samples, model.queries), meta)
        draws = send(model.sample_noise([0] * 4, [step_generator(0, 0, 0)]), model.device)
        posterior = model.encode_pictures(torch.zeros(4, 3, 32, 32))
        captions = model.encode_captions([words for words, _ in samples]), model.encode_captions([""])
        losses = model.losses(rows, draws, posterior, captions, torch.zeros(4, 3, 28, 28))
        losses["loss"].backward()
        meter.add(losses)
        optimizer.step()
        with pytest.raises(AssertionError, match="of meta, cpu"):
            torch.mm(torch.zeros(2, 2, device=meta), torch.zeros(2, 2))
    assert losses.keys() == {"loss", "text_loss", "ldm_loss", "cap_loss"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_of_an_answer_is_left_on_the_host(weights, sampler, meta):
    model = load_minigpt5(weights, dtype=torch.bfloat16).to(meta).eval()
    model.schedule = NoiseSchedule(model.schedule.config, meta)
    sampling = Sampling(sampler=sampler, steps=4, max_new_tokens=4, force_image=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    pixels = torch.zeros(1, 3, 28, 28, dtype=torch.bfloat16, device=meta)
    with OneDevice():
        said = say(
            model, [prompt_ids(model, text) for text in ("a boat", "<ImageHere> a moon")], pixels, sampling, generators
        )
        latents = torch.cat([model.sample_latents(1, generator) for generator in generators])
        painted = paint(model, torch.cat([features for _, features in said]), sampling, latents)
    assert [ids for ids, _ in said] == [[512, 5, 5, 5]] * 2 and painted.shape == (2, 3, 32, 32)


# ---- gradient checkpointing


class Kept:
    """Bytes that are kept for the backward pass, but for what is inside checkpointed layers."""

    def __init__(self):
        self.bytes = 0

    def count(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_gradient_checkpointing_is_exact(weights, adapter):
    """The same losses and gradients to the bit, through LoRA's dropout too."""
    results = []
    for checkpointed in (False, True):
        model, kept = open_model(weights, adapter), Kept()
        if checkpointed:
            checkpoint_gradients(model)
        with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor):
            losses = losses_of(model, texts(2, 4))
        results.append((losses, gradients(model, losses), kept.bytes))
    (losses, exact, most), (again, ours, least) = results
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    assert exact.keys() == ours.keys() and all(torch.equal(exact[name], ours[name]) for name in exact)
    print(f"kept {most:,} bytes, {least:,} beside the layers that are computed twice")
    assert least < 0.6 * most


def test_gradient_checkpointing_of_a_run(monkeypatch, weights, tmp_path):
    tar = write_tar(tmp_path / "x.tar", pairs(4))
    options, runs = ("--steps", 2, "--sample-every", 2), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for more in ((), ("--gradient-checkpointing",), ("--gradient-checkpointing", "--compile")):
        log = train(monkeypatch, weights, tar, tmp_path / str(len(more)), *options, *more)
        runs.append([(record["loss"], record["text_loss"]) for record in log])
    assert runs[0] == runs[1] and len(runs[0]) == 2
    for ours, expected in zip(runs[2], runs[0], strict=True):  # compiled, rows are padded
        assert ours == pytest.approx(expected, rel=1e-4)
