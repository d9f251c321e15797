"""Layers that normalise and measure in one pass, against hooks and PyTorch's own BatchNorm."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import judged, small_network
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from cvdd.backbones import batchnorm_layers
from cvdd.computing.fused_bn import FusedStatistics, _NormaliseAndMeasure
from cvdd.computing.fusion import fuse_statistics
from cvdd.statistics.bn import BatchStatistics, statistics_distance
from cvdd.synthesis.voting import Voter, judge


class Unknown(nn.BatchNorm2d):
    """Does something besides normalising."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and scale."""
        return 2 * super().forward(x)


def activated_network() -> nn.Module:
    """A network with timm's BatchNorm, which activates too."""
    layer = BatchNormAct2d(6).double()
    layer.running_mean, layer.running_var = torch.randn(6).double(), torch.rand(6).double() + 0.5
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3).double(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4).double()
    )
    return body.eval().requires_grad_(False)


@pytest.mark.parametrize("r_bn", [0.3, 0.0])
@pytest.mark.parametrize("network", [small_network(seed=3).double(), activated_network()], ids=["torch", "timm"])
def test_a_fused_network_says_what_hooks_say(network: nn.Module, r_bn: float) -> None:
    images = 3 * torch.randn(3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double() + 1
    fused, watch = fuse_statistics(network)
    assert isinstance(watch, FusedStatistics)
    for _ in range(2):
        expected, slope = judged(Voter("a", network), images, r_bn)
        found, gradient = judged(Voter("a", fused, watch=watch), images, r_bn)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-14)
    assert not watch.measured


def test_a_network_without_batchnorm_has_no_distance() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)).eval().requires_grad_(False)
    fused, watch = fuse_statistics(network)
    said, _ = judged(Voter("a", fused, bn_scale=0.0, watch=watch), torch.randn(3, 4, 3, 12, 12))
    assert not said.bn.any()
    assert said.ce.all()


def test_layers_that_a_pass_leaves_out_do_not_count() -> None:
    fused, watch = fuse_statistics(small_network())
    watch.groups = 2
    fused.get_submodule("1")(torch.randn(4, 6, 5, 5))
    only = watch.distance(10.0)
    assert only is not None
    plain = statistics_distance(watch.means, watch.variances, watch.layers, 10.0)
    torch.testing.assert_close(only, plain)
    assert len(watch.measured) == 1


def test_a_distance_of_nothing_has_a_gradient() -> None:
    """Statistics that are met exactly: 0, and no gradient that is not finite."""
    network = small_network()
    fused, watch = fuse_statistics(network)
    watch.groups, leaves = 1, []
    for name, _ in batchnorm_layers(network):
        layer = fused.get_submodule(name)
        moments = [values[None].clone().requires_grad_() for values in (0 * layer.running_mean, layer.running_var)]
        watch.note(name, *moments)
        leaves += moments
    distance = watch.distance(10.0)
    assert distance is not None
    assert float(distance.detach()) < 1e-15
    assert all(bool(slope.isfinite().all()) for slope in torch.autograd.grad(distance.sum(), leaves))


@pytest.mark.parametrize("rectify", [False, True])
def test_its_gradient_is_that_of_finite_differences(rectify: bool) -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 5, generator=source, dtype=torch.float64, requires_grad=True)
    mean, scale, shift = (torch.randn(3, generator=source, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: _NormaliseAndMeasure.apply(x, mean, scale, shift, rectify), (x,))


def test_a_mean_far_from_the_running_one_costs_little_precision() -> None:
    network = small_network()
    fused, watch = fuse_statistics(network)
    x = torch.randn(8, 6, 16, 16, generator=torch.Generator().manual_seed(0)) + 30
    watch.groups = 2
    fused.get_submodule("1")(x)
    mean, variance = watch.measured["1"]
    exact = x.double().unflatten(0, (2, 4))
    torch.testing.assert_close(mean.double(), exact.mean(dim=(1, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(dim=(1, 3, 4), unbiased=False), rtol=1e-3, atol=0)


def test_parameters_are_shared_and_the_original_stays() -> None:
    network = small_network()
    fused, _ = fuse_statistics(network)
    assert type(network[1]) is nn.BatchNorm2d
    assert [id(one) for one in fused.parameters()] == [id(one) for one in network.parameters()]
    assert list(fused.state_dict()) == list(network.state_dict())


def test_half_precision_is_measured_in_full() -> None:
    network = small_network()
    fused, watch = fuse_statistics(network)
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = fused.get_submodule("1")
    watch.groups = 1
    out = layer(images.new_ones(4, 6, 5, 5) / 3)
    assert out.dtype == torch.bfloat16
    assert watch.means[0].dtype == watch.variances[0].dtype == torch.float32


@pytest.mark.parametrize("layer", [Unknown(6), nn.BatchNorm2d(6, track_running_stats=False)], ids=["unknown", "none"])
def test_other_layers_keep_hooks(layer: nn.Module) -> None:
    network = small_network()
    network[1] = layer.eval().requires_grad_(False)
    fused, watch = fuse_statistics(network)
    assert fused is network
    assert type(watch) is BatchStatistics
    fused(torch.randn(4, 3, 12, 12))
    assert list(watch.measured) == ["1", "4"]
    watch.forget()
    # Nothing is measured where nothing is matched, in groups or not.
    images, targets = torch.randn(2, 4, 3, 12, 12), torch.arange(4).expand(2, 4)
    said = judge(images, targets, Voter("a", fused, watch=watch), r_bn=0, first_bn_multiplier=10.0)
    torch.testing.assert_close(
        tuple(said), tuple(judge(images, targets, Voter("a", network), r_bn=0, first_bn_multiplier=10.0))
    )
    assert watch.measured == {}


def test_a_network_of_timm_as_a_whole() -> None:
    network = (
        timm.create_model("efficientnet_b0", pretrained=False, num_classes=4).double().eval().requires_grad_(False)
    )
    images = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    fused, watch = fuse_statistics(network)
    assert isinstance(watch, FusedStatistics)
    targets = torch.arange(4)[None]
    one, two = (
        judge(images, targets, voter, r_bn=0.1, first_bn_multiplier=10.0)
        for voter in (Voter("a", network), Voter("a", fused, watch=watch))
    )
    torch.testing.assert_close(tuple(two), tuple(one), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_compiler_reads_has_the_same_gradient(dtype: torch.dtype, rectify: bool) -> None:
    """Of the map and of both statistics; PyTorch 2.11 lost the map's where a cast did nothing."""
    source = torch.Generator().manual_seed(0)
    images = torch.randn(6, 4, 5, 5, generator=source, dtype=torch.float64).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    centre, scale, shift = (torch.rand(4, generator=source, dtype=torch.float64).to(kind) for _ in range(3))

    def loss(x: torch.Tensor) -> torch.Tensor:
        out, mean, square = _NormaliseAndMeasure.apply(x, centre, scale, shift, rectify)
        return out.square().sum() + mean.square().sum() + square.pow(3).sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="eager")):
        leaf = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf), leaf)[0])
    assert gradients[0].abs().max() > 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
