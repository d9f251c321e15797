"""BatchNorm statistics and their distance."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import small_network
from torch import nn

from cvdd.statistics.bn import (
    BatchStatistics,
    require_batchnorm,
    running_moments,
    statistics_distance,
)
from cvdd.support.config_base import ConfigError


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def distance(network: nn.Module, images: torch.Tensor, groups: int = 1, first: float = 10.0) -> torch.Tensor:
    with BatchStatistics(network, groups) as statistics:
        network(images)
    return statistics_distance(statistics.means, statistics.variances, statistics.layers, first)


def test_distance_is_that_of_the_formula() -> None:
    """Recomputed layer by layer from the inputs, with sums instead of library calls."""
    network, images = small_network(), noise(7)
    expected, inputs = 0.0, images.double()
    for index, layer in enumerate(copy.deepcopy(network).double()):
        if isinstance(layer, nn.BatchNorm2d):
            count = inputs.shape[0] * inputs.shape[2] * inputs.shape[3]
            mean = inputs.sum(dim=(0, 2, 3)) / count
            variance = ((inputs - mean[None, :, None, None]) ** 2).sum(dim=(0, 2, 3)) / count
            term = ((variance - layer.running_var) ** 2).sum().sqrt() + ((mean - layer.running_mean) ** 2).sum().sqrt()
            expected += float(term) * (10 if index == 1 else 1)
        inputs = layer(inputs)
    assert distance(network, images).item() == pytest.approx(expected, rel=1e-5)


def test_the_first_layer_has_its_own_weight() -> None:
    network, images = small_network(), noise(7)
    plain, tenfold = distance(network, images, first=1.0), distance(network, images, first=10.0)
    second = distance(nn.Sequential(network[4:]), network[:4](images), first=1.0)
    torch.testing.assert_close(tenfold, 10 * (plain - second) + second)


@pytest.mark.parametrize("first", [1.0, 10.0])
def test_a_watch_tells_the_distance_with_the_multiplier_that_it_is_given(first: float) -> None:
    network, images = small_network(), noise(7)
    with BatchStatistics(network, 1) as statistics:
        network(images)
    found = statistics.distance(first)
    assert found is not None
    torch.testing.assert_close(found, distance(network, images, first=first))


def test_distance_reaches_the_images() -> None:
    images = noise(7).requires_grad_()
    distance(small_network(), images).sum().backward()
    assert bool((images.grad.flatten(1).norm(dim=1) > 0).all())


def test_groups_have_statistics_of_their_own() -> None:
    network, images = small_network(), noise(12)
    together = distance(network, images, groups=3)
    apart = torch.cat([distance(network, part) for part in images.split(4)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


class OtherOrder(nn.Module):
    """Runs its second layer first, as networks do that register their shortcut before their body."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.unused = nn.BatchNorm2d(3)
        self.first.running_mean.fill_(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.second(x) * 2 + 5)


def test_statistics_stay_with_their_layer() -> None:
    """Pairing by the order of execution would compare each layer's batch with another layer's running statistics."""
    network, images = OtherOrder().eval(), noise(64)
    with BatchStatistics(network, 1) as statistics:
        network(images)
    assert statistics.layers == [network.first, network.second]
    assert statistics.means[0].mean().item() == pytest.approx(5.0, abs=0.2)
    assert statistics.means[1].mean().item() == pytest.approx(0.0, abs=0.2)


def test_watching_leaves_no_trace() -> None:
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    distance(network, noise(6))
    assert all(not module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_layers_without_running_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keeps no running statistics .*method\.r_bn=0"):
        running_moments(nn.BatchNorm2d(3, track_running_stats=False))


def test_a_network_without_batchnorm_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"member plain has no BatchNorm.*method\.r_bn=0.*label\.bn_mode=running"):
        require_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)), "plain")
    require_batchnorm(small_network(), "net")
