"""network.json beside the snapshots: the configuration of their network, which a state dict does not contain.

{"backbone": "resnet101", "backbone_activation": "identity", "recurrence": 2, "num_classes": 19, "classes": {...}}

"classes" is the class table, as its TOML file has it. Files from before class tables lack it.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from dataset import ClassTable, DatasetError, parse_classes, plain_classes
from networks import NetworkConfig

from .checkpoint import CheckpointError, put, written_aside

_NAMES = [field.name for field in fields(NetworkConfig)]


class SavedNetwork(NamedTuple):
    """What network.json says."""

    config: NetworkConfig
    classes: ClassTable | None


def network_path(folder: Path) -> Path:
    return folder / "network.json"


def save_network(config: NetworkConfig, classes: ClassTable, folder: Path) -> None:
    """Write the folder's network.json atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(asdict(config) | {"classes": plain_classes(classes)}, indent=2) + "\n"
    path = network_path(folder)
    with written_aside(path, lambda file: file.write(text.encode())) as (temporary, _):
        put(temporary, path)


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
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object with the keys {', '.join(_NAMES)}, found {content!r}")
    classes = content.pop("classes", None)
    for what, names in (("missing", set(_NAMES) - content.keys()), ("unknown", content.keys() - set(_NAMES))):
        if names:
            raise CheckpointError(f"{path}: expected the keys {', '.join(_NAMES)}; {what}: {', '.join(sorted(names))}")
    try:
        config = NetworkConfig(**content)
        table = None if classes is None else parse_classes(classes, f"{path}: classes")
    except DatasetError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if table is not None and len(table) != config.num_classes:
        raise CheckpointError(f"{path}: expected num_classes {config.num_classes} classes, found {len(table)}")
    return SavedNetwork(config, table)
