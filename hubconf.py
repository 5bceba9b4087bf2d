"""Entry points of torch.hub:

    network = torch.hub.load(REPOSITORY, "ccnet", backbone="resnet50", num_classes=2)
    model = torch.hub.load(REPOSITORY, "ccnet_model", "snapshots/CS_scenes_60000.pth")

REPOSITORY is owner/name on GitHub, or with source="local" a folder. The packages of this project, networks, dataset,
utils, libs and cc_attention, must not be imported already under these names.
"""

from typing import Any

from networks import CCNet, build_model
from utils.model import Model, load_model  # while this folder can be imported from

dependencies = ["torch", "numpy", "cv2", "PIL"]


def ccnet(**settings: Any) -> CCNet:
    """CCNet with random weights; the settings are those of `networks.build_model`."""
    return build_model(**settings)


def ccnet_model(path: str, **settings: Any) -> Model:
    """The network of a snapshot, with `predict`; the settings are those of `utils.model.load_model`."""
    return load_model(path, **settings)
