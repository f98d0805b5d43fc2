"""Fine-tunes the autoencoder's decoder alone: pictures become sharper and latents stay as they are, so that no other
part must be trained again.

    python experiments/decoder.py --weights runs/weights --minutes 60    # a copy of miniature/weights, changed in place

Painted latents are not quite those of any drawn picture. So noise is added to the latents, up to NOISE of their
deviation, and the decoder learns to see the things through it.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run  # isort: skip

import torch
from torch import Tensor, nn

from experiments.pretrain import train
from experiments.recipes.painter import AutoencoderRecipe
from experiments.recipes.recipe import Setup, write_tensors
from published.parts import load_vae
from vae import VAE

NOISE = 0.2


class DecoderRecipe(AutoencoderRecipe):
    name, batch_sizes = "decoder", (512, 16)
    lr, matrix_lr, hold = 3e-4, 0.005, 400

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.vae = load_vae(setup.weights / "stable-diffusion" / "vae", torch.float32, setup.device)
        self.noise = NOISE / self.vae.config.scaling_factor
        self.vae.config = replace(self.vae.config, scaling_factor=1.0)  # as in the recipe, latents are unscaled
        self.model = nn.ModuleDict({name: getattr(self.vae, name) for name in ("decoder", "post_quant_conv")})
        self.model.requires_grad_(True)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        pixels, weight, noise = super().batch(generator)
        spread = self.noise * torch.rand(len(noise), 1, 1, 1, generator=generator).to(noise.device)
        return pixels, weight, noise, spread * self.normal(noise.shape, generator)

    def losses(self, _: nn.Module, pixels: Tensor, weight: Tensor, noise: Tensor, added: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            latents = self.vae.sample(*self.vae.encode(pixels), noise) + added
        return self.drawing_losses(self.vae.decode(latents) - pixels, weight)

    def whole(self, decoder: nn.Module) -> VAE:
        vae = copy.deepcopy(self.vae)
        vae.load_state_dict(decoder.state_dict(), strict=False)
        return vae

    def measure(self, decoder: nn.Module) -> dict[str, float]:
        return super().measure(self.whole(decoder))

    def export(self, decoder: nn.Module, weights: Path) -> None:
        path = weights / "stable-diffusion" / "vae" / "diffusion_pytorch_model.safetensors"
        write_tensors(path, self.whole(decoder).state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a copy of miniature/weights")
    parser.add_argument("--minutes", type=float, default=60, help="training time over all runs, which may be several")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/decoder"), help="folder of checkpoints and training sets"
    )
    parser.add_argument("--pictures", type=int, default=1 << 15, help="different pictures to train on")
    args = parser.parse_args()
    setup = Setup(args.out, args.weights, torch.device("cpu"), pictures=args.pictures)
    recipe = DecoderRecipe(setup)
    decoder = train(recipe, setup, args.minutes)
    if decoder is not None:
        recipe.export(decoder, args.weights)


if __name__ == "__main__":
    run(main)
