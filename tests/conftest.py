"""Shared fixtures: generated scenes, real ones if CCNET_CAMVID names their folder, and devices."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from targets import TARGETS, needs_gpu, running_on
from torch.utils._python_dispatch import TorchDispatchMode

# The same examples in every run, so that a failure is due to the change under test.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """The emulator is slow: its tests are so marked, and of two dtypes that share an attention kernel it runs one.

    These are float32 and bfloat16; in test_cuda_kernels.py it runs all four.
    """
    emulated = [item for item in items if item.get_closest_marker("emulated") is not None]
    repeated = set()
    for item in emulated:
        item.add_marker(pytest.mark.slow)
        dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
        if item.path.name == "test_criss_cross_native.py" and dtype in (torch.float64, torch.float16):
            repeated.add(item)
    config.hook.pytest_deselected(items=list(repeated))
    items[:] = [item for item in items if item not in repeated]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder of 6 training, 3 validation and 2 test scenes of 48x64 pixels. Not to be written to."""
    from dataset.scenes import write_data_set  # not above: the operators' tests also run where only torch is installed

    root = tmp_path_factory.mktemp("scenes")
    write_data_set(root, {"train": 6, "val": 3, "test": 2}, height=48, width=64, seed=7)
    return root


@pytest.fixture(scope="session")
def camvid() -> Path:
    """CamVid in the Cityscapes layout."""
    if "CCNET_CAMVID" not in os.environ:
        pytest.skip("needs CamVid in the Cityscapes layout: set CCNET_CAMVID to its folder")
    return Path(os.environ["CCNET_CAMVID"])


class _NoHostCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "item")), name
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_host_copies():
    """A context that fails on operations for which the host waits for the device, such as reading a value."""
    return _NoHostCopies()


@pytest.fixture(autouse=True)
def _independent():
    """Every test starts with the same random numbers and nothing compiled, whatever ran before."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # which counts how often a function was compiled, and refuses from a limit on
        torch._dynamo.reset()


@pytest.fixture(params=TARGETS)
def each_target(request):
    """Run the test with each instruction set of this CPU, on the emulated GPU, and on the GPU."""
    with running_on(request.param):
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda":
        needs_gpu()
    return request.param
