"""network.json beside the snapshots: the configuration of their network, which a state dict does not contain.

{"backbone": "resnet101", "backbone_activation": "identity", "recurrence": 2, "num_classes": 19}
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from networks import NetworkConfig

from .checkpoint import CheckpointError, put, written_aside

_NAMES = [field.name for field in fields(NetworkConfig)]


def network_path(folder: Path) -> Path:
    return folder / "network.json"


def save_network(config: NetworkConfig, folder: Path) -> None:
    """Write the folder's network.json atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(asdict(config), indent=2) + "\n"
    path = network_path(folder)
    with written_aside(path, lambda file: file.write(text.encode())) as (temporary, _):
        put(temporary, path)


def read_network(folder: Path) -> NetworkConfig | None:
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
    for what, names in (("missing", set(_NAMES) - content.keys()), ("unknown", content.keys() - set(_NAMES))):
        if names:
            raise CheckpointError(f"{path}: expected the keys {', '.join(_NAMES)}; {what}: {', '.join(sorted(names))}")
    try:
        return NetworkConfig(**content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
