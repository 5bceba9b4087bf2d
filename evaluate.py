"""Evaluate CCNet: IoU of every class, coloured predictions, submissions, and pictures of the attention.

    python evaluate.py --data-dir YOUR_CS_PATH --restore-from snapshots/CS_scenes_60000.pth --recurrence 2

is the paper's single-scale evaluation by sliding window; add --whole for whole images at six scales and mirrored, and
--gpu 0,1,2,3 for four GPUs, or run it with torchrun.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, SequentialSampler
from tqdm import tqdm

from dataset import CLASS_NAMES, SPLITS, EvaluationSet, Item, check_labels, load_batches, read_list, scan
from dataset.images import ImageFile
from dataset.labels import TRAIN_ID_TO_ID
from networks import CCNet, PredictionNetwork, build_model, load_state
from utils.checkpoint import read_state_dict
from utils.commandline import (
    CommandError,
    add_shared_flags,
    check_ignore_label,
    number,
    plain_flags,
)
from utils.distributed import World
from utils.inference import Predictor, multi_scale, sliding_predictor, whole_predictor
from utils.launch import launch
from utils.metrics import ConfusionMatrix
from utils.precision import in_mixed_precision
from utils.visualisation import attention_figure, palette_image

_WHOLE_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def pixel(text: str) -> tuple[int, int]:
    """Parse "y,x"."""
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected Y,X in pixels, got {text!r}") from None
    return y, x


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate CCNet.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_shared_flags(parser)
    add = parser.add_argument
    add("--restore-from", type=Path, required=True, help="state dict to evaluate")
    add("--split", choices=SPLITS, default="val", help="images to evaluate")
    add("--batch-size", type=number(int, 1), default=1, help="images predicted at a time")
    add("--whole", action="store_true", help="whole images, not tiles of --input-size; six scales and mirrored")
    add("--scales", type=number(float, 0.1, 8), nargs="+", help="1, or with --whole 0.75 1 1.25 1.5 1.75 2")
    add("--flip", action=argparse.BooleanOptionalAction, help="also the mirror image; no, or with --whole yes")
    add("--output-dir", type=Path, help="folder of all results; outputs beside the state dict if not given")
    add("--submit", action="store_true", help="also write label ids as the benchmark's server wants them")
    add("--attention", type=pixel, action="append", metavar="Y,X", help="show where this pixel looks; may be repeated")
    add("--attention-image", metavar="NAME", help="image of --attention by its file name; the first one if not given")
    return parser


def find_items(args: argparse.Namespace) -> list[Item]:
    """The images to evaluate; no two have one name, by which their results would overwrite each other."""
    if args.data_list is not None:
        items = read_list(args.data_dir, args.data_list, args.label_encoding)
    else:
        items = scan(args.data_dir, args.split, args.label_encoding)
    (name, count), *_ = Counter(item.frame if args.submit else item.name for item in items).most_common(1)
    if count > 1:
        raise CommandError(f"{args.data_list or args.data_dir}: expected every image once, found {count} named {name}")
    return items


def find_attention_item(args: argparse.Namespace, items: list[Item]) -> Item:
    """The image of --attention, in which its pixels are."""
    if args.recurrence == 0:
        raise CommandError("--attention: expected --recurrence 1 or more, with 0 there is no attention to show")
    named = args.attention_image
    item = next((i for i in items if named in (None, i.name, i.frame, i.image.name)), None)
    if item is None:
        raise CommandError(f"--attention-image {named}: expected an image of the data set, found none of that name")
    height, width = ImageFile(item.image).size
    for y, x in args.attention:
        if not (0 <= y < height and 0 <= x < width):
            raise CommandError(f"--attention {y},{x}: expected a pixel of {item.image}, which is {height}x{width}")
    return item


def make_predictor(args: argparse.Namespace, world: World, model: CCNet) -> Predictor:
    """Prediction as --amp, --compile, --whole, --input-size, --scales and --flip ask for it."""
    prediction = PredictionNetwork(model)
    if args.compile:
        prediction.compile()
    network = in_mixed_precision(prediction, world.device, args.amp)
    predict = whole_predictor(network) if args.whole else sliding_predictor(network, args.input_size)
    scales = args.scales or (_WHOLE_SCALES if args.whole else (1.0,))
    flip = args.whole if args.flip is None else args.flip
    return multi_scale(predict, scales, flip)


def same_size_groups(samples: list[dict]) -> Iterator[list[dict]]:
    """Split a batch where the size of its images changes."""
    for _, group in groupby(samples, key=lambda sample: sample["image"].shape):
        yield list(group)


def save_prediction(prediction: np.ndarray, item: Item, output_dir: Path, submit: bool) -> None:
    """Write uint8 [H, W] training ids: coloured, and for --submit as label ids under the server's naming."""
    palette_image(prediction).save(output_dir / "predictions" / f"{item.name}.png")
    if submit:
        Image.fromarray(TRAIN_ID_TO_ID[prediction]).save(output_dir / "submit" / f"{item.frame}_pred_labelIds.png")


def predict_all(
    args: argparse.Namespace, world: World, predict: Predictor, items: list[Item], output_dir: Path
) -> ConfusionMatrix:
    """Predict and save every image, and count the classes where there is a label.

    The batches, which are those of one process, go round the processes: none is predicted twice or padded.
    """
    device = world.device
    confusion = ConfusionMatrix(args.num_classes, device)
    samples = EvaluationSet(items, args.ignore_label)
    batches = list(BatchSampler(SequentialSampler(samples), args.batch_size, drop_last=False))[world.rank :: world.size]
    num_images = sum(len(batch) for batch in batches)
    with tqdm(total=num_images, unit="image", dynamic_ncols=True, disable=not world.is_main) as bar:
        for batch in load_batches(samples, batches, args.num_workers, collate=list):
            for group in same_size_groups(batch):
                images = torch.stack([sample["image"] for sample in group]).to(device)
                predictions = predict(images.to(memory_format=torch.channels_last)).argmax(1)
                for sample, prediction in zip(group, predictions, strict=True):
                    if sample["label"] is not None:
                        confusion.update(sample["label"].to(device), prediction)
                    save_prediction(prediction.byte().cpu().numpy(), sample["item"], output_dir, args.submit)
                bar.update(len(group))
    confusion.counts = world.sum(confusion.counts)
    return confusion


def attention_picture(model: CCNet, item: Item, pixels: list[tuple[int, int]], folder: Path) -> Path:
    """Write the figure of where the pixels look."""
    image = EvaluationSet([Item(item.image, None)])[0]["image"][None].to(next(model.parameters()).device)
    path = folder / f"{item.name}.png"
    attention_figure(model, image.to(memory_format=torch.channels_last), pixels).save(path)
    return path


def iou_table(confusion: ConfusionMatrix, names: list[str]) -> str:
    """A Markdown table of every class's IoU and their mean, in percent."""
    rows = [
        (name, "absent" if math.isnan(iou) else f"{100 * iou:.2f}")
        for name, iou in zip(names, confusion.iou().tolist(), strict=True)
    ]
    rows += [
        ("**mean IoU**", f"{100 * confusion.mean_iou():.2f}"),
        ("pixel accuracy", f"{100 * confusion.pixel_accuracy():.2f}"),
    ]
    return "\n".join(["| class | IoU, % |", "|:--|--:|", *(f"| {name} | {value} |" for name, value in rows)])


def null_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def save_report(args: argparse.Namespace, confusion: ConfusionMatrix, num_images: int, output_dir: Path) -> str:
    """Write result.json and report.md; returns the table."""
    names = [*CLASS_NAMES, *(f"class {k}" for k in range(len(CLASS_NAMES), args.num_classes))]
    ious = [null_if_nan(iou) for iou in confusion.iou().tolist()]
    flags = plain_flags(args)
    result = {
        "meanIU": null_if_nan(confusion.mean_iou()),
        "IU_array": ious,
        "classes": dict(zip(names, ious, strict=True)),
        "pixel_accuracy": null_if_nan(confusion.pixel_accuracy()),
        "images": num_images,
        "flags": flags,
    }
    (output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    table = iou_table(confusion, names)
    settings = "\n".join(f"- {name}: {value}" for name, value in flags.items())
    (output_dir / "report.md").write_text(f"# {args.restore_from}\n\n{num_images} images\n\n{table}\n\n{settings}\n")
    return table


@torch.no_grad()
def evaluate(args: argparse.Namespace, world: World) -> int:
    """Evaluate, and return the exit status."""
    check_ignore_label(args.ignore_label, args.num_classes)
    items = find_items(args)
    check_labels(items)
    attention_item = find_attention_item(args, items) if args.attention else None
    model = build_model(args.backbone, args.num_classes, args.recurrence, args.backbone_activation)
    load_state(model, read_state_dict(args.restore_from), str(args.restore_from))
    model.to(world.device).eval()

    output_dir = args.output_dir or args.restore_from.parent / "outputs"
    for folder, wanted in (("predictions", True), ("submit", args.submit), ("attention", args.attention)):
        if wanted:
            (output_dir / folder).mkdir(parents=True, exist_ok=True)
    confusion = predict_all(args, world, make_predictor(args, world, model), items, output_dir)
    if not world.is_main:
        return 0
    labelled = sum(item.label is not None for item in items)
    if labelled:
        print(save_report(args, confusion, labelled, output_dir), end="\n\n")
        print(f"report:       {output_dir / 'report.md'}, {output_dir / 'result.json'}")
    print(f"checkpoint:   {args.restore_from}")
    print(f"predictions:  {output_dir / 'predictions'}")
    if args.submit:
        print(f"submission:   {output_dir / 'submit'}")
    if attention_item is not None:
        picture = attention_picture(model, attention_item, args.attention, output_dir / "attention")
        print(f"attention:    {picture}")
    return 0


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    sys.exit(launch(evaluate, arguments))
