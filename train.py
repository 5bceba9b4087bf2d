"""Train CCNet.

The paper's recipe, with the ImageNet backbone at dataset/resnet101-imagenet.pth:

    python train.py --data-dir YOUR_CS_PATH --restore-from dataset/resnet101-imagenet.pth \
        --random-mirror --random-scale --input-size 769,769 --batch-size 8 --num-steps 60000 \
        --learning-rate 1e-2 --weight-decay 1e-4 --recurrence 2

Add --gpu 0,1,2,3 for four GPUs, or run it with torchrun --nproc_per_node=4; --ohem --ohem-thres 0.7 --ohem-keep 100000
for online hard example mining; --amp bf16 for mixed precision. The same command with --resume goes on with an
interrupted run, on as many GPUs as there are then.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from dataset import EpochSampler, Item, TrainingSet, check_labels, load_batches, read_list, scan
from libs import freeze_statistics
from networks import CCNet, build_model
from utils.arguments import MOST_IMAGES, MOST_STEPS, ArgumentParser, boolean, number
from utils.checkpoint import save_snapshot, snapshot_path, training_steps
from utils.commandline import (
    CommandError,
    add_shared_flags,
    check_ignore_label,
    check_memory,
    network_config,
    with_network,
)
from utils.criterion import BatchShare, CriterionDSN, CriterionOhemDSN
from utils.distributed import World, stop_requests
from utils.launch import launch
from utils.network_file import save_network
from utils.resuming import run_flags, run_network, start_or_resume
from utils.schedule import poly_learning_rate
from utils.training import (
    Part,
    PendingLosses,
    StepRecord,
    TrainingStep,
    batch_share,
    distribute,
    make_optimizer,
)
from utils.training_log import TrainingLog
from utils.visualisation import training_panel

# Learning rate of the fine-tuning stage, a tenth of the recipe's. The authors say that theirs is low, not how low.
_FINE_TUNING_RATE = 1e-3


def get_parser() -> ArgumentParser:
    parser = ArgumentParser("Train CCNet.")
    add_shared_flags(parser)
    add = parser.add_argument_group("images").add_argument
    add("--split", choices=("train", "val", "trainval"), help="images to train on; train, or trainval with --ft")
    add("--random-mirror", action="store_true", help="mirror every other image")
    add("--random-scale", action="store_true", help="scale images by 0.7, 0.8, ... 2.1")
    add("--random-seed", type=number(int, 0, 2**63 - 1), default=12345, help="of initialisation, data and dropout")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=number(int, 1, MOST_IMAGES), default=8, help="images a step, of all processes together")
    add(
        "--accumulate", type=number(int, 1, MOST_IMAGES), default=1,
        help="parts that a batch is put through the network in, one after the other, to save memory",
    )  # fmt: skip
    add(
        "--num-steps", type=number(int, 0, MOST_STEPS), default=40000,
        help="training steps; a larger number with --resume extends a run, and stretches its schedule",
    )  # fmt: skip
    add("--start-iters", type=number(int, 0, MOST_STEPS), default=0, help="step of schedule and data to begin at")
    add(
        "--learning-rate", type=number(float, 0, 1e6), default=1e-2,
        help=f"base of the schedule base * (1 - step / steps) ^ power; with --ft {_FINE_TUNING_RATE}",
    )  # fmt: skip
    add("--power", type=number(float, 0, 100), default=0.9, help="of the schedule")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    add("--weight-decay", type=number(float, 0, 1e6), default=5e-4, help="of SGD; the recipe's is 0.0001")
    add("--clip-grad-norm", type=number(float, 0, 1e12), help="clip the norm of all gradients together to this")
    add(
        "--skip-nonfinite", action="store_true",
        help="leave out steps whose loss or gradient is infinite or NaN, and count them in the log; without, training "
        "stops and names the step and its images",
    )  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add(
        "--ohem", type=boolean, nargs="?", const=True, default=False,
        help="online hard example mining on the main loss; alone, or with 1 or 0",
    )  # fmt: skip
    add(
        "--ohem-thres", type=number(float, 0, 1), default=0.6,
        help="true-class probability up to which a pixel is hard; recommended 0.7",
    )  # fmt: skip
    add(
        "--ohem-keep", type=number(int, 0, MOST_STEPS), default=200000,
        help="pixels of a batch kept at least; recommended 100000",
    )  # fmt: skip

    add = parser.add_argument_group("weights").add_argument
    add(
        "--restore-from", type=Path,
        help="weights to begin with: ImageNet backbone or whole network; from scratch if not given",
    )  # fmt: skip
    add("--not-restore-last", action="store_true", help="leave out the classifying layers, for other classes")
    add(
        "--is-training", action=argparse.BooleanOptionalAction, default=True,
        help="update batch norm's running statistics; --no-is-training uses them as they are",
    )  # fmt: skip
    add(
        "--ft", action="store_true",
        help=f"fine-tuning stage of a trained network: train and val images, statistics frozen, learning rate "
        f"{_FINE_TUNING_RATE}",
    )  # fmt: skip

    add = parser.add_argument_group("snapshots and log").add_argument
    add("--snapshot-dir", type=Path, default=Path("snapshots"), help="folder of snapshots and TensorBoard log")
    add("--resume", action="store_true", help="go on from the newest snapshot in --snapshot-dir, if there is one")
    add("--save-pred-every", type=number(int, 1, MOST_STEPS), default=10000, help="steps between snapshots, pictures")
    add("--keep", type=number(int, 1, MOST_STEPS), help="how many of the newest snapshots are kept; else all")
    add("--save-num-images", type=number(int, 0, MOST_IMAGES), default=2, help="images of the batch logged as pictures")
    add("--print-frequency", type=number(int, 1, MOST_STEPS), default=10, help="steps between logged losses")
    return parser


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, where --ft changes the default of --learning-rate."""
    parser = get_parser()
    if parser.parse_args(arguments).ft:
        parser.set_defaults(learning_rate=_FINE_TUNING_RATE)
    return parser.parse_args(arguments)


def find_items(args: argparse.Namespace) -> list[Item]:
    """The images to train on."""
    if args.data_list is not None:
        return read_list(args.data_dir, args.data_list, args.label_encoding, need_labels=True)
    return scan(args.data_dir, args.split or ("trainval" if args.ft else "train"), args.label_encoding)


_DIVERGED = "training has diverged: begin again with a lower --learning-rate and another --snapshot-dir"


def check_losses(args: argparse.Namespace, world: World, records: list[StepRecord]) -> None:
    """They are all finite."""
    bad = next((record for record in records if not record.is_finite), None)
    if bad is not None:
        names = ", ".join(name for part in world.gather(bad.names) for name in part)
        steps = training_steps(args.snapshot_dir)
        last_good = snapshot_path(args.snapshot_dir, steps[-1]) if steps else "none yet"
        raise CommandError(
            f"the loss is {bad.losses['total']} at step {bad.step}, of the images {names}; the last good snapshot: "
            f"{last_good}; {_DIVERGED}, or skip such steps with --skip-nonfinite"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """The network is worth saving: no weight or statistic is infinite or NaN."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CommandError(f"{name} is not finite after step {step}; {_DIVERGED}")


def check_batch(args: argparse.Namespace, world: World) -> None:
    """The batch can be cut into equal parts, each with an image for every process."""
    if args.batch_size % args.accumulate != 0:
        raise CommandError(f"--batch-size {args.batch_size}: expected a multiple of --accumulate {args.accumulate}")
    if args.batch_size // args.accumulate < world.size:
        raise CommandError(
            f"--batch-size {args.batch_size}: expected {world.size * args.accumulate} or more, an image for each of "
            f"{world.size} processes in each of --accumulate {args.accumulate} parts"
        )
    check_memory(f"--batch-size {args.batch_size}", args.batch_size // args.accumulate // world.size, args.input_size)


def make_criterion(args: argparse.Namespace, share: BatchShare | None) -> CriterionDSN:
    """The loss of a part of the batch."""
    if args.ohem:
        return CriterionOhemDSN(args.ohem_thres, args.ohem_keep // args.accumulate, args.ignore_label, share)
    return CriterionDSN(args.ignore_label, share)


def train(args: argparse.Namespace, world: World) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that ended training early."""
    check_batch(args, world)
    args = run_network(args, world)
    check_ignore_label(args.ignore_label, args.num_classes)
    items = find_items(args)
    check_labels(items)
    torch.manual_seed(args.random_seed)
    model = build_model(network_config(args)).to(world.device)
    optimizer = make_optimizer(model, args.learning_rate, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    defaults = with_network(get_parser().parse_args([]), None)
    first, resumed = start_or_resume(args, defaults, world, model, optimizer, scaler)
    if first > args.num_steps:
        raise CommandError(f"--start-iters {first}: expected at most --num-steps {args.num_steps}")
    model.train()
    if args.ft or not args.is_training:
        freeze_statistics(model)
    if args.compile:
        model.compile()

    def save(step: int) -> Path:
        return save_snapshot(model, optimizer, args.snapshot_dir, step, run_flags(args), args.keep, scaler)

    if world.is_main:
        save_network(network_config(args), args.snapshot_dir)
        where = f"on {world.device}" if world.size == 1 else f"on {world.size} processes"
        print(f"{args.backbone}, R={args.recurrence}, {where}: {len(items)} images, steps {first} to {args.num_steps}")
        if first == args.num_steps and not resumed:  # no step to do: the network as it is
            save(first)
    share = batch_share(world, args.batch_size // args.accumulate)
    training_step = TrainingStep(
        distribute(model, world, share), make_criterion(args, share), optimizer, scaler, world, args.amp,
        args.clip_grad_norm, args.skip_nonfinite,
    )  # fmt: skip
    log = TrainingLog(args.snapshot_dir if world.is_main else None, first, args.num_steps, args.batch_size)
    with stop_requests(world.received), closing(log):
        step, stopped_by = run_steps(args, world, items, model, training_step, first, log, save)
    if world.is_main:
        if stopped_by:
            print(f"stopped by {signal.Signals(stopped_by).name} at step {step}; go on with --resume")
        else:
            print(f"done: {snapshot_path(args.snapshot_dir, step)}")
    return 128 + stopped_by if stopped_by else 0


def load_steps(args: argparse.Namespace, world: World, items: list[Item], first: int) -> Iterator[list[Part]]:
    """The parts of each step's batch, on the device: of this process's images."""
    samples = TrainingSet(
        items, args.input_size, args.ignore_label, args.random_scale, args.random_mirror, args.random_seed
    )
    batches = EpochSampler(
        len(items), args.batch_size, first, args.num_steps, args.random_seed, args.accumulate, world.rank, world.size
    )
    loaded = load_batches(samples, batches, args.num_workers, pin_memory=world.device.type == "cuda")
    for _ in range(first, args.num_steps):
        yield [
            Part(
                batch["image"].to(world.device, non_blocking=True, memory_format=torch.channels_last),
                batch["label"].to(world.device, non_blocking=True),
                batch["name"],
            )
            for batch in islice(loaded, args.accumulate)
        ]


def run_steps(
    args: argparse.Namespace,
    world: World,
    items: list[Item],
    model: CCNet,
    training_step: TrainingStep,
    first: int,
    log: TrainingLog,
    save: Callable[[int], Path],
) -> tuple[int, int | None]:
    """The main loop, from step `first` to the last or until a process has received a signal.

    Returns the step reached, and that signal if it is not the last.
    """
    step, stopped_by = first, None
    losses = PendingLosses(world)
    for parts in load_steps(args, world, items, first):
        learning_rate = poly_learning_rate(args.learning_rate, step, args.num_steps, args.power)
        training_step.optimizer.param_groups[0]["lr"] = learning_rate
        outcome = training_step(parts)
        step += 1
        names = [name for part in parts for name in part.names]
        if outcome.skipped:
            log.skipped(step, [name for part in world.gather(names) for name in part])
        else:
            losses.add(step, outcome.losses, names)
        log.advance()
        stopped_by = world.stop_signal() if step < args.num_steps else None
        saving = step % args.save_pred_every == 0 or step == args.num_steps or stopped_by is not None
        if saving or step % args.print_frequency == 0:  # in other steps nothing waits for the device
            records = losses.drain()
            check_losses(args, world, records)
            log.scalars(step, learning_rate, records[-1].losses if records else {})
        if saving and world.is_main:
            check_weights(model, step)
            path = save(step)
            images, labels, _ = parts[-1]
            for i in range(min(args.save_num_images, len(images))):
                picture = training_panel(images[i], labels[i], outcome.logits[i])
                log.picture(step, f"image, label, prediction/{i}", picture)
            log.message(f"step {step}: {path}")
        if stopped_by is not None:
            break
    return step, stopped_by


if __name__ == "__main__":
    arguments = parse_flags()
    sys.exit(launch(train, arguments, max_processes=arguments.batch_size // arguments.accumulate))
