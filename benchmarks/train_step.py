"""Images/s and memory of training and of evaluation on this machine, beside the plain form of the same network.

    python -m benchmarks.train_step [--parts step evaluation ohem ccl] [--backbone resnet101] [--crops 193 385] ...

Ours is what train.py and evaluate.py run. The plain form is the original's in plain PyTorch: attention as batched
matrix products, nn.BatchNorm2d and ReLU (in place as in the original), NCHW, one tile at a time through the whole
network including the auxiliary head, OHEM on the host with NumPy and SciPy, and the loss read in every step. bfloat16
is torch.autocast for both; our logits are float32. All times of a row are measured in one process, in turns, and are
medians. (If other work runs on the machine, --cpu-time gives steadier numbers, with --threads 1, or with more threads
that do not spin where they wait, by the environment's OMP_WAIT_POLICY=PASSIVE.)

- step: forward, loss, backward and the update of SGD; with --ohem the loss is that with OHEM.
- evaluation: one image by sliding window, with logits at full resolution.
- ohem: forward and backward of the criterion alone, from logits at an eighth of the crop.
- ccl: those of the category consistent loss, from 16 channels at an eighth; the plain form is a loop over the classes.

Before the timing, losses, logits and gradients (without dropout) of all contenders are compared, and the run ends if
they differ. Memory is the peak beyond weights and images: of two training steps (with gradients and the optimiser's
buffers), or of one evaluation; on the CPU each is measured in a new process.
"""

import argparse
import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from cc_attention import CrissCrossAttention
from libs import ABN, to_batchnorm
from networks import BACKBONES, BatchDropout2d, CCNet, NetworkConfig, PredictionNetwork, build_model
from networks.ccnet import CCL_CHANNELS
from networks.resnet import BasicBlock, Bottleneck
from utils.arguments import ArgumentParser
from utils.category_consistency import ALPHA, BETA, DELTA_D, DELTA_V, GAMMA, category_consistent_loss
from utils.criterion import AUXILIARY_WEIGHT, CriterionDSN, CriterionOhemDSN
from utils.inference import sliding_predictor
from utils.precision import in_mixed_precision
from utils.training import make_optimizer

from .criss_cross import bmm_attention
from .measuring import (
    DTYPES,
    Work,
    add_fresh_memory,
    begin,
    bytes_from_a_new_process,
    peak_bytes,
    print_machine,
    print_table,
    take_turns,
)

# Largest norm of the difference over the norm, for results and for gradients. In bfloat16, rounding grows over a
# hundred layers: both forms differ from float64 by 0.06 in the logits and 0.2 in gradients. In float32 the difference
# comes from few elements that are so near to 0 that rounding decides over their sign.
AGREEMENT = {torch.float32: (1e-3, 2e-2), torch.bfloat16: (0.1, 0.4)}
CLASSES, VOID = 19, 255
THRESHOLD, KEPT = 0.7, 100_000  # OHEM's, as recommended
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4  # low, since the labels are random
PARTS = ("step", "evaluation", "ohem", "ccl")
KINDS = ("plain", "ours")
Criterion = Callable[[list[Tensor], Tensor], Tensor]


# ---- the plain form ----


class PlainAttention(nn.Module):
    """Criss-cross attention in plain PyTorch, with the convolutions and gamma of a given module."""

    def __init__(self, attention: CrissCrossAttention):
        super().__init__()
        self.query_conv, self.key_conv = attention.query_conv, attention.key_conv
        self.value_conv, self.gamma = attention.value_conv, attention.gamma

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * bmm_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x)) + x


def plain_network(backbone: str, recurrence: int) -> nn.Module:
    """The network of torch's own modules, NCHW; its state dict has the names of `to_batchnorm`."""
    network = to_batchnorm(CCNet(NetworkConfig(backbone, recurrence=recurrence, num_classes=CLASSES)))
    network.head.cca = PlainAttention(network.head.cca)  # type: ignore[union-attr, arg-type]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchDropout2d):
                setattr(module, name, nn.Dropout2d(child.p))
            if isinstance(child, nn.LeakyReLU | nn.ReLU):
                child.inplace = True
    return network


def plain_criterion(preds: list[Tensor], target: Tensor, ohem: bool = False) -> Tensor:
    main, auxiliary = (
        F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=True) for logits in preds
    )
    target = target.long()
    main_target = only_hard_pixels(F.softmax(main, dim=1), target) if ohem else target
    main_loss = F.cross_entropy(main, main_target, ignore_index=VOID)
    return main_loss + AUXILIARY_WEIGHT * F.cross_entropy(auxiliary, target, ignore_index=VOID)


def only_hard_pixels(probability: Tensor, target: Tensor) -> Tensor:
    """The target [N, H, W] with void where the pixel is not hard; computed on the host."""
    on_host, labels = probability.detach().float().cpu().numpy(), target.cpu().numpy().copy()
    threshold = threshold_on_the_host(on_host, labels)
    valid = labels != VOID
    true_class = np.moveaxis(on_host, 1, 0)[:, valid][labels[valid], np.arange(valid.sum())]
    labels[valid] = np.where(true_class <= threshold, labels[valid], VOID)
    return torch.from_numpy(labels).to(target.device)


def threshold_on_the_host(probability: np.ndarray, labels: np.ndarray) -> float:
    small = ndimage.zoom(probability, (1, 1, 1 / 8, 1 / 8), order=1)
    small_labels = ndimage.zoom(labels, (1, 1 / 8, 1 / 8), order=0)
    valid = small_labels != VOID
    kept = KEPT // 64
    if kept >= valid.sum():
        return 1.0
    true_class = np.moveaxis(small, 1, 0)[:, valid][small_labels[valid], np.arange(valid.sum())]
    return max(THRESHOLD, float(np.partition(true_class, kept - 1)[kept - 1]))


def plain_category_consistent_loss(features: Tensor, labels: Tensor) -> Tensor:
    """features [N, C, h, w], labels [N, h, w]."""
    pixels = features.movedim(1, -1)
    classes = [pixels[labels == k] for k in labels.unique().tolist() if k != VOID]
    means = torch.stack([h.mean(0) for h in classes])
    var = features.new_zeros(())
    for h, mean in zip(classes, means, strict=True):
        distance = (h - mean).norm(dim=1)
        far = distance - DELTA_D + (DELTA_D - DELTA_V) ** 2
        var = var + torch.where(distance > DELTA_D, far, (distance - DELTA_V).clamp(min=0) ** 2).mean()
    pairs = torch.pdist(means)  # each once
    dis = ((2 * DELTA_D - pairs).clamp(min=0) ** 2).mean()
    return ALPHA * var / len(classes) + BETA * dis + GAMMA * means.norm(dim=1).mean()


def plain_sliding_predictor(network: nn.Module, tile: int) -> Callable[[Tensor], Tensor]:
    """Like `sliding_predictor`, for images no smaller than the tile."""
    stride = math.ceil(tile * 2 / 3)

    def starts(length: int) -> list[int]:
        return [min(i * stride, length - tile) for i in range(math.ceil((length - tile) / stride) + 1)]

    def predict(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        total = images.new_zeros(len(images), CLASSES, height, width)
        count = images.new_zeros(1, 1, height, width)
        for top, left in itertools.product(starts(height), starts(width)):
            where = (..., slice(top, top + tile), slice(left, left + tile))
            logits = network(images[where].contiguous())[0]
            total[where] += F.interpolate(logits, size=(tile, tile), mode="bilinear", align_corners=True)
            count[where] += 1
        return total / count

    return predict


# ---- what is measured ----


def autocast(device: str, kind: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """For the plain form: autocast around network and loss. Ours has it around the network, by `mixed_precision`."""
    return torch.autocast(device, dtype, enabled=kind == "plain" and dtype != torch.float32)


def mixed_precision(network: nn.Module, device: str, dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
    return in_mixed_precision(network, torch.device(device), "bf16" if dtype == torch.bfloat16 else "off")


def random_network(args: argparse.Namespace, kind: str) -> nn.Module:
    """The network of that kind, always with the same weights.

    Norms differ from their initial values, and gamma is not 0. What blocks add to their shortcuts is small, as in a
    trained network; otherwise rounding in bfloat16 would grow over a hundred layers until results are arbitrary.
    """
    torch.manual_seed(0)
    ours = build_model(args.backbone, CLASSES, args.recurrence)
    with torch.no_grad():
        ours.head.get_parameter("cca.gamma").fill_(0.5)
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1 and ("bn" in name or ".1." in name):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for block in ours.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                last.weight.mul_(0.1)
    if kind == "ours":
        return ours.to(memory_format=torch.channels_last).to(args.device)
    plain = plain_network(args.backbone, args.recurrence)
    state = to_batchnorm(ours).state_dict()
    plain.load_state_dict(state)
    return plain.to(args.device)


def random_images(args: argparse.Namespace, kind: str, *size: int) -> Tensor:
    images = torch.randn(size, generator=torch.Generator().manual_seed(1))
    memory_format = torch.channels_last if kind == "ours" else torch.contiguous_format
    return images.to(args.device).contiguous(memory_format=memory_format)


def random_labels(args: argparse.Namespace, *size: int) -> Tensor:
    """Random labels, uint8, in squares of 16 pixels, some of them void."""
    generator = torch.Generator().manual_seed(2)
    n, height, width = size
    labels = torch.randint(CLASSES + 1, (n, height // 16 + 1, width // 16 + 1), generator=generator)
    labels = torch.where(labels == CLASSES, VOID, labels).repeat_interleave(16, 1).repeat_interleave(16, 2)
    return labels[:, :height, :width].to(args.device, torch.uint8).contiguous()


def criterion_of(kind: str, ohem: bool) -> Criterion:
    if kind == "plain":
        return partial(plain_criterion, ohem=ohem)
    return CriterionOhemDSN(THRESHOLD, KEPT, VOID) if ohem else CriterionDSN(VOID)


class Training:
    """A network in training, always on the same batch."""

    def __init__(self, args: argparse.Namespace, kind: str, crop: int, dtype: torch.dtype):
        self.device, self.kind, self.dtype = args.device, kind, dtype
        self.network = random_network(args, kind).train()
        self.forward: Callable[[Tensor], list[Tensor]] = self.network
        if kind == "ours":
            self.forward = mixed_precision(self.network, args.device, dtype)
        self.images = random_images(args, kind, args.batch_size, 3, crop, crop)
        self.labels = random_labels(args, args.batch_size, crop, crop)
        self.criterion = criterion_of(kind, args.ohem)
        if kind == "ours":
            self.optimizer = make_optimizer(self.network, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY)
        else:
            self.optimizer = torch.optim.SGD(
                self.network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
            )

    def loss(self) -> tuple[Tensor, list[Tensor]]:
        with autocast(self.device, self.kind, self.dtype):
            logits = self.forward(self.images)
            return self.criterion(logits, self.labels), logits

    def step(self) -> None:
        loss, _ = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.kind == "plain":
            loss.item()

    def results(self) -> dict[str, Tensor]:
        """Loss, logits and gradients of a forward and backward pass in training mode, without dropout."""
        for module in self.network.modules():
            if isinstance(module, nn.Dropout2d):
                module.eval()
        loss, logits = self.loss()
        loss.backward()
        results = {"loss": loss.detach(), "main logits": logits[0].detach(), "auxiliary logits": logits[1].detach()}
        for name in ("head.bottleneck.0.weight", "dsn.0.weight"):
            gradient = self.network.get_parameter(name).grad
            assert gradient is not None
            results[f"gradient of {name}"] = gradient
        self.network.zero_grad(set_to_none=True)
        self.network.train()
        return results


class Evaluation:
    """Prediction of one image by sliding window."""

    def __init__(self, args: argparse.Namespace, kind: str, dtype: torch.dtype):
        self.device, self.kind, self.dtype = args.device, kind, dtype
        self.image = random_images(args, kind, 1, 3, *args.image)
        network = random_network(args, kind)
        learn_statistics(network, random_images(args, kind, 2, 3, 97, 97))
        network.eval()
        if kind == "ours":
            assert isinstance(network, CCNet)
            prediction = mixed_precision(PredictionNetwork(network), args.device, dtype)
            self.predict = sliding_predictor(prediction, (args.tile, args.tile))
        else:
            self.predict = plain_sliding_predictor(network, args.tile)

    @torch.no_grad()
    def logits(self) -> Tensor:
        with autocast(self.device, self.kind, self.dtype):
            return self.predict(self.image)


@torch.no_grad()
def learn_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics to those of the images; with the initial ones logits would overflow."""
    network.train()
    for module in network.modules():
        if isinstance(module, ABN | nn.BatchNorm2d):
            module.momentum = 1.0
    network(images)


class Losses:
    """The criterion alone: forward and backward from logits at an eighth of the crop."""

    def __init__(self, args: argparse.Namespace, kind: str, ohem: bool, crop: int, dtype: torch.dtype):
        side = math.ceil(crop / 8)
        memory_format = torch.channels_last if kind == "ours" else torch.contiguous_format
        self.labels = random_labels(args, args.batch_size, crop, crop)
        self.preds = [
            logits.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            for logits in self._logits(args, side)
        ]
        self.criterion = criterion_of(kind, ohem)
        self.kind = kind

    def _logits(self, args: argparse.Namespace, side: int) -> list[Tensor]:
        """Random logits that are right for most pixels, as in training."""
        small = F.interpolate(self.labels[:, None].float(), size=(side, side))[:, 0].long()
        right = F.one_hot(small.clamp(max=CLASSES), CLASSES + 1)[..., :CLASSES].permute(0, 3, 1, 2).float()
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(2, *right.shape, generator=generator).to(args.device)
        return [4 * right + noise[0], 4 * right + noise[1]]

    def results(self) -> dict[str, Tensor]:
        # As `in_mixed_precision` gives them
        preds = [logits.float() for logits in self.preds] if self.kind == "ours" else self.preds
        loss = self.criterion(preds, self.labels)
        main, auxiliary = torch.autograd.grad(loss, self.preds)
        return {"loss": loss.detach(), "gradient of main": main, "gradient of auxiliary": auxiliary}


class Consistency:
    """The category consistent loss alone: forward and backward from features at an eighth of the crop."""

    def __init__(self, args: argparse.Namespace, kind: str, crop: int, dtype: torch.dtype):
        side = math.ceil(crop / 8)
        self.kind, self.labels = kind, random_labels(args, args.batch_size, crop, crop)
        small = random_images(args, kind, args.batch_size, CCL_CHANNELS, side, side)
        self.features = small.to(dtype).requires_grad_()

    def results(self) -> dict[str, Tensor]:
        features = self.features.float()  # as in mixed precision
        if self.kind == "ours":
            loss = category_consistent_loss(features, self.labels, CLASSES, VOID)
        else:
            crop, side = self.labels.shape[1], features.shape[2]
            nearest = (torch.linspace(0, crop - 1, side, device=features.device) + 0.5).floor().long()
            loss = plain_category_consistent_loss(features, self.labels[:, nearest][:, :, nearest])
        (gradient,) = torch.autograd.grad(loss, self.features)
        return {"loss": loss.detach(), "gradient of the features": gradient}


def check(name: str, actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """End the run unless the results agree with the expected ones."""
    for what, x in expected.items():
        difference = ((actual[what].double() - x.double()).norm() / x.double().norm()).item()
        if not difference <= AGREEMENT[dtype][what.startswith("gradient")]:
            raise SystemExit(f"{name}: {what} differs by {difference:.1e}: no times are printed")


# ---- memory ----


def memory_work(args: argparse.Namespace, part: str, kind: str, crop: int, dtype: torch.dtype) -> Work:
    """The work whose memory is measured. Runs a small form of it first, so that lazily loaded code is not counted."""
    small = copy.copy(args)
    small.backbone, small.image, small.tile = "resnet18", (65, 65), 65
    if part == "evaluation":
        Evaluation(small, kind, dtype).logits()
        return Evaluation(args, kind, dtype).logits
    Training(small, kind, 65, dtype).step()
    training = Training(args, kind, crop, dtype)

    def two_steps() -> None:
        training.step()
        training.step()

    return two_steps


def peak_in_a_new_process(args: argparse.Namespace, part: str, kind: str, crop: int, dtype_name: str) -> int:
    """`peak_bytes` of a part, on the CPU in a new process."""
    if args.device == "cuda":
        return peak_bytes(args.device, memory_work(args, part, kind, crop, DTYPES[dtype_name]))
    arguments = [
        *("--memory-of", part, kind, "--crops", str(crop), "--dtypes", dtype_name, "--backbone", args.backbone),
        *("--batch-size", str(args.batch_size), "--recurrence", str(args.recurrence), "--threads", str(args.threads)),
        *("--image", "x".join(map(str, args.image)), "--tile", str(args.tile), *(["--ohem"] if args.ohem else [])),
        *(["--fresh-memory"] if args.fresh_memory else []),
    ]
    return bytes_from_a_new_process("benchmarks.train_step", *arguments)


def megabytes(args: argparse.Namespace, part: str, kind: str, crop: int, dtype_name: str) -> str:
    if not args.memory:
        return "-"
    return f"{peak_in_a_new_process(args, part, kind, crop, dtype_name) / 1e6:.0f}"


# ---- the tables ----

HEADER = ["", "", "plain, ms", "ours, ms", "plain, images/s", "ours, images/s", "ours : plain", "ours : plain float32"]
MEMORY_HEADER = ["plain, MB", "ours, MB"]


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.cpu_time else time.perf_counter


def rows_of(
    args: argparse.Namespace, part: str, what: str, works: dict[tuple[str, str], Work], images: int, crop: int
) -> Iterable[list[str]]:
    """One row for each dtype; `works` is by dtype and kind."""
    names = {f"{dtype_name} {kind}": work for (dtype_name, kind), work in works.items()}
    ms = take_turns(names, args.repeats, args.seconds, args.device, clock=clock_of(args))
    for dtype_name in args.dtypes:
        plain, ours = ms[f"{dtype_name} plain"], ms[f"{dtype_name} ours"]
        in_float32 = ms.get("float32 plain")
        yield [
            what,
            dtype_name,
            f"{plain:.0f}",
            f"{ours:.0f}",
            f"{1e3 * images / plain:.3f}",
            f"{1e3 * images / ours:.3f}",
            f"{plain / ours:.2f}x",
            f"{in_float32 / ours:.2f}x" if in_float32 else "-",
            *(megabytes(args, part, kind, crop, dtype_name) for kind in KINDS),
        ]


def step_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for crop in args.crops:
        works: dict[tuple[str, str], Work] = {}
        for dtype_name in args.dtypes:
            dtype = DTYPES[dtype_name]
            trainings = {kind: Training(args, kind, crop, dtype) for kind in KINDS}
            expected = trainings["plain"].results()
            check(f"ours, {dtype_name}", trainings["ours"].results(), expected, dtype)
            works |= {(dtype_name, kind): training.step for kind, training in trainings.items()}
        yield from rows_of(args, "step", f"{args.batch_size}x3x{crop}x{crop}", works, args.batch_size, crop)


def evaluation_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    works: dict[tuple[str, str], Work] = {}
    for dtype_name in args.dtypes:
        dtype = DTYPES[dtype_name]
        small = copy.copy(args)
        small.image = (min(args.image[0], args.tile), min(args.image[1], args.tile + 9))  # two tiles at most
        logits = {kind: {"logits": Evaluation(small, kind, dtype).logits()} for kind in KINDS}
        check(f"ours, {dtype_name}", logits["ours"], logits["plain"], dtype)
        works |= {(dtype_name, kind): Evaluation(args, kind, dtype).logits for kind in KINDS}
    yield from rows_of(args, "evaluation", "x".join(map(str, args.image)), works, 1, args.crops[0])


def ohem_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for crop, dtype_name in itertools.product(args.ohem_crops, args.dtypes):
        dtype = DTYPES[dtype_name]
        losses = {(kind, ohem): Losses(args, kind, ohem, crop, dtype) for kind in KINDS for ohem in (False, True)}
        for ohem in (False, True):
            expected = losses["plain", ohem].results()
            check(f"ours, {dtype_name}", losses["ours", ohem].results(), expected, dtype)
        names: dict[str, Work] = {f"{kind} {ohem}": item.results for (kind, ohem), item in losses.items()}
        names["cross-entropy"] = partial(plain_cross_entropy, losses["plain", False])
        ms = take_turns(names, max(args.repeats, 15), args.seconds, args.device, clock=clock_of(args))
        one = ms["cross-entropy"]
        costs = {kind: ms[f"{kind} True"] - ms[f"{kind} False"] for kind in KINDS}
        yield [
            f"{args.batch_size}x{CLASSES}x{crop}x{crop}",
            dtype_name,
            f"{one:.1f}",
            *(f"{ms[f'{kind} {ohem}']:.1f}" for kind in KINDS for ohem in (False, True)),
            *(f"{costs[kind]:.1f} ({costs[kind] / one:.2f}x)" for kind in KINDS),
        ]


def ccl_rows(args: argparse.Namespace) -> Iterable[list[str]]:
    for crop, dtype_name in itertools.product(args.ohem_crops, args.dtypes):
        dtype = DTYPES[dtype_name]
        losses = {kind: Consistency(args, kind, crop, dtype) for kind in KINDS}
        check(f"ours, {dtype_name}", losses["ours"].results(), losses["plain"].results(), dtype)
        names: dict[str, Work] = {kind: item.results for kind, item in losses.items()}
        names["cross-entropy"] = partial(plain_cross_entropy, Losses(args, "plain", False, crop, dtype))
        ms = take_turns(names, max(args.repeats, 15), args.seconds, args.device, clock=clock_of(args))
        yield [
            f"{args.batch_size}x{CLASSES}x{crop}x{crop}",
            dtype_name,
            f"{ms['cross-entropy']:.1f}",
            *(f"{ms[kind]:.1f} ({ms[kind] / ms['cross-entropy']:.3f}x)" for kind in KINDS),
        ]


def plain_cross_entropy(losses: Losses) -> None:
    """Forward and backward of cross-entropy, of the main logits alone."""
    main, target = losses.preds[0], losses.labels
    logits = F.interpolate(main, size=target.shape[1:], mode="bilinear", align_corners=True)
    torch.autograd.grad(F.cross_entropy(logits, target.long(), ignore_index=VOID), main)


def sides(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = ArgumentParser("Training and evaluation beside the plain form of the network.")
    add = parser.add_argument
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--backbone", default="resnet101", choices=BACKBONES)
    add("--recurrence", type=int, default=2)
    add("--crops", type=int, nargs="+", default=[193, 385], help="sides of the training crops")
    add("--batch-size", type=int, default=2)
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--ohem", action="store_true", help="train with online hard example mining")
    add("--image", type=sides, default=(1024, 2048), metavar="HxW", help="size of the image that is evaluated")
    add("--tile", type=int, default=769, help="side of the sliding window's tiles")
    add("--ohem-crops", type=int, nargs="+", default=[193, 385, 769], help="sides of the crops of the criterion alone")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=5)
    add("--seconds", type=float, default=60, help="limit for one contender, which runs at least once")
    add("--cpu-time", action="store_true", help="measure CPU time, for when other work runs")
    add_fresh_memory(parser)
    add("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)  # measure one contender and print the bytes
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        raise SystemExit(
            "--cpu-time: expected --threads 1 or OMP_WAIT_POLICY=PASSIVE, since threads that wait take time"
        )
    begin(args.device, args.fresh_memory)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        part, kind = args.memory_of
        print(peak_bytes("cpu", memory_work(args, part, kind, args.crops[0], DTYPES[args.dtypes[0]])))
        return
    print_machine(
        args.device,
        f"{args.backbone}, R={args.recurrence}, {'CPU time of ' if args.cpu_time else ''}{args.threads} threads",
    )
    if "step" in args.parts:
        title = f"A training step{' with OHEM' if args.ohem else ''}: medians, and peak memory of two steps."
        print_table(title, HEADER + MEMORY_HEADER, step_rows(args))
    if "evaluation" in args.parts:
        title = f"Evaluation of an image by tiles of {args.tile}x{args.tile}: medians, and peak memory."
        print_table(title, HEADER + MEMORY_HEADER, evaluation_rows(args))
    if "ohem" in args.parts:
        title = (
            "The criterion, forward and backward: milliseconds; OHEM's cost, also as a part of what one plain "
            "cross-entropy takes (one head, upsampling included)."
        )
        names = [f"{kind}{with_ohem}" for kind in KINDS for with_ohem in ("", " with OHEM")]
        costs = [f"OHEM's cost, {kind}" for kind in KINDS]
        print_table(title, ["", "", "one cross-entropy", *names, *costs], ohem_rows(args))
    if "ccl" in args.parts:
        title = (
            "The category consistent loss, forward and backward: milliseconds, also as a part of what one plain "
            "cross-entropy takes."
        )
        print_table(title, ["", "", "one cross-entropy", *KINDS], ccl_rows(args))


if __name__ == "__main__":
    main()
