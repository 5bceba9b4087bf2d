"""Shared data: generated scenes in the Cityscapes layout, and real ones where CCNET_CAMVID says where they are."""

import os
from pathlib import Path

import pytest
import torch

from dataset.scenes import write_data_set


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder of 6 training, 3 validation and 2 test scenes of 48x64 pixels. Not to be written to."""
    root = tmp_path_factory.mktemp("scenes")
    write_data_set(root, {"train": 6, "val": 3, "test": 2}, height=48, width=64, seed=7)
    return root


@pytest.fixture(scope="session")
def camvid() -> Path:
    """CamVid in the Cityscapes layout."""
    if "CCNET_CAMVID" not in os.environ:
        pytest.skip("needs CamVid in the Cityscapes layout: set CCNET_CAMVID to its folder")
    return Path(os.environ["CCNET_CAMVID"])


@pytest.fixture(autouse=True)
def _seeded():
    """Every test begins with the same random numbers, whichever ran before."""
    torch.manual_seed(0)
