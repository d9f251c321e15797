"""Labelling with the statistics of the batch, or of each half of it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers import small_network
from torch import nn

from cvdd.backbones import BackboneConfig, build_network
from cvdd.computing.group_bn import GroupBatchNorm
from cvdd.labels.batch_statistics import BatchStatisticsNetwork
from cvdd.support.config_base import ConfigError


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def train_mode(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).train()(images)


def test_groups_equal_separate_forward_passes_in_train_mode() -> None:
    network, images = small_network(), noise(12)
    expected = torch.cat([train_mode(network, part) for part in images.split(4)])
    labelled = BatchStatisticsNetwork(network)(images, 4)
    torch.testing.assert_close(labelled, expected, rtol=1e-5, atol=1e-5)
    assert (labelled - network(images)).abs().max() > 0.01


def test_layers_keep_what_they_add_to_the_variance() -> None:
    network, images = small_network(), noise(8)
    plain = BatchStatisticsNetwork(network)(images)
    network[1].eps = network[4].eps = 0.5
    labelled = BatchStatisticsNetwork(network)(images)
    torch.testing.assert_close(labelled, train_mode(network, images), rtol=1e-5, atol=1e-5)
    assert (labelled - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    "target",
    ["cvdd.backbones.shufflenet.shufflenet_v2", "cvdd.backbones.densenet.densenet", "torchvision.models.resnet18"],
)
def test_real_networks_too(target: str) -> None:
    arguments = {
        "cvdd.backbones.shufflenet.shufflenet_v2": {
            "widths": [16, 32],
            "blocks": [1, 1],
            "stem_width": 8,
            "head_width": 16,
        },
        "cvdd.backbones.densenet.densenet": {"blocks": [2, 2], "growth": 4, "reduction": 0.5},
    }.get(target, {})
    network = build_network(BackboneConfig(name="net", target=target, arguments=arguments), 5, seed=0)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([train_mode(network, part) for part in images.split(4)])
    torch.testing.assert_close(BatchStatisticsNetwork(network)(images, 4), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", ["mobilenetv2_050", "gernet_s"])
def test_activations_inside_timms_layers_are_kept(model: str) -> None:
    network = timm.create_model(model, num_classes=5, drop_rate=0.0)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([train_mode(network, part) for part in images.split(4)])
    torch.testing.assert_close(BatchStatisticsNetwork(network)(images, 4), expected, rtol=1e-3, atol=1e-3)


def test_an_unknown_kind_of_batchnorm_is_refused() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigError, match=r"Doubling layers .*label\.bn_mode=running"):
        GroupBatchNorm(Doubling(3))


def test_running_statistics_are_neither_read_nor_touched() -> None:
    network, images = small_network(), noise(8)
    other = copy.deepcopy(network)
    for layer in (other[1], other[4]):
        layer.running_mean.add_(3.0)
        layer.running_var.mul_(7.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(BatchStatisticsNetwork(network)(images, 4), BatchStatisticsNetwork(other)(images, 4))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_dropout_is_off_unless_asked_for() -> None:
    network, images = small_network(dropout=0.5), noise(8)
    quiet = BatchStatisticsNetwork(network)
    assert torch.equal(quiet(images), quiet(images))
    noisy = BatchStatisticsNetwork(network, dropout=True)
    assert not torch.equal(noisy(images), noisy(images))


@pytest.mark.parametrize("grad", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "scale and shift"])
def test_groups_are_normalised_like_batches_of_their_own(grad: bool, memory: torch.memory_format, affine: bool) -> None:
    layer = nn.BatchNorm2d(3, affine=affine)
    if affine:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    mine = GroupBatchNorm(layer)
    mine.group_size = 2
    images = noise(6).to(memory_format=memory)
    with torch.set_grad_enabled(grad):
        found = mine(images)
    expected = torch.cat([layer.train()(part) for part in images.split(2)])
    torch.testing.assert_close(found, expected)
    if not grad:
        # Labels are those of passes of one half-batch each, to the last bit.
        assert torch.equal(found, expected)
