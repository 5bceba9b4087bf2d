"""The networks: one builder, a loader for the original's state dicts, and trained ones that predict images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ccnet import CCNet, build_model
from .config import NetworkConfig
from .heads import HEADS
from .layers import BatchDropout2d, BatchShard
from .prediction import PredictionNetwork
from .resnet import BACKBONE_ACTIVATIONS, BACKBONES, STEMS
from .state_dicts import StateDictError, load_state

if TYPE_CHECKING:
    from utils.model import Model

__all__ = [
    "BACKBONES",
    "BACKBONE_ACTIVATIONS",
    "HEADS",
    "STEMS",
    "BatchDropout2d",
    "BatchShard",
    "CCNet",
    "NetworkConfig",
    "PredictionNetwork",
    "StateDictError",
    "build_model",
    "load_model",
    "load_state",
]


def load_model(path: str | Path, **settings: Any) -> "Model":
    """The network of a snapshot, whose `predict` takes any image; see `utils.model.load_model`."""
    from utils.model import load_model  # which imports this package

    return load_model(path, **settings)
