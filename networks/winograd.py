"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3), with a quarter of the multiplications.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4. An output of 4x4 is
made of an input tile d of 6x6 and the kernel g, both transformed:

    Y = A^T [(G g G^T) * (B^T d B)] A

Summed over channels, the product is one of matrices for each of the 36 positions. A dilated convolution is one of each
of its dilation^2 phases. In float32 the result differs from that of direct summation by a few times its rounding error;
cuDNN computes float32 convolutions this way where it finds it faster, and so this is for the CPU.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_OUT, _IN = 4, 6  # sides of the tiles
_BT: list[list[float]] = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_G: list[list[float]] = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_AT: list[list[float]] = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
# Of 36 positions, the one that A^T.A spreads with factor 1 over the whole output: a bias is added there.
_CONSTANT = 1 * _IN + 1


def _of_both_axes(matrix: list[list[float]]) -> Tensor:
    """What the matrix does to rows and then to columns, as one matrix for the flattened tile."""
    rows = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(rows, rows)


_INPUT, _KERNEL, _OUTPUT = (_of_both_axes(matrix) for matrix in (_BT, _G, _AT))
# Tiles that are transformed at a time: enough for the products, few enough not to take much memory.
_TILES_AT_A_TIME = 640


class _Grid(NamedTuple):
    """How an image is cut into tiles: `rows` x `columns` of them in each of dilation^2 phases."""

    images: int
    height: int
    width: int
    dilation: int
    rows: int
    columns: int

    @classmethod
    def of(cls, x: Tensor, dilation: int) -> "_Grid":
        n, _, height, width = x.shape
        step = _OUT * dilation
        return cls(n, height, width, dilation, -(-height // step), -(-width // step))

    def tiles(self, rows: int) -> int:
        return self.images * self.dilation**2 * rows * self.columns

    def bands(self) -> Iterator[tuple[int, int]]:
        """First and last row of tiles, of parts that are computed one after the other."""
        count = max(1, round(_TILES_AT_A_TIME / self.tiles(1)))
        for first in range(0, self.rows, count):
            yield first, min(first + count, self.rows)


def _matrix(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix.to(like.dtype)


def _transformed_kernel(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] to [36, O, C]."""
    flat = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (_matrix(_KERNEL, weight) @ flat).view(_IN * _IN, *weight.shape[:2])


def _padded(x: Tensor, grid: _Grid) -> Tensor:
    """[N, C, H, W] to [N, (4 rows + 2) dilation, (4 columns + 2) dilation, C]."""
    d = grid.dilation
    bottom, right = (_OUT * grid.rows + 1) * d - grid.height, (_OUT * grid.columns + 1) * d - grid.width
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, d, right, d, bottom))


def _transformed_input(padded: Tensor, grid: _Grid, first: int, last: int) -> Tensor:
    """A band of tiles of the padded image as [36, tiles, C]."""
    d = grid.dilation
    image, row, column, _ = padded.stride()
    channels = padded.shape[3]
    tiles = padded.as_strided(
        (_IN, _IN, grid.images, d, d, last - first, grid.columns, channels),
        (d * row, d * column, image, row, column, _OUT * d * row, _OUT * d * column, 1),
        padded.storage_offset() + first * _OUT * d * row,
    )
    return (_matrix(_INPUT, padded) @ tiles.reshape(_IN * _IN, -1)).view(_IN * _IN, -1, channels)


def _cropped(blocks: Tensor, grid: _Grid, begin: int) -> Tensor:
    """[N, rows, 4, d, columns, 4, d, C] to the image [N, C, H, W] in it, channels_last and not a view: what follows may
    write over it."""
    channels = blocks.shape[-1]
    image = blocks.flatten(4, 6).flatten(1, 3)[:, begin : begin + grid.height, begin : begin + grid.width]
    out = torch.empty(
        (grid.images, channels, grid.height, grid.width), dtype=blocks.dtype, memory_format=torch.channels_last
    )
    return out.copy_(image.permute(0, 3, 1, 2))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        grid = _Grid.of(x, dilation)
        kernel = _transformed_kernel(weight)
        padded = _padded(x, grid)
        d, channels = dilation, len(weight)
        out = x.new_empty(grid.images, grid.rows, _OUT, d, grid.columns, _OUT, d, channels)
        for first, last in grid.bands():
            products = torch.bmm(_transformed_input(padded, grid, first, last), kernel.transpose(1, 2))
            if bias is not None:
                products[_CONSTANT] += bias
            band = _matrix(_OUTPUT, x) @ products.view(_IN * _IN, -1)
            band = band.view(_OUT, _OUT, grid.images, d, d, last - first, grid.columns, channels)
            out[:, first:last] = band.permute(2, 5, 0, 3, 6, 1, 4, 7)
        return _cropped(out, grid, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grid = _Grid.of(x, ctx.dilation)
        d, (out_channels, in_channels) = grid.dilation, weight.shape[:2]
        bottom, right = grid.rows * _OUT * d - grid.height, grid.columns * _OUT * d - grid.width
        grad = F.pad(grad_out.permute(0, 2, 3, 1), (0, 0, 0, right, 0, bottom)).contiguous()
        grad = grad.view(grid.images, grid.rows, _OUT, d, grid.columns, _OUT, d, out_channels)
        kernel = _transformed_kernel(weight) if needs_x else None
        padded = _padded(x, grid) if needs_weight else None
        grad_kernel = x.new_empty(_IN * _IN, out_channels, in_channels) if needs_weight else None
        grad_padded = x.new_zeros(grid.images, grid.rows + 1, _OUT, d, grid.columns + 1, _OUT, d, in_channels)
        for first, last in grid.bands():
            tiles = grad[:, first:last].permute(2, 5, 0, 3, 6, 1, 4, 7).reshape(_OUT * _OUT, -1)
            products = (_matrix(_OUTPUT, x).T @ tiles).view(_IN * _IN, -1, out_channels)
            if padded is not None and grad_kernel is not None:
                band = _transformed_input(padded, grid, first, last)
                grad_kernel.baddbmm_(products.transpose(1, 2), band, beta=float(first > 0))
            if kernel is not None:
                grad_tiles = _matrix(_INPUT, x).T @ torch.bmm(products, kernel).view(_IN * _IN, -1)
                shape = (_IN, _IN, grid.images, d, d, last - first, grid.columns, in_channels)
                _add_tiles(grad_padded, grad_tiles.view(shape), first, last)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = _cropped(grad_padded, grid, d)
        if grad_kernel is not None:
            flat = _matrix(_KERNEL, x).T @ grad_kernel.view(_IN * _IN, -1)
            grad_weight = flat.view(3, 3, out_channels, in_channels).permute(2, 3, 0, 1)
            grad_weight = grad_weight.contiguous(memory_format=torch.channels_last)
        return grad_x, grad_weight, grad_out.sum((0, 2, 3)) if needs_bias else None, None


def _add_tiles(image: Tensor, tiles: Tensor, first: int, last: int) -> None:
    """Add a band of tiles, [6, 6, N, d, d, rows, columns, C], which overlap by 2, to the padded image.

    The image is [N, rows + 1, 4, d, columns + 1, 4, d, C]: the last two rows of a tile are in the next one's place.
    """
    tiles = tiles.permute(2, 5, 0, 3, 6, 1, 4, 7)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows, columns = (slice(4, 6) if next_ else slice(0, 4) for next_ in (down, right))
        part = tiles[:, :, rows, :, :, columns]
        where = image[
            :, first + down : last + down, : part.shape[2], :, right : right + tiles.shape[4], : part.shape[5]
        ]
        where += part


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3 that keeps the size of its input where its stride is 1, and is faster on the CPU.

    Its results differ from those of nn.Conv2d by rounding, in float32 alone.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, bias: bool = False):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_faster_by_winograd(x):
            return super().forward(x)
        return _Winograd.apply(x, self.weight, self.bias, self.dilation[0])

    def _is_faster_by_winograd(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or self.stride != (1, 1) or x.dim() != 4 or x.numel() == 0:
            return False
        if {x.dtype, self.weight.dtype} != {torch.float32} or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        return _relative_cost(_Grid.of(x, self.dilation[0]), *self.weight.shape[:2]) < 0.9


def _relative_cost(grid: _Grid, out_channels: int, in_channels: int) -> float:
    """What this takes of the time of direct summation, about.

    The latter was measured to be as fast as its multiplications allow. Here the products of matrices have 0.7 of that
    rate, and moving a number to or from memory, as often as is counted below, takes as long as 50 multiplications.
    """
    tiles = grid.tiles(grid.rows)
    direct = 9 * grid.images * grid.height * grid.width * out_channels * in_channels
    products = 36 * tiles * out_channels * in_channels / 0.7
    moved = 54 * out_channels * in_channels + tiles * (108 * in_channels + 84 * out_channels)
    return (products + 50 * moved) / direct
