"""The category consistent loss: features of one class near their mean, means of different classes apart.

It is that of the paper's journal version (arXiv 1811.11721v2, section 3.4): the discriminative loss of De Brabandere et
al. (arXiv 1708.02551), which here grows only linearly far from the mean. Equations and constants were compared with
readers' notes on the paper, not with the paper itself. As the other losses it copies nothing to the host, and its
gradient over several processes is that of the whole batch (`criterion`). There are no atomic additions: sums over the
pixels of a class are matrix products.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vector_norm

from networks import BatchShard

# The paper's: the distances within which pixels are near enough and from which on the loss is linear, and the weights
# of the three terms.
DELTA_V, DELTA_D = 0.5, 1.5
ALPHA, BETA, GAMMA = 1.0, 1.0, 0.001


def category_consistent_loss(
    features: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255, shard: BatchShard | None = None
) -> Tensor:
    """alpha l_var + beta l_dis + gamma l_reg, where with the mean mu_c of the N_c features h_i of each class c in C

        l_var = 1 / |C|  sum over c of  1 / N_c  sum over i of  phi_var(||mu_c - h_i||)
        l_dis = 1 / (|C| (|C| - 1))  sum over a != b of  max(2 delta_d - ||mu_a - mu_b||, 0)^2
        l_reg = 1 / |C|  sum over c of  ||mu_c||

    and phi_var(d) is 0 up to delta_v, (d - delta_v)^2 up to delta_d and d - delta_d + (delta_d - delta_v)^2 beyond. The
    gradient of a norm is 0 where the norm is.

    The paper leaves open what follows. Labels are shrunk to the features' size (nearest, corners aligned), instead of
    upsampling the features. C are the classes of the labels that are left in the whole batch, of all processes, and the
    means are over it. With one class l_dis is 0, with none the loss is.

    Args:
        features: [N, C, h, w]; those of 16 bits are computed with in float32.
        target: [N, H, W], integer labels.
        num_classes: labels are 0 to num_classes - 1, and ignore_index, of pixels that do not count.
        shard: the images of the batch that this process has; None for all of them.

    Returns:
        A scalar; with a shard the mean over the processes is the loss.
    """
    pixels = features.movedim(1, -1).flatten(0, 2)  # [P, C]
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    labels = _shrink(target, features.shape[2:]).flatten()
    classes = torch.arange(num_classes, device=labels.device)
    belongs = ((labels[:, None] == classes) & (labels != ignore_index)[:, None]).to(pixels.dtype)  # [P, K]

    sums, counts = belongs.T @ pixels, belongs.sum(0)
    num_processes = 1
    if shard is not None:
        sums, counts = _over_processes(sums, counts)
        num_processes = dist.get_world_size()
    present, counts = counts > 0, counts.clamp(min=1)
    means = sums / counts[:, None]  # [K, C]
    num_present = present.sum()

    distances = vector_norm(pixels - belongs @ means, dim=1)
    within = (_phi_var(distances) * (belongs @ (1 / counts))).sum()  # of this process
    pairs = present[:, None] & present & (classes[:, None] != classes)
    between = ((2 * DELTA_D - vector_norm(means[:, None] - means, dim=2)).relu().square() * pairs).sum()
    size = vector_norm(means, dim=1).sum()  # the means of absent classes are 0
    per_class = (ALPHA * num_processes * within + GAMMA * size) / num_present.clamp(min=1)
    return per_class + BETA * between / (num_present * (num_present - 1)).clamp(min=1)


def _phi_var(distance: Tensor) -> Tensor:
    quadratic = (distance - DELTA_V).relu().square()
    return torch.where(distance > DELTA_D, distance - DELTA_D + (DELTA_D - DELTA_V) ** 2, quadratic)


def _over_processes(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[K, C] and [K], summed over the processes; the gradient of sums is summed as well."""
    from torch.distributed.nn.functional import all_reduce  # importing it needs a distributed build

    both = all_reduce(torch.cat([sums, counts[:, None]], dim=1))
    return both[:, :-1], both[:, -1].detach()


def _shrink(target: Tensor, size: torch.Size) -> Tensor:
    """[N, H, W] to [N, *size]: the nearest labels, with aligned corners."""
    for axis, (length, shrunk) in enumerate(zip(target.shape[1:], size, strict=True), start=1):
        steps = max(shrunk - 1, 1)
        position = torch.arange(shrunk, device=target.device) * (length - 1)
        target = target.index_select(axis, (2 * position + steps) // (2 * steps))
    return target
