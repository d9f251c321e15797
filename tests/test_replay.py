"""The samples of an epoch: drawn from a seed, packed, replayed the same everywhere."""

from __future__ import annotations

import pytest
import torch
from helpers import MEAN, STD, label_config, random_pixels
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from cvdd.augment import Mix, Views, apply_mix, apply_views, normalise
from cvdd.replay import RECORD, Replay, batch_bounds, draw_epoch, join, replay

FIELDS = ("index", "box", "flip", "partner", "mix_box", "weight")


def same(one: Replay, two: Replay) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


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
    again = Replay.from_record(plan.record())
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
    expected = torch.cat([apply_mix(shown[:2], mixes[0]), apply_mix(shown[2:], mixes[1])])
    assert torch.equal(replay(images, plan, MEAN, STD), expected)
