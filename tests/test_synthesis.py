"""Units, stacks, and the module whose parameters are the images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import MEAN, STD, method_config, quiet_trainer, small_network
from torch import Tensor, nn
from vote_reference import voting_loss

import cvdd.synthesis.distill_module
from cvdd.augmentation.augment import pixel_bounds
from cvdd.methods.gvbsm import densification
from cvdd.statistics.bn import BatchStatistics, statistics_distance
from cvdd.support.config_base import ConfigError
from cvdd.support.curves import cosine
from cvdd.synthesis.distill_module import DistillModule, NonFiniteLoss
from cvdd.synthesis.log_rows import LogRow
from cvdd.synthesis.units import Stage, Unit, plan_stages, unit_views
from cvdd.synthesis.voting import Voter

SIZE = 12


def test_learning_rate_falls_from_one_to_zero() -> None:
    assert [cosine(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert cosine(25, 100) == pytest.approx(0.5 + math.sqrt(2) / 4)


def test_bounds_are_black_and_white() -> None:
    low, high = pixel_bounds(MEAN, STD)
    assert low[0].item() == pytest.approx(-0.4914 / 0.2470)
    assert high[2].item() == pytest.approx((1 - 0.4465) / 0.2616)


# --- the module -------------------------------------------------------------------------------------------------------


def voters(**networks: nn.Module) -> list[Voter]:
    return [Voter(name, network) for name, network in networks.items()]


def module_of(
    images: Tensor,
    chosen: list[Unit],
    members: list[Voter],
    rows: list[LogRow] | None = None,
    stage: Stage | None = None,
    **changes: object,
) -> DistillModule:
    method = method_config(**{"log_every": 2, "grid_every": 6, "checkpoint_every": 6, "iterations": 11, **changes})
    targets = torch.stack([unit.targets for unit in chosen])
    stage = plan_stages(method, SIZE)[0] if stage is None else stage
    views = [unit_views(unit, method, stage) for unit in chosen]
    weights = torch.full((len(members), len(chosen)), 1 / len(members))
    kept = [] if rows is None else rows
    bounds = pixel_bounds(MEAN, STD)
    return DistillModule(
        images, targets, views, members, weights, method, bounds, lambda row, current: kept.append(row), stage
    )


def fit(module: DistillModule) -> DistillModule:
    quiet_trainer(module.epochs).fit(module)
    return module


def start(units: int) -> Tensor:
    return torch.randn(units, 4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


SLOTS = [Unit(slot, 0, 0, 4) for slot in range(3)]


def plain_loop(images: Tensor, unit: Unit, network: nn.Module, steps: int) -> Tensor:
    """The same optimisation as a plain loop with torchvision's crops."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    method = method_config(iterations=steps)
    views = unit_views(unit, method, Stage(0, 0, steps, SIZE))
    leaf = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=method.lr, betas=(0.5, 0.9), eps=1e-8)
    low, high = pixel_bounds(MEAN, STD)
    inputs: dict[int, Tensor] = {}
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, given, index=index: inputs.__setitem__(index, given[0]))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = method.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        box = views.boxes[step].tolist()
        seen = vision.resized_crop(leaf, *box, [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=True)
        seen = vision.hflip(seen) if views.flips[step] else seen
        seen = torch.roll(seen, views.shifts[step].tolist(), dims=(-2, -1))
        loss = nn.functional.cross_entropy(network(seen), torch.arange(4))
        for index, layer in enumerate(layers):
            variance, mean = torch.var_mean(inputs[index], dim=(0, 2, 3), correction=0)
            term = (layer.running_var - variance).norm() + (layer.running_mean - mean).norm()
            loss = loss + 0.01 * (10 if index == 0 else 1) * term
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            leaf.copy_(torch.clamp(leaf, low, high))
    return leaf.detach()


def test_a_plain_loop_makes_the_same_images() -> None:
    images = start(1)
    module = fit(module_of(images, [SLOTS[1]], voters(a=small_network()), iterations=5))
    expected = plain_loop(images[0], SLOTS[1], small_network(), 5)
    torch.testing.assert_close(module.images.detach()[0], expected, rtol=0, atol=2e-3)
    assert (expected - images[0]).abs().max() > 0.3


def test_units_of_a_stack_end_as_if_alone() -> None:
    images, members = start(3), voters(a=small_network(seed=1), b=small_network(seed=2))
    together = fit(module_of(images, SLOTS, members)).images.detach()
    for index in range(3):
        alone = fit(module_of(images[index : index + 1], SLOTS[index : index + 1], members)).images.detach()
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=5e-3)
    assert (together[0] - together[1]).abs().max() > 0.5


def test_rows_come_at_the_asked_iterations() -> None:
    rows: list[LogRow] = []
    module = fit(module_of(start(2), SLOTS[:2], voters(a=small_network()), rows))
    assert [row.iteration for row in rows] == [2, 4, 6, 8, 10, 11]
    assert rows == module.rows
    assert rows[-1].lr == pytest.approx(0.25 * cosine(10, 11))
    assert rows[-1].loss < rows[0].loss


def test_terms_of_a_row_are_means_over_units() -> None:
    """In the only iteration voters see the images as they were given; alone each unit has a row of its own."""
    images, members = start(2), voters(a=small_network())
    changes = {"iterations": 1, "composer": "classes", "density": 0.5, "density_scale": "dimension", "r_bn": 0.1}
    units = [Unit(slot, 0, 0, 2, 2) for slot in range(2)]
    (row,) = fit(module_of(images, units, members, **changes)).rows
    alone = [fit(module_of(images[i : i + 1], units[i : i + 1], members, **changes)).rows[0] for i in range(2)]
    assert row.density == pytest.approx(sum(one.density for one in alone) / 2, rel=1e-4)
    assert row.loss == pytest.approx(sum(one.loss for one in alone) / 2, rel=1e-4)
    assert row.loss == pytest.approx(row.ce["a"] + 0.1 * row.bn["a"] + 0.5 * row.density, rel=1e-4)


def test_images_stay_between_black_and_white() -> None:
    module = fit(module_of(5 * start(1), SLOTS[:1], voters(a=small_network()), lr=5.0))
    low, high = pixel_bounds(MEAN, STD)
    images = module.images.detach()
    assert bool((images >= low).all() and (images <= high).all())
    assert bool(((images == low) | (images == high)).any())


def test_images_are_moved_by_the_methods_adam() -> None:
    changes = {"betas": (0.7, 0.95), "eps": 1e-6, "lr": 0.03}
    optimizer = module_of(start(1), SLOTS[:1], voters(a=small_network()), **changes).configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in changes} == changes


def test_checkpoints_hold_images_and_not_members() -> None:
    module = module_of(start(1), SLOTS[:1], voters(a=small_network()))
    assert list(module.state_dict()) == ["images"]


@pytest.mark.parametrize("first", [1.0, 10.0])
def test_the_first_layer_counts_as_the_method_says(first: float) -> None:
    """In the only iteration the voter sees the images as they were given."""
    images = start(1)
    once = {"iterations": 1, "crop_scale": None, "flip": False, "jitter": 0, "first_bn_multiplier": first}
    network = small_network()
    with BatchStatistics(network, 1) as watched:
        network(images[0])
    expected = statistics_distance(watched.means, watched.variances, watched.layers, first)
    module = fit(module_of(images, SLOTS[:1], voters(a=small_network()), **once))
    assert module.rows[0].bn["a"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_a_row_is_the_mean_over_units() -> None:
    """Two voters of equal weight, and the terms of each one, which are means too."""
    rows = fit(module_of(start(3), SLOTS, voters(a=small_network(seed=1), b=small_network(seed=2)))).rows
    for row in rows:
        expected = sum(0.5 * (row.ce[name] + 0.01 * row.bn[name]) for name in "ab")
        assert row.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_matrices_are_made_for_as_many_iterations_as_fit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log rows lie five iterations apart, so that pieces of two and of four leave a shorter one."""
    changes = {"log_every": 5, "grid_every": 10, "checkpoint_every": 10}
    whole = fit(module_of(start(3), SLOTS, voters(a=small_network()), **changes)).images
    monkeypatch.setattr(cvdd.synthesis.distill_module, "MATRIX_ELEMENTS", at_once * 3 * SIZE**2)
    assert torch.equal(fit(module_of(start(3), SLOTS, voters(a=small_network()), **changes)).images, whole)


def test_images_of_a_class_are_held_apart_with_the_methods_weight_and_scale() -> None:
    """Two images of each of two classes; the gradient is that of the vote and the densification together."""
    unit, members = Unit(0, 0, 0, 2, 2), voters(a=small_network())
    changes = {"composer": "classes", "density": 0.5, "density_scale": "dimension", "r_bn": 0.1}
    module = module_of(start(1), [unit], members, **changes)
    gradient, said = module._vote(0, module.images.detach().clone(), False)
    leaf = start(1).requires_grad_()
    crowding = densification(leaf, unit.targets[None], "dimension").sum()
    loss = voting_loss(leaf, unit.targets[None], members, torch.ones(1, 1), r_bn=0.1).loss + 0.5 * crowding
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-6)
    assert said.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert said.density.item() == pytest.approx(crowding.item(), rel=1e-5)


class Broken(nn.Module):
    """Fine until its third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = small_network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x) * (float("nan") if self.calls > 2 else 1.0)


def test_a_loss_that_is_not_finite_names_its_member() -> None:
    members = voters(fine=small_network(), broken=Broken())
    with pytest.raises(NonFiniteLoss, match=r"loss of member broken is not finite in iteration 3 .*method\.lr"):
        fit(module_of(start(1), SLOTS[:1], members, log_agreement=False))


class InfiniteGradient(nn.Module):
    """Finite logits whose gradient is not: the square root at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] + (x.flatten(1)[:, :4] * 0).sqrt()


def test_a_gradient_that_is_not_finite_is_noticed() -> None:
    """Such a gradient in the last step would otherwise leave images without any meaning behind a finite loss."""
    members = voters(steep=InfiniteGradient())
    changes = {"iterations": 1, "log_every": 1, "crop_scale": None, "r_bn": 0.0}
    with pytest.raises(NonFiniteLoss, match="images are not finite after iteration 1, though the losses of steep are"):
        fit(module_of(start(1), SLOTS[:1], members, **changes))


def test_interrupted_between_epochs_is_as_uninterrupted(tmp_path: Path) -> None:
    """Epochs are of six iterations; the checkpoint has images, Adam's moments, rows and place in the schedule."""

    def build(**changes: object) -> DistillModule:
        return module_of(start(2), SLOTS[:2], voters(a=small_network()), **changes)

    whole = fit(build())
    first = quiet_trainer(1)
    first.fit(build())
    first.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ConfigError, match=r"method\.checkpoint_every=12: .* in steps of 6; set .*every=6 to go on"):
        quiet_trainer(2).fit(build(checkpoint_every=12), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    resumed = build()
    quiet_trainer(2).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(whole.images, resumed.images)
    assert whole.rows == resumed.rows


# --- one voter an iteration -------------------------------------------------------------------------------------------


def test_voters_judge_in_turn() -> None:
    """Two members in turn for two steps are two plain steps of one member each."""
    members = voters(a=small_network(seed=1), b=small_network(seed=2))
    module = module_of(start(1), SLOTS[:1], members, turns="in_turn", iterations=2, log_every=1, grid_every=2)
    fit(module)
    assert set(module.rows[0].ce) == {"a"}
    assert set(module.rows[1].ce) == {"a", "b"}
    alone = module_of(start(1), SLOTS[:1], members[:1], iterations=2, log_every=1, grid_every=2)
    fit(alone)
    assert module.rows[0].ce["a"] == pytest.approx(alone.rows[0].ce["a"], rel=1e-6)
    assert module.rows[0].loss == pytest.approx(alone.rows[0].loss, rel=1e-6)
    assert module.rows[1].loss != pytest.approx(alone.rows[1].loss, rel=1e-6)
    assert module.rows[1].ce["a"] == module.rows[0].ce["a"]


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_second_stage_goes_on_with_the_schedule_and_a_fresh_optimiser() -> None:
    """Without a blend two stages of Adam are one run whose moments are cleared in the middle."""
    changes = {"iterations": 4, "log_every": 2, "grid_every": 4, "checkpoint_every": 4, "stages": 2}
    stages = plan_stages(method_config(iterations=4, stages=2), SIZE)
    first = fit(module_of(start(1), SLOTS[:1], voters(a=small_network()), stage=stages[0], **changes))
    second = fit(module_of(first.images.detach(), SLOTS[:1], voters(a=small_network()), stage=stages[1], **changes))
    assert [row.iteration for row in first.rows + second.rows] == [2, 4]
    assert second.rows[0].lr == pytest.approx(0.25 * cosine(3, 4))
    # A fresh Adam's first step is its learning rate in the direction of the gradient's sign: 0.25 * cos at iteration 2.
    one = fit(
        module_of(first.images.detach(), SLOTS[:1], voters(a=small_network()), stage=Stage(1, 2, 3, SIZE), **changes)
    )
    steps = (one.images.detach() - first.images.detach()).abs()
    low, high = pixel_bounds(MEAN, STD)
    free = (one.images > low) & (one.images < high)
    assert steps[free].max().item() == pytest.approx(0.25 * cosine(2, 4), rel=1e-3)
