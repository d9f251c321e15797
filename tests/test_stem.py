"""First convolutions whose images are folded."""

from __future__ import annotations

import pytest
import torch
from helpers import same_layer
from torch import nn

from cvdd.computing.stem import FoldedStem, with_folded_stem


@pytest.mark.parametrize("size", [2, 3, 5, 7])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("sides", [(8, 8), (10, 12), (9, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradient_are_those_of_the_convolution(
    size: int, padding: int, sides: tuple[int, int], bias: bool
) -> None:
    convolution = nn.Conv2d(3, 5, size, 2, padding, bias=bias).double().requires_grad_(False)
    folded = FoldedStem(convolution)
    assert folded.weight.shape[1] == 16
    images = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same_layer(convolution, folded, images)


def test_only_strided_convolutions_of_images_are_folded() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(3, 4, 3, 1, 1),
        nn.Conv2d(8, 4, 3, 2, 1),
        nn.Conv2d(3, 4, (3, 5), 2),
        nn.Conv2d(3, 3, 3, 2, groups=3),
        nn.Conv2d(3, 3, 3, 2, padding="valid"),
    )
    kinds = [type(layer) for layer in with_folded_stem(network)]
    assert kinds == [FoldedStem, *[nn.Conv2d] * 5]
