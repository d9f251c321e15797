"""Layers of frozen networks whose kernels for GPUs are the project's own (:mod:`cvdd.gpu_kernels`).

Where each stands, what PyTorch's libraries or its compiler use was measured on an H200 at several times the time in
which the memory could be read (docs/speed.md). On a CPU, where tests run, the same operations are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d
from torch.nn.grad import conv2d_input

ALIGNED = 16
"""Channels are a multiple of this where a kernel reads eight at once."""

THIN = 16
"""Channels of a 1x1 convolution, on one side of it, for which libraries choose badly."""

DEEP = 256
"""Channels on the other side, at most, that a program multiplies at once."""

LARGEST_INDEX = 2**31
"""Places of memory are counted in 32 bits."""


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


# --- depthwise convolutions -------------------------------------------------------------------------------------------


@torch.library.custom_op("cvdd::depthwise", mutates_args=())
def depthwise(x: Tensor, taps: Tensor, padding: int, stride: int) -> Tensor:
    """Convolve each channel of [n, c, h, w] with its own taps [k, k, c] float32."""
    if x.device.type != "cuda":
        return _channels_last(conv2d(x, _as_weight(taps, x), stride=stride, padding=padding, groups=x.shape[1]))
    from cvdd import gpu_kernels

    height, width = (_places(side, len(taps), padding, stride) for side in x.shape[2:])
    return gpu_kernels.depthwise(_channels_last(x), taps, padding, stride, 1, height, width)


@torch.library.custom_op("cvdd::depthwise_back", mutates_args=())
def depthwise_back(gradient: Tensor, taps: Tensor, padding: int, stride: int, height: int, width: int) -> Tensor:
    """Gradient of :func:`depthwise` with respect to its images [n, c, height, width]."""
    if gradient.device.type != "cuda":
        shape = (*gradient.shape[:2], height, width)
        weight = _as_weight(taps, gradient)
        groups = shape[1]
        return _channels_last(conv2d_input(shape, weight, gradient, stride, padding, 1, groups))
    from cvdd import gpu_kernels

    turned = taps.flip(0, 1).contiguous()
    return gpu_kernels.depthwise(_channels_last(gradient), turned, len(taps) - 1 - padding, 1, stride, height, width)


@depthwise.register_fake
def _(x: Tensor, taps: Tensor, padding: int, stride: int) -> Tensor:
    height, width = (_places(side, len(taps), padding, stride) for side in x.shape[2:])
    return x.new_empty((*x.shape[:2], height, width)).to(memory_format=torch.channels_last)


@depthwise_back.register_fake
def _(gradient: Tensor, taps: Tensor, padding: int, stride: int, height: int, width: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:2], height, width)).to(memory_format=torch.channels_last)


def _note_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, taps, ctx.padding, ctx.stride = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(taps)


def _differentiate_depthwise(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (taps,) = ctx.saved_tensors
    return depthwise_back(gradient, taps, ctx.padding, ctx.stride, *ctx.size), None, None, None


depthwise.register_autograd(_differentiate_depthwise, setup_context=_note_depthwise)


def _places(side: int, size: int, padding: int, stride: int) -> int:
    return (side + 2 * padding - size) // stride + 1


def _as_weight(taps: Tensor, like: Tensor) -> Tensor:
    return taps.permute(2, 0, 1)[:, None].to(like.dtype)


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
        out: Tensor = depthwise(x, self.taps, int(self.plain.padding[0]), self.plain.stride[0])
        return out


# --- thin 1x1 convolutions --------------------------------------------------------------------------------------------


@torch.library.custom_op("cvdd::multiply", mutates_args=())
def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the channels of [n, k, h, w] with a matrix [k, m]."""
    if x.device.type != "cuda":
        return _channels_last(conv2d(x, weight.t()[:, :, None, None]))
    from cvdd import gpu_kernels

    return gpu_kernels.multiply(_channels_last(x), weight)


@multiply.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((len(x), weight.shape[1], *x.shape[2:])).to(memory_format=torch.channels_last)


def _note_multiply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_multiply(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors
    return multiply(gradient, weight.t().contiguous()), None


multiply.register_autograd(_differentiate_multiply, setup_context=_note_multiply)


class ThinPointwise(nn.Module):
    """A 1x1 convolution with few channels on one side.

    Args:
        convolution: frozen; see :func:`with_gpu_layers`.
    """

    matrix: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.plain = convolution
        self.register_buffer("matrix", convolution.weight.detach()[:, :, 0, 0].t().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]; in full precision as PyTorch does."""
        out: Tensor
        if x.dtype == torch.float32 or x.numel() // x.shape[1] * max(self.matrix.shape) >= LARGEST_INDEX:
            out = self.plain(x)
        else:
            out = multiply(x, self.matrix)
            out = out if self.plain.bias is None else out + self.plain.bias[:, None, None]
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
    from cvdd import gpu_kernels

    height, width = (_places(side, size, padding, stride) for side in x.shape[2:])
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
    from cvdd import gpu_kernels

    return gpu_kernels.to_largest(_channels_last(gradient), _channels_last(where), size, padding, stride, height, width)


@largest.register_fake
def _(x: Tensor, size: int, padding: int, stride: int) -> tuple[Tensor, Tensor]:
    height, width = (_places(side, size, padding, stride) for side in x.shape[2:])
    values = x.new_empty((*x.shape[:2], height, width)).to(memory_format=torch.channels_last)
    return values, torch.empty_like(values, dtype=torch.uint8)


@largest_back.register_fake
def _(gradient: Tensor, where: Tensor, size: int, padding: int, stride: int, height: int, width: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:2], height, width)).to(memory_format=torch.channels_last)


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
    for name, module in list(network.named_modules()):
        replacement: nn.Module | None = None
        if isinstance(module, nn.Conv2d) and _is_depthwise(module):
            replacement = Depthwise(module)
        elif isinstance(module, nn.Conv2d) and _is_thin(module):
            replacement = ThinPointwise(module)
        elif isinstance(module, nn.MaxPool2d) and _is_plain_pooling(module):
            replacement = Largest(module)
        if replacement is not None:
            network.set_submodule(name, replacement)
    return network


def _is_depthwise(module: nn.Conv2d) -> bool:
    sides = module.kernel_size, module.stride, module.padding, module.dilation
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.in_channels % ALIGNED == 0
        and module.bias is None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(len(set(side)) == 1 for side in sides)
        and module.dilation[0] == 1
        and module.padding[0] < module.kernel_size[0] <= 7
    )


def _is_thin(module: nn.Conv2d) -> bool:
    few, many = sorted((module.in_channels, module.out_channels))
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
        and few <= THIN
        and many <= DEEP
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
