"""What context is worth: accuracy on objects whose class is given only by a distant part of the image, for each head.

    python -m benchmarks.context

trains a small network with each head and several seeds on generated scenes and measures, on new scenes, for how many
pixels of the ambiguous vehicle (bus or truck, dataset/scenes.py) it predicts the right one of the two. Only these are
trained; the rest is void. The backbone is shallow: for the pixels that are counted the cue, which gives the class, is
outside the receptive field without context. This is verified. So the head none can only guess (0.5). With one pass of
criss-cross attention (R=1) a pixel gathers from its row and column, with two (R=2) and with full attention (nonlocal)
from everywhere; psp and aspp gather means over parts of the image and over all of it.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import CITYSCAPES, IGNORE_LABEL
from dataset.scenes import Scene, make_scene
from dataset.transforms import normalise
from utils.arguments import ArgumentParser
from utils.criterion import upsample

from .cost import HEADS, named_head

_SIZE = 96
_SCENES = {"training": 1600, "test": 300}
_CLASSES = torch.tensor([CITYSCAPES.names.index("bus"), CITYSCAPES.names.index("truck")])


class ShallowNetwork(nn.Module):
    """Three convolutions of stride 2 and a head, by its name or R=...; logits [N, 19, H, W]."""

    def __init__(self, head: str):
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, out_channels in ((3, 32), (32, 64), (64, 256)):
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.head = named_head(head, 256, len(CITYSCAPES))

    def forward(self, images: Tensor) -> Tensor:
        return upsample(self.head(self.backbone(images / 64)), images.shape[2:])


def make_scenes(split: int, count: int) -> tuple[list[Scene], Tensor, Tensor]:
    """Scenes, their images [count, 3, 96, 96] and labels [count, 96, 96], which are void except on bus and truck."""
    scenes = [make_scene(_SIZE, _SIZE, np.random.default_rng([split, number])) for number in range(count)]
    images = torch.from_numpy(np.stack([normalise(scene.image) for scene in scenes]))
    labels = torch.from_numpy(np.stack([CITYSCAPES.train_ids(scene.label) for scene in scenes])).long()
    return scenes, images, torch.where(torch.isin(labels, _CLASSES), labels, IGNORE_LABEL)


def reach_without_attention() -> int:
    """The largest distance, in pixels, of an input pixel that an output without context depends on, by gradients."""
    network = ShallowNetwork("none").eval()
    reach = 0
    for position in range(_SIZE // 2 - 8, _SIZE // 2 + 8):
        image = torch.rand(1, 3, _SIZE, _SIZE, requires_grad=True)
        logits = network(image)
        (gradient,) = torch.autograd.grad(logits[0, :, position, position].abs().sum(), image)
        touched = gradient[0].abs().amax(0).nonzero()
        reach = max(reach, int((touched - position).abs().max()))
    return reach


def out_of_reach(scene: Scene, reach: int) -> np.ndarray:
    """bool [96, 96]: the pixels of the vehicle that are farther than `reach` from the whole cue."""
    rows, columns = np.mgrid[:_SIZE, :_SIZE]
    cue, vehicle = scene.cue, scene.vehicle
    distance = np.maximum(
        np.maximum(cue.top - rows, rows - cue.bottom + 1), np.maximum(cue.left - columns, columns - cue.right + 1)
    )
    within = (rows >= vehicle.top) & (rows < vehicle.bottom) & (columns >= vehicle.left) & (columns < vehicle.right)
    return within & (distance > reach)


def train(network: ShallowNetwork, images: Tensor, labels: Tensor, steps: int, batch_size: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        loss = F.cross_entropy(network(images[chosen]), labels[chosen], ignore_index=IGNORE_LABEL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: ShallowNetwork, images: Tensor, labels: Tensor, counted: Tensor) -> float:
    """Fraction of the counted pixels for which the right one of bus and truck has the larger logit."""
    network.eval()
    right = 0
    for batch in torch.arange(len(images)).split(50):
        chosen = _CLASSES[network(images[batch])[:, _CLASSES].argmax(1)]
        right += int(((chosen == labels[batch]) & counted[batch]).sum())
    return right / int(counted.sum())


def plot(results: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.2), layout="constrained")
    means = [float(np.mean(values)) for values in results.values()]
    axes.bar(
        list(results), means, color=["#1f5fa8" if name.startswith("R=") else "#9aa0a6" for name in results], width=0.6
    )
    for number, values in enumerate(results.values()):
        axes.plot([number] * len(values), values, "k.", markersize=5)
        axes.annotate(
            f"{means[number]:.2f}", (number, means[number]), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="guessing")
    axes.set(ylim=(0, 1.15), ylabel="accuracy, bus or truck", title="Class told by a cue far away")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = ArgumentParser("Accuracy on objects told by far context, for each head.")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each network")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="networks trained with each head")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/context.png"), help="the plot")
    args = parser.parse_args()

    _, training_images, training_labels = make_scenes(0, _SCENES["training"])
    scenes, images, labels = make_scenes(1, _SCENES["test"])
    reach = reach_without_attention()
    counted = torch.from_numpy(np.stack([out_of_reach(scene, reach) for scene in scenes]))
    print(f"{_SCENES['test']} test scenes; without context a pixel depends on what is up to {reach} pixels away")
    print(f"counted: {int(counted.sum())} of {int((labels != IGNORE_LABEL).sum())} vehicle pixels, out of that reach\n")
    print("| head | accuracy, mean | least | most | training, s |\n|:--|--:|--:|--:|--:|")
    results: dict[str, list[float]] = {}
    for head in args.heads:
        start = time.perf_counter()
        results[head] = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            network = ShallowNetwork(head)
            train(network, training_images, training_labels, args.steps, args.batch_size)
            results[head].append(accuracy(network, images, labels, counted))
        seconds = (time.perf_counter() - start) / args.seeds
        values = results[head]
        print(f"| {head} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} | {seconds:.0f} |", flush=True)
    plot(results, args.output)
    print(f"\nplot: {args.output}")


if __name__ == "__main__":
    main()
