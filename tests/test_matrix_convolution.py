"""Convolutions as matrix products say what PyTorch's say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cvdd.computing import matrix_convolution
from cvdd.computing.matrix_convolution import MatrixConvolution, with_matrix_convolutions
from cvdd.computing.passes import Passes
from cvdd.synthesis.engine import Engine, ready_voter

CASES = {
    "plain": (3, 1, 1),
    "strided": (3, 2, 1),
    "pointwise": (1, 1, 0),
    "strided pointwise": (1, 2, 0),
    "no padding": (3, 1, 0),
    "wide": (5, 2, 2),
    "padded by more than it reaches": (1, 1, 2),
    "stride beyond the window": (2, 3, 0),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def answers(layer: nn.Conv2d, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Map of a layer, and the gradients of its images and weight."""
    shown = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(shown)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [shown, layer.weight])]


@pytest.fixture(params=["always", "where it pays", "never"])
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How many convolutions are products."""
    if request.param == "always":
        monkeypatch.setattr(matrix_convolution, "LARGE_WEIGHT", 0)
        for name in ("PLACES_OF_A_MAP", "PLACES_OF_A_WEIGHT"):
            monkeypatch.setattr(matrix_convolution, name, 10**9)
    if request.param == "never":
        for name in ("PLACES_OF_A_MAP", "PLACES_OF_A_WEIGHT"):
            monkeypatch.setattr(matrix_convolution, name, -1)
    return str(request.param)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_product_and_its_gradients_are_those_of_the_convolution(
    case: str, weight_format: str, image_format: str, multiplied: str
) -> None:
    torch.manual_seed(0)
    size, stride, padding = CASES[case]
    exact = nn.Conv2d(6, 10, size, stride, padding, bias=False)
    x = torch.randn(3, 6, 9, 8).contiguous(memory_format=FORMATS[image_format])
    half = copy.deepcopy(exact).to(torch.bfloat16, memory_format=FORMATS[weight_format])
    # Products of what half precision can hold are held against sums in full precision.
    exact.load_state_dict({"weight": half.weight.float()})
    x = x.bfloat16()
    weights = torch.randn_like(exact(x.float())).bfloat16()
    expected = answers(exact, x.float(), weights.float())
    product = MatrixConvolution(half)
    for known, own in zip(expected, answers(product, x, weights), strict=True):
        assert own.dtype == torch.bfloat16
        # Half a unit in the last of 8 places, and as much again for what was rounded before it was added up.
        torch.testing.assert_close(own.float(), known, rtol=2**-7, atol=2**-7 * float(known.std()))


def test_in_full_precision_and_beyond_the_rule_the_bits_are_those_of_the_convolution(multiplied: str) -> None:
    plain = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    product = MatrixConvolution(plain)
    x = torch.randn(2, 8, 5, 5)
    weights = torch.randn(2, 16, 5, 5)
    for known, own in zip(answers(plain, x, weights), answers(product, x, weights), strict=True):
        assert torch.equal(known, own)
    if multiplied == "never":
        with torch.autocast("cpu", torch.bfloat16):
            pairs = zip(answers(plain, x, weights), answers(product, x, weights), strict=True)
            assert all(torch.equal(known, own) for known, own in pairs)


def test_under_autocast_parameters_keep_their_type_and_get_gradients_of_it(multiplied: str) -> None:
    plain = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, _, gradient = answers(MatrixConvolution(plain), x, torch.ones(2, 16, 4, 4))
    assert out.dtype == torch.bfloat16
    assert gradient.dtype == plain.weight.dtype == torch.float32
    expected = answers(plain, x, torch.ones(2, 16, 4, 4))
    torch.testing.assert_close(gradient, expected[2], rtol=0.05, atol=0.05)


def test_frozen_weights_get_no_gradient(multiplied: str) -> None:
    layer = MatrixConvolution(nn.Conv2d(8, 16, 3, padding=1, bias=False).bfloat16().requires_grad_(False))
    x = torch.randn(2, 8, 4, 4).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def network() -> nn.Sequential:
    """Convolutions that can be products, and others."""
    return nn.Sequential(
        nn.Conv2d(256, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.Conv2d(128, 128, 3, padding=1, bias=False, groups=128),
        nn.Conv2d(128, 128, 3, padding=1, bias=True),
        nn.Conv2d(128, 16, 1, bias=False),
        nn.Conv2d(16, 1024, 3, padding=1, bias=False),
    )


def test_only_large_plain_convolutions_are_replaced_and_parameters_stay_the_same() -> None:
    plain = network()
    before = dict(plain.named_parameters())
    names = list(plain.state_dict())
    changed = with_matrix_convolutions(plain)
    assert [isinstance(layer, MatrixConvolution) for layer in changed] == [True, False, False, False, False, True]
    assert list(changed.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in changed.named_parameters())


def test_a_copy_has_parameters_of_its_own() -> None:
    layer = MatrixConvolution(nn.Conv2d(8, 16, 3, bias=False))
    own = copy.deepcopy(layer)
    with torch.no_grad():
        own.weight.zero_()
    assert layer.weight.abs().sum() > 0
    assert own(torch.ones(1, 8, 3, 3)).abs().sum() == 0


@pytest.mark.parametrize(
    ("passes", "replaced"),
    [
        (Passes(), False),
        (Passes(precision="bf16"), True),
        (Passes(compile=True, precision="bf16"), False),
    ],
)
def test_who_learns_in_half_precision_without_a_compiler_multiplies(passes: Passes, replaced: bool) -> None:
    prepared = network()
    passes.prepare(prepared, torch.device("cpu"))
    assert isinstance(prepared[0], MatrixConvolution) == replaced
    assert passes.laid_out(torch.zeros(2, 3, 4, 4)).is_contiguous() == (passes.precision == "fp32")
    last = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    # In full precision another layout would be other last bits of what is known by the same identity.
    assert passes.laid_out(last) is last


@pytest.mark.parametrize(
    ("engine", "replaced"),
    [
        (Engine(), False),
        (Engine(precision="bf16"), True),
        (Engine(compile=True, precision="bf16"), False),
        (Engine(compile=True), False),
    ],
)
def test_who_votes_in_half_precision_without_a_compiler_multiplies(engine: Engine, replaced: bool) -> None:
    frozen = network().eval().requires_grad_(False)
    voter = ready_voter("one", frozen, 1.0, engine)
    assert any(isinstance(layer, MatrixConvolution) for layer in voter.network.modules()) == replaced
    assert not any(isinstance(layer, MatrixConvolution) for layer in frozen.modules())
