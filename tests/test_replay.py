"""The samples of an epoch: drawn from a seed, packed, replayed the same everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import MEAN, STD, label_config, mixed, random_pixels
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from cvdd.augmentation.augment import Mix, Views, apply_views, normalise, swap_halves
from cvdd.augmentation.randaugment import apply_operations
from cvdd.labels.replay import RECORD, Replay, batch_bounds, draw_epoch, join, record_type, replay

FIELDS = ("index", "box", "flip", "partner", "mix_box", "weight")


def same(one: Replay, two: Replay) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


def still(images: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Replay whole images in order, mixed."""
    count, _, size, _ = images.shape
    plan = join(torch.arange(count), Views.whole(count, size, size), [(0, count, mix)])
    return replay(images, plan, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255


def test_batches_cover_an_epoch_and_the_last_may_be_smaller() -> None:
    assert batch_bounds(20, 8) == [(0, 8), (8, 16), (16, 20)]
    assert batch_bounds(16, 8) == [(0, 8), (8, 16)]
    assert batch_bounds(5, 8) == [(0, 5)]


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    label = label_config()
    one = draw_epoch(label, 20, 32, seed=1, epoch=2)
    draw_epoch(label, 20, 32, seed=1, epoch=0)
    assert same(one, draw_epoch(label, 20, 32, seed=1, epoch=2))
    assert not same(one, draw_epoch(label, 20, 32, seed=1, epoch=3))
    assert not same(one, draw_epoch(label, 20, 32, seed=2, epoch=2))


def test_views_and_mixes_are_those_of_the_labels_settings() -> None:
    """Sides are whole pixels, which is a part of 0.05 at most; shares of a beta law so narrow lie around a half."""
    plan = draw_epoch(label_config(crop_scale=(0.5, 0.6), flip=False), 200, 32, 0, 0)
    areas = (plan.box[:, 2] * plan.box[:, 3]).double() / 32**2
    assert areas.min() > 0.45
    assert areas.max() < 0.65
    assert not plan.flip.any()
    assert draw_epoch(label_config(), 200, 32, 0, 0).flip.any()
    shares = draw_epoch(label_config(mix="mixup", mix_alpha=100.0, batch_size=4), 400, 8, 0, 0).weight
    assert shares.std() < 0.06
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)


def test_an_epoch_shows_each_image_once_and_mixes_within_batches() -> None:
    plan = draw_epoch(label_config(), 20, 32, seed=0, epoch=0)
    assert sorted(plan.index.tolist()) == list(range(20))
    for start, stop in batch_bounds(20, 8):
        assert sorted(plan.partner[start:stop].tolist()) == list(range(start, stop))
        assert len(plan.mix_box[start:stop].unique(dim=0)) == 1
    assert sorted(plan.batch(8, 16).partner.tolist()) == list(range(8))


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_a_record_on_disk_gives_the_same_samples(mix: str) -> None:
    images = random_pixels(20, 32)
    plan = draw_epoch(label_config(mix=mix), 20, 32, seed=0, epoch=0)
    again = Replay.from_record(plan.record(), plan.factor)
    assert same(plan, again)
    assert torch.equal(replay(images, plan, MEAN, STD), replay(images, again, MEAN, STD))
    assert plan.record().nbytes == 20 * RECORD.itemsize


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_replay_is_torchvisions_crop_flip_and_a_mix(mix: str) -> None:
    """Sample by sample with torchvision, then the mix of the batch as a loop."""
    images = random_pixels(8, 32)
    plan = draw_epoch(label_config(mix=mix), 8, 32, seed=4, epoch=0)
    own = []
    for index, box, flip in zip(plan.index, plan.box.tolist(), plan.flip, strict=True):
        crop = vision.resized_crop(images[index].float(), *box, [32, 32], InterpolationMode.BILINEAR, antialias=True)
        own.append(vision.normalize((vision.hflip(crop) if flip else crop) / 255, MEAN, STD))
    expected = []
    for position, sample in enumerate(own):
        partner, weight = own[plan.partner[position]], plan.weight[position]
        top, left, bottom, right = plan.mix_box[position].tolist()
        mixed = weight * sample + (1 - weight) * partner
        mixed[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
        expected.append(mixed)
    torch.testing.assert_close(replay(images, plan, MEAN, STD), torch.stack(expected), rtol=0, atol=1e-3)


def test_replay_of_an_epoch_is_replay_of_its_batches() -> None:
    images = random_pixels(20, 32)
    plan = draw_epoch(label_config(), 20, 32, seed=0, epoch=0)
    whole = replay(images, plan, MEAN, STD)
    parts = [replay(images, plan.batch(start, stop), MEAN, STD) for start, stop in batch_bounds(20, 8)]
    assert torch.equal(whole, torch.cat(parts))


def test_join_is_views_and_mixes_applied() -> None:
    images, order = random_pixels(6, 16), torch.tensor([5, 0, 3, 1])
    boxes = torch.tensor([[0, 0, 16, 16], [2, 3, 8, 9], [4, 4, 4, 4], [0, 1, 10, 5]])
    views = Views(boxes, torch.tensor([True, False, True, False]), torch.zeros(4, 2, dtype=torch.long))
    mixes = [Mix(torch.tensor([1, 0]), (1, 2, 9, 12), 1.0), Mix(torch.tensor([0, 1]), (0, 0, 0, 0), 1.0)]
    plan = join(order, views, [(0, 2, mixes[0]), (2, 4, mixes[1])])
    shown = normalise(apply_views(images[order].float(), views, 16), MEAN, STD)
    expected = torch.cat([mixed(shown[:2], mixes[0]), mixed(shown[2:], mixes[1])])
    assert torch.equal(replay(images, plan, MEAN, STD), expected)


def test_cutmix_pastes_the_partner_into_the_box() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    shown = still(images, Mix(torch.tensor([1, 2, 3, 0]), (2, 3, 6, 8), 1.0))
    expected = images.float()
    for index in range(4):
        expected[index, :, 2:6, 3:8] = float((index + 1) % 4)
    torch.testing.assert_close(shown, expected)


def test_mixup_blends() -> None:
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 200.0)]).to(torch.uint8)
    shown = still(images, Mix(torch.tensor([1, 0]), (0, 0, 0, 0), 0.25))
    torch.testing.assert_close(shown[0], torch.full((3, 4, 4), 150.0))
    torch.testing.assert_close(shown[1], torch.full((3, 4, 4), 50.0))


@pytest.mark.parametrize(
    ("mix", "share"),
    [
        (Mix(torch.tensor([1, 0]), (0, 0, 0, 0), 1.0), 1.0),
        (Mix(torch.tensor([1, 0]), (2, 3, 6, 8), 1.0), 1 - 20 / 64),
        (Mix(torch.tensor([1, 0]), (0, 0, 8, 8), 1.0), 0.0),
        (Mix(torch.tensor([1, 0]), (0, 0, 0, 0), 0.25), 0.25),
    ],
)
def test_share_of_a_mixed_image_that_is_its_own(mix: Mix, share: float) -> None:
    plan = join(torch.arange(2), Views.whole(2, 8, 8), [(0, 2, mix)])
    assert plan.own_share(8).tolist() == pytest.approx([share, share])


# --- shuffled patches and RandAugment ---------------------------------------------------------------------------------

BOTH = {"shuffle": 2, "randaugment": True}


@pytest.mark.parametrize("more", [{"shuffle": 2}, {"randaugment": True}, BOTH])
def test_what_else_is_drawn_changes_nothing_before_it(more: dict) -> None:
    plain, plan = (draw_epoch(label_config(**changes), 20, 32, seed=1, epoch=2) for changes in ({}, more))
    assert same(plain, plan)
    assert (plan.swap is not None) == ("shuffle" in more)
    assert (plan.operations is not None) == ("randaugment" in more)


@pytest.mark.parametrize(("more", "name"), [({"shuffle": 2}, "swap"), ({"randaugment": True}, "operations")])
def test_what_else_is_drawn_depends_on_seed_and_epoch(more: dict, name: str) -> None:
    one, later, other, again = (
        getattr(draw_epoch(label_config(**more), 40, 32, seed, epoch), name)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    )
    assert not torch.equal(one, later)
    assert not torch.equal(one, other)
    assert not torch.equal(later, other)
    assert torch.equal(one, again)


def test_all_that_is_drawn_is_on_disk() -> None:
    images, label = random_pixels(20, 32), label_config(**BOTH)
    plan = draw_epoch(label, 20, 32, seed=0, epoch=0)
    assert plan.record().dtype == record_type(label)
    assert record_type(label_config()) == RECORD
    again = Replay.from_record(plan.record(), plan.factor)
    assert torch.equal(again.swap, plan.swap)
    assert torch.equal(again.operations, plan.operations)
    shown = [replay(images, drawn.batch(8, 16), MEAN, STD) for drawn in (plan, again)]
    assert torch.equal(*shown)
    assert torch.equal(shown[0], replay(images, plan, MEAN, STD)[8:16])


def test_patches_are_shuffled_after_randaugment_and_before_the_crop() -> None:
    images = random_pixels(20, 32)
    plan = draw_epoch(label_config(**BOTH), 20, 32, seed=0, epoch=0)
    changed = torch.empty_like(images)
    changed[plan.index] = swap_halves(apply_operations(images[plan.index], plan.operations), plan.swap)
    plain = replace(plan, swap=None, operations=None)
    assert torch.equal(replay(images, plan, MEAN, STD), replay(changed, plain, MEAN, STD))
    assert not torch.equal(replay(images, plan, MEAN, STD), replay(images, plain, MEAN, STD))
