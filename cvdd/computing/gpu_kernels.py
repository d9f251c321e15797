"""Kernels for GPUs, where those of PyTorch's libraries are several times slower than the memory they read.

Images lie in memory channels-last, and are ``[n, h, w, c]`` as the kernels see them. Channels are counted in eights, so
that Triton knows that it may read eight at once. Import this only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = {64: 32, 32: 32, 16: 64, 8: 128}
"""By places of a row that one program computes: channels of each."""


def _tiles(width: int, channels: int, rows: int) -> tuple[int, int, int]:
    """Return places and channels of a program, and the number of programs for so many rows."""
    columns = min(max(triton.next_power_of_2(width), min(TILES)), max(TILES))
    lanes = TILES[columns]
    return columns, lanes, triton.cdiv(channels, lanes) * triton.cdiv(width, columns) * rows


@triton.jit
def _own(channels, out_width, columns: tl.constexpr, lanes: tl.constexpr):
    """Channels and places of a row that a program computes, and the row, counted over all images."""
    program = tl.program_id(0)
    slices, strips = (channels + lanes - 1) // lanes, (out_width + columns - 1) // columns
    c = (program % slices) * lanes + tl.arange(0, lanes)
    j = (program // slices % strips) * columns + tl.arange(0, columns)
    return c, j, program // (slices * strips)


@triton.jit
def _largest(
    x,
    out,
    where,
    height,
    width,
    eights,
    out_height,
    out_width,
    size: tl.constexpr,
    padding: tl.constexpr,
    stride: tl.constexpr,
    columns: tl.constexpr,
    lanes: tl.constexpr,
):
    channels = 8 * eights
    c, j, row = _own(channels, out_width, columns, lanes)
    n, i, known = row // out_height, row % out_height, c < channels
    best = tl.full([columns, lanes], float("-inf"), tl.float32)
    found = tl.full([columns, lanes], 0, tl.int32)
    for k in tl.static_range(size):
        a = i * stride + k - padding
        if (a >= 0) & (a < height):
            for m in tl.static_range(size):
                b = j * stride + m - padding
                inside = ((b >= 0) & (b < width))[:, None] & known[None, :]
                place = ((n * height + a) * width + b)[:, None] * channels + c[None, :]
                values = tl.load(x + place, mask=inside, other=float("-inf")).to(tl.float32)
                better = (values > best) | (values != values)
                best = tl.where(better, values, best)
                found = tl.where(better, k * size + m, found)
    place = (row * out_width + j)[:, None] * channels + c[None, :]
    written = (j < out_width)[:, None] & known[None, :]
    tl.store(out + place, best.to(out.dtype.element_ty), mask=written)
    tl.store(where + place, found.to(tl.uint8), mask=written)


def largest(x: Tensor, size: int, padding: int, stride: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Take the largest value of each window, the first of equal ones.

    Args:
        x: [n, c, h, w] on a GPU, channels-last.
        size: side of a window, up to 15.
        padding: places around, which are never the largest.
        stride: between windows.
        height: of the result.
        width: of the result.

    Returns:
        the values [n, c, height, width], and which place of its window each is: ``row * size + column``, uint8.
    """
    n, c = x.shape[:2]
    shape = (n, c, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    where = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    columns, lanes, programs = _tiles(width, c, n * height)
    _largest[(programs,)](
        x, out, where, x.shape[2], x.shape[3], c // 8, height, width, size, padding, stride, columns, lanes
    )
    return out, where


@triton.jit
def _back(
    gradient,
    beside,
    out,
    height,
    width,
    eights,
    out_height,
    out_width,
    weighted: tl.constexpr,
    size: tl.constexpr,
    padding: tl.constexpr,
    stride: tl.constexpr,
    columns: tl.constexpr,
    lanes: tl.constexpr,
):
    """One row of places: out[n, i, j, c] = sum over k, m of gradient[n, a, b, c], each times what it counts.

    ``a = (i + padding - k) / stride``, where there is no remainder, and ``b`` likewise from j and m. It counts
    ``beside[k, m, c]`` if weighted, or 1 where ``beside[n, a, b, c]`` is ``k * size + m`` and 0 elsewhere.
    """
    channels = 8 * eights
    c, j, row = _own(channels, out_width, columns, lanes)
    n, i, known = row // out_height, row % out_height, c < channels
    total = tl.full([columns, lanes], 0.0, tl.float32)
    for k in tl.static_range(size):
        above = i + padding - k
        a = above // stride
        if (above >= 0) & (a * stride == above) & (a < height):
            for m in tl.static_range(size):
                left = j + padding - m
                b = left // stride
                inside = ((left >= 0) & (b * stride == left) & (b < width))[:, None] & known[None, :]
                place = ((n * height + a) * width + b)[:, None] * channels + c[None, :]
                given = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
                if weighted:
                    tap = tl.load(beside + (k * size + m) * channels + c, mask=known, other=0.0)
                    total += given * tap[None, :]
                else:
                    chosen = tl.load(beside + place, mask=inside, other=255)
                    total += tl.where(chosen == k * size + m, given, 0.0)
    place = (row * out_width + j)[:, None] * channels + c[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(j < out_width)[:, None] & known[None, :])


def depthwise_back(gradient: Tensor, taps: Tensor, padding: int, stride: int, height: int, width: int) -> Tensor:
    """Gradient of a convolution of each channel by itself, with respect to its images.

    Args:
        gradient: [n, c, h, w] of its result, on a GPU, channels-last.
        taps: [k, k, c] float32.
        padding: places around the images.
        stride: between places of the result.
        height: of the images.
        width: of the images.

    Returns:
        [n, c, height, width], channels-last.
    """
    return _launch_back(gradient, taps, True, len(taps), padding, stride, height, width)


def to_largest(
    gradient: Tensor, where: Tensor, size: int, padding: int, stride: int, height: int, width: int
) -> Tensor:
    """Give each window's gradient to its largest value.

    Args:
        gradient: [n, c, h, w] of the windows, on a GPU, channels-last.
        where: as :func:`largest` returned it.
        size: side of a window.
        padding: places around.
        stride: between windows.
        height: of the result.
        width: of the result.

    Returns:
        [n, c, height, width], channels-last.
    """
    return _launch_back(gradient, where, False, size, padding, stride, height, width)


def _launch_back(
    gradient: Tensor, beside: Tensor, weighted: bool, size: int, padding: int, stride: int, height: int, width: int
) -> Tensor:
    n, c, rows, places = gradient.shape
    out = torch.empty(
        (n, c, height, width), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
    )
    columns, lanes, programs = _tiles(width, c, n * height)
    shapes = rows, places, c // 8, height, width
    _back[(programs,)](gradient, beside, out, *shapes, weighted, size, padding, stride, columns, lanes)
    return out
