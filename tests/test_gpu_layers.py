"""The project's own kernels for GPUs, against PyTorch's layers.

The kernels run here in Triton's interpreter; on a GPU, where there is one, as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cvdd.backbones import BackboneConfig, build_network
from cvdd.computing import gpu_layers
from cvdd.computing.copies import sharing_copy
from cvdd.computing.gpu_layers import Convolution, Depthwise, Largest, with_gpu_layers
from cvdd.computing.stem import with_folded_stem

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYERS = {
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
    "depthwise with a stride": lambda: nn.Conv2d(48, 48, 3, stride=2, padding=1, groups=48, bias=False),
    "depthwise of 5 places": lambda: nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16, bias=False),
    "depthwise of 24 channels": lambda: nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24, bias=False),
    "depthwise without padding": lambda: nn.Conv2d(16, 16, 3, groups=16, bias=False),
    "convolution": lambda: nn.Conv2d(16, 32, 3, padding=1, bias=False),
    "convolution with a stride": lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1),
    "convolution of one place": lambda: nn.Conv2d(16, 32, 1, stride=2, bias=False),
    "convolution of groups": lambda: nn.Conv2d(16, 32, 5, stride=3, padding=1, groups=4),
    "pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "pooling apart": lambda: nn.MaxPool2d(2),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().requires_grad_(False)


def replaced(layer: nn.Module) -> nn.Module:
    (found,) = with_gpu_layers(nn.Sequential(layer)).children()
    assert type(found) in (Convolution, Depthwise, Largest)
    return found


def images(layer: nn.Module, height: int = 9, width: int = 14, ties: bool = False) -> Tensor:
    channels = getattr(layer, "in_channels", 24)
    values = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
    return (values.round() if ties else values).contiguous(memory_format=torch.channels_last)


def with_gradient(function: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, Tensor]:
    leaf = given.clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf)
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), torch.autograd.grad((out * factor).sum(), leaf)[0]


def check(layer: nn.Module, given: Tensor, tolerance: float) -> None:
    """Hold a replacement against the layer, value and gradient."""
    expected = with_gradient(layer, given)
    replacement = replaced(layer)
    found = with_gradient(replacement, given)
    for one, other in zip(found, expected, strict=True):
        # What is PyTorch's on both sides is laid out as PyTorch likes.
        assert isinstance(replacement, Convolution) or one.is_contiguous(memory_format=torch.channels_last)
        assert (one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


# --- the layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_what_pytorch_says(name: str) -> None:
    layer = made(name)
    check(layer, images(layer), 1e-6)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("depthwise_back", lambda x: (x.detach(), torch.rand(3, 3, 16), 1, 2, 17, 28)),
        ("largest", lambda x: (x, 3, 1, 2)),
        ("largest_back", lambda x: (x.detach(), torch.full(x.shape, 4).byte(), 3, 1, 2, 17, 28)),
    ],
)
def test_operations_are_what_they_tell_a_compiler(
    operation: str, arguments: Callable[[Tensor], tuple[Any, ...]]
) -> None:
    given = torch.rand(2, 16, 9, 14).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(getattr(gpu_layers, operation), arguments(given))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(16, 16, (3, 1), groups=16, bias=False), "not square"),
        (nn.Conv2d(16, 16, 3, dilation=2, groups=16, bias=False), "dilated"),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=16, bias=False), "other padding"),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "places beyond the edge"),
        (nn.MaxPool2d((3, 2)), "not square"),
        (nn.AvgPool2d(2), "no maximum"),
    ],
)
def test_other_layers_stay(layer: nn.Module, why: str) -> None:
    assert next(with_gpu_layers(nn.Sequential(layer)).children()) is layer, why


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(58, 58, 3, groups=58, bias=False), "channels that are no multiple of 8"),
        (nn.Conv2d(16, 32, 3, groups=16, bias=False), "several channels from one"),
        (nn.Conv2d(16, 16, 3, groups=16), "a bias"),
        (nn.Conv2d(16, 16, 3, bias=False), "all channels together"),
    ],
)
def test_other_convolutions_have_no_kernel_of_ours(layer: nn.Conv2d, why: str) -> None:
    assert type(next(with_gpu_layers(nn.Sequential(layer)).children())) is Convolution, why


def test_the_gradient_of_images_does_not_need_them() -> None:
    given = torch.rand(2, 16, 9, 14, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(values: Tensor) -> Tensor:
        kept.append(tuple(values.shape))
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        replaced(made("convolution"))(given)
    assert kept == [(32, 16, 3, 3)]


def test_pooling_of_other_channels_is_pytorchs() -> None:
    given = torch.rand(2, 7, 9, 14)
    torch.testing.assert_close(replaced(made("pooling"))(given), made("pooling")(given))


@pytest.mark.parametrize(
    ("builder", "kinds"), [("mobilenet_v2", {Depthwise, Convolution}), ("resnet18", {Largest, Convolution})]
)
def test_a_network_as_a_whole(builder: str, kinds: set[type]) -> None:
    backbone = BackboneConfig(name=builder, target=f"torchvision.models.{builder}")
    network = build_network(backbone, 10, 0).eval().requires_grad_(False)
    changed = with_gpu_layers(with_folded_stem(sharing_copy(network)))
    assert {type(module) for module in changed.modules()} >= kinds
    assert all(type(module) not in kinds for module in network.modules())
    given = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(with_gradient(changed, given), with_gradient(network, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels as programs of Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = importlib.util.find_spec("cvdd.computing.gpu_kernels")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("width", [5, 14, 40, 70])
@pytest.mark.parametrize(("size", "padding", "stride"), [(3, 1, 1), (3, 1, 2), (5, 2, 2), (3, 0, 1)])
def test_kernels_of_depthwise_convolutions(
    interpreted: ModuleType, size: int, padding: int, stride: int, width: int
) -> None:
    layer = nn.Conv2d(40, 40, size, stride, padding, groups=40, bias=False).requires_grad_(False)
    given, taps = images(layer, 6, width), layer.weight[:, 0].permute(1, 2, 0).contiguous()
    leaf = given.clone(memory_format=torch.preserve_format).requires_grad_()
    expected = layer(leaf)
    factor = torch.randn_like(expected)
    slope = torch.autograd.grad(expected, leaf, factor)[0]
    back = interpreted.depthwise_back(factor, taps, padding, stride, 6, width)
    torch.testing.assert_close(back, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("width", [5, 14, 70])
@pytest.mark.parametrize(("size", "padding", "stride"), [(3, 1, 2), (2, 0, 2), (3, 1, 1)])
def test_kernels_of_pooling(
    interpreted: ModuleType, size: int, padding: int, stride: int, width: int, ties: bool
) -> None:
    """The first of equal values is the largest, as PyTorch has it."""
    layer = nn.MaxPool2d(size, stride, padding)
    given = images(layer, 7, width, ties)
    leaf = given.clone(memory_format=torch.preserve_format).requires_grad_()
    expected = layer(leaf)
    factor = torch.randn_like(expected)
    slope = torch.autograd.grad(expected, leaf, factor)[0]
    out, where = interpreted.largest(given, size, padding, stride, *expected.shape[2:])
    assert torch.equal(out, expected.detach())
    assert torch.equal(where, gpu_layers.largest(given, size, padding, stride)[1])
    back = interpreted.to_largest(factor, where, size, padding, stride, 7, width)
    torch.testing.assert_close(back, slope, rtol=1e-5, atol=1e-5)


@with_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [7, 14, 30, 112])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_says_what_pytorch_says(
    name: str, side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = made(name).to("cuda", dtype)
    given = images(layer, side, side, ties=isinstance(layer, nn.MaxPool2d)).to("cuda", dtype)
    given = given.contiguous(memory_format=torch.channels_last)
    check(layer, given, 1e-5 if dtype == torch.float32 else 0.01)
