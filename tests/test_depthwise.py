"""Strided depthwise convolutions that compute all places."""

from __future__ import annotations

import pytest
import torch
from helpers import same_layer
from torch import nn

from cvdd.computing.depthwise import SlicedDepthwise, without_strided_depthwise


@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("side", [7, 8])
def test_values_and_gradient_are_those_of_the_convolution(
    stride: int | tuple[int, int], padding: int | str, side: int
) -> None:
    if padding == "same":
        convolution = nn.Conv2d(4, 4, 3, stride, 1, groups=4, padding_mode="circular").double()
    else:
        convolution = nn.Conv2d(4, 8, 3, stride, padding, dilation=2, groups=4, bias=False).double()
    sliced = SlicedDepthwise(convolution)
    assert sliced.weight is convolution.weight
    images = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same_layer(convolution, sliced, images)


def test_only_strided_depthwise_convolutions_are_replaced() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.Conv2d(4, 4, 3, 1, groups=4),
        nn.Conv2d(4, 8, 3, 2, groups=2),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, groups=8)),
    )
    names = list(network.state_dict())
    kinds = [type(layer) for layer in without_strided_depthwise(network).modules() if isinstance(layer, nn.Conv2d)]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Conv2d, SlicedDepthwise]
    assert list(network.state_dict()) == names
