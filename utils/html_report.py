"""The report that people look at: one HTML file with everything in it, of an evaluation."""

import argparse
import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from dataset import ClassTable, ImageFile, Item, output_names
from dataset.samples import read_train_ids
from networks import CCNet

from .metrics import ConfusionMatrix
from .report import percent
from .training_log import read_scalars
from .visualisation import attention_of_file, error_panel

# Images that are shown of the worst and of the best, and how wide.
_SHOWN = 3
_WIDTH = 1600

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; padding: 0 1em }
h2 { margin-top: 2em } table { border-collapse: collapse }
td, th { padding: 2px 8px; text-align: right; white-space: nowrap } th:first-child, td:first-child { text-align: left }
.matrix td, .matrix th { font-size: 11px; padding: 2px 4px }
.matrix td:first-child { font-size: 12px }
.matrix th { writing-mode: vertical-rl; vertical-align: bottom }
.swatch { display: inline-block; width: 1em; height: 1em; vertical-align: -2px; border: 1px solid #999 }
.bar { background: #1f5fa8; height: 10px; display: inline-block }
img { width: 100%; image-rendering: pixelated } figure { margin: 1em 0 } figcaption { color: #555 }
"""


class Panel(NamedTuple):
    """A picture, uint8 [H, W, 3] RGB, and what it shows."""

    caption: str
    picture: np.ndarray


def html_report(
    title: str,
    facts: Sequence[str],
    classes: ClassTable,
    confusion: ConfusionMatrix,
    sections: dict[str, Sequence[Panel]],
    curve: Sequence[tuple[int, float]],
) -> str:
    """The page.

    Args:
        facts: lines below the title.
        sections: pictures, by the heading above them; those without pictures are left out.
        curve: (step, loss) of the training; empty if it is not known.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<div>{html.escape(fact)}</div>" for fact in facts),
        _iou_table(classes, confusion),
        *_confusion_table(classes, confusion),
        *_pictures(sections),
        *_training_curve(curve),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def save_html_report(
    args: argparse.Namespace,
    model: CCNet,
    items: list[Item],
    confusion: ConfusionMatrix,
    facts: list[str],
    folder: Path,
) -> Path:
    """Write report.html of an evaluation whose predictions are in the folder; returns its path.

    Its curve is of the log beside the weights. Attention is shown for the worst image.
    """
    names = output_names(items)
    scores = _scores(args, [item for item in items if item.label is not None], names, folder)
    ranked = sorted(scores, key=lambda item: scores[item])
    panels = [_panel(args, item, scores[item], names[item], folder) for item in ranked[:_SHOWN]]
    best = [_panel(args, item, scores[item], names[item], folder) for item in ranked[: _SHOWN - 1 : -1][:_SHOWN]]
    sections: dict[str, Sequence[Panel]] = {
        "Worst images: image, truth, prediction, errors": panels,
        "Best images": best,
    }
    if args.recurrence and ranked:
        sections["Where pixels attend to"] = [_attention(args, model, ranked[0])]
    curve = read_scalars(args.restore_from.parent, "loss/total")
    path = folder / "report.html"
    path.write_text(html_report(str(args.restore_from), facts, args.classes, confusion, sections, curve), "utf-8")
    return path


def _scores(args: argparse.Namespace, items: list[Item], names: dict[Item, str], folder: Path) -> dict[Item, float]:
    """The mean IoU of each image that has a pixel of a class."""
    scores = {}
    for item in items:
        confusion = ConfusionMatrix(len(args.classes))
        label, prediction = _label(args, item), _prediction(names[item], folder)
        confusion.update(torch.from_numpy(label.astype(np.int64)), torch.from_numpy(prediction.astype(np.int64)))
        scores[item] = confusion.mean_iou()
    return {item: score for item, score in scores.items() if not math.isnan(score)}


def _label(args: argparse.Namespace, item: Item) -> np.ndarray:
    return read_train_ids(item, args.classes, args.ignore_label)


def _prediction(name: str, folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "predictions" / f"{name}.png"))


def _panel(args: argparse.Namespace, item: Item, score: float, name: str, folder: Path) -> Panel:
    image = ImageFile(item.image).read_colour()
    picture = error_panel(image, _label(args, item), _prediction(name, folder), args.classes)
    return Panel(f"{name}: mean IoU {percent(score)}", _at_most_wide(picture))


def _attention(args: argparse.Namespace, model: CCNet, item: Item) -> Panel:
    """Of the pixels of --attention, or of two, in the middle and left of it."""
    height, width = ImageFile(item.image).size
    places = args.attention or [(height // 2, width // 2), (height // 2, width // 4)]
    figure = attention_of_file(model, item.image, places, args.classes)
    return Panel(f"{item.name}: a green cross is the pixel, red is where it attends to", np.asarray(figure))


def _at_most_wide(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if width <= _WIDTH:
        return picture
    return cv2.resize(picture, (_WIDTH, round(height * _WIDTH / width)), interpolation=cv2.INTER_AREA)


def _swatch(classes: ClassTable, index: int) -> str:
    colour = ",".join(map(str, classes.palette[index].tolist()))
    return f'<span class="swatch" style="background: rgb({colour})"></span>'


def _iou_table(classes: ClassTable, confusion: ConfusionMatrix) -> str:
    rows = []
    for index, (name, iou) in enumerate(zip(classes.names, confusion.iou().tolist(), strict=True)):
        text, width = ("absent", 0) if iou != iou else (percent(iou), round(300 * iou))
        bar = f'<span class="bar" style="width: {width}px"></span>'
        rows.append(
            f"<tr><td>{_swatch(classes, index)} {html.escape(name)}</td><td>{text}</td>"
            f'<td style="text-align: left">{bar}</td></tr>'
        )
    means = (("mean IoU", confusion.mean_iou()), ("pixel accuracy", confusion.pixel_accuracy()))
    rows += [f"<tr><th>{name}</th><th>{percent(value)}</th><td></td></tr>" for name, value in means]
    return f'<h2>IoU, %</h2><table id="iou">{"".join(rows)}</table>'


def _confusion_table(classes: ClassTable, confusion: ConfusionMatrix) -> Iterable[str]:
    """Of the classes that occur, what share of each row's pixels is predicted as each column."""
    counts = confusion.counts.cpu().numpy()
    present = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    header = "".join(f"<th>{html.escape(classes.names[k])}</th>" for k in present)
    yield "<h2>Confusion matrix</h2><p>What the pixels of each class are predicted as, in percent of them.</p>"
    yield f'<table class="matrix" id="confusion"><tr><td></td>{header}</tr>'
    for row in present:
        shares = counts[row, present] / max(counts[row].sum(), 1)
        cells = "".join(
            f'<td style="background: rgba({"31,95,168" if column == row else "192,57,43"},{share:.2f})">'
            f"{f'{100 * share:.1f}' if share >= 0.0005 else ''}</td>"
            for column, share in zip(present, shares, strict=True)
        )
        yield f"<tr><td>{_swatch(classes, row)} {html.escape(classes.names[row])}</td>{cells}</tr>"
    yield "</table>"


def _pictures(sections: dict[str, Sequence[Panel]]) -> Iterable[str]:
    for heading, panels in sections.items():
        if panels:
            yield f"<h2>{html.escape(heading)}</h2>"
        for panel in panels:
            file = io.BytesIO()
            Image.fromarray(panel.picture).save(file, "JPEG", quality=88)
            data = base64.b64encode(file.getvalue()).decode()
            caption = html.escape(panel.caption)
            yield f'<figure><img src="data:image/jpeg;base64,{data}" alt="{caption}">'
            yield f"<figcaption>{caption}</figcaption></figure>"


def _training_curve(curve: Sequence[tuple[int, float]]) -> Iterable[str]:
    """The loss by the step, as a line in a picture of 800x240."""
    if len(curve) < 2:
        return
    steps, losses = np.array(curve).T
    x = 60 + 720 * (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    y = 210 - 190 * (losses - losses.min()) / max(losses.max() - losses.min(), 1e-12)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    labels = [
        (55, 214, "end", f"{losses.min():.3g}"),
        (55, 25, "end", f"{losses.max():.3g}"),
        (60, 232, "middle", f"step {steps[0]:.0f}"),
        (780, 232, "end", f"{steps[-1]:.0f}"),
    ]
    texts = "".join(f'<text x="{a}" y="{b}" text-anchor="{anchor}">{text}</text>' for a, b, anchor, text in labels)
    yield '<h2>Training loss</h2><svg id="curve" viewBox="0 0 800 240" width="800" font-size="12">'
    yield f'<path d="M60 15V210H785" fill="none" stroke="#999"/>{texts}'
    yield f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/></svg>'
