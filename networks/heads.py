"""The heads: what each gathers of the image, and the classifying layers behind it."""

from collections.abc import Callable

from torch import Tensor

from .aspp import ASPPModule
from .layers import Head, classifier
from .non_local import NonLocalModule
from .psp import PSPModule
from .rcca import RCCAModule


class PlainHead(Head):
    """No context: reduce the channels, classify. The baseline of the paper's comparisons."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.bottleneck = classifier(in_channels, in_channels // 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(x)


HEADS: dict[str, Callable[..., Head]] = {
    "rcca": RCCAModule,
    "none": PlainHead,
    "psp": PSPModule,
    "aspp": ASPPModule,
    "nonlocal": NonLocalModule,
}
# Those whose attention's result the category consistent loss can be of
ATTENTION_HEADS = ("rcca", "nonlocal")
# Layers by which a state dict of a head is known; those of no context are in the others as well.
HEAD_LAYERS = {"rcca": "cca", "psp": "stages", "aspp": "branches", "nonlocal": "non_local", "none": "bottleneck"}


def build_head(name: str, in_channels: int, num_classes: int, recurrence: int) -> Head:
    """The head of that name, one of HEADS; recurrence is R of rcca."""
    return HEADS[name](in_channels, num_classes, *(recurrence,) * (name == "rcca"))
