"""Evaluate CCNet: IoU of every class, coloured predictions, submissions, and pictures of the attention.

    python evaluate.py --data-dir YOUR_CS_PATH --restore-from snapshots/CS_scenes_60000.pth --recurrence 2

is the paper's single-scale evaluation by sliding window. Add --whole to evaluate whole images, averaged over six scales
and their mirror images, and --gpu 0,1,2,3 for four GPUs, or run it with torchrun.

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images street.jpg holidays/

predicts any images.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, SequentialSampler
from tqdm import tqdm

from dataset import SPLITS, EvaluationSet, Item, check_labels, load_batches, output_names, submission_name
from dataset.images import ImageFile
from dataset.transforms import denormalise
from networks import CCNet, PredictionNetwork, build_model, load_state
from utils.arguments import MOST_IMAGES, ArgumentParser, number, pixel
from utils.checkpoint import read_state_dict
from utils.commandline import (
    CommandError,
    add_shared_flags,
    check_memory,
    find_items,
    network_config,
    plain_flags,
    with_network,
)
from utils.distributed import World
from utils.inference import Predictor, multi_scale, sliding_predictor, whole_predictor
from utils.launch import launch
from utils.metrics import ConfusionMatrix
from utils.network_file import SavedNetwork, find_network
from utils.precision import in_mixed_precision
from utils.report import read_others, save_report
from utils.visualisation import attention_of_file, overlay, palette_image

_WHOLE_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
# Of --output-dir
_FOLDERS = ("predictions", "overlays", "submit", "attention")
_FILES = ("result.json", "report.md", "report.html")


def get_parser() -> ArgumentParser:
    parser = ArgumentParser("Evaluate CCNet.")
    add_shared_flags(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--restore-from", type=Path, required=True, help="state dict to evaluate")
    add(
        "--images", type=Path, nargs="+", metavar="FILE|FOLDER",
        help="predict these images, of any size, in place of a data set's: predictions, and overlays with a legend",
    )  # fmt: skip
    add("--split", choices=SPLITS, default="val", help="images to evaluate; those of test are only predicted")
    add("--batch-size", type=number(int, 1, MOST_IMAGES), default=1, help="images predicted at a time")
    add("--whole", action="store_true", help="predict whole images, at six scales and mirrored, instead of tiles")
    add(
        "--scales", type=number(float, 0.1, 8), nargs="+",
        help="scales to average over; by default 1, or with --whole 0.75 1 1.25 1.5 1.75 2",
    )  # fmt: skip
    add(
        "--flip", action=argparse.BooleanOptionalAction,
        help="average with the mirror image; by default off, or with --whole on",
    )  # fmt: skip
    add(
        "--compare-recurrence", type=number(int, 0, 64), nargs="+", default=[], metavar="R",
        help="also evaluate the same weights with these numbers of passes of attention",
    )  # fmt: skip
    add(
        "--compare-with", type=Path, nargs="+", default=[], metavar="RESULT.JSON",
        help="also show what other evaluations of the same images measured, each by its result.json",
    )  # fmt: skip

    add = parser.add_argument_group("results").add_argument
    add(
        "--output-dir", type=Path,
        help="folder of the results, for this evaluation alone: report.md, result.json, report.html, predictions/, "
        "overlays/, submit/, attention/; by default outputs/<name of the state dict>/<split or list>/ beside the state "
        "dict",
    )  # fmt: skip
    add("--submit", action="store_true", help="also write label values, for Cityscapes under its server's names")
    add("--report", action="store_true", help="also write report.html: tables, best and worst images, training curve")
    add("--attention", type=pixel, action="append", metavar="Y,X", help="show where this pixel attends to; repeatable")
    add("--attention-image", metavar="NAME", help="file name of the image for --attention; by default the first one")
    return parser


def find_attention_item(args: argparse.Namespace, items: list[Item]) -> Item:
    """The image for --attention; raise a CommandError if there is none, or a pixel is not in it."""
    if args.recurrence == 0:
        raise CommandError(
            "--attention: expected --head rcca and --recurrence 1 or more, otherwise there is none to show"
        )
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
    """The predictor that --amp, --compile, --whole, --input-size, --scales and --flip describe."""
    prediction = PredictionNetwork(model)
    if args.compile:
        prediction.compile()
    network = in_mixed_precision(prediction, world.device, args.amp)
    predict = whole_predictor(network) if args.whole else sliding_predictor(network, args.input_size)
    scales = args.scales or (_WHOLE_SCALES if args.whole else (1.0,))
    flip = args.whole if args.flip is None else args.flip
    return multi_scale(predict, scales, flip)


def same_size_groups(samples: list[dict]) -> Iterator[list[dict]]:
    """Split a batch into groups of consecutive images of the same size."""
    for _, group in groupby(samples, key=lambda sample: sample["image"].shape):
        yield list(group)


def prepare_output(args: argparse.Namespace) -> Path:
    """Create the folder of results and remove those of an earlier evaluation, so that they never mix.

    Raises:
        CommandError: it has files of these names that are not from an evaluation.
    """
    name = "images" if args.images else args.split if args.data_list is None else args.data_list.stem
    output_dir = args.output_dir or args.restore_from.parent / "outputs" / args.restore_from.stem / name
    marker = output_dir / "evaluation.json"
    earlier = [path for folder in _FOLDERS for path in (output_dir / folder).glob("*")]
    earlier += [path for path in map(output_dir.joinpath, _FILES) if path.exists()]
    if earlier and not marker.exists():
        raise CommandError(
            f"--output-dir {output_dir}: expected a new folder or one of an earlier evaluation, found {earlier[0]} and "
            f"no {marker.name}; give another folder"
        )
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    wanted = {"predictions": True, "overlays": args.images, "submit": args.submit, "attention": args.attention}
    for folder in _FOLDERS:
        if wanted[folder]:
            (output_dir / folder).mkdir(parents=True, exist_ok=True)
        elif (output_dir / folder).exists():
            (output_dir / folder).rmdir()
    marker.write_text(json.dumps(plain_flags(args), indent=2) + "\n")
    return output_dir


def save_prediction(args: argparse.Namespace, sample: dict, prediction: np.ndarray, name: str, folder: Path) -> None:
    """Write training ids [H, W] as a coloured image, over the image with --images, and to submit as label values."""
    images = {folder / "predictions" / f"{name}.png": palette_image(prediction, args.classes)}
    if args.images:
        pixels = denormalise(sample["image"].numpy())
        images[folder / "overlays" / f"{name}.jpg"] = overlay(pixels, prediction, args.classes)
    if args.submit:
        path = folder / "submit" / submission_name(name)
        images[path] = Image.fromarray(args.classes.label_values[prediction])
    for path, image in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)  # names may have folders
        image.save(path)


def predict_all(
    args: argparse.Namespace, world: World, predict: Predictor, items: list[Item], output_dir: Path | None
) -> ConfusionMatrix:
    """Predict every image, save it if there is a folder, and count classes if there is a label.

    Batches are those of a single process, distributed round-robin: no image is predicted twice or padded.
    """
    device = world.device
    confusion = ConfusionMatrix(args.num_classes, device)
    names = output_names(items)
    samples = EvaluationSet(items, args.classes, args.ignore_label)
    batches = list(BatchSampler(SequentialSampler(samples), args.batch_size, drop_last=False))[world.rank :: world.size]
    num_images = sum(len(batch) for batch in batches)
    with tqdm(total=num_images, unit="image", dynamic_ncols=True, disable=not world.is_main) as bar:
        for batch in load_batches(samples, batches, args.num_workers, collate=list):
            for group in same_size_groups(batch):
                images = torch.stack([sample["image"] for sample in group]).to(device)
                predictions = predict(images.to(memory_format=torch.channels_last)).argmax(1)
                for sample, prediction in zip(group, predictions, strict=True):
                    if "label" in sample:
                        confusion.update(sample["label"].to(device), prediction)
                    if output_dir is not None:
                        train_ids = prediction.cpu().numpy().astype(args.classes.dtype)
                        save_prediction(args, sample, train_ids, names[items[sample["index"]]], output_dir)
                bar.update(len(group))
    confusion.counts = world.sum(confusion.counts)
    return confusion


def network_line(args: argparse.Namespace, found: SavedNetwork | None) -> str:
    """A line on which network is evaluated, and where that information is from."""
    source = f"as {found.source}" if found else "as the flags say"
    if found and "recurrence" in found.known and found.config.recurrence != args.recurrence:
        source += f", but R, with which it was trained, was {found.config.recurrence}"
    settings = asdict(network_config(args))
    del settings["ccl"]  # of training alone
    return f"{', '.join(f'{name} {value}' for name, value in settings.items())} ({source})"


@torch.no_grad()
def evaluate(args: argparse.Namespace, world: World) -> int:
    """Evaluate, and return the exit status."""
    state = read_state_dict(args.restore_from)
    found = find_network(args.restore_from, state)
    args = with_network(args, found)
    items = find_items(args, args.split)
    output_names(items)  # an error if two are equal
    check_labels(items, args.classes)
    check_memory(f"--batch-size {args.batch_size}", min(args.batch_size, len(items)), ImageFile(items[0].image).size)
    attention_item = find_attention_item(args, items) if args.attention else None
    if args.compare_recurrence and args.head != "rcca":
        raise CommandError(f"--compare-recurrence: expected --head rcca, got {args.head}")
    others = read_others(args.compare_with, args.classes.names)
    model = build_model(network_config(args))
    load_state(model, state, str(args.restore_from))
    model.to(memory_format=torch.channels_last).to(world.device).eval()
    if world.is_main:
        print(f"network: {network_line(args, found)}")

    output_dir = world.broadcast(prepare_output(args) if world.is_main else None)
    confusion = predict_all(args, world, make_predictor(args, world, model), items, output_dir)
    measured = {args.recurrence: confusion}
    for recurrence in args.compare_recurrence:
        if recurrence not in measured:
            model.head.recurrence = recurrence
            measured[recurrence] = predict_all(args, world, make_predictor(args, world, model), items, None)
            model.head.recurrence = args.recurrence
    compared = {recurrence: measured[recurrence] for recurrence in args.compare_recurrence}
    if not world.is_main:
        return 0
    labelled = sum(item.label is not None for item in items)
    gamma = None if model.head.gamma is None else model.head.gamma.item()
    if labelled:
        print(save_report(args, confusion, compared, others, gamma, labelled, output_dir))
        if gamma is not None:
            print(f"gamma of the attention: {gamma:.4g} (with 0 it adds nothing)\n")
        print(f"report:       {output_dir / 'report.md'}, {output_dir / 'result.json'}")
        if args.report:
            from utils.html_report import save_html_report  # which loads TensorBoard's writer, in more than a second

            facts = [network_line(args, found), f"{labelled} images of {args.data_dir}"]
            print(f"to look at:   {save_html_report(args, model, items, confusion, facts, output_dir)}")
    print(f"checkpoint:   {args.restore_from}")
    print(f"predictions:  {output_dir / 'predictions'}")
    if args.images:
        print(f"overlays:     {output_dir / 'overlays'}")
    if args.submit:
        print(f"submission:   {output_dir / 'submit'}")
    if attention_item is not None:
        path = output_dir / "attention" / f"{attention_item.name}.png"
        attention_of_file(model, attention_item.image, args.attention, args.classes).save(path)
        print(f"attention:    {path}")
    return 0


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    sys.exit(launch(evaluate, arguments))
