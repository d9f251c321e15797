"""Dense blocks that measure each map once, against hooks at every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import judged
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet

from cvdd.backbones.densenet import densenet
from cvdd.computing.copies import sharing_copy
from cvdd.computing.fused_bn import FusedStatistics, measure
from cvdd.computing.fused_dense import MeasuredDenseBlock, joined
from cvdd.computing.fusion import fuse_statistics
from cvdd.computing.gpu_layers import Convolution, with_gpu_layers
from cvdd.computing.stem import with_folded_stem
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.voting import Voter

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: densenet(4, blocks=(2, 3), growth=4),
    "torchvision's": lambda: TorchvisionDenseNet(4, (2, 1, 1, 3), 8, num_classes=4),
}


def frozen(name: str) -> nn.Module:
    """A network in double precision whose running statistics and affine parameters differ from layer to layer."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                assert values is not None
                values.copy_(0.3 * torch.randn_like(values))
            for values in (module.running_var, module.weight):
                assert values is not None
                values.copy_(torch.rand_like(values) + 0.5)
    return network


def blocks_of(network: nn.Module) -> list[MeasuredDenseBlock]:
    return [module for module in network.modules() if isinstance(module, MeasuredDenseBlock)]


@pytest.mark.parametrize("r_bn", [0.3, 0.0])
@pytest.mark.parametrize(("name", "count"), [("ours", 2), ("torchvision's", 4)])
def test_a_dense_network_says_what_hooks_say(name: str, count: int, r_bn: float) -> None:
    network = frozen(name)
    images = 2 * torch.randn(3, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double() + 0.5
    fused, watch = fuse_statistics(network)
    assert isinstance(watch, FusedStatistics)
    assert len(blocks_of(fused)) == count
    assert not blocks_of(network)
    for _ in range(2):
        expected, slope = judged(Voter("a", network), images, r_bn)
        found, gradient = judged(Voter("a", fused, watch=watch), images, r_bn)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-13)
    assert not watch.measured


@pytest.mark.parametrize("name", NETWORKS)
def test_with_a_gpus_layers_it_says_the_same(name: str) -> None:
    network = frozen(name)
    images = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    fused, watch = fuse_statistics(with_folded_stem(sharing_copy(network)))
    changed = with_gpu_layers(fused)
    assert any(isinstance(module, Convolution) for module in blocks_of(changed)[0].modules())
    expected, slope = judged(Voter("a", network), images, 0.3)
    found, gradient = judged(Voter("a", changed, watch=watch), images, 0.3)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-13)


def test_parameters_are_shared() -> None:
    network = frozen("ours")
    fused, _ = fuse_statistics(network)
    assert {id(one) for one in fused.parameters()} == {id(one) for one in network.parameters()}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_joined_maps_lie_as_their_parts_do(layout: torch.memory_format) -> None:
    maps = [torch.randn(2, channels, 3, 4).contiguous(memory_format=layout) for channels in (5, 2)]
    found = joined(maps)
    assert torch.equal(found, torch.cat(maps, dim=1))
    assert found.is_contiguous(memory_format=layout)


def test_a_compiler_joins_channels_last_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out plane by plane, as it would by itself, joined maps took a third of a network's time on a GPU."""
    axes: list[int] = []
    real = torch.cat

    def cat(maps: Sequence[Tensor], dim: int) -> Tensor:
        axes.append(dim)
        assert all(one.is_contiguous() for one in maps)
        return real(maps, dim=dim)

    monkeypatch.setattr(torch, "cat", cat)
    joined([torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2)])
    assert axes == [3]


def test_a_block_that_nothing_known_follows_stays() -> None:
    network = frozen("ours")
    network.trans1 = nn.Sequential(nn.Identity(), network.trans1)
    fused, watch = fuse_statistics(network)
    assert len(blocks_of(fused)) == 1
    images = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    expected, found = (judged(voter, images, 0.3)[0] for voter in (Voter("a", network), Voter("a", fused, watch=watch)))
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=1e-11)


def test_the_gradient_of_what_is_measured_is_that_of_finite_differences() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 5, generator=source, dtype=torch.float64, requires_grad=True)
    centre = torch.randn(3, generator=source, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: measure(x, centre), (x,))


@pytest.mark.slow
def test_compiled_it_says_the_same_in_stages_of_two_sizes() -> None:
    network = frozen("ours").float()
    fused, watch = fuse_statistics(network)
    compiled = Engine(compile=True).opinion
    for number, (units, count, side) in enumerate([(2, 4, 32), (2, 4, 40), (2, 3, 32), (3, 2, 40)]):
        images = torch.randn(units, count, 3, side, side, generator=torch.Generator().manual_seed(number))
        expected, slope = judged(Voter("a", network), images, 0.3)
        leaf = images.clone().requires_grad_()
        targets = torch.arange(count).expand(units, count)
        said = compiled(leaf, targets, Voter("a", fused, watch=watch), r_bn=0.3, first_bn_multiplier=10.0)
        gradient = torch.autograd.grad(said.value.sum(), leaf)[0]
        torch.testing.assert_close(tuple(said), tuple(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-6)
