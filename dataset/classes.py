"""Class tables: which classes a data set has, and which values or colours of its label images mean them.

A table is a TOML file; those that come with the project are in tables/.

    name = "road users"
    classes = [
        {name = "road", values = [0]},
        {name = "person", values = [1, 7], colour = [220, 20, 60], label_colours = [[255, 0, 0]]},
    ]
    void = {values = [255], label_colours = [[0, 0, 0]]}

A class's place in the list is its training id. `colour` is how it is shown; `label_colours` are read from label images
with colours, if there are such. `training_ids = true` says that label files with training ids in place of these values
are about.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .items import DatasetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Value of void pixels in the training labels of up to 255 classes.
IGNORE_LABEL = 255
# The most classes: their training ids take 16 bits, and one of these is void's.
MOST_CLASSES = 65535
# Largest value of a label image, as -1 is stored in 8 and in 16 bits.
_MINUS_ONE = (255, 65535)
ENCODINGS = ("ids", "trainids")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelClass:
    """A class that is learnt.

    Attributes:
        name: as reports show it.
        values: its values in label images of one channel, 0..65535, or -1.
        colour: RGB, 0..255, in which it is shown.
        label_colours: its colours in label images of three channels.
    """

    name: str
    values: tuple[int, ...] = ()
    colour: Colour = (0, 0, 0)
    label_colours: tuple[Colour, ...] = ()


@dataclass(frozen=True)
class Void:
    """What label images hold where there is nothing to learn: values and colours."""

    values: tuple[int, ...] = ()
    label_colours: tuple[Colour, ...] = ()


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set, in the order of their training ids.

    Attributes:
        name: in messages.
        classes: what is learnt.
        void: what is not.
        training_ids: whether label images may hold training ids instead, with 255 as void.
        source: where the table is from, in messages.
    """

    name: str
    classes: tuple[LabelClass, ...]
    void: Void = Void()
    training_ids: bool = False
    source: str = field(default="", compare=False)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    @property
    def dtype(self) -> type:
        """Of training ids: uint8, or uint16 for more than 255 classes."""
        return np.uint8 if len(self) <= IGNORE_LABEL else np.uint16

    @property
    def ignore_label(self) -> int:
        """Training id of void: the largest of `dtype`."""
        return int(np.iinfo(self.dtype).max)

    @cached_property
    def palette(self) -> np.ndarray:
        """uint8 [256 or 65536, 3]: RGB colour of each training id; other values are black."""
        palette = np.zeros((self.ignore_label + 1, 3), dtype=np.uint8)
        palette[: len(self)] = [entry.colour for entry in self.classes]
        return palette

    @cached_property
    def label_values(self) -> np.ndarray:
        """[256 or 65536]: the first label value of each training id, to submit; other values become 0."""
        first = [entry.values[0] if entry.values else index for index, entry in enumerate(self.classes)]
        values = np.zeros(self.ignore_label + 1, dtype=np.uint8 if max(first) < 256 else np.uint16)
        values[: len(self)] = first
        return values

    @property
    def has_label_colours(self) -> bool:
        """Whether label images of three channels hold colours."""
        return bool(self.void.label_colours) or any(entry.label_colours for entry in self.classes)

    def describe(self, encoding: str) -> str:
        """The values of label images, for messages."""
        if encoding == "trainids":
            return f"training ids 0..{len(self) - 1} and {self.ignore_label} (void)"
        values = sorted({*self.void.values, *(value for entry in self.classes for value in entry.values)})
        text = _ranges(value for value in values if value >= 0) or "none"
        return f"label ids {text}{' and -1 (255)' * (-1 in values)} of {self.name}"

    def known(self, encoding: str = "ids") -> np.ndarray:
        """bool [65536]: the values that label images may hold; of -1 they are 255 and 65535."""
        return self._values(encoding)[0]

    def train_ids(self, label: np.ndarray, encoding: str = "ids", ignore_label: int | None = None) -> np.ndarray:
        """The training ids [H, W] of a label image, `dtype`, with `ignore_label` for void.

        Args:
            label: [H, W] values, or uint8 [H, W, 3] colours.
            encoding: of values: "ids", those of the table, or "trainids".
            ignore_label: by default the table's.

        Raises:
            ValueError: the table does not have a value or colour; the message says which.
        """
        void = self.ignore_label if ignore_label is None else ignore_label
        if label.ndim == 3:
            return self._ids_of_colours(label, void)
        known, ids = self._values(encoding)
        values = label if label.dtype == np.uint8 else np.where(label == -1, 65535, label)
        in_range = values.dtype == np.uint8 or bool((values >= 0).all() and (values <= 65535).all())
        found = known[values] if in_range else np.isin(values, np.flatnonzero(known))
        if not found.all():
            raise ValueError(f"expected {self.describe(encoding)}, found {label[~found][0]}")
        return ids[values] if void == self.ignore_label else np.where(ids == self.ignore_label, void, ids)[values]

    @cache  # noqa: B019 - there are few tables, and they live as long as the program
    def _values(self, encoding: str) -> tuple[np.ndarray, np.ndarray]:
        """bool [65536]: which values there are; `dtype` [65536]: their training ids."""
        known = np.zeros(65536, dtype=bool)
        ids: np.ndarray = np.full(65536, self.ignore_label, dtype=self.dtype)
        if encoding == "trainids":
            entries = {index: [index] for index in range(len(self))} | {self.ignore_label: [-1, self.ignore_label]}
        else:
            entries = {index: list(entry.values) for index, entry in enumerate(self.classes)}
            entries |= {self.ignore_label: list(self.void.values)}
        for index, values in entries.items():
            for value in values:
                places = list(_MINUS_ONE) if value == -1 else value
                known[places], ids[places] = True, index
        return known, ids

    def _ids_of_colours(self, label: np.ndarray, void: int) -> np.ndarray:
        codes, ids = self._colours
        pixels = colour_codes(label)
        places = np.minimum(np.searchsorted(codes, pixels), len(codes) - 1)
        unknown = codes[places] != pixels
        if unknown.any():
            colour = tuple(label[unknown][0].tolist())
            raise ValueError(f"expected the {len(codes)} label colours of {self.name}, found {colour}")
        return np.where(ids == self.ignore_label, void, ids).astype(self.dtype)[places]

    @cached_property
    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """The label colours as sorted numbers, and their training ids."""
        entries = [(colour, i) for i, entry in enumerate(self.classes) for colour in entry.label_colours]
        entries += [(colour, self.ignore_label) for colour in self.void.label_colours]
        pairs = sorted((int(colour_codes(np.array(colour))), index) for colour, index in entries)
        codes, ids = zip(*pairs, strict=True)
        return np.array(codes), np.array(ids)


def colour_codes(colours: np.ndarray) -> np.ndarray:
    """RGB colours [..., 3] as numbers."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (red << 16) + (green << 8) + blue


def _ranges(values: Iterable[int]) -> str:
    """Sorted numbers as text: 0..10, 255."""
    parts = []
    for _, group in groupby(enumerate(values), lambda pair: pair[1] - pair[0]):
        members = [value for _, value in group]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}..{members[-1]}")
    return ", ".join(parts)


# ---- files ----

_TABLES = Path(__file__).parent / "tables"
BUILT_IN = tuple(sorted(path.stem for path in _TABLES.glob("*.toml")))


def load_classes(name: str | Path) -> ClassTable:
    """A class table: one that is built in, by its name, or that of a TOML file.

    Raises:
        DatasetError: there is no such table or file, or it is not as this module says.
    """
    path = _TABLES / f"{name}.toml" if name in BUILT_IN else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise DatasetError(f"{name}: expected a class table: {', '.join(BUILT_IN)} or a .toml file that exists")
    return parse_classes(read_toml(path, "a class table"), str(path))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        DatasetError: it cannot be read; the message says that `what` was expected.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: expected {what}, a TOML file, cannot read it: {error}") from error


def parse_classes(content: Any, source: str) -> ClassTable:
    """The class table of what a TOML file, or `plain_classes`, holds.

    Raises:
        DatasetError: it is no class table; the message names `source` and the entry.
    """
    try:
        kinds = {"name": _text, "classes": _classes, "void": _void, "training_ids": _flag}
        table = ClassTable(**_entry(content, "the table", ("name", "classes"), kinds), source=source)
        _check_apart(table)
    except ValueError as error:
        raise DatasetError(f"{source}: {error}") from None
    return table


def plain_classes(table: ClassTable) -> dict:
    """The table as dictionaries, lists, text and numbers."""
    return {name: value for name, value in asdict(table).items() if name != "source"}


def _entry(content: Any, where: str, needed: tuple[str, ...], kinds: Mapping[str, Callable[[Any, str], Any]]) -> dict:
    """The values of a TOML table, each checked by the function of its name."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected {', '.join(kinds)}, got {content!r}")
    for what, names in (("missing", set(needed) - content.keys()), ("unknown", content.keys() - kinds)):
        if names:
            raise ValueError(f"{where}: expected {', '.join(kinds)}; {what}: {', '.join(sorted(names))}")
    return {name: kinds[name](value, f"{where}: {name}") for name, value in content.items()}


def _classes(content: Any, where: str) -> tuple[LabelClass, ...]:
    if not isinstance(content, list | tuple) or not 1 <= len(content) <= MOST_CLASSES:
        raise ValueError(f"{where}: expected a list of 1 to {MOST_CLASSES} classes, got {content!r}")
    kinds = {"name": _text, "values": _label_values, "colour": _colour, "label_colours": _label_colours}
    entries = []
    for index, entry in enumerate(content):
        found = _entry(entry, f"{where}[{index}]", ("name",), kinds)
        colours = found.get("label_colours")
        found.setdefault("colour", colours[0] if colours else _nth_colour(index + 1))
        if not found.get("values") and not colours:
            found["values"] = (index,)
        entries.append(LabelClass(**found))
    return tuple(entries)


def _void(content: Any, where: str) -> Void:
    return Void(**_entry(content, where, (), {"values": _label_values, "label_colours": _label_colours}))


def _text(content: Any, where: str) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: expected text, got {content!r}")
    return content


def _flag(content: Any, where: str) -> bool:
    if not isinstance(content, bool):
        raise ValueError(f"{where}: expected true or false, got {content!r}")
    return content


def _label_values(content: Any, where: str) -> tuple[int, ...]:
    values = content if isinstance(content, list | tuple) else [content]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value <= 65535:
            raise ValueError(f"{where}: expected whole numbers from -1 to 65535, got {value!r}")
    return tuple(values)


def _label_colours(content: Any, where: str) -> tuple[Colour, ...]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: expected a list of colours, [[red, green, blue], ...], got {content!r}")
    return tuple(_colour(colour, where) for colour in content)


def _colour(content: Any, where: str) -> Colour:
    is_list = isinstance(content, list | tuple) and len(content) == 3
    if not is_list or not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= 255 for x in content):
        raise ValueError(f"{where}: expected [red, green, blue], each 0..255, got {content!r}")
    return (content[0], content[1], content[2])


def _nth_colour(index: int) -> Colour:
    """PASCAL VOC's colour of a class: its bits, from the lowest, are dealt out to red, green and blue."""
    colour = [0, 0, 0]
    for bit in range(24):
        colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return (colour[0], colour[1], colour[2])


def _check_apart(table: ClassTable) -> None:
    """Raise a ValueError if two classes have the same name, or two entries a label value or label colour."""
    entries: list[tuple[str, LabelClass | Void]] = [(entry.name, entry) for entry in table.classes]
    owners: dict[object, str] = {}
    for name, entry in [*entries, ("void", table.void)]:
        if isinstance(entry, LabelClass) and table.names.count(name) > 1:
            raise ValueError(f"expected classes of different names, found {name} twice")
        for item in {255 if value == -1 else value for value in entry.values} | set(entry.label_colours):
            if owners.setdefault(item, name) != name:
                raise ValueError(
                    f"expected each label value and colour once, found {item} of {owners[item]} and {name}"
                )


CITYSCAPES = load_classes("cityscapes")
