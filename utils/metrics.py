"""Intersection over union."""

import torch
from torch import Tensor


class ConfusionMatrix:
    """Exact counts of (true class, predicted class) pairs, accumulated on the device.

    Args:
        num_classes: K; pixels whose label is outside 0..K-1 (void) do not count.
        device: device of the counts.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, label: Tensor, prediction: Tensor) -> None:
        """Count the pixels of two integer tensors of the same shape; predictions are 0..K-1.

        Raises:
            ValueError: the shapes differ.
        """
        if label.shape != prediction.shape:
            raise ValueError(f"prediction: expected shape {list(label.shape)} as label, got {list(prediction.shape)}")
        valid = (label >= 0) & (label < self.num_classes)
        pairs = label[valid].long() * self.num_classes + prediction[valid].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def iou(self) -> Tensor:
        """IoU of every class, TP / (TP + FP + FN): float64 [K] on the CPU; NaN for a class that occurs in neither."""
        counts = self.counts.cpu().double()
        true_positive = counts.diagonal()
        return true_positive / (counts.sum(0) + counts.sum(1) - true_positive)

    def mean_iou(self) -> float:
        """Mean over the classes whose IoU is not NaN."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Fraction of the valid pixels that are predicted correctly."""
        counts = self.counts.cpu().double()
        return (counts.diagonal().sum() / counts.sum()).item()
