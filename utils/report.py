"""What an evaluation measured: result.json, report.md and the table that is printed."""

import argparse
import json
import math
from pathlib import Path

from .commandline import CommandError, plain_flags
from .metrics import ConfusionMatrix


def measures(confusion: ConfusionMatrix, names: list[str]) -> dict:
    """The entries of result.json for a confusion matrix; the IoU of an absent class is null."""
    ious = [None if math.isnan(iou) else iou for iou in confusion.iou().tolist()]
    return {
        "meanIU": confusion.mean_iou(),
        "IU_array": ious,
        "classes": dict(zip(names, ious, strict=True)),
        "pixel_accuracy": confusion.pixel_accuracy(),
    }


def read_others(paths: list[Path], names: list[str]) -> dict[str, dict]:
    """What the evaluations of --compare-with measured, by the names of their checkpoints' folders.

    Raises:
        CommandError: one is no result.json, of other classes, or of a folder of the same name as another.
    """
    others: dict[str, dict] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text())
            name, classes = Path(result["flags"]["restore_from"]).resolve().parent.name, list(result["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--compare-with {path}: expected an evaluation's result.json: {error!r}") from error
        if classes != names:
            raise CommandError(
                f"--compare-with {path}: expected the {len(names)} classes measured here, found {classes}"
            )
        if name in others:
            raise CommandError(f"--compare-with {path}: two evaluations of checkpoints in folders named {name}")
        others[name] = result
    return others


def percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"


def iou_table(results: dict[str, dict]) -> str:
    """A Markdown table of IoUs, their mean and the pixel accuracy, in percent, with a column for each result."""
    columns = [
        [*result["classes"].items(), ("**mean IoU**", result["meanIU"]), ("pixel accuracy", result["pixel_accuracy"])]
        for result in results.values()
    ]
    lines = [f"| class | {' | '.join(results)} |", "|:--" + "|--:" * len(results) + "|"]
    for row in zip(*columns, strict=True):
        lines.append(f"| {row[0][0]} | {' | '.join(percent(value) for _, value in row)} |")
    return "\n".join(lines)


def save_report(
    args: argparse.Namespace,
    confusion: ConfusionMatrix,
    compared: dict[int, ConfusionMatrix],
    others: dict[str, dict],
    gamma: float | None,
    num_images: int,
    output_dir: Path,
) -> str:
    """Write result.json and report.md; returns the table of IoUs.

    Args:
        compared: results of the same weights with other numbers of passes.
        others: results of other evaluations, from `read_others`.
        gamma: gamma of the attention; None if the head has none.
        num_images: number of images with a label.
    """
    names = args.classes.names
    flags = plain_flags(args)
    result = measures(confusion, names) | {
        "recurrence": {str(r): measures(passes, names) for r, passes in compared.items()},
        "gamma": gamma,
        "images": num_images,
        "flags": flags,
    }
    (output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    passes = {f"R={r}": result["recurrence"][str(r)] for r in compared}
    table = iou_table({"IoU, %": result, **passes, **others})
    settings = "\n".join(f"- {name}: {value}" for name, value in flags.items())
    facts = f"{num_images} images" + ("" if gamma is None else f", gamma {gamma:.4g}")
    (output_dir / "report.md").write_text(f"# {args.restore_from}\n\n{facts}\n\n{table}\n\n{settings}\n")
    return table
