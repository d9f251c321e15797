"""Layers of frozen networks whose kernels for GPUs are the project's own (:mod:`cvdd.computing.gpu_kernels`).

Each is faster than what PyTorch's libraries and its compiler use, as measured on an H200 (docs/speed.md), because those
stay far below the rate at which memory can be read. On a CPU, where tests run, the same operations are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, max_pool2d
from torch.nn.grad import conv2d_input

from cvdd.computing.copies import with_layers
from cvdd.computing.stem import can_be_folded, is_square_convolution, places

ALIGNED = 8
"""Channels are a multiple of this where a kernel reads eight at once."""

LARGEST_INDEX = 2**31
"""Places of memory are counted in 32 bits."""


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _like(values: Tensor, height: int, width: int) -> Tensor:
    return values.new_empty((*values.shape[:2], height, width)).to(memory_format=torch.channels_last)


# --- depthwise convolutions -------------------------------------------------------------------------------------------


@torch.library.custom_op("cvdd::depthwise_back", mutates_args=())
def depthwise_back(gradient: Tensor, taps: Tensor, padding: int, stride: int, height: int, width: int) -> Tensor:
    """Gradient of a depthwise convolution with taps [k, k, c] float32, for its images [n, c, height, width]."""
    if gradient.device.type != "cuda":
        shape = (*gradient.shape[:2], height, width)
        weight = taps.permute(2, 0, 1)[:, None].to(gradient.dtype)
        return _channels_last(conv2d_input(shape, weight, gradient, stride, padding, 1, shape[1]))
    from cvdd.computing import gpu_kernels

    return gpu_kernels.depthwise_back(_channels_last(gradient), taps, padding, stride, height, width)


@depthwise_back.register_fake
def _(gradient: Tensor, taps: Tensor, padding: int, stride: int, height: int, width: int) -> Tensor:
    return _like(gradient, height, width)


class _Depthwise(torch.autograd.Function):
    """PyTorch's convolution with a gradient of our own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, taps: Tensor, padding: int, stride: int) -> Tensor:
        return conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, taps, ctx.padding, ctx.stride = inputs
        ctx.size = tuple(x.shape[2:])
        ctx.save_for_backward(taps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        return depthwise_back(gradient, taps, ctx.padding, ctx.stride, *ctx.size), None, None, None, None


class Depthwise(nn.Module):
    """A depthwise convolution.

    Args:
        convolution: frozen; see :func:`with_gpu_layers`.
    """

    taps: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.plain = convolution
        taps = convolution.weight.detach()[:, 0].permute(1, 2, 0).float()
        self.register_buffer("taps", taps.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        if x.numel() >= LARGEST_INDEX:
            plain: Tensor = self.plain(x)
            return plain
        padding, stride = int(self.plain.padding[0]), self.plain.stride[0]
        out: Tensor = _Depthwise.apply(x, self.plain.weight, self.taps, padding, stride)
        return out


# --- other convolutions -----------------------------------------------------------------------------------------------


class _Convolve(torch.autograd.Function):
    """PyTorch's convolution, whose gradient of the images alone is PyTorch's too but does not ask for the images.

    PyTorch's own asks for them, whatever is wanted of it. A compiler then keeps the map that goes into every
    convolution, instead of telling from the layer before where it was cut off.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
        return conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding, ctx.groups = inputs
        # Sides that a stride rounds down come back by padding.
        reach = [ctx.stride * (along - 1) + weight.shape[2] - 2 * ctx.padding for along in output.shape[2:]]
        ctx.beyond = [side - reached for side, reached in zip(x.shape[2:], reach, strict=True)]
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        own = conv_transpose2d(gradient, weight, None, ctx.stride, ctx.padding, ctx.beyond, ctx.groups)
        return own, None, None, None, None, None


class Convolution(nn.Module):
    """A convolution.

    Args:
        convolution: frozen; see :func:`with_gpu_layers`.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.plain = convolution

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        plain = self.plain
        padding, stride = int(plain.padding[0]), plain.stride[0]
        out: Tensor = _Convolve.apply(x, plain.weight, plain.bias, stride, padding, plain.groups)
        return out


# --- max-pooling ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cvdd::largest", mutates_args=())
def largest(x: Tensor, size: int, padding: int, stride: int) -> tuple[Tensor, Tensor]:
    """Take the largest value of each window of [n, c, h, w], and which of its places that is (uint8, row by row)."""
    if x.device.type != "cuda":
        values, index = max_pool2d(x, size, stride, padding, return_indices=True)
        height, width = values.shape[2:]
        top = torch.arange(height, device=x.device)[:, None] * stride - padding
        left = torch.arange(width, device=x.device) * stride - padding
        place = (index // x.shape[3] - top) * size + index % x.shape[3] - left
        return _channels_last(values), _channels_last(place.to(torch.uint8))
    from cvdd.computing import gpu_kernels

    height, width = (places(side, size, padding, stride) for side in x.shape[2:])
    return gpu_kernels.largest(_channels_last(x), size, padding, stride, height, width)


@torch.library.custom_op("cvdd::largest_back", mutates_args=())
def largest_back(
    gradient: Tensor, where: Tensor, size: int, padding: int, stride: int, height: int, width: int
) -> Tensor:
    """Gradient of :func:`largest` with respect to its images [n, c, height, width]."""
    if gradient.device.type != "cuda":
        top = torch.arange(gradient.shape[2], device=gradient.device)[:, None] * stride - padding
        left = torch.arange(gradient.shape[3], device=gradient.device) * stride - padding
        index = (where // size + top) * width + where % size + left
        out = gradient.new_zeros((*gradient.shape[:2], height * width))
        return _channels_last(out.scatter_add_(2, index.flatten(2), gradient.flatten(2)).unflatten(2, (height, width)))
    from cvdd.computing import gpu_kernels

    return gpu_kernels.to_largest(_channels_last(gradient), _channels_last(where), size, padding, stride, height, width)


@largest.register_fake
def _(x: Tensor, size: int, padding: int, stride: int) -> tuple[Tensor, Tensor]:
    height, width = (places(side, size, padding, stride) for side in x.shape[2:])
    values = _like(x, height, width)
    return values, torch.empty_like(values, dtype=torch.uint8)


@largest_back.register_fake
def _(gradient: Tensor, where: Tensor, size: int, padding: int, stride: int, height: int, width: int) -> Tensor:
    return _like(gradient, height, width)


def _note_largest(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_largest(ctx: Any, gradient: Tensor, nothing: Tensor | None) -> tuple[Tensor | None, ...]:
    (where,) = ctx.saved_tensors
    return largest_back(gradient, where, *ctx.window, *ctx.size), None, None, None


largest.register_autograd(_differentiate_largest, setup_context=_note_largest)


class Largest(nn.Module):
    """Max-pooling.

    Args:
        pooling: see :func:`with_gpu_layers`.
    """

    def __init__(self, pooling: nn.MaxPool2d) -> None:
        super().__init__()
        self.plain = pooling
        self.window = _one(pooling.kernel_size), _one(pooling.padding), _one(pooling.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Pool [n, c, h, w]."""
        if x.shape[1] % ALIGNED or x.numel() >= LARGEST_INDEX:
            plain: Tensor = self.plain(x)
            return plain
        values: Tensor = largest(x, *self.window)[0]
        return values


# --- the choice -------------------------------------------------------------------------------------------------------


def with_gpu_layers(network: nn.Module) -> nn.Module:
    """Replace layers of a frozen network, in place, where this module has better ones for a GPU; return it."""
    return with_layers(network, _better)


def _better(module: nn.Module) -> nn.Module | None:
    # What can be folded is FoldedStem's, the convolution inside one too.
    if is_square_convolution(module) and not can_be_folded(module):
        return Depthwise(module) if _is_depthwise(module) else Convolution(module)
    if isinstance(module, nn.MaxPool2d) and _is_plain_pooling(module):
        return Largest(module)
    return None


def _is_depthwise(module: nn.Conv2d) -> bool:
    return (
        module.groups == module.in_channels == module.out_channels
        and module.in_channels % ALIGNED == 0
        and module.bias is None
        and int(module.padding[0]) < module.kernel_size[0] <= 7
    )


def _is_plain_pooling(module: nn.MaxPool2d) -> bool:
    sides = module.kernel_size, module.stride, module.padding, module.dilation
    return (
        type(module) is nn.MaxPool2d
        and not module.ceil_mode
        and not module.return_indices
        and all(isinstance(side, int) or len(set(side)) == 1 for side in sides)
        and _one(module.dilation) == 1
        and _one(module.kernel_size) <= 15
    )


def _one(side: Any) -> int:
    return int(side if isinstance(side, int) else side[0])
