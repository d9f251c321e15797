"""Images whose parts have the features of real ones: views, judgements and iterations against plain ones (CIM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fit, method_config, quiet_trainer, small_network
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from cvdd.augmentation.augment import enlarged_parts, pixel_bounds
from cvdd.schema import AnchorsConfig, EngineConfig, MethodConfig
from cvdd.statistics.features import FeatureWatch, feature_distance, feature_layer
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine, Work, can_be_compiled, choose_engine, ready_voter, vain_wishes
from cvdd.synthesis.units import Stage, Unit, unit_views
from cvdd.synthesis.voting import Anchors, judge

SIZE, CLASSES = 16, 4
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
HEADED = AnchorsConfig(weight=0.7)


def anchored(**changes: Any) -> MethodConfig:
    """A method of two stacks' worth of iterations that looks at features alone."""
    fields = {"factor": 2, "init": "real", "anchors": HEADED, "ce": 0.0, "r_bn": 0.0, "iterations": 6, "jitter": 0}
    pace = {"log_every": 2, "grid_every": 6, "checkpoint_every": 6, "lr": 0.04, "betas": (0.9, 0.999)}
    return method_config(**{**fields, **pace, "schedule": "constant", "crop_scale": None, "pad": 2, **changes})


def images_and_anchors(units: int = 2, images: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [units, images, 3, s, s], and a real one for each part of each."""
    source = torch.Generator().manual_seed(seed)
    whole = torch.randn(units, images, 4, 3, SIZE, SIZE, generator=source) * 0.3
    return torch.randn(units, images, 3, SIZE, SIZE, generator=source) * 0.3, whole


def parts_by_hand(images: Tensor) -> Tensor:
    """[n, 3, s, s] to [n, 4, 3, s, s]: upper left, upper right, lower left, lower right, each enlarged by itself."""
    half = SIZE // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    cut = [images[:, :, top : top + half, left : left + half] for top, left in corners]
    return torch.stack([functional.interpolate(one, (SIZE, SIZE), mode="bilinear") for one in cut], dim=1)


def penultimate(network: nn.Sequential, images: Tensor) -> Tensor:
    """What the last layer of a plain network is given."""
    features: Tensor = network[:-1](images)
    return features


# --- parts and features -----------------------------------------------------------------------------------------------


def test_parts_are_cut_row_by_row_and_enlarged() -> None:
    images, _ = images_and_anchors()
    expected = torch.stack([parts_by_hand(unit).flatten(0, 1) for unit in images])
    torch.testing.assert_close(enlarged_parts(images, 2), expected, rtol=0, atol=1e-6)
    assert torch.equal(enlarged_parts(images, 1), images)


def test_features_are_what_the_last_linear_layer_is_given() -> None:
    network, images = small_network().eval(), torch.randn(3, 3, SIZE, SIZE)
    name = feature_layer(network, "head", "a")
    assert isinstance(network.get_submodule(name), nn.Linear)
    watch = FeatureWatch(network, name)
    network(images)
    torch.testing.assert_close(watch.take(), penultimate(network, images))
    with pytest.raises(ConfigError, match="a forward pass does not call this module"):
        watch.take()


def test_features_of_a_layer_inside_are_flattened() -> None:
    network = small_network().eval()
    watch = FeatureWatch(network, "1")
    network(torch.randn(3, 3, SIZE, SIZE))
    assert watch.take().shape[0] == 3


def test_a_member_without_such_a_layer_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"anchors\.layer=layer9: member a has no module of that name; choose head, or"
    ):
        feature_layer(small_network(), "layer9", "a")
    with pytest.raises(ConfigError, match=r"member b does not end in a linear layer; name one of its modules \(0\)"):
        feature_layer(nn.Sequential(nn.Conv2d(3, 4, 1)), "head", "b")


def test_distances_by_hand() -> None:
    shown, aims = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.5, 0.0]])
    assert feature_distance(shown, aims, "l1").tolist() == [1.5, 0.25]
    assert feature_distance(shown, aims, "l2").tolist() == [2.5, 0.125]


# --- judgements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize(("ce", "r_bn"), [(0.0, 0.0), (1.0, 0.3)])
def test_a_judgement_adds_the_distance_from_the_anchors(distance: Any, ce: float, r_bn: float) -> None:
    network = small_network(CLASSES).eval().requires_grad_(False)
    seen, whole = images_and_anchors()
    targets = torch.arange(CLASSES).expand(2, CLASSES)
    options: dict[str, Any] = {"ce": ce, "r_bn": r_bn, "first_bn_multiplier": 10.0}
    voter = ready_voter("a", network, 1.0, Engine(), HEADED)
    leaf = seen.clone().requires_grad_()
    said = judge(leaf, targets, voter, anchors=Anchors(whole[:, :, 0], 0.7, distance), **options)
    other = seen.clone().requires_grad_()
    plain = judge(other, targets, ready_voter("a", small_network(CLASSES).eval(), 1.0, Engine()), **options)
    far = penultimate(network, other.flatten(0, 1)) - penultimate(network, whole[:, :, 0].flatten(0, 1)).detach()
    gap = (far.abs() if distance == "l1" else far.square()).mean(dim=1).view(2, CLASSES).mean(dim=1)
    value = plain.value + 0.7 * gap
    torch.testing.assert_close(said.features, gap.detach())
    torch.testing.assert_close(said.value, value)
    assert torch.equal(said.ce, plain.ce)
    assert torch.equal(said.bn, plain.bn)
    expected = torch.autograd.grad(value.sum(), other)[0]
    torch.testing.assert_close(torch.autograd.grad(said.value.sum(), leaf)[0], expected, rtol=1e-4, atol=1e-7)


def test_features_in_half_precision_are_close_to_those_in_full() -> None:
    seen, whole = images_and_anchors()
    targets = torch.arange(CLASSES).expand(2, CLASSES)
    said = [
        judge(
            seen,
            targets,
            ready_voter("a", small_network(CLASSES).eval().requires_grad_(False), 1.0, engine, HEADED),
            ce=0.0,
            r_bn=0.0,
            first_bn_multiplier=1.0,
            anchors=Anchors(whole[:, :, 0], 1.0, "l1"),
        ).features
        for engine in (Engine(), Engine(precision="bf16"))
    ]
    assert said[1].dtype == torch.float32
    torch.testing.assert_close(said[1], said[0], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("r_bn", [0.0, 0.1])
def test_a_compiled_judgement_says_the_same(r_bn: float) -> None:
    seen, whole = images_and_anchors()
    targets = torch.arange(CLASSES).expand(2, CLASSES)
    found = []
    for engine in (Engine(), Engine(compile=True)):
        voter = ready_voter("a", small_network(CLASSES).eval().requires_grad_(False), 1.0, engine, HEADED)
        for anchors in (whole[:, :, 0], whole[:, :, 1]):
            leaf = seen.clone().requires_grad_()
            options: dict[str, Any] = {"ce": 0.0, "r_bn": r_bn, "first_bn_multiplier": 10.0}
            said = engine.opinion(leaf, targets, voter, anchors=Anchors(anchors, 1.0, "l1"), **options)
            found.append((*said, torch.autograd.grad(said.value.sum(), leaf)[0]))
    for compiled, plain in zip(found[2:], found[:2], strict=True):
        for one, other in zip(compiled, plain, strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[2][3], found[3][3])


def test_layers_inside_are_not_compiled() -> None:
    inside = anchored(anchors={"layer": "layer3"})
    assert can_be_compiled(anchored(), split=False)
    assert not can_be_compiled(inside, split=False)
    work = Work((), 1, 4, 1, SIZE, CLASSES)
    wanted = EngineConfig(compile=True, precision="fp32")
    assert not choose_engine(wanted, inside, work, torch.device("cpu")).compile
    (said,) = vain_wishes(wanted, inside, split=False)
    assert "method.anchors.layer" in said


# --- iterations -------------------------------------------------------------------------------------------------------


def module_of(images: Tensor, whole: Tensor, networks: list[nn.Sequential], method: MethodConfig) -> DistillModule:
    units = [Unit(slot, 0, 0, CLASSES) for slot in range(len(images))]
    frozen = [network.eval().requires_grad_(False) for network in networks]
    stage = Stage(0, 0, method.iterations, SIZE)
    return DistillModule(
        images,
        torch.stack([unit.targets for unit in units]),
        [unit_views(unit, method, stage) for unit in units],
        [ready_voter(f"m{index}", one, 1.0, Engine(), method.anchors) for index, one in enumerate(frozen)],
        torch.full((len(networks), len(units)), 1 / len(networks)),
        method,
        pixel_bounds(MEAN, STD),
        lambda row, current: None,
        anchors=whole,
    )


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Move what is seen, so that its first pixel is that at (down, right); 0 comes in."""
    padded = functional.pad(images, (SIZE, SIZE, SIZE, SIZE))
    return padded[..., SIZE + down : 2 * SIZE + down, SIZE + right : 2 * SIZE + right]


def with_square(images: Tensor, middle: Tensor, side: int) -> Tensor:
    """Cut the same square out of all."""
    left = torch.ones(SIZE, SIZE)
    top, start = (int(place) - side // 2 for place in middle)
    left[max(top, 0) : max(top + side, 0), max(start, 0) : max(start + side, 0)] = 0
    return images * left


@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine", "ce": 0.5}, {"cutout": 0.5}, {"cutout": 0.2}])
def test_iterations_are_those_of_a_plain_loop(changes: dict[str, Any]) -> None:
    """All parts at once, with the same shift and flip as their anchors, by Adam at the schedule's rate."""
    method, networks = anchored(**changes), [small_network(CLASSES, seed=1), small_network(CLASSES, seed=2)]
    images, whole = images_and_anchors()
    module = module_of(images, whole, networks, method)
    fit(module, module.train_dataloader(), 1)
    low, high = pixel_bounds(MEAN, STD)
    for unit in range(2):
        views = unit_views(Unit(unit, 0, 0, CLASSES), method, Stage(0, 0, method.iterations, SIZE))
        own = images[unit].clone().requires_grad_()
        adam = torch.optim.Adam([own], method.lr, method.betas)
        for index in range(method.iterations):
            if method.schedule == "cosine":
                angle = torch.tensor(torch.pi * index / method.iterations)
                adam.param_groups[0]["lr"] = method.lr * 0.5 * (1 + float(angle.cos()))
            down, right = (int(value) for value in views.boxes[index, :2])
            both = [parts_by_hand(own).flatten(0, 1), whole[unit].flatten(0, 1)]
            both = [shifted(one, down, right) for one in both]
            both = [one.flip(-1) for one in both] if views.flips[index] else both
            if method.cutout:
                side = {0.5: SIZE // 2, 0.2: 3}[method.cutout]
                both = [with_square(one, views.cuts[index], side) for one in both]
            loss = torch.zeros(())
            for network in networks:
                far = (penultimate(network, both[0]) - penultimate(network, both[1]).detach()).abs().mean()
                classes = torch.arange(CLASSES).repeat_interleave(4)
                loss = loss + 0.5 * (0.7 * far + method.ce * functional.cross_entropy(network(both[0]), classes))
            (own.grad,) = torch.autograd.grad(loss, own)
            adam.step()
            with torch.no_grad():
                own.clamp_(low, high)
        torch.testing.assert_close(module.images[unit].detach(), own.detach(), rtol=0, atol=2e-4)


def test_who_judges_in_turn_is_compared_by_features_too() -> None:
    """Cosines are asked of all voters where one judges; that of a voter with itself is 1."""
    images, whole = images_and_anchors()
    method = anchored(turns="in_turn", log_agreement=True)
    module = module_of(images, whole, [small_network(CLASSES, seed=1), small_network(CLASSES, seed=1)], method)
    fit(module, module.train_dataloader(), 1)
    assert [row.agreement for row in module.rows] == [{"m0-m1": pytest.approx(1.0, abs=1e-4)}] * len(module.rows)


def test_an_interrupted_run_goes_on_with_the_same_anchors(tmp_path: Path) -> None:
    def build() -> DistillModule:
        return module_of(*images_and_anchors(), [small_network(CLASSES)], anchored(checkpoint_every=4, grid_every=4))

    whole, half, rest = build(), quiet_trainer(1), build()
    quiet_trainer(2).fit(whole)
    half.fit(build())
    half.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(2).fit(rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(rest.images, whole.images)
    assert rest.rows == whole.rows


def test_shifts_and_flips_are_of_the_whole_picture() -> None:
    views = unit_views(Unit(0, 0, 0, CLASSES), anchored(iterations=60), Stage(0, 0, 60, SIZE))
    assert set(views.boxes[:, 2:].flatten().tolist()) == {SIZE}
    assert set(views.boxes[:, :2].flatten().tolist()) == {-2, -1, 0, 1, 2}


def test_features_are_logged_and_fall() -> None:
    images, whole = images_and_anchors()
    method = anchored(iterations=60, checkpoint_every=60, grid_every=60, log_every=20, pad=0, flip=False)
    module = module_of(images, whole, [small_network(CLASSES)], method)
    fit(module, module.train_dataloader(), 1)
    distances = [row.features["m0"] for row in module.rows]
    assert distances[-1] < 0.7 * distances[0]
    assert module.rows[-1].loss == pytest.approx(0.7 * distances[-1], rel=1e-5)


def test_units_in_passes_are_as_units_together() -> None:
    images, whole = images_and_anchors()
    found = []
    for units_per_pass in (None, 1):
        module = module_of(images, whole, [small_network(CLASSES)], anchored())
        module._per_pass = units_per_pass or len(images)
        fit(module, module.train_dataloader(), 1)
        found.append(module.images.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 1}, r"with method\.factor=1 an image is one; set method\.factor=2, or method\.anchors=null"),
        ({"init": "patches"}, r"of method\.init=patches they are not known; set method\.init=real, easiest or medium"),
        ({"sizes": [8, 16], "stages": 2}, r"method\.sizes others; set method\.sizes=null"),
        ({"anchors": None, "pad": 0}, r"method\.ce=0 and method\.r_bn=0 leave nothing to optimise"),
        ({"anchors": None, "ce": 1.0}, r"method\.pad shifts whole images, and method\.factor=2 shows parts"),
        ({"anchors": {"weight": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_go_with_anchors_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        anchored(**changes)


def test_images_that_nobody_optimises_may_stand_beside_them() -> None:
    beside = anchored(iterations=0, factor=1, pad=0)
    assert not beside.recovers
