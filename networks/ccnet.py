"""CCNet: the dilated ResNet with the RCCA head, or another one, and an auxiliary head."""

from dataclasses import replace

from torch import Tensor, nn

from .config import NetworkConfig
from .heads import build_head
from .layers import AttentionHead, classifier
from .resnet import DilatedResNet

# Channels of the features that the category consistent loss is of (arXiv 1811.11721v2, section 3.4).
CCL_CHANNELS = 16


class CCNet(DilatedResNet):
    """The whole network. The backbone is the base class, not a member, so that state-dict names are the original's.

    Shape: images [N, 3, H, W], BGR with the mean subtracted, to [main, auxiliary] logits, each
    [N, num_classes, h, w] with h and w about an eighth of H and W (97 for 769). With config.ccl features of the
    attention's result for the category consistent loss follow, [N, 16, h, w].
    """

    def __init__(self, config: NetworkConfig):
        super().__init__(config.backbone, config.backbone_activation, config.stem)
        layer3_channels, layer4_channels = self.out_channels
        self.head = build_head(config.head, layer4_channels, config.num_classes, config.recurrence or 0)
        self.dsn = classifier(layer3_channels, layer3_channels // 2, config.num_classes, bias=True)
        self.ccl = nn.Conv2d(layer4_channels // 4, CCL_CHANNELS, 1) if config.ccl else None

    def forward(self, images: Tensor) -> list[Tensor]:
        layer3, layer4 = self.features(images)
        if self.ccl is None:
            return [self.head(layer4), self.dsn(layer3)]
        assert isinstance(self.head, AttentionHead)
        attended = self.head.attended(layer4)
        return [self.head.classified(layer4, attended), self.dsn(layer3), self.ccl(attended)]

    def main_logits(self, images: Tensor) -> Tensor:
        """The main logits alone, [N, num_classes, h, w], without computing the auxiliary ones."""
        return self.head(self.features(images)[1])


def build_model(
    backbone: str | NetworkConfig = NetworkConfig.backbone,
    num_classes: int = NetworkConfig.num_classes,
    recurrence: int | None = NetworkConfig.recurrence,
    backbone_activation: str = NetworkConfig.backbone_activation,
    stem: str = NetworkConfig.stem,
    head: str = NetworkConfig.head,
    ccl: bool = NetworkConfig.ccl,
) -> CCNet:
    """Build CCNet. Its weights are contiguous; with `.to(memory_format=torch.channels_last)` it is faster.

    Args:
        backbone: its name; or a NetworkConfig, in place of all arguments.
        num_classes, recurrence, backbone_activation, stem, head, ccl: as in NetworkConfig.

    Raises:
        ValueError: an argument is out of range, and the message names it; or there are others beside a NetworkConfig.
    """
    config = NetworkConfig(NetworkConfig.backbone, backbone_activation, recurrence, num_classes, stem, head, ccl)
    if isinstance(backbone, str):
        config = replace(config, backbone=backbone)
    elif config == NetworkConfig():
        config = backbone
    else:
        raise ValueError(f"expected a NetworkConfig alone, got other arguments beside {backbone}")
    return CCNet(config)
