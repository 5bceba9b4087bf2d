"""The networks: one builder, and loading of the original's state dicts."""

from .ccnet import CCNet, build_model
from .config import NetworkConfig
from .layers import BatchDropout2d
from .prediction import PredictionNetwork
from .resnet import BACKBONE_ACTIVATIONS, BACKBONES
from .state_dicts import StateDictError, load_state

__all__ = [
    "BACKBONES",
    "BACKBONE_ACTIVATIONS",
    "BatchDropout2d",
    "CCNet",
    "NetworkConfig",
    "PredictionNetwork",
    "StateDictError",
    "build_model",
    "load_state",
]
