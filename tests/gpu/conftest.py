"""Several processes share a GPU: which one each takes, and how much of its memory.

FLATQUANT_TEST_GPUS names the GPUs of the run; here each of xdist's workers puts its own first in it.
FLATQUANT_TEST_GPU_SHARE is the share of its GPU's memory that a worker may allocate.
"""

import os
import sys

import pytest

_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
_gpus = list(filter(None, os.environ.get("FLATQUANT_TEST_GPUS", "").split(",")))
if _worker and _gpus:  # before anything initialises CUDA
    _own = int(_worker.removeprefix("gw")) % len(_gpus)
    _gpus = _gpus[_own:] + _gpus[:_own]
    os.environ["FLATQUANT_TEST_GPUS"] = ",".join(_gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[0]


@pytest.fixture(autouse=True, scope="session")
def share_the_memory():
    torch = sys.modules.get("torch")
    share = float(os.environ.get("FLATQUANT_TEST_GPU_SHARE", "1"))
    if torch and share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def leave_torch_as_it_was():
    """A test that changes torch's default dtype or device fails; the tests after it have the defaults again."""
    yield
    if torch := sys.modules.get("torch"):
        found = torch.get_default_dtype(), torch.get_default_device().type
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        assert found == (torch.float32, "cpu")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A folder of all processes of the run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if _worker else base
