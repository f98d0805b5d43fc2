"""The voken feature mapper against torch.nn.Transformer."""

from functools import partial

import torch
from helpers import assert_close, randomise, shapes
from torch import nn

from mapper import VokenMapper
from published.loading import load, save_safetensors


class Reference(nn.Module):
    """The mapper as the released code writes it."""

    def __init__(self, llm_width: int, width: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(llm_width, width), nn.GELU(), nn.Linear(width, width))
        self.llm_to_t2i_mapping = nn.Transformer(
            width, 8, 4, 4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, 77, width))

    def forward(self, features):
        queries = self.t2i_decoder_prompt.expand(len(features), -1, -1)
        return self.llm_to_t2i_mapping(self.fc(features), queries)


def test_forward_and_gradients(tmp_path):
    reference = randomise(Reference(48, 32), scale=0.3)
    save_safetensors(reference.state_dict(), tmp_path / "mapper.safetensors")
    ours = load(partial(VokenMapper, 48, 32, 77), tmp_path).requires_grad_(True)
    features = torch.randn(3, 8, 48, generator=torch.Generator().manual_seed(1))
    features[1] = 0  # the unconditional branch
    towards = torch.randn(3, 77, 32, generator=torch.Generator().manual_seed(2))
    output, expected = ours(features), reference(features)
    assert_close(output, expected, 1e-5, "conditioning")
    (output * towards).sum().backward()
    (expected * towards).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    ratios = {
        name: ((p.grad - gradients[name]).norm() / gradients[name].norm()).item() for name, p in ours.named_parameters()
    }
    worst = max(ratios, key=ratios.get)
    print(f"largest relative L2 difference of a gradient: {ratios[worst]:.1e}, {worst}")
    assert ratios[worst] <= 1e-4


def test_full_size_names():
    with torch.device("meta"):
        ours, reference = VokenMapper(), Reference(4096, 1024)
    assert shapes(ours) == shapes(reference)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (ours.llm_to_t2i_mapping, ours.fc)]
    assert [round(size / 1e6, 1) for size in sizes] == [117.6, 5.2]
