import json
import os
from pathlib import Path

import pytest
import torch
from helpers import pairs, write_tar
from random_weights import write_random_weights


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=Path(__file__).parent / "golden", help="folder of the recordings")
    parser.addoption("--gpu", action="store_true", help="tests see the GPU: with `-k gpu`, as others want a CPU")
    parser.addoption(
        "--rehearse", action="store_true", help="the tests of test_gpu.py run on the CPU, to find mistakes"
    )


def pytest_configure(config):
    """The commands' tests expect what a CPU does: float32, nothing compiled, the same bits again."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_generate_tests(metafunc):
    """The runs and cases of test_golden.py are those that the recordings hold."""
    wanted = {"run", "case"} & set(metafunc.fixturenames)
    if metafunc.module.__name__ != "test_golden" or not wanted:
        return
    golden = json.loads((metafunc.config.getoption("--golden") / "golden.json").read_text())
    if "run" in wanted:
        runs = [(stage, name.removesuffix("_snr")) for stage in ("uas", "mls") for name in golden[stage]["losses"]]
        metafunc.parametrize(("name", "run"), runs)
    else:
        metafunc.parametrize("case", [name for name in golden["generation"] if name.startswith(("s1_", "s2_"))])


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The recordings were made on one thread; small tensors gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of small random weights. Some test files have a fixture of this name with other weights."""
    return write_random_weights(tmp_path_factory.mktemp("weights"), small=True)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """A tar of ten pairs."""
    return write_tar(tmp_path_factory.mktemp("data") / "pairs.tar", pairs(10))
