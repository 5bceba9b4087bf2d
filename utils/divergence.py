"""Errors of a training whose losses or weights are not finite any more."""

from pathlib import Path

from torch import nn

from .checkpoint import snapshot_path, training_steps
from .commandline import CommandError
from .distributed import World
from .training import StepRecord

_DIVERGED = "training has diverged: start again with a lower --learning-rate and another --snapshot-dir"


def check_losses(records: list[StepRecord], world: World, folder: Path) -> None:
    """Raise a CommandError, the same in all processes, if a loss is infinite or NaN.

    Args:
        folder: of the snapshots; the message names the last one.
    """
    bad = next((record for record in records if not record.is_finite), None)
    if bad is not None:
        names = ", ".join(name for part in world.gather(bad.names) for name in part)
        steps = training_steps(folder)
        last_good = snapshot_path(folder, steps[-1]) if steps else "none yet"
        raise CommandError(
            f"the loss is {bad.losses['total']} at step {bad.step}, of the images {names}; the last good snapshot: "
            f"{last_good}; {_DIVERGED}, or skip such steps with --skip-nonfinite"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """Raise a CommandError if a weight or statistic is infinite or NaN."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CommandError(f"{name} is not finite after step {step}; {_DIVERGED}")
