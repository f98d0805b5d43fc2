"""Noise schedule and samplers against diffusers: timesteps exactly, whole trajectories with a stand-in for the UNet."""

import json

import pytest
import torch

from published.loading import WeightsError
from published.parts import load_schedule
from scheduler import DDIM, PNDM, SAMPLERS, DPMSolver, NoiseSchedule, ScheduleConfig

diffusers = pytest.importorskip("diffusers")

PUBLISHED = {  # SD 2.1-base, with the spacing that its loader fills in
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
VARIANTS = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "linear, alpha to one, no offset": {"beta_schedule": "linear", "set_alpha_to_one": True, "steps_offset": 0},
}
REFERENCES = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


def write(folder, **changes) -> NoiseSchedule:
    (folder / "scheduler_config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    return load_schedule(folder)


def stand_in(latents: torch.Tensor, t: int) -> torch.Tensor:
    """A fixed, smooth function of both: neighbouring channels and places mixed, stronger late."""
    mixed = 0.7 * latents + 0.5 * latents.roll(1, 1) - 0.4 * latents.roll(2, -1)
    return torch.tanh(mixed + t / 700) * (0.4 + t / 1500)


@pytest.mark.parametrize("steps", [1, 2, 6, 25, 50])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories(name, variant, steps, tmp_path):
    sampler = SAMPLERS[name](write(tmp_path, **VARIANTS[variant]), steps)
    reference = REFERENCES[name].from_pretrained(tmp_path)
    reference.set_timesteps(steps)
    assert sampler.timesteps.tolist() == reference.timesteps.tolist()

    for seed in range(2):  # twice with one sampler: index 0 has to forget the first run
        ours = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        reference.set_timesteps(steps)
        worst = 0.0
        for index, t in enumerate(sampler.timesteps.tolist()):
            ours = sampler.step(stand_in(ours, t), index, ours)
            theirs = reference.step(stand_in(theirs, t), t, theirs).prev_sample
            worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        print(f"{name}, {variant}, {steps} steps: {worst:.1e}")
        assert worst <= 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_perfect_predictions_lead_back(name, prediction_type):
    """A model that knows the clean latents is led to them. PNDM needs steps small enough for its multistep mean."""
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction_type, set_alpha_to_one=True, steps_offset=0))
    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = SAMPLERS[name](schedule, 10)
    latents, _ = schedule.add_noise(clean, clean.roll(1, -1), sampler.timesteps[:1])
    for index, t in enumerate(sampler.timesteps):
        a = schedule.alphas_cumprod[t]
        noise = (latents - a.sqrt() * clean) / (1 - a).sqrt()
        output = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        latents = sampler.step(output, index, latents)
    assert (latents - clean).abs().max() <= 1e-4 * clean.abs().max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_training_noise(prediction_type, beta_schedule, tmp_path):
    schedule = write(tmp_path, prediction_type=prediction_type, beta_schedule=beta_schedule)
    reference = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(schedule.alphas_cumprod, reference.alphas_cumprod)

    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 17, 500, 999])
    noisy, target = schedule.add_noise(latents, noise, t)
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, t))
    velocity = reference.get_velocity(latents, noise, t)
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)
    assert schedule.add_noise(latents.bfloat16(), noise.bfloat16(), t)[0].dtype == torch.bfloat16


def test_min_snr_weights():
    t = torch.arange(0, 1000, 37)
    epsilon = NoiseSchedule(ScheduleConfig())
    velocity = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction"))
    snr = epsilon.snr(t)
    a = epsilon.alphas_cumprod.double()[t]
    torch.testing.assert_close(snr.double(), a / (1 - a))
    torch.testing.assert_close(epsilon.snr_weight(t, 5), torch.minimum(snr, torch.tensor(5.0)) / snr)
    torch.testing.assert_close(velocity.snr_weight(t, 5), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    for schedule in (epsilon, velocity):
        assert torch.equal(schedule.snr_weight(t, 0), torch.ones(len(t)))


def test_calls_of_the_unet():
    schedule = NoiseSchedule(ScheduleConfig())
    assert PNDM(schedule, 6).timesteps.tolist() == [831, 665, 665, 499, 333, 167, 1]
    assert [len(sampler(schedule, 50).timesteps) for sampler in (PNDM, DDIM, DPMSolver)] == [51, 50, 50]


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_latents(name):
    """Steps are made in float32; the latents keep their type."""
    sampler = SAMPLERS[name](NoiseSchedule(ScheduleConfig()), 4)
    single = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    half = single.bfloat16()
    output = stand_in(half.float(), 700).bfloat16()
    half, single = sampler.step(output, 0, half), sampler.step(output.float(), 0, single)
    assert half.dtype == torch.bfloat16 and torch.equal(half, single.bfloat16())


@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_numbers_of_steps(name):
    schedule = NoiseSchedule(ScheduleConfig())
    most = 998 if name == "dpm" else 999
    assert max(SAMPLERS[name](schedule, most).timesteps.tolist()) <= 999
    for steps in (-1, 0, most + 1, 5000):
        with pytest.raises(ValueError, match=f"cannot sample in {steps} steps: 1 to {most} are possible"):
            SAMPLERS[name](schedule, steps)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2' is not supported"),
        ({"prediction_type": "sample"}, "only 'epsilon' or 'v_prediction'"),
        ({"timestep_spacing": "trailing"}, "only 'leading'"),
        ({"skip_prk_steps": False}, "skip_prk_steps False is not supported"),
        ({"trained_betas": [0.1]}, "only null"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not supported"),
        ({"steps_offset": "1"}, "steps_offset '1' is not supported, only 0 or 1"),
        ({"num_train_timesteps": "1"}, "num_train_timesteps should be int"),
        ({"num_train_timesteps": 10**6}, "leave no signal at the last timestep"),
    ],
)
def test_refusals(change, said, tmp_path):
    with pytest.raises(WeightsError, match=said) as caught:
        write(tmp_path, **change)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
