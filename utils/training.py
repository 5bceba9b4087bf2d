"""One step of training: forward and backward passes of a batch's parts, and the update; and what the losses were."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import shard
from networks import BatchDropout2d, CCNet

from .criterion import BatchShare, CriterionDSN
from .distributed import World
from .precision import in_mixed_precision

LOSSES = ("total", "main", "auxiliary")


def batch_share(world: World, part_size: int) -> BatchShare | None:
    """The images of a batch (or part of one) that this process has; None if it has them all."""
    return None if world.size == 1 else BatchShare(shard(part_size, world.rank, world.size), part_size)


def distribute(model: CCNet, world: World, images: BatchShare | None) -> nn.Module:
    """The network with gradients that are means over the processes, whose weights are alike already."""
    for module in model.modules():
        if isinstance(module, BatchDropout2d):
            module.images = images
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        # The newest PyTorch has another name for broadcast_buffers, which older ones do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # the statistics are those of all processes
            gradient_as_bucket_view=True,
            find_unused_parameters=model.head.recurrence == 0,  # the attention's, which are there and not used
        )


def make_optimizer(
    model: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD as one kernel, to which a GradScaler's scale is a tensor that the host does not wait for.

    Its momentum begins as zeros instead of being made in the first step: if a GradScaler leaves that step out, PyTorch
    2.14 goes on with uninitialised memory.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay, fused=True)
    if momentum > 0:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Part(NamedTuple):
    """Images of a step's batch that go through the network together: [N, 3, H, W], labels [N, H, W], and names."""

    images: Tensor
    labels: Tensor
    names: list[str]


class Outcome(NamedTuple):
    """Result of one step: this rank's part of the losses, LOSSES, [3] on the device; whether the update was skipped."""

    losses: Tensor
    logits: Tensor
    """main, of the last part"""
    skipped: bool


class TrainingStep:
    """One step of SGD. Called with the parts of a batch, one after the other; returns the step's Outcome.

    The gradient is the mean over the parts.

    Args:
        model: from `distribute`.
        criterion: its share has to be that of a part.
        scaler: of the gradients, for float16; not enabled otherwise.
        amp: mixed precision, one of AMP_DTYPES.
        max_norm: global gradient-norm limit; None: no clipping.
        skip_nonfinite: leave the network as it was, statistics included, if the loss is not finite or, without a
            scaler, which does so itself, the gradient. It waits for the device in each step.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: CriterionDSN,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        world: World,
        amp: str = "off",
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ):
        self.model = model
        self.network: Callable[[Tensor], list[Tensor]] = in_mixed_precision(model, world.device, amp)
        self.criterion = criterion
        self.optimizer = optimizer
        self.scaler = scaler
        self.world = world
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite

    def __call__(self, parts: list[Part]) -> Outcome:
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.skip_nonfinite else []
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(LOSSES), device=self.world.device)
        for number, part in enumerate(parts, start=1):
            with self._gradients_stay_here(number < len(parts)):
                part_losses, logits = self._forward_and_backward(part, len(parts))
            losses += part_losses
        return Outcome(losses, logits, self._update(losses, buffers))

    def _gradients_stay_here(self, more_parts_follow: bool):
        """The processes' gradients are summed once a step, with the last part."""
        if more_parts_follow and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _forward_and_backward(self, part: Part, num_parts: int) -> tuple[Tensor, Tensor]:
        logits = self.network(part.images)
        main, auxiliary = self.criterion.components(logits, part.labels)
        total = self.criterion.combine(main, auxiliary)
        self.scaler.scale(total / num_parts).backward()
        return torch.stack([total, main, auxiliary]).detach() / num_parts, logits[0].detach()

    def _update(self, losses: Tensor, buffers: list[Tensor]) -> bool:
        """Step, unless it is to be skipped, which is returned."""
        norm = losses.new_zeros(())
        if self.max_norm is not None or self.skip_nonfinite:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if self.max_norm is None else self.max_norm)
        skip = self.skip_nonfinite and not self._is_finite(losses, norm)
        if skip:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return skip

    def _is_finite(self, losses: Tensor, norm: Tensor) -> bool:
        """The same in all processes."""
        finite = self.world.sum(losses).isfinite().all()
        return bool(finite) if self.scaler.is_enabled() else bool(finite & norm.isfinite())


class StepRecord(NamedTuple):
    """Losses of a step, those of the whole batch, and the names of this process's images."""

    step: int
    losses: dict[str, float]
    names: list[str]

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses.values())


class PendingLosses:
    """The losses of the steps since the last `drain`, on the device."""

    def __init__(self, world: World):
        self.world = world
        self._losses: list[Tensor] = []
        self._steps: list[tuple[int, list[str]]] = []

    def add(self, step: int, losses: Tensor, names: Iterable[str]) -> None:
        self._losses.append(losses)
        self._steps.append((step, list(names)))

    def drain(self) -> list[StepRecord]:
        """All steps since the last call, the same in all processes but for the names. Waits for the device."""
        if not self._steps:
            return []
        rows = (self.world.sum(torch.stack(self._losses)) / self.world.size).tolist()
        records = [
            StepRecord(step, dict(zip(LOSSES, row, strict=True)), names)
            for (step, names), row in zip(self._steps, rows, strict=True)
        ]
        self._losses, self._steps = [], []
        return records
