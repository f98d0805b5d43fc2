from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=Path(__file__).parent / "golden", help="folder of the recordings")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The recordings were made on one thread; small tensors gain nothing from more."""
    torch.set_num_threads(1)
