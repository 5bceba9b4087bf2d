"""State dicts of the original's generations, brought to this network's names and loaded without silent gaps."""

from torch import Tensor, nn

_HEADS = ("head.", "dsn.")
_CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")
_RENAMED = {"head.conv1a.": "head.conva.", "head.conv1b.": "head.convb."}
_SHOWN = 12


class StateDictError(ValueError):
    """A state dict does not fit the network; the message lists the keys."""


def _rename(key: str) -> str:
    """This network's name for a key of any generation: the models of December 2018 say conv1a/conv1b."""
    key = key.removeprefix("module.")
    for old, new in _RENAMED.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _is_backbone_only(state: dict[str, Tensor]) -> bool:
    """Whether the state dict is an ImageNet classifier's: the backbone, and no segmentation head."""
    return not any(_rename(key).startswith(_HEADS) for key in state)


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    restore_last: bool = True,
    allow_backbone: bool = False,
) -> None:
    """Load a state dict of any of the original's generations, in place.

    `module.` prefixes are removed and old names renamed. Nothing may be missing or left over, except what that kind
    of file is known to lack or to have besides: num_batches_tracked (nn.BatchNorm2d's counter, which activated batch
    norm does not use) in any file; fc.* too many and head.*, dsn.* missing in an ImageNet backbone.

    Args:
        state: names to tensors.
        source: what the messages call it, its path.
        restore_last: whether to load the two last, classifying layers; if not, they may also have other shapes.
        allow_backbone: whether an ImageNet backbone will do, which leaves the heads as they are.

    Raises:
        StateDictError: keys are missing or unexpected, or shapes differ. The model is unchanged then.
    """
    backbone_only = allow_backbone and _is_backbone_only(state)
    found = {_rename(key): tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    expected = model.state_dict()
    if backbone_only:
        found = {key: tensor for key, tensor in found.items() if not key.startswith("fc.")}
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith(_HEADS)}
    if not restore_last:
        found = {key: tensor for key, tensor in found.items() if not key.startswith(_CLASSIFIERS)}
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith(_CLASSIFIERS)}

    problems = [
        *_listed("missing", sorted(expected.keys() - found.keys())),
        *_listed("unexpected", sorted(found.keys() - expected.keys())),
        *_listed(
            "of another shape",
            [
                f"{key}: the file has {list(found[key].shape)}, the network {list(tensor.shape)}"
                for key, tensor in expected.items()
                if key in found and found[key].shape != tensor.shape
            ],
        ),
    ]
    if problems:
        kind = "an ImageNet backbone" if backbone_only else "a whole network"
        raise StateDictError(
            f"{source}: read as {kind}, it does not fit this network (--backbone, --num-classes):\n"
            + "\n".join(problems)
        )
    model.load_state_dict(found, strict=False)


def _listed(what: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"    ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {len(lines)} {what}:", *(f"    {line}" for line in lines[:_SHOWN]), *more]
