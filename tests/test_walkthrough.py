"""docs/walkthrough.ipynb: its code runs from the first to the last cell, without Jupyter, and its words stay true."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def ran() -> dict:
    """The names that the cells define, and under "displayed" the pictures that each cell shows."""
    names, displayed = {}, []
    names["display"] = lambda picture: displayed[-1].append(picture)
    for number, source in enumerate(CODE):
        displayed.append([])
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    return names | {"displayed": displayed}


def test_the_file_holds_every_output_and_is_small():
    stored = [cell for cell in CELLS if cell["cell_type"] == "code"]
    kinds = [output["output_type"] for cell in stored for output in cell["outputs"]]
    print(f"{len(stored)} code cells, {NOTEBOOK.stat().st_size:,} bytes")
    assert 12 <= len(stored) <= 15 and NOTEBOOK.stat().st_size < 1_500_000
    assert [cell["execution_count"] for cell in stored] == list(range(1, len(stored) + 1))
    assert all(cell["outputs"] for cell in stored) and "error" not in kinds


def test_words_stand_before_every_code_cell():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")


def test_what_is_stored_is_what_is_shown(ran):
    """As many pictures in each cell, of the same sizes in pixels; what is in them depends on the machine."""
    for pictures, cell in zip(ran["displayed"], (c for c in CELLS if c["cell_type"] == "code"), strict=True):
        data = [output["data"] for output in cell["outputs"] if "data" in output]
        assert all("image/png" in kinds for kinds in data) and len(data) == len(pictures)
        assert all(isinstance(picture, Image.Image) and max(picture.size) < 1300 for picture in pictures)


def test_vokens_and_their_features(ran):
    model, features = ran["model"], ran["features"]
    assert features.shape == (1, 8, model.llama.config.hidden_size)
    learned = [word for word, note in zip(ran["words"], ran["taught"], strict=True) if note]
    assert learned == ["[IMG0]", "[IMG7]", "_###"]
    assert torch.equal(features[0], ran["hidden"][0, ran["start"] : ran["start"] + 8])
    assert ran["difference"] < 1e-4
    assert ran["begins"].argmax() == ran["start"]  # a picture is likeliest where the caption ends


def test_the_mapper_stands_in_for_the_text_encoder(ran):
    assert ran["conditioning"].shape == ran["encoded"].shape
    assert ran["similarity"].argmax(1).tolist() == [0, 1, 2, 3]
    assert (ran["painted"] - ran["from_text"]).abs().mean() < 0.2


def test_pictures(ran):
    side = ran["model"].unet.config.sample_size * ran["model"].vae.config.downsampling
    assert ran["painted"].shape == (4, 3, side, side) and ran["day"].size == (side, side)
    assert len(ran["film"]) == 20 and len(ran["frames"]) == 7
    assert ran["changed"].max() > 0 and len(ran["stories"]) == 4
    assert all(len(columns) >= 2 for columns in ran["stories"])


def test_attention_is_a_share(ran):
    attention = ran["attention"]
    assert attention.shape == (64, ran["encoded"].shape[1])
    assert torch.allclose(attention.sum(1), torch.ones(64), atol=1e-4)
    assert not any("attend" in vars(layer) for layer in ran["layers"])


def test_losses_and_their_gradients(ran):
    losses, after = ran["losses"], ran["after"]
    assert set(losses) == {"loss", "text_loss", "ldm_loss", "cap_loss"}
    assert all(value.isfinite() for value in losses.values())
    total = 0.01 * losses["text_loss"] + losses["ldm_loss"] + 0.1 * losses["cap_loss"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert after["loss"] < losses["loss"]
    trained = ran["model"].trained_parameters()
    assert sum(len(parameters) for parameters in ran["parts"].values()) == len(trained)
    assert {name for name, p in ran["learner"].named_parameters() if p.grad is not None} == {
        name if name.startswith("vokens.") else f"mapper.{name}" for name in trained
    }
