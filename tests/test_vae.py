"""The autoencoder against diffusers' AutoencoderKL: random weights through the real loader, float32."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.images import preprocess_output
from published.loading import WeightsError
from published.parts import load_vae
from vae import VAE, VAEConfig, to_pixels

diffusers = pytest.importorskip("diffusers")

PUBLISHED = {  # SD 2.1-base
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 768,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TWO_LEVELS = {
    **PUBLISHED,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
CASES = {
    "two levels": TWO_LEVELS,
    "three levels, 16 latent channels": {
        **TWO_LEVELS,
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.7,
    },
}


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def randomise(model: torch.nn.Module) -> None:
    """Every parameter random and none trivial; the first maps are small, so that the group norms' epsilon matters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if "coder.conv_in" in name:
            values *= 0.01
        parameter.data = values


def save_reference(folder, config):
    reference = diffusers.AutoencoderKL(**config).eval()
    randomise(reference)
    reference.save_pretrained(folder, safe_serialization=True)
    return reference


def picture(config, seed=1):
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encode_sample_decode(case, tmp_path):
    reference = save_reference(tmp_path, CASES[case])
    vae = load_vae(tmp_path, torch.float32, "cpu")
    pixels, scale = picture(CASES[case]), CASES[case]["scaling_factor"]

    posterior = reference.encode(pixels).latent_dist
    mean, logvar = vae.encode(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    latents = vae.sample(mean, logvar, noise)
    pairs = {
        "mean": (mean, posterior.mean),
        "logvar": (logvar, posterior.logvar),
        "latents": (latents, (posterior.mean + posterior.std * noise) * scale),
        "pixels": (vae.decode(latents), reference.decode(latents / scale).sample),
    }
    assert pixels.shape[-1] == mean.shape[-1] * vae.config.downsampling
    for name, (ours, theirs) in pairs.items():
        print(f"{case}: {name} {difference(ours, theirs):.1e}")
        assert ours.shape == theirs.shape and difference(ours, theirs) <= 2e-5, name


@torch.no_grad()
def test_log_variance_is_clamped(tmp_path):
    save_reference(tmp_path, TWO_LEVELS)
    vae = load_vae(tmp_path)
    vae.quant_conv.bias[4:] += torch.tensor([1000.0, -1000.0, 0.0, 0.0])
    _, logvar = vae.encode(picture(TWO_LEVELS))
    assert logvar[:, 0].unique().tolist() == [20.0] and logvar[:, 1].unique().tolist() == [-30.0]


@pytest.mark.parametrize("as_convolution", [False, True])
@pytest.mark.parametrize("old_names", [False, True])
def test_other_published_forms(old_names, as_convolution, tmp_path):
    reference = save_reference(tmp_path, TWO_LEVELS)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if ".attentions." in name and tensor.ndim == 2 and as_convolution:
            tensor = tensor[:, :, None, None].contiguous()
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old) if old_names else name
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors) == old_names
    save_file(tensors, path)
    ours, theirs = load_vae(tmp_path).state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_published_names_and_shapes():
    with torch.device("meta"):
        models = VAE(VAEConfig()), diffusers.AutoencoderKL(**PUBLISHED)
    ours, theirs = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in models)
    assert ours == theirs
    assert VAEConfig().downsampling == 8


def test_defaults_are_the_published_settings():
    for field in dataclasses.fields(VAEConfig):
        published = PUBLISHED[field.name]
        assert field.default == (tuple(published) if isinstance(published, list) else published), field.name


def test_bfloat16(tmp_path):
    reference = save_reference(tmp_path, TWO_LEVELS)
    vae = load_vae(tmp_path, torch.bfloat16)
    pixels = picture(TWO_LEVELS)
    with torch.no_grad():
        mean, _ = vae.encode(pixels.bfloat16())
        decoded, theirs = vae.decode(mean * 0.18215), reference.decode(mean.float()).sample
    assert mean.dtype == decoded.dtype == torch.bfloat16
    print(f"bfloat16 decode against float32: {difference(decoded.float(), theirs):.1e}")
    assert difference(decoded.float(), theirs) <= 5e-2


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@torch.no_grad()
def test_no_black_pictures_in_half_precision(stored, tmp_path):
    """A decoder whose feature maps pass float16's range, asked for in every type."""
    reference = save_reference(tmp_path, TWO_LEVELS)
    reference.decoder.conv_in.weight *= 1e6
    reference.post_quant_conv.weight *= 10
    reference.decoder.conv_in.weight.clamp_(-6e4, 6e4)
    reference.to(stored).save_pretrained(tmp_path, safe_serialization=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = reference.float().decode(latents / 0.18215).sample
    assert not reference.half().decode(latents.half() / 0.18215).sample.isfinite().all()  # the case is a real one
    for dtype in (torch.float16, torch.bfloat16, torch.float32, None):
        vae = load_vae(tmp_path, dtype)
        assert all(p.dtype in (torch.float32, torch.bfloat16) for p in vae.parameters())
        for given in (torch.float16, torch.bfloat16, torch.float32):
            ours = vae.decode(latents.to(given)).float()
            figure = difference(ours, theirs)
            print(f"stored {stored}, loaded as {dtype}, latents in {given}: {figure:.1e}")
            assert figure <= 6e-2


def test_every_parameter_trains_from_nothing():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=16))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    pixels, losses = picture(TWO_LEVELS), []
    for _ in range(40):
        mean, logvar = vae.encode(pixels)
        decoded = vae.decode(vae.sample(mean, logvar, torch.randn_like(mean)))
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = (decoded - pixels).square().mean() + 1e-4 * divergence
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    still = [name for name, parameter in vae.named_parameters() if not parameter.grad.abs().sum() > 0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert not still
    assert losses[-1] < 0.9 * losses[0]


def test_preprocess_output():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    padded, cropped = (to_pixels(preprocess_output(wide, 16, pad)) for pad in (True, False))
    assert padded.shape == cropped.shape == (3, 16, 16) and padded.dtype == torch.float32
    assert padded[:, 0].unique().tolist() == [1.0]  # white above
    assert padded[:, 8, 8].tolist() == cropped[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "relu"}, "act_fn 'relu' is not supported"),
        ({"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
        ({"latent_channels": 8}, "has shape"),
        ({"layers_per_block": [1, 1]}, "layers_per_block should be int"),
    ],
)
def test_refusals(change, said, tmp_path):
    save_reference(tmp_path, TWO_LEVELS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=said) as caught:
        load_vae(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
