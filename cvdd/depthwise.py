"""Depthwise convolutions of frozen networks, written so that their gradient is fast in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.fused_bn import as_type


class SlicedDepthwise(nn.Conv2d):
    """A strided depthwise convolution that computes all places and keeps those that the stride asks for.

    oneDNN has no kernel for the strided gradient in bfloat16 and falls back to one that is 90 to 300 times slower than
    the forward pass; with all places computed there is one. Parameters are shared.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, 1, groups=convolution.groups)
        for name in ("weight", "bias", "padding", "dilation", "kernel_size", "padding_mode"):
            setattr(self, name, getattr(convolution, name))
        self._reversed_padding_repeated_twice = convolution._reversed_padding_repeated_twice
        self.kept = convolution.stride

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        down, right = self.kept
        return super().forward(x)[:, :, ::down, ::right]


class StencilDepthwise(nn.Module):
    """A depthwise convolution as a sum over the cells of its kernel, which a compiler makes one pass over the map.

    Weight and bias are shared, and have no gradient.

    Args:
        convolution: with as many outputs as inputs, zeros around the map and no dilation.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert is_plain_depthwise(convolution)
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride = (convolution.stride[0], convolution.stride[1])
        self.padding = (int(convolution.padding[0]), int(convolution.padding[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        out: Tensor = _Stencil.apply(x, self.weight, self.stride, self.padding)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class _Stencil(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        (rows, columns), (down, right) = weight.shape[-2:], padding
        padded = nn.functional.pad(x, (right, right, down, down))
        high = (padded.shape[2] - rows) // stride[0] * stride[0] + 1
        wide = (padded.shape[3] - columns) // stride[1] * stride[1] + 1

        def cell(i: int, j: int) -> Tensor:
            return padded[:, :, i : i + high : stride[0], j : j + wide : stride[1]]

        return _weighted(weight, cell, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.shape = x.shape[-2:]
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), gradient = ctx.saved_tensors, gradients[0]

        def cell(i: int, j: int) -> Tensor:
            row, in_row = _source(ctx.shape[0], ctx.padding[0] - i, ctx.stride[0], gradient.shape[2], gradient.device)
            column, in_column = _source(
                ctx.shape[1], ctx.padding[1] - j, ctx.stride[1], gradient.shape[3], gradient.device
            )
            # Multiplied rather than chosen: nothing that is read here is infinite.
            return gradient[:, :, row[:, None], column] * (in_row[:, None] & in_column)

        return _weighted(weight, cell, gradient.dtype), None, None, None


def _source(length: int, offset: int, stride: int, available: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where along one axis each of ``length`` places has its gradient from, and whether it has one."""
    place = torch.arange(length, device=device) + offset
    source = torch.div(place, stride, rounding_mode="floor")
    found = (source * stride == place) & (source >= 0) & (source < available)
    return source.clamp(0, available - 1), found


def _weighted(weight: Tensor, cell: Callable[[int, int], Tensor], dtype: torch.dtype) -> Tensor:
    rows, columns = weight.shape[-2:]
    total: Tensor | None = None
    for i in range(rows):
        for j in range(columns):
            part = cell(i, j)
            full = part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
            term = full * weight[:, 0, i, j].to(full.dtype).view(-1, 1, 1)
            total = term if total is None else total + term
    assert total is not None
    return as_type(total, dtype)


def is_plain_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution that :class:`StencilDepthwise` can stand for."""
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels > 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def without_strided_depthwise(network: nn.Module) -> nn.Module:
    """Replace a network's strided depthwise convolutions, in place; return it."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1 and max(module.stride) > 1:
            network.set_submodule(name, SlicedDepthwise(module))
    return network


def with_stencils(network: nn.Module) -> nn.Module:
    """Replace a network's depthwise convolutions by stencils where that is possible, in place; return it."""
    for name, module in list(network.named_modules()):
        if is_plain_depthwise(module):
            assert isinstance(module, nn.Conv2d)
            network.set_submodule(name, StencilDepthwise(module))
    return network
