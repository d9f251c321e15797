"""BatchNorm of groups as two compiled loops: the same numbers, with sums and rectifiers inside."""

from __future__ import annotations

import copy
import logging
from collections import Counter

import pytest
import torch
from helpers import label_config, small_network
from torch import Tensor, fx, nn

import cvdd.computing.automatic
import cvdd.computing.group_kernels
from cvdd.backbones import BackboneConfig, build_network
from cvdd.computing.group_fusion import FusedGroupNorm, GroupedDenseBlock, fuse_groups
from cvdd.computing.group_kernels import group_moments, normalise_groups
from cvdd.computing.passes import Passes, passes_of_labels
from cvdd.labels.batch_statistics import BatchStatisticsNetwork
from cvdd.labels.teachers import Teachers
from cvdd.schema import EngineConfig
from cvdd.support.config_base import ConfigError

OWN = {
    "convnet": {"width": 4, "depth": 2, "pooled_size": 4},
    "resnet": {"width": 4, "blocks": [1, 2]},
    "mobilenet_v2": {},
    "shufflenet_v2": {"widths": [16, 32], "blocks": [1, 1], "stem_width": 8, "head_width": 16},
    "densenet": {"blocks": [2, 2], "growth": 4, "reduction": 0.5},
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops as PyTorch's own operations."""
    monkeypatch.setattr(cvdd.computing.group_kernels, "_compiled", lambda function: function)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled(network: nn.Module) -> nn.Module:
    """With scales and shifts of its own in every BatchNorm layer."""
    source = torch.Generator().manual_seed(3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            layer.weight.data.uniform_(0.5, 1.5, generator=source)
            layer.bias.data.uniform_(-0.5, 0.5, generator=source)
    return network.eval()


def same_labels(network: nn.Module, images: Tensor) -> BatchStatisticsNetwork:
    """Hold a network with fused layers against one with PyTorch's; return the former."""
    fused = BatchStatisticsNetwork(network, fused=True)
    expected = BatchStatisticsNetwork(network)(images, 4)
    torch.testing.assert_close(fused(images, 4), expected, rtol=1e-3, atol=1e-3)
    assert fused(images, 2).sub(expected).abs().max() > 1e-2
    return fused


def kinds(network: nn.Module) -> Counter[str]:
    """How many of each kind of operation a traced network consists of."""
    assert isinstance(network, fx.GraphModule)
    modules = [network.get_submodule(node.target) for node in network.graph.nodes if node.op == "call_module"]
    functions = [node.target.__name__ for node in network.graph.nodes if node.op == "call_function"]
    return Counter([type(module).__name__ for module in modules] + functions)


def own_network(name: str) -> nn.Module:
    target = f"cvdd.backbones.{name.partition('_')[0].removesuffix('v2')}.{name}"
    return settled(build_network(BackboneConfig(name="net", target=target, arguments=OWN[name]), 5, seed=0))


# --- the loops --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("shape", [(6, 8, 8, 3), (4, 7, 7, 2), (6, 1, 1, 5), (2, 13, 1, 1), (2, 2, 2, 40_000)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_are_those_of_each_group(shape: tuple[int, ...], offset: float) -> None:
    """Also around a mean that is a thousand deviations from zero, where the difference of two squares has no digit."""
    maps = noise(*shape) + offset
    found = group_moments(maps, 2)
    wide = maps.double().view(2, -1, shape[-1])
    torch.testing.assert_close(found.mean.double(), wide.mean(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.variance.double(), wide.var(1, correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_moments_of_half_precision_are_in_full() -> None:
    maps = noise(4, 5, 5, 3).bfloat16()
    found = group_moments(maps, 2)
    assert found.mean.dtype == found.variance.dtype == torch.float32
    wide = maps.double().view(2, -1, 3)
    torch.testing.assert_close(found.variance.double(), wide.var(1, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("rectify", [False, True])
def test_groups_are_scaled_and_shifted_by_their_own_values(beside: bool, rectify: bool) -> None:
    maps, added = noise(6, 4, 4, 3).bfloat16(), noise(6, 4, 4, 3, seed=1).bfloat16() if beside else None
    scale, shift = noise(3, 3, seed=2), noise(3, 3, seed=3)
    found = normalise_groups(maps, scale, shift, added, rectify)
    expected = torch.stack(
        [maps[n].float() * scale[n // 2] + shift[n // 2] + (0 if added is None else added[n].float()) for n in range(6)]
    )
    # Rounded once, at the end.
    assert torch.equal(found, (expected.relu() if rectify else expected).bfloat16())


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OWN)
def test_own_networks_label_the_same(name: str) -> None:
    fused = same_labels(own_network(name), noise(8, 3, 16, 16))
    left = kinds(fused.network)
    assert not {"relu", "relu_", "ReLU"} & set(left)
    assert len(fused.layers) >= 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model", ["mobilenetv2_050", "gernet_s", "resnet18"])
def test_timms_networks_label_the_same(model: str) -> None:
    """Some of their layers rectify, some do something else after normalising."""
    arguments = {"model_name": model, "drop_rate": 0.0}
    config = BackboneConfig(name="net", target="timm.create_model", arguments=arguments)
    same_labels(settled(build_network(config, 5, seed=0)), noise(8, 3, 64, 64))


@pytest.mark.usefixtures("uncompiled")
def test_torchvisions_networks_label_the_same() -> None:
    for target in ("torchvision.models.resnet18", "torchvision.models.densenet121"):
        network = settled(build_network(BackboneConfig(name="net", target=target), 5, seed=0))
        fused = same_labels(network, noise(8, 3, 32, 32))
        blocks = [module for module in fused.network.modules() if isinstance(module, GroupedDenseBlock)]
        assert len(blocks) == (4 if "densenet" in target else 0)


@pytest.mark.usefixtures("uncompiled")
def test_sums_and_rectifiers_become_a_part_of_the_norms_before_them() -> None:
    found = kinds(BatchStatisticsNetwork(own_network("resnet"), fused=True).network)
    assert not {"add", "iadd", "relu", "relu_"} & set(found)
    assert found["FusedGroupNorm"] == found["Conv2d"]


@pytest.mark.usefixtures("uncompiled")
def test_each_map_of_a_dense_block_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(maps: Tensor, groups: int) -> object:
        measured.append(maps.shape[-1])
        return group_moments(maps, groups)

    monkeypatch.setattr("cvdd.computing.group_fusion.group_moments", measure)
    # Two blocks of two layers, growth 4: what comes in, and of each layer the inner map of 16 and what it adds.
    BatchStatisticsNetwork(own_network("densenet"), fused=True)(noise(8, 3, 16, 16), 4)
    assert measured == [8, 16, 4, 16, 4, 16, 8, 16, 4, 16, 4, 16]


class Twice(nn.Module):
    """Uses maps in ways that must stay apart from what made them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), way
        self.offset = nn.Parameter(noise(1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        normal = self.norm(maps)
        ways = {
            "seen by two": lambda: normal.relu() + 2 * normal,
            "itself": lambda: normal + normal,
            "called twice": lambda: self.norm(normal.relu()),
            "method": lambda: normal.relu(),
            "spread out": lambda: (self.offset + normal).relu(),
            "after": lambda: nn.functional.relu(images[:, :1, 2:, 2:] + normal, inplace=True),
            "changed between": lambda: normal + nn.functional.relu_(maps),
            "rectified first": lambda: nn.functional.relu(normal) + maps,
        }
        return ways[self.way]().mean(dim=(2, 3))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("way", "left"),
    [
        ("seen by two", {"relu", "add"}),
        ("itself", {"add"}),
        ("called twice", {"relu"}),
        ("method", set()),
        ("spread out", set()),
        ("after", set()),
        ("changed between", {"add", "relu"}),
        ("rectified first", {"add"}),
    ],
)
def test_what_others_see_too_stays_apart(way: str, left: set[str]) -> None:
    network = same_labels(settled(Twice(way)), noise(8, 3, 8, 8)).network
    assert isinstance(network, fx.GraphModule)
    assert {node.name.partition("_")[0] for node in network.graph.nodes} & {"relu", "add"} == left


@pytest.mark.usefixtures("uncompiled")
def test_a_network_that_cannot_be_traced_keeps_its_own_sums(caplog: pytest.LogCaptureFixture) -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            maps: Tensor = self.norm(images).relu() if images.mean() > 1 else self.norm(images)
            return maps.amax(dim=(2, 3))

    with caplog.at_level(logging.DEBUG, "cvdd.computing.norm_tracing"):
        fused = same_labels(settled(Choosing()), noise(8, 3, 8, 8))
    assert "Choosing cannot be traced" in caplog.text
    assert not isinstance(fused.network, fx.GraphModule)
    assert isinstance(fused.layers[0], FusedGroupNorm)


def test_an_unknown_kind_of_batchnorm_is_refused() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigError, match=r"Doubling layers .*label\.bn_mode=running"):
        fuse_groups(nn.Sequential(nn.Conv2d(3, 3, 1), Doubling(3)))


@pytest.mark.usefixtures("uncompiled")
def test_the_network_that_was_given_stays_as_it_was() -> None:
    network = small_network()
    before = copy.deepcopy(network)
    BatchStatisticsNetwork(network, fused=True)(noise(8, 3, 12, 12), 4)
    assert str(network) == str(before)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.state_dict().items())


@pytest.mark.usefixtures("uncompiled")
def test_dropout_is_on_where_it_is_asked_for() -> None:
    network, images = small_network(dropout=0.5), noise(8, 3, 12, 12)
    quiet, noisy = (BatchStatisticsNetwork(network, dropout, fused=True) for dropout in (False, True))
    assert torch.equal(quiet(images), quiet(images))
    assert not torch.equal(noisy(images), noisy(images))


# --- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "precision", "mode", "samples", "expected"),
    [
        ("auto", "bf16", "batch", 10**6, {"compiled": "norms", "precision": "bf16"}),
        ("auto", "bf16", "batch", 10, {"precision": "bf16"}),
        ("auto", "fp32", "batch", 10**6, {}),
        ("auto", "bf16", "running", 10**6, {"precision": "bf16"}),
        (True, "fp32", "batch", 10, {"compiled": "norms"}),
        (True, "fp32", "running", 10, {"compiled": True}),
        (False, "bf16", "batch", 10**6, {"precision": "bf16"}),
    ],
)
def test_labels_on_a_cpu_are_compiled_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
    wanted: bool | str,
    precision: str,
    mode: str,
    samples: int,
    expected: dict[str, object],
) -> None:
    monkeypatch.setattr(cvdd.computing.automatic, "has_compiler", lambda device: True)
    engine = EngineConfig.model_validate({"compile_labels": wanted, "precision_labels": precision})
    backbone = BackboneConfig(name="net", target="cvdd.backbones.resnet.resnet", arguments=OWN["resnet"])
    passes = passes_of_labels(engine, label_config(bn_mode=mode), [backbone], samples, 10, 32, torch.device("cpu"))
    assert passes.identity == expected


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_loops_say_the_same(precision: str) -> None:
    """Batches of two sizes, of which one has halves of unequal size, through the real loops."""
    networks = [own_network(name) for name in ("resnet", "densenet", "shufflenet_v2")]
    weights, limit = [0.5, 0.3, 0.2], 1e-4 if precision == "fp32" else 0.1
    plain, fused = (
        Teachers(networks, weights, label_config(), Passes(precision=precision, compile_norms=norms))
        for norms in (False, True)
    )
    for count, size in ((24, 8), (10, 5)):
        samples = noise(count, 3, 16, 16)
        found, expected = fused.score(samples, size), plain.score(samples, size)
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
        assert not torch.equal(found, expected)
        assert torch.equal(found, fused.score(samples, size))
