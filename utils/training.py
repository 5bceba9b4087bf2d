"""A step of training: schedule, forward and backward passes over the parts of a batch, update, and its losses."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import shard
from networks import BatchDropout2d, BatchShard, CCNet
from networks.rcca import RCCAModule

from .criterion import CriterionDSN, Losses
from .distributed import World
from .precision import in_mixed_precision


def poly_learning_rate(base: float, step: int, num_steps: int, power: float) -> float:
    """base * (1 - step / num_steps) ** power, for step in 0..num_steps-1 (paper, section 4.2)."""
    return base * (1 - step / num_steps) ** power


def batch_shard(world: World, batch_size: int) -> BatchShard | None:
    """The images of a batch (or of a part of one) that this process has; None if it is the only process."""
    return None if world.size == 1 else BatchShard(shard(batch_size, world.rank, world.size), batch_size)


def distribute(model: CCNet, world: World, shard: BatchShard | None) -> nn.Module:
    """The network, whose gradients are averaged over the processes. All processes must have the same weights."""
    for module in model.modules():
        if isinstance(module, BatchDropout2d):
            module.shard = shard
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        # Newer versions of PyTorch deprecate broadcast_buffers for a name that older ones do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # statistics are synchronised by the batch norms
            gradient_as_bucket_view=True,
            # Those of the attention if R = 0.
            find_unused_parameters=isinstance(model.head, RCCAModule) and model.head.recurrence == 0,
        )


def make_optimizer(
    model: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD as one fused kernel, which reads a GradScaler's scale on the device, so that the host does not wait.

    Momentum starts as zeros instead of being created in the first step: if a GradScaler skips that step, PyTorch 2.14
    continues with uninitialised memory.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay, fused=True)
    if momentum > 0:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    _step_as_memory_holds_weights(optimizer)
    return optimizer


def _step_as_memory_holds_weights(optimizer: torch.optim.Optimizer) -> None:
    """For each step, give channels_last weights and what belongs to them the shape in which they are contiguous.

    That is [O, H, W, C]. Of others PyTorch 2.14's fused SGD for the CPU makes copies, and takes three times as long.
    """
    permuted: list[Tensor] = []

    def permute(weight: Tensor, order: tuple[int, ...]) -> None:
        gradient, weight.grad = weight.grad, None
        weight.data = weight.data.permute(order)
        weight.grad = None if gradient is None else gradient.permute(order)
        state = optimizer.state.get(weight, {})
        if "momentum_buffer" in state:
            state["momentum_buffer"] = state["momentum_buffer"].permute(order)

    def before(*_: object) -> None:
        for weight in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
                permute(weight, (0, 2, 3, 1))
                permuted.append(weight)

    def after(*_: object) -> None:
        while permuted:
            permute(permuted.pop(), (0, 3, 1, 2))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


class Part(NamedTuple):
    """Images of a batch that go through the network together.

    images: float32 [N, 3, H, W]; labels: uint8 [N, H, W] training ids; names: of the N images.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class Outcome(NamedTuple):
    """Result of one step.

    losses: [3], or [4] with --ccl, on the device: this process's part of the `Losses` of the batch; logits:
    [N, K, h, w], main logits of the last part; skipped: whether the update was skipped.
    """

    losses: Tensor
    logits: Tensor
    skipped: bool


class TrainingStep:
    """One step of SGD. Called with the parts of a batch; returns the Outcome.

    The gradient is the mean over the parts.

    Args:
        model: the network, from `distribute`.
        criterion: the loss of a part.
        scaler: gradient scaler for float16; otherwise disabled.
        amp: mixed precision, one of AMP_DTYPES.
        max_norm: global gradient-norm limit; None: no clipping.
        skip_nonfinite: skip the update and restore the statistics if the loss or the gradient is not finite (a scaler
            itself skips the update for the gradient). Every step then waits for the device.
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
        losses = []
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with nullcontext() if is_last else self._no_sync():
                part_losses, logits = self._forward_and_backward(part, len(parts))
            losses.append(part_losses)
        mean = torch.stack(losses).mean(0)
        return Outcome(mean, logits, self._update(mean, buffers))

    def _no_sync(self) -> AbstractContextManager[object]:
        """No gradients are synchronised: that is done once a step, with the last part."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _forward_and_backward(self, part: Part, num_parts: int) -> tuple[Tensor, Tensor]:
        logits = self.network(part.images)
        losses = self.criterion.losses(logits, part.labels)
        self.scaler.scale(losses.total / num_parts).backward()
        return losses.stacked().detach(), logits[0].detach()

    def _update(self, losses: Tensor, buffers: list[Tensor]) -> bool:
        """Update the weights unless the step is to be skipped; returns whether it was skipped."""
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
        """Whether the losses and, without a scaler, the gradient are finite; the same in all processes."""
        finite = self.world.sum(losses).isfinite().all()
        return bool(finite) if self.scaler.is_enabled() else bool(finite & norm.isfinite())


class StepRecord(NamedTuple):
    """Losses of a step, over the whole batch, by their names in `Losses`; and the names of this process's images."""

    step: int
    losses: dict[str, float]
    names: list[str]

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses.values())


class PendingLosses:
    """The losses of the steps since the last `drain`, kept on the device."""

    def __init__(self, world: World):
        self.world = world
        self._losses: list[Tensor] = []
        self._steps: list[tuple[int, list[str]]] = []

    def add(self, step: int, losses: Tensor, names: Iterable[str]) -> None:
        self._losses.append(losses)
        self._steps.append((step, list(names)))

    def drain(self) -> list[StepRecord]:
        """Return and forget the records of all steps since the last call. Waits for the device.

        All processes call it together; only the names differ among them.
        """
        if not self._steps:
            return []
        rows = (self.world.sum(torch.stack(self._losses)) / self.world.size).tolist()
        records = [
            StepRecord(step, dict(zip(Losses._fields, row, strict=False)), names)  # without the last if it is off
            for (step, names), row in zip(self._steps, rows, strict=True)
        ]
        self._losses, self._steps = [], []
        return records
