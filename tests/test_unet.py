"""The UNet against diffusers' UNet2DConditionModel: random weights through the real loader, float32."""

import dataclasses
import json

import pytest
import torch

from published.loading import WeightsError
from published.parts import load_unet
from unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

PUBLISHED = {  # SD 2.1-base
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
TWO_LEVELS = {
    **PUBLISHED,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "sample_size": 8,
}
CASES = {
    "two levels": TWO_LEVELS,
    "three levels, one head number": {
        **TWO_LEVELS,
        "block_out_channels": [16, 32, 48],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "in_channels": 6,
        "out_channels": 5,
    },
    "sines first, other eps": {**TWO_LEVELS, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3},
}


def randomise(model: torch.nn.Module) -> None:
    """Every parameter random and none trivial; the first maps are small, so that every epsilon matters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if name.startswith(("conv_in", "down_blocks.0.resnets.0.conv2", "down_blocks.0.resnets.0.conv_shortcut")):
            values *= 0.01
        parameter.data = values


def save_reference(folder, config):
    reference = diffusers.UNet2DConditionModel(**config).eval()
    randomise(reference)
    reference.save_pretrained(folder, safe_serialization=True)
    return reference


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, config["in_channels"], 8, 8, generator=generator)
    condition = torch.randn(2, 5, config["cross_attention_dim"], generator=generator)
    return sample, torch.tensor([3, 981]), condition


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case, tmp_path):
    reference = save_reference(tmp_path, CASES[case]).requires_grad_(False)
    unet = load_unet(tmp_path, torch.float32, "cpu")
    assert not any(parameter.requires_grad for parameter in unet.parameters())

    results = []
    for model in (unet, lambda *args: reference(*args).sample):
        sample, timesteps, condition = inputs(CASES[case])
        sample.requires_grad_(), condition.requires_grad_()
        output = model(sample, timesteps, condition)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output * direction).sum().backward()
        results.append((output.detach(), sample.grad, condition.grad))

    (ours, *our_gradients), (theirs, *their_gradients) = results
    print(f"{case}: output {difference(ours, theirs):.1e}")
    assert difference(ours, theirs) <= 1e-4
    for name, mine, other in zip(("sample", "condition"), our_gradients, their_gradients, strict=True):
        relative = ((mine - other).norm() / other.norm()).item()
        print(f"{case}: gradient of {name} {relative:.1e}")
        assert relative <= 1e-4


def test_scalar_timestep_equals_a_batch_of_them(tmp_path):
    save_reference(tmp_path, TWO_LEVELS)
    unet = load_unet(tmp_path)
    sample, _, condition = inputs(TWO_LEVELS)
    one, many = (unet(sample, torch.tensor(timesteps), condition) for timesteps in (500, [500, 500]))
    print(f"one timestep for all against one for each: {difference(one, many):.1e}")
    assert difference(one, many) <= 1e-5


@torch.no_grad()
def test_bfloat16(tmp_path):
    """As far from float32 as diffusers is, no further: the layouts in memory differ, and so does the rounding."""
    reference = save_reference(tmp_path, TWO_LEVELS)
    sample, timesteps, condition = inputs(TWO_LEVELS)
    exact = reference(sample, timesteps, condition).sample
    sample, condition = sample.bfloat16(), condition.bfloat16()
    ours = load_unet(tmp_path, torch.bfloat16)(sample, timesteps, condition)
    theirs = reference.to(torch.bfloat16)(sample, timesteps, condition).sample
    assert ours.dtype == torch.bfloat16
    figures = difference(ours.float(), exact), difference(theirs.float(), exact)
    print("bfloat16 against float32: ours {:.1e}, diffusers {:.1e}".format(*figures))
    assert figures[0] <= 1.3 * figures[1]
    norms = [(x.float() - exact).norm().item() for x in (ours, theirs)]  # of all values, not of one
    assert norms[0] <= 1.3 * norms[1]


@pytest.mark.parametrize("heads", [[5, 10, 20, 20], 5])
def test_published_names_and_shapes(heads):
    with torch.device("meta"):
        ours = UNet(UNetConfig(attention_head_dim=tuple(heads) if isinstance(heads, list) else (heads,) * 4))
        theirs = diffusers.UNet2DConditionModel(**{**PUBLISHED, "attention_head_dim": heads})
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_defaults_are_the_published_settings():
    for field in dataclasses.fields(UNetConfig):
        published = PUBLISHED[field.name]
        assert field.default == (tuple(published) if isinstance(published, list) else published), field.name


def test_every_parameter_trains_from_nothing():
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(4, 4),
        norm_num_groups=8,
    )
    unet = UNet(config)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    sample, timesteps, condition = inputs(TWO_LEVELS)
    losses = []
    for _ in range(40):
        loss = (unet(sample, timesteps, condition) - sample).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    still = [name for name, parameter in unet.named_parameters() if not parameter.grad.abs().sum() > 0]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert not still
    assert losses[-1] < 0.3 * losses[0]


def test_forward_compiles_to_one_graph(tmp_path):
    save_reference(tmp_path, TWO_LEVELS)
    unet = load_unet(tmp_path)
    with torch.no_grad():
        compiled, given = torch.compile(unet, backend="eager", fullgraph=True), inputs(TWO_LEVELS)
        assert torch.equal(compiled(*given), unet(*given))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_linear_projection": False}, "use_linear_projection False is not supported"),
        ({"use_linear_projection": None}, "use_linear_projection None is not supported"),
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported"),
        ({"only_cross_attention": True}, "only_cross_attention True is not supported"),
        ({"attention_head_dim": [2, 4, 4]}, r"does not go with attention_head_dim \(2, 4, 4\)"),
        ({"attention_head_dim": [3, 4]}, r"does not go with attention_head_dim \(3, 4\)"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D is not supported"),
        ({"cross_attention_dim": 32}, "has shape"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "is missing"),
    ],
)
def test_refusals(change, said, tmp_path):
    save_reference(tmp_path, TWO_LEVELS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=said) as caught:
        load_unet(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
