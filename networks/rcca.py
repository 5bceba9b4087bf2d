"""The recurrent criss-cross attention head (paper, section 3.3 and figure 2)."""

from torch import Tensor, nn

from cc_attention import CrissCrossAttention

from .layers import AttentionHead


class RCCAModule(AttentionHead):
    """Reduce the channels, apply criss-cross attention `recurrence` times with shared weights, fuse, classify.

    Args:
        in_channels: channels of the features; the attention has a quarter of that.
        num_classes: channels of the logits.
        recurrence: R >= 0. With 0 attention is not applied, but has its parameters, so that a state dict loads for
            every R.

    Shape: [N, in_channels, H, W] to [N, num_classes, H, W].
    """

    cca: CrissCrossAttention

    def __init__(self, in_channels: int, num_classes: int, recurrence: int):
        super().__init__(in_channels, num_classes, "cca", CrissCrossAttention)
        self.recurrence = recurrence

    @property
    def gamma(self) -> nn.Parameter:
        return self.cca.gamma

    def attended(self, x: Tensor) -> Tensor:
        out = self.conva(x)
        for _ in range(self.recurrence):
            out = self.cca(out)
        return out
