"""Dilated residual networks: ResNets whose last two stages have 1/8 of the input's resolution.

He et al., arXiv 1512.03385, with the dilation of the CCNet paper (section 4.2) and, if not asked for another, the stem
of three convolutions of the original. Parameters have the names of the ImageNet models that the original starts from.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs import ABNSync, InPlaceABNSync

from .layers import conv3x3

# Activation of the backbone's batch norms. identity: none, and ReLU follows, as in the original; both are one operator
# here, which keeps its input and its result for the backward pass. leaky_relu: only the result (docs/inplace_abn.md).
BACKBONE_ACTIVATIONS = ("identity", "leaky_relu")

# Output channels of the stem's convolutions. conv3x3: three of 3x3, the original's and that of ResNet V1s;
# conv3x3_narrow: that of V1c; conv7x7: one of 7x7, that of He et al. and of torchvision.
STEMS = {"conv3x3": (64, 64, 128), "conv3x3_narrow": (32, 32, 64), "conv7x7": (64,)}


def _norm(channels: int, activation: str) -> ABNSync:
    """Batch norm with the activation after it, for one of BACKBONE_ACTIVATIONS; with a residual, after their sum."""
    if activation == "identity":
        return ABNSync(channels, activation="relu")
    return InPlaceABNSync(channels, activation=activation)


def _max_pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """pool(x) of 3x3 pixels with stride 2, padding 1 and ceil_mode, which torch.export takes with sizes of any name.

    PyTorch cannot prove that with ceil_mode the last window begins within the image, whatever its size, and restricts
    named dimensions to sizes of the example's kind. While it exports, the same windows are those of a padded image.
    """
    if not torch.compiler.is_exporting():
        return pool(x)
    return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), pool.kernel_size, pool.stride, pool.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        activation: str,
    ):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride, dilation)
        self.bn1 = _norm(channels, activation)
        self.conv2 = conv3x3(channels, channels, dilation=dilation)
        self.bn2 = _norm(channels, activation)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and 101)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        activation: str,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = _norm(channels, activation)
        self.conv2 = conv3x3(channels, channels, stride, dilation)
        self.bn2 = _norm(channels, activation)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = _norm(channels * self.expansion, activation)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), shortcut)


BACKBONES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class DilatedResNet(nn.Module):
    """The backbone: images [N, 3, H, W] to the features of the last two stages at 1/8.

    Args:
        name: one of BACKBONES.
        activation: one of BACKBONE_ACTIVATIONS.
        stem: one of STEMS.

    Attributes:
        out_channels: channels of (layer3, layer4).
    """

    def __init__(self, name: str, activation: str = "identity", stem: str = "conv3x3"):
        super().__init__()
        block, (n1, n2, n3, n4) = BACKBONES[name]
        channels = STEMS[stem]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False) if stem == "conv7x7" else conv3x3(3, channels[0], stride=2)
        self.bn1 = _norm(channels[0], activation)
        self.three_convolutions = len(channels) == 3
        if self.three_convolutions:
            self.conv2 = conv3x3(channels[0], channels[1])
            self.bn2 = _norm(channels[1], activation)
            self.conv3 = conv3x3(channels[1], channels[2])
            self.bn3 = _norm(channels[2], activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _make_stage(block, activation, channels[-1], 64, n1)
        self.layer2 = _make_stage(block, activation, 64 * block.expansion, 128, n2, stride=2)
        self.layer3 = _make_stage(block, activation, 128 * block.expansion, 256, n3, dilation=2)
        self.layer4 = _make_stage(block, activation, 256 * block.expansion, 512, n4, dilation=4)
        self.out_channels = (256 * block.expansion, 512 * block.expansion)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] to (layer3, layer4), each [N, C, ~H/8, ~W/8]."""
        x = self.bn1(self.conv1(images))
        if self.three_convolutions:
            x = self.bn2(self.conv2(x))
            x = self.bn3(self.conv3(x))
        layer3 = self.layer3(self.layer2(self.layer1(_max_pool(self.maxpool, x))))
        return layer3, self.layer4(layer3)


def _make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    activation: str,
    in_channels: int,
    channels: int,
    num_blocks: int,
    stride: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        downsample = nn.Sequential(convolution, InPlaceABNSync(out_channels, activation="identity"))
    blocks = [block(in_channels, channels, stride, dilation, downsample, activation)]
    blocks += [block(out_channels, channels, 1, dilation, None, activation) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
