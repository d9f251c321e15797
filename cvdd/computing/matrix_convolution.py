"""Convolutions in half precision on a CPU as matrix products, where their weights are large next to their maps.

Only without a compiler, which writes loops of its own for the unfolding that are slower than all the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from cvdd.computing.copies import with_layers
from cvdd.computing.stem import is_square_convolution, places

LARGE_WEIGHT = 2**20
"""Values of a weight from which on it pays to multiply by it, if its map is small."""

LARGE_GRADIENT = 2**17
"""Values of a weight from which on it pays to multiply for its gradient, if its map is small."""

PLACES_OF_A_MAP = 4
"""Such a map has at most so many places for each of its channels."""

PLACES_OF_A_WEIGHT = 8
"""For its gradient, the map that the weight makes has at most so many places for each of its channels."""


class MatrixConvolution(nn.Conv2d):
    """A convolution that is a matrix product where that is faster, and PyTorch's elsewhere.

    oneDNN rearranges a weight in each call, which takes longer than to multiply where maps are small: at eight images
    the gradient of a 3x3 weight with 512 channels takes 4.6 ms in bfloat16, as a product 1.0 ms. Parameters are those
    of the convolution that it stands for, and keep their names.

    Args:
        convolution: see :func:`with_matrix_convolutions`.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(convolution))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        if x.device.type != "cpu" or _type_of(x) != torch.bfloat16:
            return super().forward(x)
        weight = self.weight.to(torch.bfloat16)
        out: Tensor = _Convolve.apply(x.to(torch.bfloat16), weight, self.stride[0], int(self.padding[0]))
        return out


def _type_of(x: Tensor) -> torch.dtype:
    """What PyTorch's convolution would compute in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        height, width = (places(side, weight.shape[2], padding, stride) for side in x.shape[2:])
        if not _multiplies(len(x) * height * width, weight):
            return conv2d(x, weight, None, stride, padding)
        product = _windows(x, weight, stride, padding) @ _matrix(weight).t()
        return product.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
        of_images, of_weight = None, None
        wanted = list(ctx.needs_input_grad[:2])
        if wanted[0] and _multiplies(len(rows), weight):
            wanted[0] = False
            of_images = _folded(rows @ _matrix(weight), x, weight, ctx.stride, ctx.padding)
        if wanted[1] and len(rows) <= PLACES_OF_A_WEIGHT * len(weight):
            wanted[1] = False
            product = rows.t() @ _windows(x, weight, ctx.stride, ctx.padding)
            of_weight = _as_weight(product, weight)
        if any(wanted):
            window = [ctx.stride] * 2, [ctx.padding] * 2, [1] * 2
            rest = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, *window, False, [0] * 2, 1, [*wanted, False]
            )
            of_images, of_weight = (rest[0] if wanted[0] else of_images), (rest[1] if wanted[1] else of_weight)
        return of_images, of_weight, None, None


def _multiplies(positions: int, weight: Tensor) -> bool:
    return weight.numel() >= LARGE_WEIGHT and positions <= PLACES_OF_A_MAP * len(weight)


def _matrix(weight: Tensor) -> Tensor:
    """A weight [d, c, k, k] as a matrix [d, c * k * k], or [d, k * k * c] where that is how it lies in memory."""
    return (weight.permute(0, 2, 3, 1) if _channels_last(weight) else weight).reshape(len(weight), -1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """Undo :func:`_matrix`."""
    if not _channels_last(weight):
        return matrix.view(weight.shape)
    d, c, size, _ = weight.shape
    return matrix.view(d, size, size, c).permute(0, 3, 1, 2)


def _channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous()


def _windows(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Unfold [n, c, h, w]: a row for each window, [n * places, c * k * k], its columns those of :func:`_matrix`."""
    size = weight.shape[2]
    inside = pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = inside.unfold(1, size, stride).unfold(2, size, stride)
    windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, size * size, x.shape[1])
    if not _channels_last(weight):
        # Apart, because together with the unfolding it is three times as slow.
        windows = windows.transpose(1, 2)
    return windows.reshape(-1, weight[0].numel())


def _folded(windows: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Add up what :func:`_windows` has of each place of ``x`` [n, c, h, w]."""
    n, c, height, width = x.shape
    size = weight.shape[2]
    rows, columns = (places(side, size, padding, stride) for side in (height, width))
    if _channels_last(weight):
        cells = windows.view(n, rows, columns, size, size, c)
    else:
        apart = windows.view(-1, c, size * size).transpose(1, 2).contiguous()
        cells = apart.view(n, rows, columns, size, size, c)
    total = x.new_zeros(n, height + 2 * padding, width + 2 * padding, c, dtype=torch.float32)
    for down in range(size):
        for right in range(size):
            total[:, down : down + stride * rows : stride, right : right + stride * columns : stride] += cells[
                :, :, :, down, right
            ]
    inside = total[:, padding : padding + height, padding : padding + width]
    return inside.to(x.dtype, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def with_matrix_convolutions(network: nn.Module) -> nn.Module:
    """Let a network's convolutions be matrix products where that is faster, in place; return it."""
    return with_layers(network, _as_product)


def _as_product(module: nn.Module) -> nn.Module | None:
    if not is_square_convolution(module) or module.groups > 1 or module.bias is not None:
        return None
    return MatrixConvolution(module) if module.weight.numel() >= LARGE_GRADIENT else None
