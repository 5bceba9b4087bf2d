"""CCNet: the dilated ResNet with the RCCA head and an auxiliary head."""

import torch
from torch import Tensor, nn

from libs import InPlaceABNSync

from .layers import BatchDropout2d, conv3x3
from .rcca import RCCAModule
from .resnet import DilatedResNet


class CCNet(DilatedResNet):
    """The whole network. The backbone is inherited, not held, so that state-dict names are the original's.

    Shape: images [N, 3, H, W], BGR with the mean subtracted, to [main, auxiliary] logits, each
    [N, num_classes, h, w] with h and w about an eighth of H and W (97 for 769).
    """

    def __init__(self, backbone: str, num_classes: int, recurrence: int, backbone_activation: str):
        super().__init__(backbone, backbone_activation)
        layer3_channels, layer4_channels = self.out_channels
        self.head = RCCAModule(layer4_channels, num_classes, recurrence)
        self.dsn = nn.Sequential(
            conv3x3(layer3_channels, layer3_channels // 2, bias=True),
            InPlaceABNSync(layer3_channels // 2),
            BatchDropout2d(0.1),
            nn.Conv2d(layer3_channels // 2, num_classes, 1),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        layer3, layer4 = self.features(images)
        return [self.head(layer4), self.dsn(layer3)]

    def main_logits(self, images: Tensor) -> Tensor:
        """The first of the results alone, without computing the other."""
        return self.head(self.features(images)[1])


def build_model(
    backbone: str = "resnet101", num_classes: int = 19, recurrence: int = 2, backbone_activation: str = "identity"
) -> CCNet:
    """Build CCNet, in channels_last memory format.

    Args:
        backbone: resnet18, resnet34, resnet50 or resnet101 (the paper's).
        num_classes: channels of the logits.
        recurrence: how many times criss-cross attention is applied, 0 or more; 2 in the paper.
        backbone_activation: of the backbone's batch norms: identity, each followed by ReLU (the original's), or
            leaky_relu, which saves memory. State dicts have the same names, and fit the activation that they were
            trained with.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected 1 or more, got {num_classes}")
    model = CCNet(backbone, num_classes, recurrence, backbone_activation)
    return model.to(memory_format=torch.channels_last)
