"""Look at a data set before training on it.

    python -m dataset DATA [--classes NAME|FILE]

prints how many images each split has, their sizes, the share of pixels of each class, and everything that is wrong:
files that are missing or cannot be read, labels of another size than their image, values that the class table does not
have. It writes a contact sheet, and ends with status 1 if something is wrong. Without a class table it prints one to
begin with.
"""

import os
import sys
from pathlib import Path

from utils.arguments import MOST_PROCESSES, ArgumentParser, loaded_by, number

from .classes import ENCODINGS, ClassTable, load_classes
from .contact_sheet import contact_sheet
from .items import DatasetError, Item
from .layouts import SPLITS, default_classes, find_layout
from .samples import Value
from .survey import Survey, survey

_PARTS = [split for split, parts in SPLITS.items() if parts == (split,)]


def get_parser() -> ArgumentParser:
    parser = ArgumentParser("Look at a data set before training on it.")
    add = parser.add_argument
    add("data_dir", type=Path, metavar="DATA", help="folder of the data set")
    add(
        "--classes",
        type=loaded_by(load_classes, DatasetError),
        metavar="NAME|FILE",
        help="class table; by default that of the folder",
    )
    add("--label-encoding", choices=ENCODINGS, help="values in the label images, as in train.py")
    add("--contact-sheet", type=Path, help="picture to write; by default <name of DATA>_contact_sheet.jpg here")
    add("--num-workers", type=number(int, 1, MOST_PROCESSES), default=os.cpu_count() or 1, help="processes")
    return parser


def size_line(found: Survey) -> str:
    """The sizes of the images, the most frequent first."""
    sizes = [f"{height}x{width} ({count})" for (height, width), count in found.sizes.most_common(3)]
    return ", ".join(sizes) + (f" and {len(found.sizes) - 3} more" if len(found.sizes) > 3 else "")


def share_table(surveys: dict[str, Survey], classes: ClassTable) -> str:
    """The share of pixels of each class and of void, in percent, with a column for each split."""
    columns = [found.shares(classes) for found in surveys.values()]
    width = max(len(name) for name in [*classes.names, "void"]) + 2
    lines = [f"{'pixels, %':{width}}" + "".join(f"{split:>12}" for split in surveys)]
    rows = [(name, [shares[k] for shares, _, _ in columns]) for k, name in enumerate(classes.names)]
    for name, shares in [*rows, ("void", [void for _, void, _ in columns])]:
        lines.append(f"{name:{width}}" + "".join(f"{100 * share:12.3f}" for share in shares))
    return "\n".join(lines)


def problems(surveys: dict[str, Survey], classes: ClassTable | None) -> list[str]:
    """A line for each thing that is wrong."""
    lines = [problem for found in surveys.values() for problem in found.problems]
    for split, found in surveys.items():
        if classes is None:
            continue
        for value, path in sorted(found.shares(classes)[2].items(), key=str):
            lines.append(f"{path}: the value {value} of {split} is not in the class table {classes.name}")
    return lines


def template(name: str, values: list[Value]) -> str:
    """A class table to begin with: a class for each value or colour."""
    means = [f"label_colours = [{list(v)}]" if isinstance(v, tuple) else f"values = [{v}]" for v in values]
    entries = "".join(f'    {{name = "class {index}", {text}}},\n' for index, text in enumerate(means))
    return f'name = "{name}"\nclasses = [\n{entries}]\nvoid = {{values = []}}\n'


def _sorting_key(value: Value) -> tuple:
    return (isinstance(value, tuple), value)


def look(root: Path, classes: ClassTable | None, encoding: str | None, sheet: Path | None, num_workers: int) -> int:
    """Print what the data set holds and write the contact sheet; returns the exit status."""
    layout = find_layout(root)
    classes = classes or default_classes(root)
    items: dict[str, list[Item]] = {part: layout.find(root, part, encoding) for part in _PARTS}
    items = {part: found for part, found in items.items() if found}
    if not items:
        raise DatasetError(f"{root}: no images in the layout of {layout.name}: {layout.expected}")
    print(f"{root}: layout of {layout.name}; classes: {f'{classes.name}, {len(classes)}' if classes else 'no table'}\n")
    surveys = {part: survey(found, classes, num_workers) for part, found in items.items()}
    for part, found in surveys.items():
        print(f"{part:12} {found.images} images, {found.labels} with labels; {size_line(found)}")
    labelled = {part: found for part, found in surveys.items() if found.labels}
    if classes is not None and labelled:
        print(f"\n{share_table(labelled, classes)}")
        path = sheet or Path(f"{root.resolve().name}_contact_sheet.jpg")
        contact_sheet([item for found in items.values() for item in found if item.label], classes).save(path)
        print(f"\ncontact sheet: {path}")
    if classes is None and labelled:
        values = sorted({value for found in labelled.values() for _, value in found.pixels}, key=_sorting_key)
        print(f"\nThe label images hold {len(values)} values. A class table to begin with, for {root}/classes.toml:\n")
        print(template(root.resolve().name, values[:65535]))
    lines = problems(surveys, classes)
    if lines:
        print("\n".join(["", f"{len(lines)} problems:", *lines]))
    elif classes is not None:
        print("\nnothing is wrong")
    return 1 if lines or classes is None else 0


def main() -> None:
    args = get_parser().parse_args()
    try:
        sys.exit(look(args.data_dir, args.classes, args.label_encoding, args.contact_sheet, args.num_workers))
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
