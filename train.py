"""Train CCNet.

The paper's recipe, with the ImageNet backbone at dataset/resnet101-imagenet.pth:

    python train.py --data-dir YOUR_CS_PATH --restore-from dataset/resnet101-imagenet.pth \
        --random-mirror --random-scale --input-size 769,769 --batch-size 8 --num-steps 60000 \
        --learning-rate 1e-2 --weight-decay 1e-4 --recurrence 2

Add --ohem --ohem-thres 0.7 --ohem-keep 100000 for online hard example mining. A run that was interrupted goes on
with the same command and --resume.
"""

import argparse
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import EpochSampler, Item, TrainingSet, load_batches, read_list, scan
from libs import ABN
from networks import CCNet, build_model, load_state
from utils.checkpoint import (
    CheckpointError,
    read_state_dict,
    read_training,
    restore_generators,
    save_snapshot,
    snapshot_path,
    training_steps,
)
from utils.commandline import (
    CommandError,
    add_shared_flags,
    boolean,
    check_ignore_label,
    number,
    plain_flags,
    run,
    select_device,
)
from utils.criterion import CriterionDSN, CriterionOhemDSN
from utils.schedule import poly_learning_rate
from utils.training_log import TrainingLog
from utils.visualisation import training_panel


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train CCNet.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_shared_flags(parser)
    add = parser.add_argument
    add("--split", choices=("train", "val", "trainval"), help="images to train on; train, or trainval with --ft")
    add("--batch-size", type=number(int, 1), default=8, help="images a step")
    add("--num-steps", type=number(int, 0), default=40000, help="training steps")
    add("--start-iters", type=number(int, 0), default=0, help="step of the schedule and of the data to begin at")
    add("--learning-rate", type=number(float, 0), default=1e-2, help="at step 0, of the polynomial decay")
    add("--power", type=number(float, 0), default=0.9, help="of the polynomial decay")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="L2 penalty")
    add("--random-mirror", action="store_true", help="mirror every other image")
    add("--random-scale", action="store_true", help="scale images by 0.7 to 2.1")
    add("--random-seed", type=number(int, 0, 2**63 - 1), default=12345, help="of initialisation, data and dropout")
    add(
        "--ohem", type=boolean, nargs="?", const=True, default=False, help="online hard example mining on the main loss"
    )
    add(
        "--ohem-thres", type=number(float, 0, 1), default=0.6, help="true-class probability up to which a pixel is hard"
    )
    add("--ohem-keep", type=number(int, 0), default=200000, help="pixels of a batch kept at least")
    add(
        "--is-training",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="update the running means and variances; without, they are used as they are",
    )
    add("--ft", action="store_true", help="fine-tuning stage: train on trainval with --no-is-training")
    add("--restore-from", type=Path, help="weights to begin with: an ImageNet backbone or a whole network")
    add("--not-restore-last", action="store_true", help="do not restore the last, classifying layers")
    add("--snapshot-dir", type=Path, default=Path("snapshots"), help="folder of the snapshots and the log")
    add("--save-pred-every", type=number(int, 1), default=10000, help="steps between snapshots and between pictures")
    add("--save-num-images", type=number(int, 0), default=2, help="images of the batch to log as pictures")
    add("--print-frequency", type=number(int, 1), default=10, help="steps between logged losses")
    add("--resume", action="store_true", help="go on from the newest snapshot in --snapshot-dir, if there is one")
    return parser


# Flags that may change when a run goes on: they say where and how fast it runs, and what one sees of it.
_FREE_FLAGS = {
    "data_dir", "device", "gpu", "num_workers", "print_frequency", "restore_from", "resume", "save_num_images",
    "save_pred_every", "snapshot_dir",
}  # fmt: skip


def find_items(args: argparse.Namespace) -> list[Item]:
    """The images to train on."""
    if args.data_list is not None:
        return read_list(args.data_dir, args.data_list)
    return scan(args.data_dir, args.split or ("trainval" if args.ft else "train"))


def run_flags(args: argparse.Namespace) -> dict:
    """What defines the run, and has to be the same when it goes on."""
    return {name: value for name, value in plain_flags(args).items() if name not in _FREE_FLAGS}


def restore(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict | None]:
    """Load what the run begins or goes on with. Returns the step, and the training state if it goes on."""
    steps = training_steps(args.snapshot_dir)
    if steps and not args.resume:
        raise CommandError(
            f"--snapshot-dir {args.snapshot_dir}: holds a run at step {steps[-1]}; add --resume to go on with it, "
            "or give another folder"
        )
    if steps:
        return steps[-1], resume(args, model, optimizer, steps[-1])
    if args.restore_from is not None:
        state = read_state_dict(args.restore_from)
        load_state(model, state, str(args.restore_from), restore_last=not args.not_restore_last, allow_backbone=True)
    return args.start_iters, None


def resume(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    """Load the snapshot of a step of the run in --snapshot-dir. Returns its training state."""
    training = read_training(args.snapshot_dir, step)
    # A flag that did not exist yet when the run began is as if it had not been given.
    before, now = run_flags(get_parser().parse_args([])) | training["flags"], run_flags(args)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        lines = [f"    --{name.replace('_', '-')}: was {before.get(name)}, is {now.get(name)}" for name in changed]
        raise CommandError(
            f"--resume: the run in {args.snapshot_dir} was begun with other flags; go on with the same, or give "
            "another --snapshot-dir:\n" + "\n".join(lines)
        )
    path = snapshot_path(args.snapshot_dir, step)
    load_state(model, read_state_dict(path), str(path))
    try:
        optimizer.load_state_dict(training["optimizer"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the optimiser's state beside it does not fit: {error}") from error
    return training


def freeze_statistics(model: nn.Module) -> None:
    """Let every batch norm use its running statistics and leave them as they are."""
    for module in model.modules():
        if isinstance(module, ABN):
            module.eval()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT (Ctrl-C) is as ever."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_DIVERGED = "training has diverged: begin again with a lower --learning-rate and another --snapshot-dir"


def train_step(
    model: CCNet,
    criterion: CriterionDSN,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of SGD. Returns the losses, still on the device, and the main logits."""
    logits = model(images)
    main, auxiliary = criterion.components(logits, labels)
    loss = criterion.combine(main, auxiliary)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return {"total": loss.detach(), "main": main.detach(), "auxiliary": auxiliary.detach()}, logits[0].detach()


def finite_values(losses: dict[str, Tensor], step: int) -> dict[str, float]:
    """The losses as numbers, which waits for the device."""
    values = {name: loss.item() for name, loss in losses.items()}
    if not math.isfinite(values["total"]):
        raise CommandError(f"the loss is {values['total']} at step {step}; {_DIVERGED}")
    return values


def check_weights(model: nn.Module, step: int) -> None:
    """The network is worth saving: no weight or statistic is infinite or NaN."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CommandError(f"{name} is not finite after step {step}; {_DIVERGED}")


def train(args: argparse.Namespace) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that ended training early."""
    device = select_device(args.device, args.gpu)
    check_ignore_label(args.ignore_label, args.num_classes)
    items = find_items(args)
    torch.manual_seed(args.random_seed)
    model = build_model(args.backbone, args.num_classes, args.recurrence, args.backbone_activation).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    first, training = restore(args, model, optimizer)
    if first > args.num_steps:
        raise CommandError(f"--start-iters {first}: expected at most --num-steps {args.num_steps}")
    model.train()
    if args.ft or not args.is_training:
        freeze_statistics(model)
    if training is not None:
        restore_generators(training, device)
    criterion = CriterionDSN(args.ignore_label)
    if args.ohem:
        criterion = CriterionOhemDSN(args.ohem_thres, args.ohem_keep, args.ignore_label)
    print(f"{args.backbone}, R={args.recurrence}, on {device}: {len(items)} images, steps {first} to {args.num_steps}")
    if first == args.num_steps and training is None:  # no step to do: the network as it is
        save_snapshot(model, optimizer, args.snapshot_dir, first, run_flags(args))
    log = TrainingLog(args.snapshot_dir, first, args.num_steps, args.batch_size)
    with stop_requests() as stop, closing(log):
        step = run_steps(args, items, model, criterion, optimizer, first, log, stop)
    if stop and step < args.num_steps:
        print(f"stopped by {signal.Signals(stop[0]).name} at step {step}; go on with --resume")
        return 128 + stop[0]
    print(f"done: {snapshot_path(args.snapshot_dir, step)}")
    return 0


def run_steps(
    args: argparse.Namespace,
    items: list[Item],
    model: CCNet,
    criterion: CriterionDSN,
    optimizer: torch.optim.Optimizer,
    first: int,
    log: TrainingLog,
    stop: list[int],
) -> int:
    """The main loop, from step `first` to the last or until `stop` is not empty. Returns the step reached."""
    device = next(model.parameters()).device
    samples = TrainingSet(
        items, args.input_size, args.ignore_label, args.random_scale, args.random_mirror, args.random_seed
    )
    batches = EpochSampler(len(items), args.batch_size, first, args.num_steps, args.random_seed)
    step = first
    for batch in load_batches(samples, batches, args.num_workers, pin_memory=device.type == "cuda"):
        images = batch["image"].to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = batch["label"].to(device, non_blocking=True)
        learning_rate = poly_learning_rate(args.learning_rate, step, args.num_steps, args.power)
        optimizer.param_groups[0]["lr"] = learning_rate
        losses, logits = train_step(model, criterion, optimizer, images, labels)
        step += 1
        log.advance()
        stopping = bool(stop)  # read once: a signal that comes later is for the next step
        save = step % args.save_pred_every == 0 or step == args.num_steps or stopping
        if save or step % args.print_frequency == 0:  # in other steps nothing waits for the device
            log.scalars(step, learning_rate, finite_values(losses, step))
        if save:
            check_weights(model, step)
            path = save_snapshot(model, optimizer, args.snapshot_dir, step, run_flags(args))
            for i in range(min(args.save_num_images, len(images))):
                log.picture(step, f"image, label, prediction/{i}", training_panel(images[i], labels[i], logits[i]))
            log.message(f"step {step}: {path}")
        if stopping:
            break
    return step


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    sys.exit(run(lambda: train(arguments)))
