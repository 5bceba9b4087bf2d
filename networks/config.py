"""The configuration of a network: the settings that a state dict does not contain."""

from dataclasses import dataclass

from .heads import ATTENTION_HEADS, HEADS
from .resnet import BACKBONE_ACTIVATIONS, BACKBONES, STEMS


@dataclass(frozen=True)
class NetworkConfig:
    """The arguments of `build_model`. The defaults are the paper's network.

    Attributes:
        backbone: resnet18, resnet34, resnet50 or resnet101.
        backbone_activation: activation of the backbone's batch norms: identity, each followed by ReLU (the original's),
            or leaky_relu, which saves memory. State dicts have the same names for both, but are right only for the one
            that they were trained with.
        recurrence: R, how many times criss-cross attention is applied, 0 or more. A state dict loads for every R. None
            becomes 2, or 0 for other heads than rcca, which have none.
        num_classes: channels of the logits.
        stem: the backbone's first convolutions: conv3x3, three of 64, 64 and 128 channels (the original's);
            conv3x3_narrow, of 32, 32 and 64; or conv7x7, one of 64.
        head: rcca, recurrent criss-cross attention; or to compare with: none, psp, aspp or nonlocal (heads.py).
        ccl: whether there is a convolution that makes features for the category consistent loss, in training; only with
            a head that attends, rcca or nonlocal.

    Raises:
        ValueError: a setting is out of range or has another type; the message names it.
    """

    backbone: str = "resnet101"
    backbone_activation: str = "identity"
    recurrence: int | None = None
    num_classes: int = 19
    stem: str = "conv3x3"
    head: str = "rcca"
    ccl: bool = False

    def __post_init__(self) -> None:
        _check_choice("backbone", self.backbone, tuple(BACKBONES))
        _check_choice("backbone_activation", self.backbone_activation, BACKBONE_ACTIVATIONS)
        _check_choice("stem", self.stem, tuple(STEMS))
        _check_choice("head", self.head, tuple(HEADS))
        if self.recurrence is None:
            object.__setattr__(self, "recurrence", 2 if self.head == "rcca" else 0)
        _check_at_least("recurrence", self.recurrence, 0)
        if self.head != "rcca" and self.recurrence != 0:
            raise ValueError(f"recurrence: expected 0, since only the head rcca recurs, got {self.recurrence}")
        _check_at_least("num_classes", self.num_classes, 1)
        if not isinstance(self.ccl, bool):
            raise ValueError(f"ccl: expected True or False, got {self.ccl!r}")
        if self.ccl and self.head not in ATTENTION_HEADS:
            raise ValueError(f"ccl: expected a head that attends, {' or '.join(ATTENTION_HEADS)}, got {self.head}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected {low} or more, got {value}")
