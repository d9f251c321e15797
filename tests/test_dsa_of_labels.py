"""DSA in the views of a student: drawn by sample and batch, replayed, stored, recorded, and left where it is not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import MEAN, STD, label_config, random_pixels
from torch import Tensor
from torch.nn import functional

from cvdd.augmentation.dsa import EACH, FAMILIES, MOVES, SiameseAugmentation, augment, augment_each, draw_each
from cvdd.labels.replay import Replay, draw_epoch, record_type, replay

SIZE = 16


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=source(9))


def values(
    *, colours: tuple[float, ...] = (0.5, 0.5, 0.5), move: str = "crop", place: tuple[float, float] = (0, 0)
) -> Tensor:
    """Of one sample; a cutout that lies outside."""
    return torch.tensor([[*colours, MOVES.index(move), *place, -SIZE, -SIZE]])


def test_what_changes_nothing_changes_nothing() -> None:
    one = images(1)
    assert torch.allclose(augment_each(one, values()), one, atol=1e-6)
    assert torch.allclose(augment_each(one, values(move="scale", place=(1, 1))), one, atol=1e-5)
    assert torch.allclose(augment_each(one, values(move="rotate")), one, atol=1e-5)


@pytest.mark.parametrize("family", ["color", "crop", "cutout"])
def test_a_change_alone_is_that_of_the_family(family: str) -> None:
    one, drawn = images(1), FAMILIES[family].draw(1, SIZE, source(3))
    chosen = values()
    column = {"color": 0, "crop": 4, "cutout": 6}[family]
    chosen[:, column : column + drawn.shape[1]] = drawn
    assert torch.allclose(augment_each(one, chosen), augment(one, SiameseAugmentation(family, drawn)), atol=1e-6)


@pytest.mark.parametrize(("move", "place"), [("scale", (1.1, 0.9)), ("rotate", (0.2, 0.0))])
def test_what_is_stretched_or_turned_is_sampled_as_released(move: str, place: tuple[float, float]) -> None:
    """By PyTorch's own grid with its defaults, around the centre."""
    cosine, sine = math.cos(place[0]), math.sin(place[0])
    rows = [[cosine, -sine], [sine, cosine]] if move == "rotate" else [[place[0], 0], [0, place[1]]]
    one, theta = images(1), torch.tensor([[[*rows[0], 0.0], [*rows[1], 0.0]]])
    grid = functional.affine_grid(theta, [1, 3, SIZE, SIZE], align_corners=False)
    expected = functional.grid_sample(one, grid, align_corners=False)
    assert torch.allclose(augment_each(one, values(move=move, place=place)), expected, atol=1e-5)


def test_colours_come_first_and_the_cutout_last() -> None:
    one, chosen = images(1), values(colours=(0.9, 0.8, 0.1), place=(2, -1))
    chosen[:, 6:] = 8
    coloured = augment(one, SiameseAugmentation("color", chosen[:, :3]))
    shifted = augment(coloured, SiameseAugmentation("crop", chosen[:, 4:6].long()))
    assert torch.allclose(augment_each(one, chosen), augment(shifted, SiameseAugmentation("cutout", chosen[:, 6:])))
    assert (augment_each(one, chosen)[0, :, 8, 8] == 0).all()


def test_one_move_for_a_batch_and_parameters_for_every_sample() -> None:
    bounds = [(start, start + 4) for start in range(0, 400, 4)] + [(400, 403)]
    drawn = draw_each(bounds, SIZE, source())
    assert drawn.shape == (403, EACH)
    families = [drawn[start:stop, 3].unique() for start, stop in bounds]
    assert all(len(family) == 1 for family in families)
    counts = torch.cat(families).long().bincount()
    assert len(counts) == len(MOVES)
    assert (counts > 20).all()
    for column in (0, 1, 2, 6, 7):
        assert len(drawn[:4, column].unique()) > 1
    once, again, otherwise = (draw_each([(0, 4)], SIZE, source(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, otherwise)


def test_ranges_of_what_is_drawn() -> None:
    drawn = draw_each([(start, start + 5) for start in range(0, 1000, 5)], 32, source())
    colours, family, place, cuts = drawn.split([3, 1, 2, 2], dim=1)
    assert 0 <= colours.min() < 0.05
    assert 0.95 < colours.max() <= 1
    limits = {"crop": (-4, 4), "scale": (1 / 1.2, 1.2)}
    for name, (low, high) in limits.items():
        of_family = place[family[:, 0] == MOVES.index(name)]
        assert low <= of_family.min() <= low + 0.1
        assert high - 0.1 <= of_family.max() <= high
    turned = place[family[:, 0] == MOVES.index("rotate")]
    assert turned[:, 0].abs().max() <= math.radians(15)
    assert (turned[:, 1] == 0).all()
    assert (cuts.min(), cuts.max()) == (0, 32)


# --- in an epoch ------------------------------------------------------------------------------------------------------


def test_it_is_drawn_beside_all_else_and_by_seed_and_epoch() -> None:
    plain, plan = (draw_epoch(label_config(dsa=dsa), 20, SIZE, seed=1, epoch=2) for dsa in (False, True))
    assert plain.dsa is None
    for name, drawn in plain.drawn().items():
        assert torch.equal(drawn, plan.drawn()[name])
    again, later, other = (draw_epoch(label_config(dsa=True), 20, SIZE, *place) for place in ((1, 2), (1, 3), (0, 2)))
    assert torch.equal(plan.dsa, again.dsa)
    assert not torch.equal(plan.dsa, later.dsa)
    assert not torch.equal(plan.dsa, other.dsa)


@pytest.mark.parametrize("more", [{}, {"shuffle": 2}, {"factor": 2}, {"randaugment": True}])
def test_it_is_on_disk(more: dict) -> None:
    pixels, label = random_pixels(20, SIZE), label_config(dsa=True, **more)
    plan = draw_epoch(label, 20, SIZE, seed=0, epoch=0)
    assert plan.record().dtype == record_type(label)
    assert "dsa" not in (record_type(label_config(**more)).names or ())
    # Views are as large as images, whatever part of one they show.
    assert int(plan.dsa[:, 6:].max()) > SIZE // 2
    again = Replay.from_record(np.frombuffer(plan.record().tobytes(), record_type(label)), plan.factor)
    shown = [replay(pixels, drawn.batch(8, 16), MEAN, STD) for drawn in (plan, again)]
    assert torch.equal(*shown)
    assert torch.equal(shown[0], replay(pixels, plan, MEAN, STD)[8:16])


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_views_are_changed_after_the_crop_and_before_the_mix(mix: str) -> None:
    pixels, label = random_pixels(20, SIZE), label_config(dsa=True, mix=mix, batch_size=10, factor=2)
    plan = draw_epoch(label, 20, SIZE, seed=0, epoch=0)
    alone = replace(plan, mix_box=torch.zeros_like(plan.mix_box), weight=torch.ones_like(plan.weight))
    changed = augment_each(replay(pixels, replace(alone, dsa=None), MEAN, STD), plan.dsa)
    assert torch.equal(replay(pixels, alone, MEAN, STD), changed)
    if mix == "none":
        assert torch.equal(replay(pixels, plan, MEAN, STD), changed)
    else:
        pasted = changed[plan.partner]
        mixed = replay(pixels, plan, MEAN, STD)
        assert ((mixed == changed) | (mixed == pasted)).all()
        assert not torch.equal(mixed, changed)
