"""The losses: cross-entropy on both heads, and online hard example mining on the main one.

All of it is computed on the logits' device, and nothing is copied to the host: no step waits for the device.

Where a batch is spread over processes its loss is that of all its pixels together: a mean over the valid ones of all
processes. Each process computes its own part, times the number of processes, so that the mean over the processes, which
is what DistributedDataParallel makes of gradients, is the loss of the batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

AUXILIARY_WEIGHT = 0.4
# OHEM's k-th smallest probability is taken on maps shrunk by this, and so of min_kept / 8^2 pixels.
_SHRINK = 8


def upsample(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned, as the original upsamples everywhere. [N, C, h, w] to [N, C, *size]."""
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


class BatchShare(NamedTuple):
    """What this process has of a batch that is spread over torch.distributed's group."""

    images: range
    batch_size: int


def _mean_over_valid(pixel_losses: Tensor, valid: Tensor, share: BatchShare | None) -> Tensor:
    """Mean over the valid pixels; 0, with zero gradients, where there are none."""
    total = valid.sum()
    if share is None:
        return (pixel_losses * valid).sum() / total.clamp(min=1)
    dist.all_reduce(total)
    return (pixel_losses * valid).sum() * (dist.get_world_size() / total.clamp(min=1))


class CriterionDSN(nn.Module):
    """Cross-entropy of the main logits plus 0.4 times that of the auxiliary ones.

    Args:
        ignore_index: label of pixels that do not count.
        share: which part of the batch this process has; None for all of it.

    Called with preds, [main, auxiliary] logits [N, K, h, w] each, and target [N, H, W], integer labels; the logits
    are upsampled to H x W. Returns the loss, a scalar.
    """

    def __init__(self, ignore_index: int = 255, share: BatchShare | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        self.share = share

    def components(self, preds: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the main and of the auxiliary head, before weighting."""
        # Contiguous while they are small: cross-entropy would copy the large ones.
        main, auxiliary = (upsample(logits.contiguous(), target.shape[1:]) for logits in preds)
        target = target.long()
        return self.main_loss(main, target), self._cross_entropy(auxiliary, target)

    @staticmethod
    def combine(main: Tensor, auxiliary: Tensor) -> Tensor:
        """The loss from its components."""
        return main + AUXILIARY_WEIGHT * auxiliary

    def forward(self, preds: list[Tensor], target: Tensor) -> Tensor:
        return self.combine(*self.components(preds, target))

    def main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of the main head; logits [N, K, H, W] at the target's resolution."""
        return self._cross_entropy(logits, target)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        return _mean_over_valid(losses, target != self.ignore_index, self.share)


class CriterionOhemDSN(CriterionDSN):
    """The same with online hard example mining on the main head: only its hard pixels count.

    A pixel is hard where the probability of its true class is at most max(thresh, the k-th smallest such
    probability), with k = min_kept / 64 counted on maps shrunk 8x (bilinear probabilities, nearest labels). Where the
    shrunk maps have no more than k valid pixels, all count.

    Args:
        thresh: probability below which pixels always count.
        min_kept: how many pixels of the batch count at least, about.
        ignore_index: label of pixels that do not count.
        share: which part of the batch this process has; None for all of it.
    """

    def __init__(
        self,
        thresh: float = 0.7,
        min_kept: int = 100000,
        ignore_index: int = 255,
        share: BatchShare | None = None,
    ):
        super().__init__(ignore_index, share)
        if not 0 <= thresh <= 1:
            raise ValueError(f"thresh: expected a probability, 0 to 1, got {thresh}")
        if min_kept < 0:
            raise ValueError(f"min_kept: expected 0 or more, got {min_kept}")
        self.thresh = thresh
        self.min_kept = min_kept

    def main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        probability = torch.exp(-losses.detach())
        hard = probability <= self.threshold(logits.detach(), target)
        return _mean_over_valid(losses, hard & (target != self.ignore_index), self.share)

    def threshold(self, logits: Tensor, target: Tensor) -> Tensor:
        """The probability up to which pixels count, a scalar. logits [N, K, H, W], target [N, H, W]."""
        k = self.min_kept // _SHRINK**2
        if k == 0:
            return logits.new_full((), self.thresh)
        probability, valid = self._shrunk_probability(logits, target)
        # Void pixels come last in the order. With fewer than k pixels any answer will do: num_valid <= k then.
        ordered = self._of_all(torch.where(valid, probability, torch.inf)).flatten()
        kth = ordered.kthvalue(min(k, ordered.numel())).values
        return torch.where(ordered.isfinite().sum() <= k, torch.ones_like(kth), kth.clamp(min=self.thresh))

    def _of_all(self, maps: Tensor) -> Tensor:
        """The whole batch's of maps [N, h, w] of this process's images."""
        if self.share is None:
            return maps
        whole = maps.new_zeros(self.share.batch_size, *maps.shape[1:])
        whole[self.share.images.start : self.share.images.stop] = maps
        dist.all_reduce(whole)
        return whole

    def _shrunk_probability(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of the true class on the shrunk maps, and where that class is not void; [N, H/8, W/8] each.

        Shrinking keeps the corners aligned. Only the pixels that the bilinear samples touch are put through softmax.
        """
        row_low, row_high, row_part, row_nearest = _shrunk_positions(target.shape[1], target.device)
        column_low, column_high, column_part, column_nearest = _shrunk_positions(target.shape[2], target.device)
        rows, columns = torch.cat([row_low, row_high]), torch.cat([column_low, column_high])
        probability = logits.index_select(2, rows).index_select(3, columns).float().softmax(dim=1)

        labels = target.index_select(1, row_nearest).index_select(2, column_nearest)
        valid = labels != self.ignore_index
        index = torch.where(valid, labels, 0).repeat(1, 2, 2).unsqueeze(1)
        height, width = labels.shape[1:]
        corners = probability.gather(1, index).squeeze(1).unflatten(2, (2, width)).unflatten(1, (2, height))
        upper, lower = torch.lerp(corners[:, :, :, 0], corners[:, :, :, 1], column_part).unbind(1)
        return torch.lerp(upper, lower, row_part[:, None]), valid


def _shrunk_positions(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where an axis shrunk 8x, its ends aligned, samples the original: the two neighbours, the part of the second,
    and the nearest pixel."""
    shrunk = max(round(length / _SHRINK), 1)
    step = (length - 1) / (shrunk - 1) if shrunk > 1 else 0.0
    position = torch.arange(shrunk, device=device, dtype=torch.float64) * step
    low = position.floor().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    nearest = (position + 0.5).floor().clamp(max=length - 1)
    return low.long(), high.long(), (position - low).float(), nearest.long()
