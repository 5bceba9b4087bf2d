"""What network a state dict is of: its configuration and classes, which its tensors do not contain.

They travel with the state dict (`checkpoint.described`), and stand in network.json beside the snapshots, for people:

{"backbone": "resnet101", "backbone_activation": "identity", "recurrence": 2, "num_classes": 19, "stem": "conv3x3",
 "head": "rcca", "ccl": false, "classes": {...}}

"classes" is the class table, as its TOML file has it.
"""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dataset import ClassTable, DatasetError, parse_classes, plain_classes
from networks import STEMS, NetworkConfig
from networks.heads import HEAD_LAYERS

from .checkpoint import CheckpointError, description_of, put, written_aside

_NAMES = tuple(field.name for field in fields(NetworkConfig))
# Settings that files from before them lack, as these networks had the defaults.
_LATER = {"stem", "head", "ccl"}
# Blocks of layer3 of the backbones, and whether these are bottlenecks
_BACKBONES = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}


class SavedNetwork(NamedTuple):
    """What is known of the network of a state dict.

    Attributes:
        config: its configuration.
        classes: its class table, if that is known.
        source: where this is from, for messages: "... says".
        known: the settings of config that are known; the others are the paper's.
    """

    config: NetworkConfig
    classes: ClassTable | None
    source: str
    known: tuple[str, ...] = _NAMES

    @property
    def is_described(self) -> bool:
        """Whether a description says it, and not shapes alone, which do not say everything."""
        return self.known == _NAMES


def network_path(folder: Path) -> Path:
    return folder / "network.json"


def describe(config: NetworkConfig, classes: ClassTable | None) -> dict[str, Any]:
    """What travels with a state dict, the content of network.json."""
    return asdict(config) | {"classes": None if classes is None else plain_classes(classes)}


def save_network(config: NetworkConfig, classes: ClassTable, folder: Path) -> None:
    """Write the folder's network.json atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(describe(config, classes), indent=2) + "\n"
    path = network_path(folder)
    with written_aside(path, lambda file: file.write(text.encode())) as (temporary, _):
        put(temporary, path)


def find_network(path: Path, state: dict[str, Tensor]) -> SavedNetwork | None:
    """What network a state dict is of: as it says itself, or network.json beside it, or else its shapes.

    None if its shapes are not those of a backbone of this project.

    Raises:
        CheckpointError: the description or network.json is not as this module says.
    """
    description = description_of(state)
    if description is not None:
        return _parse(description, str(path))
    return read_network(path.parent) or _from_shapes(path, state)


def read_network(folder: Path) -> SavedNetwork | None:
    """Read the folder's network.json; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or a key is missing, unknown or has an invalid value.
    """
    path = network_path(folder)
    try:
        content: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a description of a network, cannot read it: {error}") from error
    return _parse(content, str(path))


def _parse(content: Any, source: str) -> SavedNetwork:
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: expected an object with the keys {', '.join(_NAMES)}, found {content!r}")
    settings = {name: value for name, value in content.items() if name != "classes"}
    missing, unknown = set(_NAMES) - settings.keys() - _LATER, settings.keys() - set(_NAMES)
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            raise CheckpointError(
                f"{source}: expected the keys {', '.join(_NAMES)}; {what}: {', '.join(sorted(map(str, names)))}"
            )
    classes = content.get("classes")
    try:
        config = NetworkConfig(**settings)
        table = None if classes is None else parse_classes(classes, f"{source}: classes")
    except DatasetError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if table is not None and len(table) != config.num_classes:
        raise CheckpointError(f"{source}: expected num_classes {config.num_classes} classes, found {len(table)}")
    return SavedNetwork(config, table, f"{source} says")


def _from_shapes(path: Path, state: dict[str, Tensor]) -> SavedNetwork | None:
    """What the names and shapes of a state dict say, under the names of any project that it can be loaded from."""
    blocks = [int(match[1]) for key in state if (match := re.search(r"(?:^|\.)layer3\.(\d+)\.", key))]
    is_bottleneck = any("layer3.0.conv3." in key for key in state)
    backbone = _BACKBONES.get((max(blocks, default=-1) + 1, is_bottleneck))
    first = [x for key, x in state.items() if re.search(r"(^|\.)(?<!\d\.)(conv1|conv1\.0|stem\.0)\.weight$", key)]
    if backbone is None or not first or first[0].ndim != 4:
        return None
    narrow = len(first[0]) == STEMS["conv3x3_narrow"][0]
    stem = "conv7x7" if first[0].shape[3] == 7 else "conv3x3_narrow" if narrow else "conv3x3"
    settings: dict[str, Any] = {"backbone": backbone, "stem": stem}
    head = next((name for name, layer in HEAD_LAYERS.items() if any(f"head.{layer}." in key for key in state)), None)
    if head is not None:
        settings |= {"head": head, "ccl": any(re.search(r"(^|\.)ccl\.weight$", key) for key in state)}
    biases = [tensor for key, tensor in state.items() if key.endswith(("dsn.3.bias", "decode_head.conv_seg.bias"))]
    if biases:
        settings["num_classes"] = len(biases[0])
    return SavedNetwork(NetworkConfig(**settings), None, f"the shapes in {path} say", tuple(settings))
