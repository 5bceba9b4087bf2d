"""Weights of other projects under this network's names: ResNets of torchvision, timm and mmsegmentation, and the last's
CCNet.

They are recognised by names and shapes. Their images are RGB, divided by 255, then normalised by ImageNet's mean and
standard deviation. This is folded into the first convolution and its norm, so that they take this project's images.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

# Of the images that torchvision, timm and mmsegmentation train on: R, G, B in 0..1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of this project's images: B, G, R in 0..255. The same as dataset.transforms.IMAGE_MEAN.
_OWN_MEAN = (104.00698793, 116.66876762, 122.67891434)

# mmsegmentation's names, and timm's of the stem with three convolutions.
_STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
_CCHEAD = {
    "convs.0.conv": "conva.0",
    "convs.0.bn": "conva.1",
    "convs.1.conv": "convb.0",
    "convs.1.bn": "convb.1",
    "conv_cat.conv": "bottleneck.0",
    "conv_cat.bn": "bottleneck.1",
    "conv_seg": "bottleneck.3",
    "cca.gamma.scale": "cca.gamma",  # of no dimension
}
# What a state dict of mmsegmentation's CCNet does not show.
MMSEGMENTATION_DIFFERS = (
    "the first blocks of layer3 and layer4 are dilated by 1 and 2, here by 2 and 4; its heads have ReLU, here leaky "
    "ReLU; the auxiliary head has 256 channels, here 512"
)

_EPS = 1e-5  # of the norms

State = dict[str, Tensor]


def is_mmsegmentations(state: State) -> bool:
    """Whether the names are those of a whole network of mmsegmentation."""
    return any(name.startswith("decode_head.") for name in state)


def from_other_project(state: State) -> State | None:
    """The weights under this network's names and for its images; None if they are not of another project.

    mmsegmentation's auxiliary head is left out. Norms without num_batches_tracked, as in old files, get it, since it
    marks the weights of torch's batch norm.

    Raises:
        ValueError: the network has other layers than this one; the message says which.
    """
    if is_mmsegmentations(state):
        if not any(name.startswith("decode_head.cca.") for name in state):
            raise ValueError("expected mmsegmentation's CCNet (decode_head.cca.*), found a network with another head")
        state = {_of_cchead(name): tensor for name, tensor in state.items() if not name.startswith("auxiliary_head.")}
        gamma = state.get("head.cca.gamma")
        state |= {} if gamma is None else {"head.cca.gamma": gamma.reshape(1)}
    elif any(name.startswith(("head.", "dsn.")) for name in state):
        return None
    elif "conv1.0.weight" in state:  # timm's; its last norm is outside
        state = {
            f"stem.7{name.removeprefix('bn1')}" if name.startswith("bn1.") else name: x for name, x in state.items()
        }
    elif "stem.0.weight" not in state and getattr(state.get("conv1.weight"), "shape", ())[2:] != (7, 7):
        return None
    if any(".downsample.2." in name for name in state):
        raise ValueError(
            "expected the shortcuts of ResNet, V1b, V1c or V1s, a convolution with stride 2, found those of V1d or "
            "V1e, which average before it"
        )
    state = {re.sub(r"^(?:stem|conv1)\.(\d)\.", _own_stem, name): tensor for name, tensor in state.items()}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in state if "running_mean" in name}
    return _for_own_images(state | {name: torch.tensor(0) for name in counters})


def _own_stem(match: re.Match) -> str:
    return f"{_STEM.get(match[1], match[0])}."


def _of_cchead(name: str) -> str:
    """mmsegmentation's name of CCNet under this network's."""
    name = name.removeprefix("backbone.")
    if not name.startswith("decode_head."):
        return name
    name = name.removeprefix("decode_head.")
    for old, new in _CCHEAD.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return f"head.{name}"


def _for_own_images(state: State) -> State:
    """The weights of a network for images in RGB, divided by 255 and normalised, for this project's images.

    For each channel c of this project's image, x = (c + own mean - 255 mean) / (255 std). So the first convolution of x
    is that of c, with weights divided by 255 std, plus a constant (but at the border, where x is padded with 0). The
    norm subtracts the constant. Weights and statistics are then those of 255 times the average of std times this
    convolution, so that the weights keep their size: before a norm, a step of training changes the direction of weights
    by an angle that is inversely proportional to the square of their size.
    """
    first, norm = state.get("conv1.weight"), [state.get(f"bn1.{name}") for name in ("running_mean", "running_var")]
    if first is None or first.shape[1:2] != (3,) or not first.is_floating_point() or first.layout != torch.strided:
        return state  # load_state says what is wrong
    if norm[0] is None or norm[1] is None:
        return state
    dtype = torch.promote_types(first.dtype, torch.float32)
    mean, std, own_mean = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (_MEAN, _STD, _OWN_MEAN[::-1]))
    unit = 255 * std.mean()
    weight = first.double() * (unit / (255 * std))
    constant = (weight * (own_mean - 255 * mean)).sum((1, 2, 3))
    return state | {
        "conv1.weight": weight.flip(1).to(dtype),
        "bn1.running_mean": (unit * norm[0].double() - constant).to(dtype),
        "bn1.running_var": (unit**2 * (norm[1].double() + _EPS) - _EPS).to(dtype),
    }


def torchvision_weights(backbone: str) -> Path:
    """The file of torchvision's ImageNet weights, its first version, which its own segmentation networks begin with.

    It is downloaded once, to where torch.hub keeps files.

    Raises:
        OSError: it cannot be downloaded or written.
        RuntimeError: what came is not the file.
    """
    from torchvision.models import get_model_weights  # not needed otherwise

    url = get_model_weights(backbone)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2])
    return path
