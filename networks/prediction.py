"""CCNet made ready for prediction."""

import torch
from torch import Tensor, nn

from libs import fold_norms

from .ccnet import CCNet
from .resnet import BasicBlock, Bottleneck


class PredictionNetwork(nn.Module):
    """A copy of the network in evaluation, without what only training needs.

    Batch norms are folded into the convolutions before them, the auxiliary head is left out, and activations and sums
    are computed in place. The network itself is left as it is.

    Shape: images [N, 3, H, W] to [main logits], [N, num_classes, h, w], as the first of CCNet's.
    """

    def __init__(self, model: CCNet):
        super().__init__()
        network = fold_norms(model)
        assert isinstance(network, CCNet)
        self.network: CCNet = network
        del network.dsn
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
            if isinstance(module, BasicBlock | Bottleneck):
                module.activates_sum = True  # what is left of the norm adds the shortcut in place

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [self.network.main_logits(images)]
