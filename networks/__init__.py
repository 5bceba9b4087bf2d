"""The networks: one builder, and a loader for the original's state dicts."""

from .ccnet import CCNet, build_model
from .config import NetworkConfig
from .layers import BatchDropout2d, BatchShard
from .prediction import PredictionNetwork
from .resnet import BACKBONE_ACTIVATIONS, BACKBONES
from .state_dicts import StateDictError, load_state

__all__ = [
    "BACKBONES",
    "BACKBONE_ACTIVATIONS",
    "BatchDropout2d",
    "BatchShard",
    "CCNet",
    "NetworkConfig",
    "PredictionNetwork",
    "StateDictError",
    "build_model",
    "load_state",
]
