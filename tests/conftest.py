import json
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=Path(__file__).parent / "golden", help="folder of the recordings")


def pytest_generate_tests(metafunc):
    """The runs and cases of test_golden.py are those that the recordings hold."""
    recorded = {"run", "case"} & set(metafunc.fixturenames)
    if metafunc.module.__name__ == "test_golden" and recorded:
        golden = json.loads((metafunc.config.getoption("--golden") / "golden.json").read_text())
        if "run" in recorded:
            metafunc.parametrize("run", [name.removesuffix("_snr") for name in golden["uas"]["losses"]])
        else:
            metafunc.parametrize("case", [name for name in golden["generation"] if name.startswith("s1_")])


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The recordings were made on one thread; small tensors gain nothing from more."""
    torch.set_num_threads(1)
