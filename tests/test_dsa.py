"""DSA: each family against a small example, and what all have in common."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvdd.augmentation.dsa import FAMILIES, SiameseAugmentation, augment, draw_augmentation

ALL = tuple(FAMILIES)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 3, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=source(1))


def drawn(family: str, *rows: list[float]) -> SiameseAugmentation:
    return SiameseAugmentation(family, torch.tensor(rows))


def test_color_is_brightness_then_saturation_then_contrast() -> None:
    """One pixel (0, 3, 6): brightness +0.25; halves of the distances to the mean; then 1.5 about the image's mean."""
    pixel = torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1)
    seen = augment(pixel, drawn("color", [0.75, 0.25, 1.0]))
    # 0.25, 3.25, 6.25 -> 1.75, 3.25, 4.75 -> 1.0, 3.25, 5.5
    assert seen.flatten().tolist() == pytest.approx([1.0, 3.25, 5.5])


def test_crop_shifts_and_fills_with_nothing() -> None:
    whole = images(2, 4)
    seen = augment(whole, SiameseAugmentation("crop", torch.tensor([[1, 0], [0, -2]])))
    assert torch.equal(seen[0, :, :3], whole[0, :, 1:])
    assert not seen[0, :, 3].any()
    assert torch.equal(seen[1, :, :, 2:], whole[1, :, :, :2])
    assert not seen[1, :, :, :2].any()


def test_cutout_removes_half_the_side_around_its_centre() -> None:
    ones = torch.ones(2, 3, 8, 8)
    seen = augment(ones, SiameseAugmentation("cutout", torch.tensor([[4, 4], [0, 8]])))
    expected = torch.ones(8, 8)
    expected[2:6, 2:6] = 0
    assert torch.equal(seen[0, 1], expected)
    corner = torch.ones(8, 8)
    corner[:2, 6:] = 0
    assert torch.equal(seen[1, 2], corner)


def test_flip_mirrors_some_samples() -> None:
    whole = images(2)
    seen = augment(whole, SiameseAugmentation("flip", torch.tensor([[True], [False]])))
    assert torch.equal(seen[0], whole[0].flip(-1))
    assert torch.equal(seen[1], whole[1])


def test_scale_and_rotation_of_nothing_are_nothing() -> None:
    whole = images()
    for still in (drawn("scale", [1.0, 1.0]), drawn("rotate", [0.0])):
        torch.testing.assert_close(augment(whole, still), whole, rtol=0, atol=1e-5)


def test_scale_of_two_shows_every_second_pixel_and_nothing_around_it() -> None:
    """On a side of 5 the grid -1, -0.5, 0, 0.5, 1 doubled leaves the outer two; the middle three are 0, 2 and 4."""
    row = torch.arange(1.0, 6.0).expand(1, 1, 5, 5)
    seen = augment(row, drawn("scale", [2.0, 1.0]))
    torch.testing.assert_close(seen[0, 0, 2], torch.tensor([0.0, 1.0, 3.0, 5.0, 0.0]))


def test_a_quarter_turn() -> None:
    """Column x and row y show what was at column -y and row x: counterclockwise."""
    whole = images(1, 5)
    seen = augment(whole, drawn("rotate", [math.pi / 2]))
    torch.testing.assert_close(seen, whole.rot90(1, dims=(-2, -1)), rtol=0, atol=1e-5)


def test_parameters_stay_in_their_ranges() -> None:
    """Sides of 32: shifts of up to 4, stretches of 1/1.2 to 1.2, 15 degrees."""
    many = {family: FAMILIES[family].draw(4000, 32, source()) for family in ALL}
    assert sorted(set(many["crop"].flatten().tolist())) == list(range(-4, 5))
    assert sorted(set(many["cutout"].flatten().tolist())) == list(range(33))
    low, high = many["scale"].min().item(), many["scale"].max().item()
    assert 1 / 1.2 <= low < 0.835
    assert 1.198 < high <= 1.2
    assert 14.9 < math.degrees(many["rotate"].abs().max().item()) <= 15
    assert many["flip"].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert many["color"].mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.02)


def test_one_family_for_a_batch_all_equally_often_and_parameters_for_every_sample() -> None:
    draws = source(3)
    found = [draw_augmentation(ALL, 4, 8, draws) for _ in range(600)]
    counts = {family: sum(one is not None and one.family == family for one in found) for family in ALL}
    assert all(70 <= count <= 130 for count in counts.values()), counts
    for one in found:
        assert one is not None
        assert len(one.values) == 4
    assert draw_augmentation((), 4, 8, draws) is None
    assert torch.equal(augment(images(), None), images())


@pytest.mark.parametrize("family", ALL)
def test_a_shared_draw_is_the_same_for_batches_of_any_size(family: str) -> None:
    one = draw_augmentation((family,), 5, 8, source(), shared=True)
    whole = images(5)
    together = augment(whole, one)
    alone = torch.cat([augment(whole[k : k + 1], one) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ALL)
def test_samples_have_parameters_of_their_own(family: str) -> None:
    augmentation = draw_augmentation((family,), 16, 8, source(2))
    same = images(1).expand(16, -1, -1, -1)
    seen = augment(same, augmentation)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("family", ALL)
def test_the_gradient_is_that_of_finite_differences(family: str) -> None:
    augmentation = draw_augmentation((family,), 2, 5, source(4))
    small = torch.randn(2, 3, 5, 5, generator=source(5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: augment(given, augmentation), (small,))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for family in ALL:
        augment(images(), draw_augmentation((family,), 3, 8, source()))
    assert torch.equal(before, torch.get_rng_state())
