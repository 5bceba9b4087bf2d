"""The losses: cross-entropy on both heads, online hard example mining on the main one, and the category consistent one.

Everything is computed on the logits' device and nothing is copied to the host, so that no step waits for the device.

The loss of a batch that is spread over processes is a mean over the valid pixels of all processes, weighted by their
classes if these have weights. Each process
computes its own part times the number of processes. The mean over the processes, as DistributedDataParallel takes it of
the gradients, is then that of the whole batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from networks import BatchShard

from .category_consistency import category_consistent_loss

AUXILIARY_WEIGHT = 0.4
# OHEM finds the k-th smallest probability on maps shrunk by this factor, with k = min_kept / 8^2.
_SHRINK = 8


def upsample(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Resize bilinearly with aligned corners, as the original does everywhere. [N, C, h, w] to [N, C, *size]."""
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


class Losses(NamedTuple):
    """Scalars: the loss to minimise and those that it is made of, of the two heads and the category consistent one."""

    total: Tensor
    main: Tensor
    auxiliary: Tensor
    ccl: Tensor | None = None

    def stacked(self) -> Tensor:
        """Those that there are, in this order."""
        return torch.stack([loss for loss in self if loss is not None])


def _weighted_mean(pixel_losses: Tensor, weights: Tensor, shard: BatchShard | None) -> Tensor:
    """Mean weighted by weights, or over the pixels where a mask is true, of all processes if there is a shard.

    It is 0, with zero gradients, if the weights are.
    """
    total = weights.sum()
    if shard is None:
        return (pixel_losses * weights).sum() / torch.where(total > 0, total, 1)
    dist.all_reduce(total)
    return (pixel_losses * weights).sum() * (dist.get_world_size() / torch.where(total > 0, total, 1))


class CriterionDSN(nn.Module):
    """Cross-entropy of the main logits, 0.4 times that of the auxiliary ones, and the category consistent loss if there
    are features for it.

    Args:
        ignore_index: label of pixels that do not count.
        shard: the images of the batch that this process has; None for all of them.
        weight: [K], positive weights of the classes, as in nn.CrossEntropyLoss: each head's loss is the sum of the
            weighted losses of the pixels over the sum of their weights. None: all are 1.

    Called with preds, what CCNet returns, [main, auxiliary] logits [N, K, h, w] each and maybe features, and target
    [N, H, W], integer labels; the logits are upsampled to H x W. Returns the loss, a scalar.
    """

    weight: Tensor | None

    def __init__(self, ignore_index: int = 255, shard: BatchShard | None = None, weight: Tensor | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        self.shard = shard
        self.register_buffer("weight", weight)

    def forward(self, preds: list[Tensor], target: Tensor) -> Tensor:
        return self.losses(preds, target).total

    def losses(self, preds: list[Tensor], target: Tensor) -> Losses:
        """The loss, and those that it is made of before weighting."""
        # Made contiguous while they are small; cross-entropy would copy the upsampled ones.
        main_logits, auxiliary_logits = (upsample(logits.contiguous(), target.shape[1:]) for logits in preds[:2])
        target = target.long()
        main, auxiliary = self._main_loss(main_logits, target), self._cross_entropy(auxiliary_logits, target)
        heads = main + AUXILIARY_WEIGHT * auxiliary
        if len(preds) == 2:
            return Losses(heads, main, auxiliary)
        ccl = category_consistent_loss(preds[2], target, preds[0].shape[1], self.ignore_index, self.shard)
        return Losses(heads + ccl, main, auxiliary, ccl)

    def _main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._cross_entropy(logits, target)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        return self._mean(losses, target != self.ignore_index, target)

    def _mean(self, losses: Tensor, counted: Tensor, target: Tensor) -> Tensor:
        """Mean of the pixels' losses where `counted` is true, weighted by the pixels' classes."""
        if self.weight is None:
            return _weighted_mean(losses, counted, self.shard)
        return _weighted_mean(losses, self.weight[torch.where(counted, target, 0)] * counted, self.shard)


class CriterionOhemDSN(CriterionDSN):
    """CriterionDSN with online hard example mining (OHEM) on the main head: only hard pixels count there.

    A pixel is hard where the probability of its true class is at most max(thresh, the k-th smallest such
    probability), with k = min_kept / 64 counted on maps shrunk 8x (bilinear probabilities, nearest labels). Where the
    shrunk maps have no more than k valid pixels, all count.

    Args:
        thresh: probability below which pixels always count.
        min_kept: about how many pixels of the batch count at least.
        ignore_index, shard, weight: as in CriterionDSN. Weights do not decide which pixels are hard.

    Raises:
        ValueError: thresh is no probability, or min_kept is negative.
    """

    def __init__(
        self,
        thresh: float = 0.7,
        min_kept: int = 100000,
        ignore_index: int = 255,
        shard: BatchShard | None = None,
        weight: Tensor | None = None,
    ):
        super().__init__(ignore_index, shard, weight)
        if not 0 <= thresh <= 1:
            raise ValueError(f"thresh: expected a probability, 0 to 1, got {thresh}")
        if min_kept < 0:
            raise ValueError(f"min_kept: expected 0 or more, got {min_kept}")
        self.thresh = thresh
        self.min_kept = min_kept

    def _main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")
        probability = torch.exp(-losses.detach())
        hard = probability <= self.threshold(logits.detach(), target)
        return self._mean(losses, hard & (target != self.ignore_index), target)

    def threshold(self, logits: Tensor, target: Tensor) -> Tensor:
        """The probability up to which pixels count, a scalar. logits [N, K, H, W], target [N, H, W]."""
        k = self.min_kept // _SHRINK**2
        if k == 0:
            return logits.new_full((), self.thresh)
        probability, valid = self._shrunk_probability(logits, target)
        # Void pixels are last in order. With k or fewer valid pixels the k-th is not used: the threshold is 1.
        ordered = self._gather(torch.where(valid, probability, torch.inf)).flatten()
        kth = ordered.kthvalue(min(k, ordered.numel())).values
        return torch.where(ordered.isfinite().sum() <= k, torch.ones_like(kth), kth.clamp(min=self.thresh))

    def _gather(self, maps: Tensor) -> Tensor:
        """Maps [N, h, w] of this process's images to those of the whole batch."""
        if self.shard is None:
            return maps
        whole = maps.new_zeros(self.shard.batch_size, *maps.shape[1:])
        whole[self.shard.images.start : self.shard.images.stop] = maps
        dist.all_reduce(whole)
        return whole

    def _shrunk_probability(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of the true class on the shrunk maps, and where that class is not void; [N, H/8, W/8] each.

        Corners are aligned. Softmax is computed only for the pixels that bilinear interpolation reads.
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
    """Where an axis that is shrunk 8x, with aligned ends, samples the original one.

    For each position: the two neighbours, the weight of the second, and the nearest pixel; [length / 8] each.
    """
    shrunk = max(round(length / _SHRINK), 1)
    step = (length - 1) / (shrunk - 1) if shrunk > 1 else 0.0
    position = torch.arange(shrunk, device=device, dtype=torch.float64) * step
    low = position.floor().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    nearest = (position + 0.5).floor().clamp(max=length - 1)
    return low.long(), high.long(), (position - low).float(), nearest.long()
