"""CCNet for prediction only."""

import torch
from torch import Tensor, nn

from libs import fold_norms

from .ccnet import CCNet


class PredictionNetwork(nn.Module):
    """A copy of the network in evaluation mode, without the parts that only training needs.

    Batch norms are folded into the preceding convolutions, the auxiliary head and the features for the category
    consistent loss are dropped, and activations and sums are computed in place; its memory format is channels_last. No
    parameter requires a gradient, and it stays in evaluation mode: `train()` changes nothing. `model` is not changed.

    Shape: images [N, 3, H, W] to [main logits], [N, num_classes, h, w], as the first of CCNet's.
    """

    def __init__(self, model: CCNet):
        super().__init__()
        self.network = fold_norms(model)
        del self.network.dsn, self.network.ccl
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PredictionNetwork":
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.network.main_logits(images)]
