"""Depthwise convolutions with a stride, written so that their gradient is fast in half precision on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from cvdd.computing.copies import with_layers


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


def without_strided_depthwise(network: nn.Module) -> nn.Module:
    """Replace a network's strided depthwise convolutions, in place; return it."""
    return with_layers(network, _sliced)


def _sliced(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.Conv2d or max(module.stride) == 1 or module.groups == 1:
        return None
    return SlicedDepthwise(module) if module.groups == module.in_channels else None
