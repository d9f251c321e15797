"""RandAugment of images that are made of several: it changes the one that is shown, as an image of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    MEAN,
    PRIORS,
    STD,
    configure,
    label_config,
    random_pixels,
    same_files,
    small_network,
    tiny_context,
)
from test_factor import FOUR, SIZE, colours
from test_graphs import same, train_student
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

import cvdd
from cvdd.augmentation.augment import Views, apply_views, cut_cells, draw_views, in_cells, normalise
from cvdd.augmentation.randaugment import OPERATIONS, SIGNED, apply_operations
from cvdd.chain.compare import compare
from cvdd.chain.images import make_images
from cvdd.chain.labels import make_labels
from cvdd.chain.preflight import check_before_work
from cvdd.chain.unit_files import load_images
from cvdd.computing.passes import Passes
from cvdd.labels.replay import Replay, draw_epoch, replay
from cvdd.labels.sources import ComputedLabels
from cvdd.labels.teachers import Teachers
from cvdd.support.seeds import generator

pytest_plugins = ["chain_fixtures"]


def changed(count: int = SIZE, **changes: Any) -> Replay:
    """An epoch of four pictures in each of so many images, changed by RandAugment and not mixed."""
    return draw_epoch(label_config(**{"factor": 2, "randaugment": True, "mix": "none", **changes}), count, SIZE, 1, 2)


def corners(plan: Replay) -> list[tuple[int, int]]:
    """Row and column at which the cell of each sample begins."""
    half = SIZE // 2
    return [(top // half * half, left // half * half) for top, left, _, _ in plan.box.tolist()]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_cell_of_a_view_is_cut_out(factor: int) -> None:
    images, side = random_pixels(50, 12), 12 // factor
    small = draw_views(50, side, side, (0.1, 1.0), True, 0, generator(0, "views"))
    views = in_cells(small, factor, side, generator(0, "test"))
    cells, inside = cut_cells(images, views, factor)
    assert torch.equal(inside.boxes, small.boxes)
    assert torch.equal(inside.flips, views.flips)
    for image, box, cell in zip(images, views.boxes.tolist(), cells, strict=True):
        row, column = (place // side * side for place in box[:2])
        assert torch.equal(cell, image[:, row : row + side, column : column + side])
    torch.testing.assert_close(apply_views(cells.float(), inside, 12), apply_views(images.float(), views, 12))


def test_a_part_is_changed_as_an_image_of_its_size() -> None:
    """Sample by sample with torchvision: the part is cut out, changed, cropped and flipped."""
    images, plan, half = random_pixels(400, SIZE), changed(400), SIZE // 2
    assert set(plan.operations.flatten().tolist()) == {*range(len(OPERATIONS)), *(-1 - n for n in range(len(SIGNED)))}
    expected = []
    for position, (row, column) in enumerate(corners(plan)):
        part = images[plan.index[position]][None, :, row : row + half, column : column + half]
        part = apply_operations(part, plan.operations[position : position + 1])[0]
        top, left, height, width = plan.box[position].tolist()
        box = [top - row, left - column, height, width]
        crop = vision.resized_crop(part.float(), *box, [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=True)
        expected.append(vision.normalize((vision.hflip(crop) if plan.flip[position] else crop) / 255, MEAN, STD))
    torch.testing.assert_close(replay(images, plan, MEAN, STD), torch.stack(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rounding", [False, True])
def test_nothing_that_randaugment_moves_comes_from_another_cell(rounding: bool) -> None:
    images, plan, half = random_pixels(400, SIZE), changed(400, crop_scale=(1.0, 1.0)), SIZE // 2
    others = random_pixels(400, SIZE, seed=1)
    for index, (row, column) in zip(plan.index.tolist(), corners(plan), strict=True):
        place = index, slice(None), slice(row, row + half), slice(column, column + half)
        others[place] = images[place]
    shown = replay(images, plan, MEAN, STD, rounding)
    assert torch.equal(shown, replay(others, plan, MEAN, STD, rounding))
    assert not torch.equal(shown, replay(images, replace(plan, operations=None), MEAN, STD, rounding))


def test_black_comes_in_from_beyond_a_cell() -> None:
    """Of images in four bright colours, shears, rotations and translations show one of them and black."""
    numbers = torch.tensor([sign * number for number in range(1, 6) for sign in (1, -1)])
    plan = changed(len(numbers), crop_scale=(1.0, 1.0))
    plan = replace(plan, operations=torch.stack([numbers, torch.zeros_like(numbers)], dim=1))
    shown = replay(colours(len(numbers)), plan, torch.zeros(3), torch.full((3,), 1 / 255))
    assert len(set(corners(plan))) > 1
    for sample, (row, column) in zip(shown, corners(plan), strict=True):
        colour = float(colours(1)[0, 0, row, column])
        assert sample.max() == pytest.approx(colour)
        assert float(sample.min()) == pytest.approx(0, abs=1e-3)


def test_operations_that_change_nothing_show_what_is_shown_without() -> None:
    images, plan = random_pixels(60, SIZE), changed(60, mix="mixup")
    still = replace(plan, operations=torch.zeros_like(plan.operations))
    expected = replay(images, replace(plan, operations=None), MEAN, STD)
    torch.testing.assert_close(replay(images, still, MEAN, STD), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounding", [False, True])
def test_whole_images_are_changed_as_ever(rounding: bool) -> None:
    images, plan = random_pixels(60, SIZE), changed(60, factor=1)
    whole = apply_operations(images[plan.index], plan.operations).float()
    views = Views(plan.box, plan.flip, torch.zeros(60, 2, dtype=torch.long))
    expected = normalise(apply_views(whole, views, SIZE, rounding), MEAN, STD)
    assert torch.equal(replay(images, plan, MEAN, STD, rounding), expected)


def test_randaugment_and_cells_are_drawn_as_each_is_without_the_other() -> None:
    both, cells, operations = changed(), changed(randaugment=False), changed(factor=1)
    for name, values in cells.drawn().items():
        assert torch.equal(getattr(both, name), values)
    assert torch.equal(both.operations, operations.operations)
    assert torch.equal(both.flip, operations.flip)


def test_the_number_of_cells_stays_with_what_was_drawn() -> None:
    images, label = random_pixels(20, SIZE), label_config(factor=2, randaugment=True)
    plan = draw_epoch(label, 20, SIZE, 0, 0)
    parts = [plan.batch(0, 8), plan.batch(8, 16), plan.batch(16, 20)]
    ways = [Replay.from_record(plan.record(), 2), Replay.cat(parts), plan.to(torch.device("cpu"))]
    shown = replay(images, plan, MEAN, STD)
    assert all(torch.equal(replay(images, way, MEAN, STD), shown) for way in ways)
    assert torch.equal(torch.cat([replay(images, part, MEAN, STD) for part in parts]), shown)


# --- labels and students ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("label.keep=0.5",), ("protocol.repeat_labels=true", "label.epochs=2")])
def test_stored_labels_of_changed_parts(chain_home: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Views that are stored or drawn again, somebody's own program, and a student of given labels: all see the same."""
    usual = (*FOUR, "method.iterations=0", "label.randaugment=true", *more)
    context = tiny_context(chain_home, *usual)
    images = make_images(context, PRIORS)
    stored = make_labels(context, images, PRIORS)
    drawn = make_labels(tiny_context(chain_home, *usual, "label.parameters=seed"), images, PRIORS)
    assert stored.artifact is not None
    assert drawn.artifact is not None
    pixels, made = load_images(images)[0], cvdd.load(stored.artifact.path)
    in_rounds = "protocol.repeat_labels=true" in more
    opened, again = (labels.open(pixels, in_rounds) for labels in (stored, drawn))
    for epoch in range(2):
        (plan, logits), (other, alike) = opened.epoch(epoch), again.epoch(epoch)
        assert torch.equal(logits, alike)
        assert torch.equal(replay(pixels, plan, MEAN, STD), replay(pixels, other, MEAN, STD))
        if not in_rounds:
            samples, said = (torch.cat(batches) for batches in zip(*made.batches(epoch), strict=True))
            assert torch.equal(said, logits.float())
            assert torch.equal(samples, replay(pixels, plan, torch.tensor(made.mean), torch.tensor(made.std)))
    typed = ("method=given", f"method.given={images.path}", "method.iterations=0", "label=given")
    learnt = [override for override in more if override.startswith("protocol.")]
    given = tiny_context(tmp_path, *typed, f"label.given={stored.artifact.path}", *learnt)
    check_before_work(given)
    assert (given.config.label.factor, given.config.label.randaugment) == (2, True)
    (student,), (theirs,) = (compare(one)[1][0].students for one in (given, context))
    assert student.manifest["files"] == theirs.manifest["files"]


def test_labels_of_changed_parts_are_computed_as_they_are_stored(chain_home: Path, tmp_path: Path) -> None:
    usual = (*FOUR, "method.iterations=0", "label.randaugment=true")
    contexts = [tiny_context(chain_home, *usual), tiny_context(chain_home, *usual, "label.store=none")]
    images = make_images(contexts[0], PRIORS)
    pixels = load_images(images)[0]
    stored, computed = (make_labels(context, images, PRIORS).open(pixels) for context in contexts)
    for epoch in range(3):
        (plan, logits), (other, alike) = stored.epoch(epoch), computed.epoch(epoch)
        assert torch.equal(logits, alike)
        assert torch.equal(replay(pixels, plan, MEAN, STD), replay(pixels, other, MEAN, STD))
    copy = tiny_context(tmp_path, *usual, "label.store=none")
    (student,), (theirs,) = (compare(context)[1][0].students for context in (copy, contexts[0]))
    assert same_files(student, theirs)


def test_a_recorded_student_is_shown_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is recorded with RandAugment, but whatever it is given is shown as it was labelled."""
    label = label_config(factor=2, randaugment=True, batch_size=8, dtype="float32", epochs=8)
    labels = ComputedLabels(Teachers([small_network()], [1.0], label), random_pixels(20), label, 0, MEAN, STD)
    monkeypatch.setattr("test_graphs.labels_of", lambda device: labels)
    same(*(train_student(1, "cpu", Passes(record=record))[1] for record in (False, True)))


def test_the_best_labels_go_with_four_pictures(tmp_path: Path) -> None:
    label = configure(tmp_path, "method=random_real", "method.factor=2", "label=best", "compare=none").label
    assert (label.factor, label.randaugment) == (2, True)


def test_swapped_parts_are_refused() -> None:
    for more in ({}, {"randaugment": True}):
        with pytest.raises(ValueError, match=r"set label\.shuffle=1, or method\.factor=1"):
            label_config(factor=2, shuffle=2, **more)
