"""What only a GPU can show: the same results as on a CPU, in float32 and in bfloat16; exact resumption; CUDA graphs.

    pytest --gpu tests/test_gpu.py              on a GPU
    pytest --rehearse tests/test_gpu.py         the same lines on a CPU, nothing compiled

The stack is the tests' small one with random weights. The bounds stand in BOUNDS.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import pairs, write_tar
from safetensors.torch import load_file
from test_commands import train

from bench.gpu import not_compiled
from common import graphs
from common.collate import collate
from generation import Sampling, paint, prompt_ids, say
from prompts import uas_texts
from published.parts import load_minigpt5
from trainer import run as trainer_run
from trainer.compiled import bucket_length, compile_losses

# dtype -> largest difference from float32 on the CPU of states and pictures, of losses, of gradients: norm of the
# difference over the norm. bfloat16 rounds to 1 in 256, and the roundings of all layers add up.
BOUNDS = {torch.float32: (1e-4, 1e-4, 1e-3), torch.bfloat16: (0.05, 0.05, 0.2)}
CAPTIONS = ["a red boat on the sea", "two dogs in the snow at night", "an old house"]


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """The GPU, with float32 products in float32; on the CPU, to rehearse, nothing is compiled."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for cached in (graphs.compiled, graphs.lasting_cache):
        cached.cache_clear()
    if request.config.getoption("--gpu") and torch.cuda.is_available():
        yield torch.device("cuda", 0)
    elif request.config.getoption("--rehearse"):
        with patch.object(torch, "compile", not_compiled):
            yield torch.device("cpu")
    else:
        pytest.skip("needs a GPU, and --gpu")
    for cached in (graphs.compiled, graphs.lasting_cache):
        cached.cache_clear()
    torch._dynamo.reset()


def open_model(weights, device, dtype=torch.float32):
    torch.manual_seed(0)  # of the vokens and the mapper, which are made on the CPU
    return load_minigpt5(weights, dtype=dtype, device=device, read_pictures=False, read_captions=True).eval()


def check(ours: torch.Tensor, reference: torch.Tensor, bound: float, name: str) -> None:
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    figure = ((ours - reference).norm() / reference.norm().clamp(min=1e-30)).item()
    print(f"{name}: largest relative difference {figure:.1e}, bound {bound:.0e}")
    assert figure <= bound, f"{name}: {figure:.2e} is over {bound:.0e}"


def losses_of(model, round_length=int) -> dict[str, torch.Tensor]:
    """Stage 1's losses of three captions, with random numbers and latents that are the same everywhere."""
    texts = [uas_texts(caption) for caption in CAPTIONS]
    batch = collate(model.tokenizer, texts, model.queries, round_length)
    generator = torch.Generator().manual_seed(1)
    noise = model.sample_noise([0] * len(texts), [generator])
    posterior = model.sample_latents(len(texts), generator), model.sample_latents(len(texts), generator) - 3
    captions = model.encode_captions(CAPTIONS), model.encode_captions([""])
    return model.losses(batch, noise, tuple(t.to(model.device) for t in posterior), captions)


def gradients_of(model, losses: dict) -> dict[str, torch.Tensor]:
    losses["loss"].backward()
    mapper = model.mapper
    return {
        "vokens, input": model.vokens.input.grad,
        "vokens, output": model.vokens.output.grad,
        "mapper, first layer": mapper.fc[0].weight.grad,
        "mapper, queries": mapper.t2i_decoder_prompt.grad,
    }


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_losses_and_gradients(weights, device, dtype):
    models = open_model(weights, device, dtype), open_model(weights, torch.device("cpu"))
    losses = [losses_of(model) for model in models]
    gradients = [gradients_of(model, own) for model, own in zip(models, losses, strict=True)]
    for name, reference in losses[1].items():
        check(losses[0][name], reference, BOUNDS[dtype][1], name)
    for name, reference in gradients[1].items():
        check(gradients[0][name], reference, BOUNDS[dtype][2], name)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_states_and_pictures(weights, device, dtype):
    models = open_model(weights, device, dtype), open_model(weights, torch.device("cpu"))
    sampling = Sampling(steps=5, guidance=1.0 if dtype == torch.bfloat16 else 7.5)  # guidance makes roundings larger
    states, pictures = [], []
    for model in models:
        ids = torch.tensor([prompt_ids(model, "a red boat on the sea at night")], device=model.device)
        with torch.no_grad():
            states.append(model.llama(model.embed(ids)))
        features = torch.randn(2, 8, model.llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
        latents = model.sample_latents(2, torch.Generator().manual_seed(1))
        pictures.append(paint(model, features.to(model.device), sampling, latents))
    check(*states, BOUNDS[dtype][0], "hidden states")
    check(*pictures, 10 * BOUNDS[dtype][0] if sampling.guidance > 1 else BOUNDS[dtype][0], "pictures")


def words_of(model, prompt: str, **options) -> list[int]:
    sampling = Sampling(temperature=0.0, max_new_tokens=12, **options)
    return say(model, [prompt_ids(model, prompt)], None, sampling, [torch.Generator().manual_seed(0)])[0][0]


def test_words(weights, device):
    models = open_model(weights, device), open_model(weights, torch.device("cpu"))
    for caption in CAPTIONS:
        ours, expected = (words_of(model, caption) for model in models)
        assert ours == expected and len(ours) > 1


def test_cuda_graphs(weights, device):
    """What is recorded once is right for other inputs too, and the next call leaves an earlier result as it was."""
    model = open_model(weights, device)
    model.tokenizer.stops = []
    for caption in (*CAPTIONS, CAPTIONS[0]):
        assert words_of(model, caption, compile=True) == words_of(model, caption)
    sampling, drawn = Sampling(steps=4, guidance=2.0), []
    for seed in (0, 1, 0):
        generator = torch.Generator().manual_seed(seed)
        latents = model.sample_latents(1, generator)
        features = torch.randn(1, 8, model.llama.config.hidden_size, generator=generator).to(device)
        drawn.append([paint(model, features, replace(sampling, compile=flag), latents) for flag in (True, False)])
    for pair in drawn:
        check(*pair, 1e-3, "compiled picture")
    assert torch.equal(drawn[0][0], drawn[2][0]) and not torch.equal(drawn[0][0], drawn[1][0])


def test_resume_is_exact(weights, device, monkeypatch, tmp_path):
    """A run that was stopped and resumed equals an uninterrupted one wherever two uninterrupted ones are equal. Some of
    a GPU's kernels add up in no fixed order: then it differs by ten times what these two differ by, at most."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    tar = write_tar(tmp_path / "pairs.tar", pairs(10))
    options = ("--device", device.type, "--no-compile", "--accumulate", 2, "--save-every", 2, "--steps", 6)
    run = partial(train, monkeypatch, weights, tar)
    run(tmp_path / "whole", *options)
    run(tmp_path / "again", *options)
    save = trainer_run.save_checkpoint

    def save_then_stop(out, state, *rest):
        save(out, state, *rest)
        if state["step"] == 4:
            raise KeyboardInterrupt

    with patch.object(trainer_run, "save_checkpoint", save_then_stop), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *options)
    run(tmp_path / "parts", *options, "--resume")
    whole, again, parts = (
        load_file(tmp_path / name / "step-00000006" / "trained.safetensors") for name in ("whole", "again", "parts")
    )

    def differ(ours: dict, other: dict) -> float:
        return max((ours[name] - other[name]).abs().max().item() for name in ours)

    noise, figure = differ(again, whole), differ(parts, whole)
    print(f"resumed: largest relative difference {figure:.1e}, of two uninterrupted runs {noise:.1e}")
    assert parts.keys() == whole.keys() and figure <= 10 * noise
    if device.type == "cpu":
        assert noise == 0


def test_compiled_losses(weights, device):
    """Last, since compiling takes longest."""
    results = []
    for compiled in (True, False):
        model = open_model(weights, device)
        if compiled:
            compile_losses(model)
        losses = losses_of(model, bucket_length)
        results.append(SimpleNamespace(losses=losses, gradients=gradients_of(model, losses)))
    for kind, bound in (("losses", 1e-4), ("gradients", 1e-3)):
        ours, expected = (getattr(result, kind) for result in results)
        for name in expected:
            check(ours[name], expected[name], bound, f"compiled: {name}")
