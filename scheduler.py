"""Diffusion time: how much noise a timestep means, the noise added in training, and three samplers that remove it.

Paper: MiniGPT-5, Eq. 3 (training noise); sampling is Stable Diffusion's. Covers the published SD 2.1-base (epsilon
prediction) and 2.1 (v prediction). Left out: samplers that add noise, timestep spacings other than "leading", which is
also assumed where a file does not name one, and PNDM's Runge-Kutta start.

    latents, noise (B, C, h, w), t (B,) -> add_noise            noisy latents and target, (B, C, h, w) each
    snr, snr_weight                                             (B,)
    sampler.timesteps                                           (n,), one for each call of the UNet, in order
    sampler.step(model_output, index, latents)                  (B, C, h, w)

A sampling loop; nothing in it waits for the GPU, the coefficients are Python floats:

    sampler = SAMPLERS["pndm"](schedule, steps=50)
    for index, t in enumerate(sampler.timesteps):
        latents = sampler.step(unet(latents, t, conditioning), index, latents)

With a = alphas_cumprod[t]: x_t = sqrt(a) x_0 + sqrt(1 - a) epsilon, and v = sqrt(a) epsilon - sqrt(1 - a) x_0.
Latents are scaled ones. B batch, C channels, h w latent height and width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScheduleConfig:
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); or "linear"
    prediction_type: str = "epsilon"  # SD 2.1-base; or "v_prediction", SD 2.1
    set_alpha_to_one: bool = False  # the last step ends without noise; false: with as much as at timestep 0
    steps_offset: int = 1


class NoiseSchedule:
    """The forward process. `alphas_cumprod` (num_train_timesteps,) float32: the signal's share of the variance of a
    noisy latent."""

    def __init__(self, config: ScheduleConfig, device: str | torch.device | None = None):
        self.config = config
        power = {"linear": 1.0, "scaled_linear": 2.0}[config.beta_schedule]
        start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas = torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float32) ** power
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise (B, C, h, w), timesteps t (B,) -> noisy latents, in the latents' dtype, and what the UNet
        should predict from them, the noise or v; (B, C, h, w) each."""
        a = self.alphas_cumprod[t][:, None, None, None]  # (B, 1, 1, 1)
        signal, spread = a.sqrt().to(latents.dtype), (1 - a).sqrt().to(latents.dtype)
        target = noise if self.config.prediction_type == "epsilon" else signal * noise - spread * latents
        return signal * latents + spread * noise, target

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a / (1 - a) at timesteps t (B,) -> (B,)."""
        a = self.alphas_cumprod[t]
        return a / (1 - a)

    def snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR weight of a sample's loss, (B,) -> (B,) (Hang et al. 2023, gamma 5 there); gamma <= 0: all ones."""
        snr = self.snr(t)
        if gamma <= 0:
            return torch.ones_like(snr)
        # A loss on epsilon is the loss on x_0 times SNR, a loss on v times SNR + 1; min(SNR, gamma) replaces both.
        return snr.clamp(max=gamma) / (snr if self.config.prediction_type == "epsilon" else snr + 1)


def leading_timesteps(config: ScheduleConfig, steps: int, below: int = 0) -> tuple[list[int], int]:
    """`steps` evenly spaced timesteps, from high to low, and their spacing. They are the highest of `steps` + `below`
    timesteps, the lowest of which is steps_offset."""
    max_steps = config.num_train_timesteps - config.steps_offset - below
    if not 1 <= steps <= max_steps:
        raise ValueError(f"cannot sample in {steps} steps: 1 to {max_steps} are possible")
    spacing = config.num_train_timesteps // (steps + below)
    return [spacing * (k + below) + config.steps_offset for k in reversed(range(steps))], spacing


def transfer(a: float, a_next: float, prediction_type: str) -> tuple[float, float]:
    """Coefficients (p, q) of x_next = p x + q model_output: DDIM's step without noise from signal share a to a_next.

    DDIM (Song et al. 2021) Eq. 12, sigma = 0; PNDM's Eq. 11 (Liu et al. 2022) is the same map.
    """
    if prediction_type == "epsilon":
        return math.sqrt(a_next / a), math.sqrt(1 - a_next) - math.sqrt(a_next * (1 - a) / a)
    return (  # with v prediction the step is a rotation
        math.sqrt(a_next * a) + math.sqrt((1 - a_next) * (1 - a)),
        math.sqrt((1 - a_next) * a) - math.sqrt(a_next * (1 - a)),
    )


class DDIM:
    """Deterministic DDIM (eta 0): equal steps, each the transfer from its timestep to the next."""

    def __init__(self, schedule: NoiseSchedule, steps: int):
        config, a = schedule.config, schedule.alphas_cumprod.tolist()
        final_share = 1.0 if config.set_alpha_to_one else a[0]
        timesteps, spacing = leading_timesteps(config, steps)
        shares = [(a[t], a[t - spacing] if t >= spacing else final_share) for t in timesteps]
        self.transfers = [transfer(*pair, config.prediction_type) for pair in shares]
        self.timesteps = torch.tensor(timesteps, device=schedule.alphas_cumprod.device)

    def step(self, model_output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Model output at timesteps[index] and latents, each (B, C, h, w) -> the next, less noisy latents."""
        p, q = self.transfers[index]
        return (p * latents.float() + q * model_output.float()).to(latents.dtype)


# Adams-Bashforth weights for 1 to 4 model outputs, the newest first.
MULTISTEP = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PNDM(DDIM):
    """PNDM as Stable Diffusion runs it, the published default: linear multistep without the Runge-Kutta start.

    The first step is made twice, the second time with the mean of the outputs at its two ends; so n steps call the
    UNet n + 1 times (but 1 step once).
    """

    def __init__(self, schedule: NoiseSchedule, steps: int):
        super().__init__(schedule, steps)
        self.timesteps = torch.cat([self.timesteps[:2], self.timesteps[1:]])
        self.transfers = self.transfers[:1] + self.transfers

    def step(self, model_output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Model output at timesteps[index] and latents, each (B, C, h, w) -> the next, less noisy latents.

        Indices must come in order: the step uses up to three outputs before this one; index 0 forgets them.
        """
        model_output, start = model_output.float(), latents.float()
        if index == 0:
            self.outputs, self.first = [], start
        if index == 1:
            start, combined = self.first, (model_output + self.outputs[0]) / 2
        else:
            self.outputs = [model_output, *self.outputs[:3]]
            weights = MULTISTEP[len(self.outputs) - 1]
            combined = sum(weight * output for weight, output in zip(weights, self.outputs, strict=True))
        p, q = self.transfers[index]
        return (p * start + q * combined).to(latents.dtype)


class DPMSolver:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2, midpoint): good pictures in 20 to 25 steps.

    The last step ends without noise, whatever set_alpha_to_one says, and is of first order, as the first one is.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int):
        v_prediction, a = schedule.config.prediction_type == "v_prediction", schedule.alphas_cumprod.tolist()
        timesteps, _ = leading_timesteps(schedule.config, steps, below=1)  # the lowest is replaced by "no noise"
        self.timesteps = torch.tensor(timesteps, device=schedule.alphas_cumprod.device)
        alphas = [math.sqrt(a[t]) for t in timesteps] + [1.0]
        sigmas = [math.sqrt(1 - a[t]) for t in timesteps] + [0.0]
        lambdas = [math.log(alphas[i] / sigmas[i]) for i in range(steps)]
        self.coefficients = []
        for i in range(steps):
            alpha, sigma = alphas[i], sigmas[i]
            to_clean = (alpha, -sigma) if v_prediction else (1 / alpha, -sigma / alpha)
            keep = sigmas[i + 1] / sigma
            between = 0 < i < steps - 1
            slope = (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) / 2 if between else 0.0
            self.coefficients.append((*to_clean, keep, alphas[i + 1] - keep * alpha, slope))

    def step(self, model_output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Model output at timesteps[index] and latents, each (B, C, h, w) -> the next, less noisy latents.

        Indices must come in order: the step uses the clean latents predicted by the one before.
        """
        p, q, keep, move, slope = self.coefficients[index]
        x = latents.float()
        clean = p * x + q * model_output.float()
        ahead = clean + slope * (clean - self.previous) if slope else clean  # extrapolated to the middle of the step
        self.previous = clean
        return (keep * x + move * ahead).to(latents.dtype)


SAMPLERS = {"pndm": PNDM, "ddim": DDIM, "dpm": DPMSolver}
