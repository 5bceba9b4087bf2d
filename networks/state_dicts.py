"""Loading of state dicts of all versions of the original, under this network's names and without silent gaps."""

import torch
from torch import Tensor, nn

from libs import absorb_negative_weights

from .pretrained import MMSEGMENTATION_DIFFERS, from_other_project, is_mmsegmentations

_HEADS = ("head.", "dsn.")
_CCL = "ccl."
_CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")
_RENAMED = {"head.conv1a.": "head.conva.", "head.conv1b.": "head.convb."}
# Attributes in which DataParallel, AveragedModel, torch.compile, FSDP and checkpointing hold the wrapped module
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTER = "num_batches_tracked"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SHOWN = 12


class StateDictError(ValueError):
    """A state dict does not fit the network; the message lists the keys."""


def _rename(key: str) -> str:
    """This network's name for a key; the models of December 2018 have conv1a and conv1b."""
    for old, new in _RENAMED.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _in_names_of(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state dict under the model's names, without names of wrappers and prefixes of all keys, such as `model.`.

    AveragedModel's counter, n_averaged, is dropped.
    """
    keys = {
        key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in state if key != "n_averaged"
    }
    own = {name for name, _ in model.named_children()}
    while len(tops := {name.partition(".")[0] for name in keys.values()}) == 1 and not tops & own:
        prefix = f"{tops.pop()}."
        if not all(name.startswith(prefix) for name in keys.values()):
            break
        keys = {key: name.removeprefix(prefix) for key, name in keys.items()}
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, name in keys.items():
        name = _rename(name)
        if name in found:
            raise StateDictError(f"{source}: {origin[name]} and {key} are both {name} of this network; expected one")
        found[name], origin[name] = state[key], key
    return found


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    restore_last: bool = True,
    as_start: bool = False,
) -> list[str]:
    """Load a state dict of any version of the original into the model, or that of another project.

    Returns the names of tensors of the heads that were left as they are though the file is of a whole network.

    Prefixes of wrappers are removed and old names renamed; `pretrained` has the names of other projects. No key may be
    missing or unexpected, except that an ImageNet backbone has fc.* and lacks head.* and dsn.*, and that the layer for
    the category consistent loss, ccl.*, which only training needs, may be missing in one of both. Norms with
    num_batches_tracked are torch's and are converted to activated batch norm; if their weights are negative, the
    convolutions before them are changed too.

    Args:
        state: names to tensors.
        source: its path, for messages.
        restore_last: whether to load the two classifying layers; if not, their shapes may differ.
        as_start: whether training begins with these weights. Then an ImageNet backbone, a network with another number
            of classes or another head and mmsegmentation's CCNet are accepted, and what they lack or does not fit stays
            as it is.

    Raises:
        StateDictError: keys are missing or unexpected, shapes differ, numbers are not finite, a tensor is not a plain
            floating-point one, a negative weight has no convolution before it, or it is another project's, which cannot
            be converted. The model is unchanged then.
    """
    state = _in_names_of(model, state, source)
    of_mmsegmentation = is_mmsegmentations(state)
    if of_mmsegmentation and not as_start:
        raise StateDictError(
            f"{source}: expected the weights of this project's CCNet, found mmsegmentation's, which is another "
            f"network: {MMSEGMENTATION_DIFFERS}; training can begin with it (train.py --restore-from)"
        )
    try:
        state = from_other_project(state) or state
    except ValueError as error:
        raise StateDictError(f"{source}: {error}") from None
    own = model.state_dict()
    backbone_only = as_start and not any(key.startswith(_HEADS) for key in state)
    if as_start and any(state[key].shape[:1] != own[key].shape[:1] for key in _classifiers(state, own)):
        restore_last = False
    left_alone: tuple[str, ...] = () if restore_last else _CLASSIFIERS
    if of_mmsegmentation:
        left_alone += ("dsn.",)
    if as_start and _layers_of_head(state) != _layers_of_head(own):
        left_alone += ("head.",)
    if backbone_only:
        left_alone = _HEADS
    if any(key.startswith(_CCL) for key in state) != any(key.startswith(_CCL) for key in own):
        left_alone += (_CCL,)
    ignored = (*left_alone, "fc.") if backbone_only else left_alone
    state = {key: tensor for key, tensor in state.items() if not key.startswith(ignored)}
    expected = {key: tensor for key, tensor in own.items() if not key.startswith(left_alone)}
    problems = _problems(state, expected)
    if not problems:
        state = absorb_negative_weights(model, state)
        problems = _negative(state)
    if problems:
        kind = "an ImageNet backbone" if backbone_only else "a whole network"
        raise StateDictError(
            f"{source}: read as {kind}, it does not fit this network (--backbone, --stem, --classes):\n"
            + "\n".join(problems)
            + _hint_of_classes(state, expected)
        )
    model.load_state_dict(state, strict=False)
    return [] if backbone_only else sorted(own.keys() - expected.keys())


def _classifiers(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    return [key for key in state if key.startswith(_CLASSIFIERS) and key in own]


def _layers_of_head(state: dict[str, Tensor]) -> set[str]:
    return {key.split(".")[1] for key in state if key.startswith("head.")}


def _problems(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Lines on all that keeps the state dict from being loaded where these tensors are expected."""
    found = {key: tensor for key, tensor in state.items() if not key.endswith(f".{_COUNTER}")}
    unusable = {key: reason for key in expected if key in found and (reason := _why_unusable(found[key]))}
    other_shapes = [
        f"{key}: the file has {list(found[key].shape)}, the network {list(expected[key].shape)}"
        for key in _of_other_shapes(state, expected)
        if key not in unusable
    ]
    return [
        *_listed("missing", sorted(expected.keys() - found.keys())),
        *_listed("unexpected", sorted(found.keys() - expected.keys())),
        *_listed("unusable", [f"{key}: {reason}" for key, reason in unusable.items()]),
        *_listed("of another shape", other_shapes),
    ]


def _of_other_shapes(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [key for key in expected if key in state and state[key].shape != expected[key].shape]


def _negative(state: dict[str, Tensor]) -> list[str]:
    """Lines on the norms of torch's that have negative weights."""
    counted = [key.removesuffix(_COUNTER) + "weight" for key in state if key.endswith(_COUNTER)]
    return _listed(
        "with negative numbers, as torch's batch norm may have and activated batch norm may not, and no convolution "
        "directly before it",
        [
            f"{key}: {int((state[key] < 0).sum())} of {state[key].numel()}"
            for key in counted
            if key in state and (state[key] < 0).any()
        ],
    )


def _hint_of_classes(state: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What to do if nothing but the classifying layers is of another shape."""
    keys = _of_other_shapes(state, expected)
    if not keys or not all(key.startswith(_CLASSIFIERS) for key in keys):
        return ""
    classes, wanted = (tensors[keys[0]].shape[:1] for tensors in (state, expected))
    return (
        f"\nThe file has {', '.join(map(str, classes))} classes, the network {wanted[0]}: give --classes, or train new "
        "classifying layers with --not-restore-last"
    )


def _why_unusable(tensor: Tensor) -> str | None:
    """Why the tensor cannot be a weight or statistic; None if it can."""
    if tensor.is_quantized:
        return f"expected a plain tensor, found a quantised one, {tensor.dtype}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"expected a dense tensor, found a {'nested' if tensor.is_nested else tensor.layout} one"
    if tensor.is_meta:
        return "expected numbers, found a tensor on the meta device, which has none"
    if tensor.dtype not in _DTYPES:
        return f"expected floating-point numbers, found {tensor.dtype}"
    bad = int((~tensor.isfinite()).sum())
    return f"expected finite numbers, found {bad} of {tensor.numel()} that are NaN or infinite" if bad else None


def _listed(what: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"    ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {len(lines)} {what}:", *(f"    {line}" for line in lines[:_SHOWN]), *more]
