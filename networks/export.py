"""Writes the network of a snapshot for other programs.

    python -m networks.export CHECKPOINT OUT.onnx           ONNX, of standard operators only
    python -m networks.export CHECKPOINT OUT.pt2            a program of torch.export
    python -m networks.export CHECKPOINT OUT.safetensors    the weights, and what network they are of

CHECKPOINT is a snapshot of train.py or anything else that `load_model` takes. The first two files are of the network
for prediction, from images [N, 3, H, W] to logits [N, K, h, w], for any N, H and W. Before such a file gets its name it
is read again and compared with the network, on images of other sizes than those that it was exported with.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import DatasetError
from utils.arguments import ArgumentParser, number, size
from utils.checkpoint import CheckpointError, put, write_safetensors, written_aside
from utils.model import load_network
from utils.network_file import describe

from .ccnet import CCNet
from .prediction import PredictionNetwork
from .state_dicts import StateDictError

# Shapes [N, H, W] of the images that a network of any size is exported with and compared on
_EXAMPLE, _COMPARED = (2, 65, 97), ((1, 97, 129), (3, 50, 34))
# torch.export takes sizes of 1 for constants. Below this, those of the features are 1 or 2, and a column has one other
# pixel or none.
_LEAST_SIZE = 15
# Largest difference of logits, as a part of the largest logit
_TOLERANCE = 1e-3


class ExportError(CheckpointError):
    """A network cannot be exported, or what was written computes something else."""


def export(
    checkpoint: Path, out: Path, recurrence: int | None = None, fixed_size: tuple[int, int] | None = None
) -> str:
    """Write the network of a snapshot. Returns a line on what was written.

    Args:
        recurrence: R, in place of that with which it was trained.
        fixed_size: the (height, width) of all images; None for any.

    Raises:
        ExportError: the suffix of `out` is another, a package is missing, the network cannot be exported or computes
            something else when it is read again.
        CheckpointError, StateDictError: as `load_network`; or `out` cannot be written.
    """
    if out.suffix not in _WRITERS:
        raise ExportError(f"{out}: expected a name that ends in {', '.join(_WRITERS)}")
    return _WRITERS[out.suffix](checkpoint, out, recurrence, fixed_size)


def _write_weights(checkpoint: Path, out: Path, recurrence: int | None, fixed_size: tuple[int, int] | None) -> str:
    """All weights, those that only training needs included."""
    if fixed_size is not None:
        raise ExportError(f"{out}: expected no --size, since weights are those of every size")
    network, found = load_network(checkpoint, recurrence)
    # What only the shapes say they still say.
    description = describe(found.config, found.classes) if found.is_described else None
    write_safetensors(network.state_dict(), out, description)
    return f"{out}: {len(network.state_dict())} tensors; {'with' if description else 'without'} a description"


def _write_program(checkpoint: Path, out: Path, recurrence: int | None, fixed_size: tuple[int, int] | None) -> str:
    network = _for_prediction(load_network(checkpoint, recurrence)[0])
    images, sizes = _example(fixed_size)
    program = torch.export.export(network, (images,), dynamic_shapes=(sizes,))

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        with path.open("rb") as file:
            module: Any = torch.export.load(file).module()
        return lambda images: module(images)[0]

    return _write_checked(out, lambda file: torch.export.save(program, file.file), read, network, fixed_size)


def _write_onnx(checkpoint: Path, out: Path, recurrence: int | None, fixed_size: tuple[int, int] | None) -> str:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ExportError(f"{out}: expected the packages {', '.join(missing)}: pip install {' '.join(missing)}")
    model, found = load_network(checkpoint, recurrence)
    if found.config.head == "psp" and fixed_size is None:
        raise ExportError(f"{out}: expected --size HEIGHT,WIDTH, since in ONNX the head psp cannot be for any size")
    network = _for_prediction(model)
    images, sizes = _example(fixed_size)
    program: Any = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=(sizes,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _write_checked(out, lambda file: program.save(file.name, external_data=False), read, network, fixed_size)


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_program, ".safetensors": _write_weights}


def _example(fixed_size: tuple[int, int] | None) -> tuple[Tensor, dict[int, Any]]:
    """Images to export with, and the dimensions of theirs that may have other sizes."""
    count, *pixels = _EXAMPLE
    sizes = {0: torch.export.Dim("batch", min=1)}
    if fixed_size is None:
        sizes |= {2: torch.export.Dim("height", min=_LEAST_SIZE), 3: torch.export.Dim("width", min=_LEAST_SIZE)}
    return torch.zeros(count, 3, *(fixed_size or pixels)), sizes


def _for_prediction(model: CCNet) -> PredictionNetwork:
    """With contiguous weights: torch.export.save warns about others."""
    return PredictionNetwork(model).to(memory_format=torch.contiguous_format)


def _write_checked(
    out: Path,
    write: Callable[[Any], object],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    network: PredictionNetwork,
    fixed_size: tuple[int, int] | None,
) -> str:
    """Write a file, under its name only if what is read of it computes what the network does. Returns a line on it.

    Args:
        write: writes into a temporary file, as of the module tempfile.
        read: of the path, images to logits.
    """
    with written_aside(out, write) as (temporary, _):
        comparison = _compare(read(temporary), network, out, fixed_size)
        put(temporary, out)
    return comparison


def _compare(
    run: Callable[[Tensor], Tensor], network: PredictionNetwork, out: Path, fixed_size: tuple[int, int] | None
) -> str:
    """Compare a file that was read again with the network. Returns a line on it.

    Raises:
        ExportError: logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    difference, largest, shapes = 0.0, 0.0, []
    for count, *pixels in _COMPARED:
        images = 50 * torch.randn(count, 3, *(fixed_size or pixels), generator=generator)
        logits = network(images)[0]
        difference = max(difference, (run(images) - logits).abs().max().item())
        largest = max(largest, logits.abs().max().item())
        shapes.append("x".join(map(str, images.shape)))
    line = (
        f"{out}: largest difference {difference:.1e}, of logits up to {largest:.3g}, on images {' and '.join(shapes)}"
    )
    if not difference <= _TOLERANCE * largest:
        raise ExportError(f"{line}: expected at most {_TOLERANCE:g} of the latter; it is not written")
    return line


def get_parser() -> ArgumentParser:
    parser = ArgumentParser("Write the network of a snapshot for other programs.")
    parser.add_argument("checkpoint", type=Path, help="the snapshot, or other weights of a whole network")
    parser.add_argument("out", type=Path, help="the file to write: .onnx, .pt2 (torch.export) or .safetensors")
    parser.add_argument("--recurrence", type=number(int, 0, 64), help="R; by default that of training")
    parser.add_argument("--size", type=size, metavar="HEIGHT,WIDTH", help="the size of all images; by default any")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args: argparse.Namespace = get_parser().parse_args(arguments)
    try:
        print(export(args.checkpoint, args.out, args.recurrence, args.size))
    except (CheckpointError, StateDictError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
