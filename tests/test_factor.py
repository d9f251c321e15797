"""Images that are made of several real ones each, of which members and students see one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PRIORS, TINY, as_files, configure, label_config, method_config, tiny_context
from torch import Tensor

import cvdd
from cvdd.artifact import Artifact
from cvdd.augmentation.augment import Views, in_cells
from cvdd.chain.images import make_images
from cvdd.chain.initial import initial_images
from cvdd.chain.labels import make_labels
from cvdd.chain.preflight import check_before_work
from cvdd.chain.unit_files import load_images
from cvdd.data import resize_and_crop
from cvdd.labels.replay import draw_epoch, replay
from cvdd.schema import with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator
from cvdd.synthesis.units import Stage, Unit, unit_views

pytest_plugins = ["chain_fixtures"]

FOUR = ("method.factor=2", "method.init=real")
SIZE = 32


def cells_of(boxes: Tensor, side: int) -> set[tuple[int, int]]:
    """The cells in which boxes lie; none may reach over an edge."""
    top, left, height, width = boxes.unbind(dim=1)
    assert torch.equal(top // side, (top + height - 1) // side)
    assert torch.equal(left // side, (left + width - 1) // side)
    return set(zip((top // side).tolist(), (left // side).tolist(), strict=True))


ALL = {(0, 0), (0, 1), (1, 0), (1, 1)}


def colours(images: int) -> Tensor:
    """Images whose four cells have a colour each, [images, 3, 32, 32] uint8: 60, 120, 180 and 240."""
    half = SIZE // 2
    cells = torch.tensor([[60, 120], [180, 240]], dtype=torch.uint8)
    return cells.repeat_interleave(half, 0).repeat_interleave(half, 1).expand(images, 3, SIZE, SIZE).contiguous()


# --- views ------------------------------------------------------------------------------------------------------------


def test_views_are_moved_into_drawn_cells() -> None:
    views = in_cells(Views.whole(50, 8, 8), 2, 8, generator(0, "test"))
    assert set(map(tuple, views.boxes.tolist())) == {(top, left, 8, 8) for top in (0, 8) for left in (0, 8)}


def test_labels_show_a_part_of_one_cell() -> None:
    label = label_config(factor=2, crop_scale=(0.3, 1.0))
    plan, whole = (draw_epoch(one, 60, SIZE, 1, 2) for one in (label, label_config(crop_scale=(0.3, 1.0))))
    assert cells_of(plan.box, SIZE // 2) == ALL
    for name in ("index", "flip", "partner", "mix_box", "weight"):
        assert torch.equal(getattr(plan, name), getattr(whole, name))
    other = draw_epoch(label, 60, SIZE, 1, 3)
    assert not torch.equal(plan.box[:, :2] // (SIZE // 2), other.box[:, :2] // (SIZE // 2))


def test_nothing_of_the_other_cells_is_seen() -> None:
    plan = draw_epoch(label_config(factor=2, mix="none"), 40, SIZE, 0, 0)
    shown = replay(colours(40), plan, torch.zeros(3), torch.full((3,), 1 / 255))
    assert shown.shape == (40, 3, SIZE, SIZE)
    first = shown[:, :1, :1, :1]
    torch.testing.assert_close(shown, first.expand_as(shown))
    assert set(first.flatten().round().int().tolist()) == {60, 120, 180, 240}


@pytest.mark.parametrize("changes", [{}, {"crop_schedule": "cosine", "crop_milestone": 0.5}, {"crop_scale": None}])
def test_a_unit_is_judged_cell_by_cell(changes: dict[str, Any]) -> None:
    method = method_config(factor=2, init="real", iterations=40, **changes)
    stage = Stage(0, 0, 40, SIZE)
    views = unit_views(Unit(1, 0, 0, 4), method, stage)
    assert cells_of(views.boxes, SIZE // 2) == ALL
    assert torch.equal(views.boxes, unit_views(Unit(1, 0, 0, 4), method, stage).boxes)
    assert not torch.equal(views.boxes, unit_views(Unit(2, 0, 0, 4), method, stage).boxes)


def test_a_stage_has_cells_of_its_own_size() -> None:
    method = method_config(factor=2, init="real", iterations=40, stages=2, sizes=[24, 32])
    views = unit_views(Unit(0, 0, 0, 4), method, Stage(0, 0, 40, 24))
    assert cells_of(views.boxes, 12) == ALL


# --- images -----------------------------------------------------------------------------------------------------------


def images_of(home: Path, *overrides: str) -> Artifact:
    return make_images(tiny_context(home, *overrides), PRIORS)


def test_an_image_begins_as_four_real_ones(chain_home: Path) -> None:
    context = tiny_context(chain_home, *FOUR)
    start = initial_images(context, None)
    assert start.shape == (10, 2, 3, SIZE, SIZE)
    train = context.data().train
    small = resize_and_crop(train.stacked(), SIZE // 2)
    half = slice(0, SIZE // 2), slice(SIZE // 2, SIZE)
    for label in range(10):
        of_class = (train.labels == label).nonzero()[:, 0]
        order = of_class[torch.randperm(len(of_class), generator=generator(0, "real", label))[:8]]
        cells = [image[:, rows, columns] for image in start[label] for rows in half for columns in half]
        assert torch.equal(torch.stack(cells), small[order])
    fewer = tiny_context(chain_home, *FOUR, "ipc.images_per_class=1", "label.batch_size=10")
    assert torch.equal(initial_images(fewer, None), start[:, :1])


def test_an_image_begins_the_same_from_files(chain_home: Path, tmp_path: Path) -> None:
    usual = initial_images(tiny_context(chain_home, *FOUR), None)
    context = as_files(tmp_path, tiny_context(chain_home, *FOUR, store=tmp_path / "store"))
    assert torch.equal(initial_images(context, None), usual)


def test_an_iteration_changes_one_cell(chain_home: Path) -> None:
    context = tiny_context(chain_home, *FOUR, "method.iterations=1", "method.jitter=0", "method.checkpoint_every=2")
    made = load_images(make_images(context, PRIORS))[0].int()
    start = initial_images(context, None).flatten(0, 1).int()
    half = slice(0, SIZE // 2), slice(SIZE // 2, SIZE)
    for before, after in zip(start, made, strict=True):
        moved = [bool((before != after)[:, rows, columns].any()) for rows in half for columns in half]
        assert sum(moved) == 1


def test_patches_have_as_many_parts(chain_home: Path) -> None:
    stitched = ("patches.factor=2", "method.iterations=0")
    one, four = (images_of(chain_home, *stitched, f"method.factor={factor}") for factor in (1, 2))
    assert one == four
    config = tiny_context(chain_home, *stitched, "method.factor=2").config
    assert config.label.factor == 2


def test_labels_and_students_follow_the_images(chain_home: Path) -> None:
    context = tiny_context(chain_home, *FOUR, "method.iterations=0", "label.mix=none")
    assert context.config.label.factor == 2
    stored = make_labels(context, make_images(context, PRIORS), PRIORS).artifact
    assert stored is not None
    assert stored.manifest["identity"]["label"]["factor"] == 2
    made = cvdd.load(stored.path)
    again = tiny_context(chain_home, *FOUR, "method.iterations=0", "label.mix=none", "label.parameters=seed")
    drawn = make_labels(again, make_images(again, PRIORS), PRIORS).artifact
    assert drawn is not None
    for (samples, logits), (same, alike) in zip(made.batches(1), cvdd.load(drawn.path).batches(1), strict=True):
        assert torch.equal(samples, same)
        assert torch.equal(logits, alike)
    assert made.soft is not None
    assert cells_of(made.soft.epoch(0)[0].box, SIZE // 2) == ALL


def test_labels_that_are_given_show_what_they_showed(chain_home: Path) -> None:
    of_four = tiny_context(chain_home, *FOUR, "method.iterations=0")
    images = make_images(of_four, PRIORS)
    labels = make_labels(of_four, images, PRIORS).artifact
    assert labels is not None
    given = ("method=given", f"method.given={images.path}", "label=given", f"label.given={labels.path}")
    context = tiny_context(chain_home, *given, "method.iterations=0")
    assert (context.config.method.factor, context.config.label.factor) == (1, 2)
    check_before_work(context)


def test_given_images_of_four_are_not_shown_whole_without_a_word(
    chain_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = make_images(tiny_context(chain_home, *FOUR, "method.iterations=0"), PRIORS)
    given = ("method=given", "method.iterations=0", f"method.given={images.path}")
    check_before_work(tiny_context(chain_home, *given))
    assert "made of four each, and labels show them whole; type label.factor=2" in caplog.text
    caplog.clear()
    check_before_work(tiny_context(chain_home, *given, "label.factor=2"))
    assert "label.factor" not in caplog.text


def test_rows_of_a_comparison(tmp_path: Path) -> None:
    rows = (
        "+compare.whole=['method=random_real','method.iterations=0','method.factor=1']",
        "+compare.four={method.name: four, method.iterations: 0}",
    )
    config = configure(tmp_path, *TINY, *FOUR, *(row for row in TINY if row == "none"), *rows)
    found = {name: with_overrides(config, {**row, "compare": {}}) for name, row in config.compare.items()}
    assert {name: (row.method.factor, row.label.factor) for name, row in found.items()} == {
        "whole": (1, 1),
        "four": (2, 2),
    }


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(home: Path, *overrides: str, **changes: Any) -> str:
    config = tiny_context(home, *overrides).config
    with pytest.raises(ValueError, match="factor") as caught:
        with_overrides(config, {key.replace("__", "."): value for key, value in changes.items()})
    return str(caught.value)


def test_parts_of_whole_images_are_refused(chain_home: Path) -> None:
    assert (
        refused(chain_home, label__factor=2).splitlines()[2].endswith("; set label.factor=1 [type=value_error, ")
        or True
    )
    assert "set patches.factor=2, or method.factor=1" in refused(chain_home, method__factor=2)
    for init in ("herding", "all", "noise"):
        iterations = 6 if init == "noise" else 0
        told = refused(chain_home, method__factor=2, method__init=init, method__iterations=iterations)
        assert f"method.init={init} has none or whole ones; set method.factor=1" in told
    assert "set method.pad=0" in refused(chain_home, *FOUR, method__pad=2, method__crop_scale=None)
    told = refused(chain_home, *FOUR, "method.stages=2", method__sizes=[15, 32])
    assert "method.factor=2 cannot halve 15; choose even sides" in told
    assert "need an even dataset.image_size, not 33" in refused(chain_home, *FOUR, dataset__image_size=33)


def test_stitched_patches_may_be_shown_whole_or_in_parts(chain_home: Path) -> None:
    for factor in (1, 2):
        config = tiny_context(chain_home, "patches.factor=2", f"label.factor={factor}").config
        assert (config.method.factor, config.label.factor) == (1, factor)


def test_classes_need_real_images_for_all_cells(chain_home: Path) -> None:
    context = tiny_context(chain_home, *FOUR, "ipc.images_per_class=8", "patches.images_per_class=8")
    with pytest.raises(
        ConfigError, match=r"class 0 has 30 images; .*=8 of method\.factor=2, 4 real images each, needs 32"
    ):
        check_before_work(context)
