"""Views and mixes against PIL, torchvision and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import MEAN, STD, random_pixels
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from cvdd.augmentation.augment import (
    Views,
    apply_views,
    denormalise,
    draw_boxes,
    draw_mix,
    draw_swaps,
    draw_views,
    normalise,
    resampling_matrices,
    rounded_products,
    swap_halves,
)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(box: tuple[int, ...], flip: bool = False, shift: tuple[int, int] = (0, 0)) -> Views:
    return Views(torch.tensor([box]), torch.tensor([flip]), torch.tensor([shift]))


def pil_crop(pixels: torch.Tensor, box: tuple[int, ...], size: int) -> torch.Tensor:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    top, left, height, width = box
    cut = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)


BOXES = [
    (0, 0, 32, 32),
    (3, 7, 11, 19),
    (31, 0, 1, 32),
    (5, 20, 2, 3),
    (0, 1, 32, 30),
    (9, 9, 16, 16),
]


@pytest.mark.parametrize("size", [8, 17, 32, 45])
@pytest.mark.parametrize("box", BOXES)
def test_rounded_crops_are_those_of_pil(box: tuple[int, ...], size: int) -> None:
    """Larger and smaller than the cut, on both axes. PIL's fixed-point weights decide ties in another way."""
    pixels = random_pixels(1, 32, seed=sum(box) + size)
    mine = apply_views(pixels.float(), views(box), size, rounding=True)[0]
    difference = (mine - pil_crop(pixels[0], box, size).float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < (1e-9 if size == 32 else 0.1)


def test_drawn_crops_are_exactly_those_of_pil() -> None:
    """Where the result has 32 pixels the weights have no rounding error, so every pixel must agree."""
    pixels = random_pixels(40, 32)
    boxes = draw_boxes(40, 32, 32, (0.08, 1.0), source())
    still = Views.whole(40, 32, 32)
    mine = apply_views(pixels.float(), Views(boxes, still.flips, still.shifts), 32, rounding=True)
    theirs = torch.stack([pil_crop(image, tuple(box), 32) for image, box in zip(pixels, boxes.tolist(), strict=True)])
    assert torch.equal(mine, theirs.float())


@pytest.mark.parametrize("size", [20, 64, 100])
def test_crops_are_those_of_torchvision(size: int) -> None:
    """In floating point, with antialiasing, of an image that is not square."""
    pixels = random_pixels(1, 64)[..., :48].float()
    for box in [(4, 3, 50, 40), (10, 20, 9, 17), (0, 0, 64, 48)]:
        theirs = reference.resized_crop(pixels, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(apply_views(pixels, views(box), size), theirs, rtol=1e-5, atol=1e-2)


def test_flip_comes_after_the_crop_and_the_shift_after_the_flip() -> None:
    pixels = random_pixels(1, 32).float()
    box, shift = (2, 5, 20, 13), (3, 30)
    crop = apply_views(pixels, views(box), 32)
    expected = torch.roll(crop.flip(-1), shift, dims=(-2, -1))
    assert torch.equal(apply_views(pixels, views(box, True, shift), 32), expected)


def test_the_whole_view_changes_nothing() -> None:
    pixels = random_pixels(3, 32).float()
    assert torch.equal(apply_views(pixels, Views.whole(3, 32, 32), 32), pixels)


def test_matrices_keep_the_mean() -> None:
    matrices = resampling_matrices(torch.tensor([0, 3, 9]), torch.tensor([20, 5, 1]), 20, 12)
    assert matrices.shape == (3, 12, 20)
    torch.testing.assert_close(matrices.sum(dim=2), torch.ones(3, 12))
    assert torch.equal(matrices[2, :, 9], torch.ones(12))
    assert not matrices[1, :, :3].any()
    assert not matrices[1, :, 8:].any()


def test_views_pass_gradients() -> None:
    pixels = random_pixels(1, 16).double().requires_grad_()
    apply_views(pixels.float(), views((4, 4, 8, 8)), 16).sum().backward()
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True
    assert bool((pixels.grad[0, 0][inside] > 0).all())
    assert not pixels.grad[0, 0][~inside].any()


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_boxes_lie_inside_and_have_legal_areas_and_ratios() -> None:
    boxes = draw_boxes(4000, 64, 64, (0.2, 0.6), source())
    top, left, height, width = boxes.T.double()
    assert bool((top >= 0).all() and (left >= 0).all())
    assert bool((top + height <= 64).all() and (left + width <= 64).all())
    area = height * width / 64**2
    # Sides are rounded to whole pixels.
    assert 0.2 - 0.02 < area.min() < 0.22
    assert 0.58 < area.max() < 0.6 + 0.02
    assert abs(area.mean() - 0.4) < 0.01
    ratio = (width / height).log()
    assert abs(ratio.mean()) < 0.01
    assert ratio.abs().max() < math.log(4 / 3) + 0.05
    # Uniform in the logarithm: the standard deviation of a uniform law is range / sqrt(12).
    assert abs(ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01


def test_boxes_are_placed_uniformly() -> None:
    boxes = draw_boxes(4000, 64, 64, (0.25, 0.25), source(), (1.0, 1.0))
    assert boxes[:, 2:].unique().tolist() == [32]
    counts = torch.bincount(boxes[:, 0], minlength=33)
    assert len(counts) == 33
    assert counts.min() > 4000 / 33 * 0.6
    assert counts.max() < 4000 / 33 * 1.5


def test_boxes_have_the_law_of_torchvision() -> None:
    """Also where many tries do not fit: the first that fits is taken, as in torchvision."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, 32, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    mine = draw_boxes(4000, 32, 32, (0.08, 1.0), source())
    for column in range(4):
        assert abs(mine[:, column].float().mean() - theirs[:, column].float().mean()) < 0.5
        assert abs(mine[:, column].float().std() - theirs[:, column].float().std()) < 0.4


@pytest.mark.parametrize(("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_central_box_where_nothing_fits(height: int, width: int, box: tuple[int, ...]) -> None:
    """The whole area cannot be had within a legal ratio, so the largest central box is taken, as in torchvision."""
    assert draw_boxes(3, height, width, (1.0, 1.0), source()).tolist() == [list(box)] * 3


def test_square_boxes_fall_back_to_the_shorter_side() -> None:
    assert draw_boxes(1, 20, 50, (1.0, 1.0), source(), (1.0, 1.0)).tolist() == [[0, 15, 20, 20]]


def test_drawn_views_are_reproducible_and_bounded() -> None:
    one = draw_views(500, 32, 32, (0.08, 1.0), True, 4, source(3))
    two = draw_views(500, 32, 32, (0.08, 1.0), True, 4, source(3))
    assert torch.equal(one.boxes, two.boxes)
    assert torch.equal(one.shifts, two.shifts)
    assert sorted(one.shifts.unique().tolist()) == [0, 1, 2, 3, 4]
    assert 0.4 < one.flips.float().mean() < 0.6


def test_half_of_all_views_are_mirrored() -> None:
    """The mean of 40 000 draws is 0.0025 from its expectation, or so."""
    flips = draw_views(40_000, 32, 32, None, True, 0, source()).flips
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_views_that_are_switched_off() -> None:
    still = draw_views(5, 32, 32, None, False, 0, source())
    assert still.boxes.tolist() == [[0, 0, 32, 32]] * 5
    assert not still.flips.any()
    assert not still.shifts.any()


def test_one_view_for_all_images_of_a_unit() -> None:
    """Copies of one image stay copies: crop, flip and shift are the unit's."""
    from cvdd.augmentation.augment import apply_matrices, view_matrices

    unit = draw_views(2, 16, 16, (0.08, 1.0), True, 4, source(1))
    copies = random_pixels(2, 16).float()[:, None].expand(2, 5, 3, 16, 16)
    seen = apply_matrices(copies, *view_matrices(unit, 16, 16, 16))
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    assert not torch.equal(seen[0], seen[1])


# --- mixes ------------------------------------------------------------------------------------------------------------


def test_cutmix_boxes_have_the_published_law() -> None:
    """The side is sqrt(1 - lambda) of the image, its half floored, its centre uniform, and it is clipped."""
    random = np.random.default_rng(0)

    def published(size: int) -> float:
        side = int(size * np.sqrt(1 - random.beta(1.0, 1.0)))
        row, column = random.integers(size, size=2)
        edges = [np.clip(centre + sign * (side // 2), 0, size) for centre in (row, column) for sign in (-1, 1)]
        return float((edges[1] - edges[0]) * (edges[3] - edges[2])) / size**2

    draws = [draw_mix("cutmix", 1.0, 8, 32, source(seed)) for seed in range(3000)]
    mine = np.array([(bottom - top) * (right - left) / 32**2 for top, left, bottom, right in (m.box for m in draws)])
    theirs = np.array([published(32) for _ in range(3000)])
    assert abs(mine.mean() - theirs.mean()) < 0.02
    assert abs(mine.std() - theirs.std()) < 0.02
    assert all(0 <= edge <= 32 for mix in draws for edge in mix.box)
    assert all(sorted(mix.permutation.tolist()) == list(range(8)) for mix in draws[:100])


def test_mixup_share_follows_its_beta_law() -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    for alpha in (0.8, 4.0):
        shares = np.array([draw_mix("mixup", alpha, 4, 32, source(seed)).weight for seed in range(3000)])
        assert abs(shares.mean() - 0.5) < 0.02
        assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_no_mix() -> None:
    mix = draw_mix("none", 1.0, 4, 16, source())
    assert mix.permutation.tolist() == [0, 1, 2, 3]
    assert (mix.box, mix.weight) == ((0, 0, 0, 0), 1.0)


# --- shuffled patches -------------------------------------------------------------------------------------------------


def test_halves_change_places() -> None:
    """Four patches A B / C D, each two pixels wide: columns first or rows first comes to the same."""
    patches = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]) * 10
    patches = patches + torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]]).repeat(2, 1)
    images = patches[None, None].repeat(4, 3, 1, 1)
    swap = torch.tensor([[False, False], [False, True], [True, False], [True, True]])
    shown = swap_halves(images, swap)
    layouts = [(1, 2, 3, 4), (2, 1, 4, 3), (3, 4, 1, 2), (4, 3, 2, 1)]
    for image, layout in zip(shown, layouts, strict=True):
        corners = [image[0, row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2)]
        for corner, patch in zip(corners, layout, strict=True):
            assert corner.tolist() == [[10 * patch, 10 * patch + 1], [10 * patch + 2, 10 * patch + 3]]


def test_swaps_are_fair_and_independent() -> None:
    swap = draw_swaps(4000, source())
    kinds = torch.bincount(2 * swap[:, 0].int() + swap[:, 1].int(), minlength=4)
    assert kinds.min() > 900
    assert torch.equal(swap, draw_swaps(4000, source()))


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_normalising_is_undone() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    normalised = normalise(pixels, MEAN, STD)
    assert normalised[0, 1, 0, 5].item() == pytest.approx((5 / 255 - MEAN[1]) / STD[1], rel=1e-6)
    assert torch.equal(denormalise(normalised, MEAN, STD), pixels)


def test_denormalising_clamps() -> None:
    assert denormalise(torch.full((3, 1, 1), 9.0), MEAN, STD).unique().tolist() == [255]
    assert denormalise(torch.full((3, 1, 1), -9.0), MEAN, STD).unique().tolist() == [0]


def test_products_are_rounded_inside_alone() -> None:
    products = torch.backends.cuda.matmul
    before, inside = products.fp32_precision, []

    def fails() -> None:
        with rounded_products(True):
            inside.append(products.fp32_precision)
            raise RuntimeError

    with rounded_products(False):
        assert products.fp32_precision == before
    with pytest.raises(RuntimeError):
        fails()
    assert (inside, products.fp32_precision) == (["tf32"], before)
