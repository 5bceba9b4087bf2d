"""Train CCNet.

The paper's recipe, with the ImageNet backbone at dataset/resnet101-imagenet.pth:

    python train.py --data-dir YOUR_CS_PATH --restore-from dataset/resnet101-imagenet.pth \
        --random-mirror --random-scale --input-size 769,769 --batch-size 8 --num-steps 60000 \
        --learning-rate 1e-2 --weight-decay 1e-4 --recurrence 2

Add --gpu 0,1,2,3 for four GPUs, or run it with torchrun --nproc_per_node=4; --ohem --ohem-thres 0.7 --ohem-keep 100000
for online hard example mining; --amp bf16 for mixed precision. The same command with --resume resumes an interrupted
run, on any number of GPUs.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataset import SPLITS, EpochSampler, Item, TrainingSet, check_labels, color_jitter, load_batches, part_size
from dataset.transforms import parse_scales
from libs import freeze_statistics
from networks import BatchShard, CCNet, build_model
from utils.arguments import MOST_IMAGES, MOST_STEPS, ArgumentParser, boolean, loaded_by, number, numbers
from utils.checkpoint import save_snapshot, snapshot_path
from utils.commandline import CommandError, add_shared_flags, check_memory, find_items, network_config, with_network
from utils.criterion import CriterionDSN, CriterionOhemDSN
from utils.distributed import World, stop_requests
from utils.divergence import check_losses, check_weights
from utils.launch import launch
from utils.network_file import describe, save_network
from utils.resuming import run_class_weights, run_flags, run_network, start_or_resume
from utils.training import (
    Part,
    PendingLosses,
    TrainingStep,
    batch_shard,
    distribute,
    make_optimizer,
    poly_learning_rate,
)
from utils.training_log import TrainingLog
from utils.visualisation import training_panel

# Learning rate of the fine-tuning stage: a tenth of the recipe's. The authors say only that theirs is low.
_FINE_TUNING_RATE = 1e-3


def get_parser() -> ArgumentParser:
    parser = ArgumentParser("Train CCNet.")
    add_shared_flags(parser)
    add = parser.add_argument_group("images").add_argument
    add(
        "--split",
        choices=[split for split in SPLITS if split != "test"],
        help="images to train on; by default train, or trainval with --ft",
    )
    add("--random-mirror", action="store_true", help="mirror images with probability 1/2")
    add(
        "--random-scale", type=loaded_by(parse_scales, ValueError), nargs="?", const=True, default=False,
        metavar="LOW,HIGH",
        help="scale each image by one of LOW, LOW + 0.1, ... HIGH; without a value by the recipe's, 0.7 to 2.1",
    )  # fmt: skip
    add(
        "--random-rotate", type=number(float, 0, 180), default=0, metavar="DEGREES",
        help="rotate each image by an angle of up to that, in both directions",
    )  # fmt: skip
    jitter = "BRIGHTNESS,CONTRAST,SATURATION,HUE"
    add(
        "--color-jitter", type=numbers(jitter, 10, 10, 10, 0.5), metavar=jitter,
        help="change the colours by torchvision's ColorJitter, e.g. 0.4,0.4,0.4,0.1",
    )  # fmt: skip
    add("--random-seed", type=number(int, 0, 2**63 - 1), default=12345, help="seed of initialisation, data and dropout")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=number(int, 1, MOST_IMAGES), default=8, help="images of a step, over all processes")
    add(
        "--accumulate", type=number(int, 1, MOST_IMAGES), default=1,
        help="number of parts in which a batch goes through the network, one after the other, to save memory",
    )  # fmt: skip
    add(
        "--num-steps", type=number(int, 0, MOST_STEPS), default=40000,
        help="training steps; a larger number with --resume extends a run and stretches its schedule",
    )  # fmt: skip
    add("--start-iters", type=number(int, 0, MOST_STEPS), default=0, help="step of schedule and data to start at")
    add(
        "--learning-rate", type=number(float, 0, 1e6), default=1e-2,
        help=f"learning rate at the start, times (1 - step / steps) ^ power later; with --ft {_FINE_TUNING_RATE}",
    )  # fmt: skip
    add("--power", type=number(float, 0, 100), default=0.9, help="power of the learning-rate schedule")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", type=number(float, 0, 1e6), default=5e-4, help="weight decay of SGD; the recipe's is 0.0001")
    add("--clip-grad-norm", type=number(float, 0, 1e12), help="clip the global gradient norm to this")
    add(
        "--skip-nonfinite", action="store_true",
        help="skip steps whose loss or gradient is infinite or NaN, and count them in the log; otherwise training "
        "stops and names the step and its images",
    )  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add(
        "--ohem", type=boolean, nargs="?", const=True, default=False,
        help="online hard example mining (OHEM) on the main loss; 1 or no value: on, 0: off",
    )  # fmt: skip
    add(
        "--ohem-thres", type=number(float, 0, 1), default=0.6,
        help="pixels whose true class has at most this probability are hard; recommended 0.7",
    )  # fmt: skip
    add(
        "--ohem-keep", type=number(int, 0, MOST_STEPS), default=200000,
        help="least number of pixels of a batch to keep; recommended 100000",
    )  # fmt: skip
    add(
        "--class-weights", metavar="balanced|FILE",
        help="weights of the classes in both heads' losses: the median frequency over that of each in the training "
        "images, or a TOML file with one for each name; by default all are 1",
    )  # fmt: skip

    add(
        "--ccl", action=argparse.BooleanOptionalAction,
        help="add the category consistent loss of the attention's result, with --head rcca or nonlocal; by default as "
        "the weights were trained, or off",
    )  # fmt: skip

    add = parser.add_argument_group("weights").add_argument
    add(
        "--restore-from", type=Path,
        help="weights to start with: an ImageNet backbone, of this project, torchvision, timm or mmsegmentation, or a "
        "whole network; torchvision: download its backbone; from scratch if not given",
    )  # fmt: skip
    add(
        "--initial-gamma", type=number(float, 0, 1e3), default=0,
        help="initial weight of the attention's result, where no whole network is restored; the paper's is 0",
    )  # fmt: skip
    add("--not-restore-last", action="store_true", help="do not load the classifying layers, for other classes")
    add(
        "--is-training", action=argparse.BooleanOptionalAction, default=True,
        help="update batch norm's running statistics; --no-is-training freezes them",
    )  # fmt: skip
    add(
        "--ft", action="store_true",
        help=f"fine-tuning stage of a trained network: train and val images, statistics frozen, learning rate "
        f"{_FINE_TUNING_RATE}",
    )  # fmt: skip

    add = parser.add_argument_group("snapshots and log").add_argument
    add("--snapshot-dir", type=Path, default=Path("snapshots"), help="folder of snapshots and TensorBoard log")
    add("--resume", action="store_true", help="resume from the newest snapshot in --snapshot-dir, if there is one")
    add("--save-pred-every", type=number(int, 1, MOST_STEPS), default=10000, help="steps between snapshots")
    add("--keep", type=number(int, 1, MOST_STEPS), help="number of snapshots to keep, the newest; by default all")
    add(
        "--save-num-images",
        type=number(int, 0, MOST_IMAGES),
        default=2,
        help="images logged as pictures with a snapshot",
    )
    add("--print-frequency", type=number(int, 1, MOST_STEPS), default=10, help="steps between logged losses")
    return parser


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; --ft changes the default of --learning-rate."""
    parser = get_parser()
    if parser.parse_args(arguments).ft:
        parser.set_defaults(learning_rate=_FINE_TUNING_RATE)
    return parser.parse_args(arguments)


def training_split(args: argparse.Namespace) -> str:
    """The split to train on."""
    return args.split or ("trainval" if args.ft else "train")


def images_per_part(args: argparse.Namespace, num_processes: int = 1) -> int:
    """Images that go through the network at a time: those of a part of the batch, of all processes together.

    Raises:
        CommandError: the batch cannot be divided into equal parts with an image for every process.
    """
    try:
        return part_size(args.batch_size, args.accumulate, num_processes)
    except ValueError as error:
        raise CommandError(f"--batch-size {args.batch_size}, --accumulate {args.accumulate}: {error}") from None


class Run(NamedTuple):
    """A run that is set up: everything that the training loop needs."""

    args: argparse.Namespace
    world: World
    items: list[Item]
    model: CCNet
    training_step: TrainingStep
    first: int
    """step that training starts or resumes at"""

    def save(self, step: int) -> Path:
        """Save a snapshot; returns the path of its state dict."""
        check_weights(self.model, step)
        optimizer, scaler = self.training_step.optimizer, self.training_step.scaler
        flags, description = run_flags(self.args), describe(network_config(self.args), self.args.classes)
        folder, keep = self.args.snapshot_dir, self.args.keep
        return save_snapshot(self.model, optimizer, folder, step, flags, keep, scaler, description)


def make_criterion(args: argparse.Namespace, world: World, shard: BatchShard | None) -> CriterionDSN:
    """The loss of a part of the batch."""
    weight = torch.tensor(list(args.class_weights.values()), device=world.device) if args.class_weights else None
    if args.ohem:
        return CriterionOhemDSN(args.ohem_thres, args.ohem_keep // args.accumulate, args.ignore_label, shard, weight)
    return CriterionDSN(args.ignore_label, shard, weight)


def set_up(args: argparse.Namespace, world: World) -> Run:
    """Check flags and labels, build the network, and load the weights to start with or the snapshot to resume from."""
    images = images_per_part(args, world.size)
    check_memory(f"--batch-size {args.batch_size}", images // world.size, args.input_size)
    args, weights = run_network(args, world)
    items = find_items(args, training_split(args), need_labels=True)
    check_labels(items, args.classes)
    args.class_weights = run_class_weights(args, items, world)
    torch.manual_seed(args.random_seed)
    model = build_model(network_config(args)).to(memory_format=torch.channels_last).to(world.device)
    if model.head.gamma is not None:
        nn.init.constant_(model.head.gamma, args.initial_gamma)
    optimizer = make_optimizer(model, args.learning_rate, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    defaults = get_parser().parse_args([])
    defaults.classes = args.classes
    first, resumed = start_or_resume(args, with_network(defaults, None), weights, world, model, optimizer, scaler)
    if first > args.num_steps:
        raise CommandError(f"--start-iters {first}: expected at most --num-steps {args.num_steps}")
    model.train()
    if args.ft or not args.is_training:
        freeze_statistics(model)
    if args.compile:
        model.compile()
    shard = batch_shard(world, images)
    training_step = TrainingStep(
        distribute(model, world, shard), make_criterion(args, world, shard), optimizer, scaler, world, args.amp,
        args.clip_grad_norm, args.skip_nonfinite,
    )  # fmt: skip
    run = Run(args, world, items, model, training_step, first)
    if world.is_main:
        save_network(network_config(args), args.classes, args.snapshot_dir)
        if first == args.num_steps and not resumed:  # there is no step: save the network as it is
            run.save(first)
    return run


def load_steps(run: Run) -> Iterator[list[Part]]:
    """For each step the parts of its batch: this process's images, on the device."""
    args, world = run.args, run.world
    samples = TrainingSet(
        run.items, args.input_size, args.classes, args.ignore_label, args.random_scale, args.random_mirror,
        args.random_seed, args.random_rotate, color_jitter(*args.color_jitter) if args.color_jitter else None,
    )  # fmt: skip
    batches = EpochSampler(
        len(run.items), args.batch_size, run.first, args.num_steps, args.random_seed, args.accumulate, world.rank,
        world.size,
    )  # fmt: skip
    loaded = load_batches(samples, batches, args.num_workers, pin_memory=world.device.type == "cuda")
    for _ in range(run.first, args.num_steps):
        yield [
            Part(
                batch["image"].to(world.device, non_blocking=True, memory_format=torch.channels_last),
                batch["label"].to(world.device, non_blocking=True),
                batch["name"],
            )
            for batch in islice(loaded, args.accumulate)
        ]


def train_steps(run: Run, log: TrainingLog) -> tuple[int, int | None]:
    """The training loop: until the last step, or the first after a signal that asks to stop.

    Returns the step reached, and the signal if it ended training early.
    """
    args, world = run.args, run.world
    step, stopped_by = run.first, None
    losses = PendingLosses(world)
    for parts in load_steps(run):
        learning_rate = poly_learning_rate(args.learning_rate, step, args.num_steps, args.power)
        run.training_step.optimizer.param_groups[0]["lr"] = learning_rate
        outcome = run.training_step(parts)
        step += 1
        names = [name for part in parts for name in part.names]
        if outcome.skipped:
            log.skipped(step, [name for part in world.gather(names) for name in part])
        else:
            losses.add(step, outcome.losses, names)
        log.advance()

        stopped_by = world.stop_signal() if step < args.num_steps else None
        saving = step % args.save_pred_every == 0 or step == args.num_steps or stopped_by is not None
        if saving or step % args.print_frequency == 0:  # other steps do not wait for the device
            records = losses.drain()
            check_losses(records, world, args.snapshot_dir)
            log.scalars(step, learning_rate, records[-1].losses if records else {})
        if saving and world.is_main:
            log.message(f"step {step}: {run.save(step)}")
            images, labels, _ = parts[-1]
            for i in range(min(args.save_num_images, len(images))):
                picture = training_panel(images[i], labels[i], outcome.logits[i], args.classes)
                log.picture(step, f"image, label, prediction/{i}", picture)
        if stopped_by is not None:
            break
    return step, stopped_by


def train(args: argparse.Namespace, world: World) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that ended training early."""
    run = set_up(args, world)
    args = run.args  # now with the network's flags
    if world.is_main:
        head = f"R={args.recurrence}" if args.head == "rcca" else f"head {args.head}"
        where = f"on {world.device}" if world.size == 1 else f"on {world.size} processes"
        steps = f"steps {run.first} to {args.num_steps}"
        loss = ", category consistent loss" if args.ccl else ""
        print(f"{args.backbone}, {head}, stem {args.stem}{loss}, {where}: {len(run.items)} images, {steps}")
    log = TrainingLog(args.snapshot_dir if world.is_main else None, run.first, args.num_steps, args.batch_size)
    with stop_requests(world.received), closing(log):
        step, stopped_by = train_steps(run, log)
    if world.is_main:
        if stopped_by:
            print(f"stopped by {signal.Signals(stopped_by).name} at step {step}; resume it with --resume")
        else:
            print(f"done: {snapshot_path(args.snapshot_dir, step)}")
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    sys.exit(launch(train, parse_flags(), max_processes=images_per_part))
