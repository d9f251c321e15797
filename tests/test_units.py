"""Units, stacks, stages, and what each unit sees."""

from __future__ import annotations

import pytest
import torch
from helpers import method_config
from torchvision.transforms import functional as vision

from cvdd.augmentation.augment import Views, apply_matrices
from cvdd.methods.cda import lowest_area
from cvdd.methods.fadrm import adjustable_residual
from cvdd.synthesis.units import (
    Stage,
    Unit,
    draw_per_unit,
    plan_stacks,
    plan_stages,
    plan_units,
    unit_matrices,
    unit_views,
)


def test_units_cover_every_class_of_every_slot_once() -> None:
    units = plan_units(3, 25, method_config(classes_per_unit=10))
    assert [(unit.slot, unit.block, unit.start, unit.stop) for unit in units[:4]] == [
        (0, 0, 0, 10),
        (0, 1, 10, 20),
        (0, 2, 20, 25),
        (1, 0, 0, 10),
    ]
    made = sorted((unit.slot, label) for unit in units for label in range(unit.start, unit.stop))
    assert made == [(slot, label) for slot in range(3) for label in range(25)]
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("slots_per_unit", [None, 2, 3, 9])
def test_units_of_classes_cover_every_image_once(slots_per_unit: int | None) -> None:
    method = method_config(composer="classes", classes_per_unit=2, slots_per_unit=slots_per_unit)
    units = plan_units(5, 3, method)
    numbers = torch.arange(15).view(3, 5)
    assert torch.cat([unit.of(numbers) for unit in units]).sort().values.tolist() == list(range(15))
    for unit in units:
        # Class after class: image 5c + k of the grid is slot k of class c.
        assert (unit.of(numbers) // 5).tolist() == unit.targets.tolist()
    assert max(len(unit.targets) for unit in units) == 2 * min(slots_per_unit or 5, 5)
    assert len({unit.name for unit in units}) == len(units)


def test_stacks_hold_units_of_one_draw_and_one_shape() -> None:
    units = plan_units(5, 25, method_config(classes_per_unit=10))
    by_slot = {0: (0, 1), 1: (0, 2), 2: (0, 1), 3: (0, 2), 4: (0, 1)}
    draws = draw_per_unit(units, method_config(), by_slot.__getitem__)
    stacks = plan_stacks(units, draws, method_config(units_per_stack=4))
    assert sorted(unit.name for stack in stacks for unit in stack.units) == sorted(unit.name for unit in units)
    for stack in stacks:
        assert {by_slot[unit.slot] for unit in stack.units} == {stack.draw}
        assert len({unit.stop - unit.start for unit in stack.units}) == 1
    # Six units of ten classes with the first draw: four and two; three of five classes.
    assert [len(stack.units) for stack in stacks if stack.draw == (0, 1)] == [4, 2, 3]
    assert [stack.index for stack in stacks] == list(range(len(stacks)))


def test_units_of_several_slots_draw_a_committee_each() -> None:
    method = method_config(composer="classes", classes_per_unit=1)
    assert draw_per_unit(plan_units(4, 3, method), method, lambda turn: (turn,)) == [(0,), (1,), (2,)]


def test_views_of_a_unit_depend_on_nothing_else() -> None:
    method = method_config(iterations=20)
    stage = Stage(0, 0, 20, 32)
    unit = Unit(3, 1, 4, 8)
    views = unit_views(unit, method, stage)
    assert len(views.boxes) == 20
    assert torch.equal(views.boxes, unit_views(Unit(3, 1, 0, 4), method, stage).boxes)
    for other in (Unit(2, 1, 4, 8), Unit(3, 0, 4, 8)):
        assert not torch.equal(views.boxes, unit_views(other, method, stage).boxes)
    assert not torch.equal(views.boxes, unit_views(unit, method.model_copy(update={"seed": 6}), stage).boxes)
    assert not torch.equal(views.boxes, unit_views(unit, method, Stage(1, 20, 40, 32)).boxes)


def test_squares_of_a_unit_are_drawn_beside_all_else() -> None:
    """One for each iteration, anywhere on the image at the stage's size."""
    plain, method = method_config(iterations=400), method_config(iterations=400, cutout=0.5)
    stage, unit = Stage(0, 0, 400, 16), Unit(3, 1, 4, 8)
    views, without = unit_views(unit, method, stage), unit_views(unit, plain, stage)
    assert without.cuts is None
    assert torch.equal(views.boxes, without.boxes)
    assert torch.equal(views.flips, without.flips)
    assert torch.equal(views.shifts, without.shifts)
    assert sorted(set(views.cuts.flatten().tolist())) == list(range(17))
    assert torch.equal(views.cuts, unit_views(Unit(3, 1, 0, 4), method, stage).cuts)
    for other in (Unit(2, 1, 4, 8), Unit(3, 0, 4, 8)):
        assert not torch.equal(views.cuts, unit_views(other, method, stage).cuts)
    assert not torch.equal(views.cuts, unit_views(unit, method, Stage(1, 400, 800, 16)).cuts)
    assert int(unit_views(unit, method, Stage(1, 400, 800, 32)).cuts.max()) == 32


def test_stages_are_equal_parts_with_their_own_sizes() -> None:
    method = method_config(iterations=12, stages=3, sizes=[8, 12, 16])
    assert plan_stages(method, 16) == [Stage(0, 0, 4, 8), Stage(1, 4, 8, 12), Stage(2, 8, 12, 16)]
    assert plan_stages(method_config(iterations=5), 16) == [Stage(0, 0, 5, 16)]


def test_shifts_go_both_ways() -> None:
    method = method_config(iterations=300, jitter=3, jitter_both_ways=True)
    shifts = unit_views(Unit(0, 0, 0, 2), method, Stage(0, 0, 300, 16)).shifts
    assert sorted(set(shifts.flatten().tolist())) == list(range(-3, 4))


def test_padding_shifts_whole_images_over_the_mean_colour() -> None:
    method = method_config(iterations=40, crop_scale=None, pad=2, jitter=0, flip=False)
    views = unit_views(Unit(0, 0, 0, 1), method, Stage(0, 0, 40, 6))
    rows, columns = unit_matrices(views, 6)
    image = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    seen = apply_matrices(image.expand(40, 1, 3, 6, 6), rows, columns)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    expected = [vision.crop(padded, int(top) + 2, int(left) + 2, 6, 6) for top, left in views.boxes[:, :2]]
    torch.testing.assert_close(seen[:, 0], torch.cat(expected))
    assert views.boxes[:, :2].unique().tolist() == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize(("down", "right"), [(1, 2), (0, 2), (1, 0), (-1, 2), (-1, 0), (0, 0)])
def test_a_box_over_any_edge_shows_the_mean_colour_there(down: int, right: int) -> None:
    views = Views(torch.tensor([[down, right, 6, 6]]), torch.tensor([False]), torch.zeros(1, 2, dtype=torch.long))
    image = torch.randn(1, 1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    seen = apply_matrices(image, *unit_matrices(views, 6))[0]
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    torch.testing.assert_close(seen, vision.crop(padded, 2 + down, 2 + right, 6, 6))


@pytest.mark.parametrize(
    ("schedule", "milestone", "areas"),
    [
        ("constant", 1.0, [0.08, 0.08, 0.08]),
        ("step", 0.75, [1.0, 1.0, 0.08]),
        ("linear", 1.0, [1.0, 0.54, 0.08 + 0.92 * 0.01]),
        ("cosine", 1.0, [1.0, 0.54, 0.08 + 0.92 * 0.00024671981713]),
        ("cosine", 0.5, [1.0, 0.08, 0.08]),
    ],
)
def test_crops_get_smaller(schedule: str, milestone: float, areas: list[float]) -> None:
    found = [lowest_area(iteration, 100, schedule, milestone, 0.08) for iteration in (0, 50, 99)]
    assert found == pytest.approx(areas)


def areas_of_views(size: int = 32, **changes: object) -> torch.Tensor:
    """Areas of the crops of a unit's iterations, as shares of the image."""
    method = method_config(**changes)
    boxes = unit_views(Unit(0, 0, 0, 2), method, Stage(0, 0, method.iterations, size)).boxes
    return (boxes[:, 2] * boxes[:, 3]).double() / size**2


def test_crops_without_a_schedule_have_the_methods_areas() -> None:
    """Sides are whole pixels, which is a part of 0.05 at most."""
    areas = areas_of_views(iterations=300, crop_scale=(0.5, 0.6))
    assert areas.min() > 0.45
    assert areas.max() < 0.65


def test_a_step_comes_at_its_milestone() -> None:
    areas = areas_of_views(iterations=100, crop_schedule="step", crop_milestone=0.5, crop_scale=(0.08, 0.3))
    assert areas[:50].tolist() == [1.0] * 50
    assert areas[50:].max() < 0.36
    assert areas[50:].min() < 0.15


def test_scheduled_crops_begin_with_the_whole_image() -> None:
    method = method_config(iterations=100, crop_schedule="cosine", crop_scale=(0.08, 1.0))
    boxes = unit_views(Unit(0, 0, 0, 2), method, Stage(0, 0, 100, 32)).boxes
    assert boxes[0].tolist() == [0, 0, 32, 32]
    area = (boxes[:, 2] * boxes[:, 3]).float() / 32**2
    assert area[:20].min() > 0.85
    assert area[60:].min() < 0.3


def test_scheduled_crops_are_as_large_as_the_schedule_or_the_range_allows() -> None:
    """Sides are whole pixels, which is a part of 0.06 at most."""
    method = method_config(iterations=100, crop_schedule="cosine", crop_scale=(0.08, 0.5))
    boxes = unit_views(Unit(0, 0, 0, 2), method, Stage(0, 0, 100, 32)).boxes
    areas = ((boxes[:, 2] * boxes[:, 3]).double() / 32**2).tolist()
    for iteration, area in enumerate(areas):
        lowest = lowest_area(iteration, 100, "cosine", 1.0, 0.08)
        assert lowest - 0.06 <= area <= max(lowest, 0.5) + 0.06
    assert max(areas[70:]) > 0.3


def test_residual_blends_at_the_size_of_the_next_stage() -> None:
    images, initial = torch.full((2, 1, 3, 4, 4), 2.0), torch.full((2, 1, 3, 6, 6), -1.0)
    assert torch.equal(adjustable_residual(images, initial, 0.25, 4), torch.full((2, 1, 3, 4, 4), -0.25))
    assert torch.equal(adjustable_residual(images, initial, 0.5, 8), torch.full((2, 1, 3, 8, 8), 0.5))
