"""RDED patches: which crops are taken and how they are put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import MEAN, STD, random_pixels, small_network
from torch import Tensor, nn

from cvdd.augmentation.augment import normalise
from cvdd.data import Data, TensorSource
from cvdd.schema import PatchesConfig
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.patches import cut_crops, make_patches, score_crops, select, stitch

SIZE = 16


def config(**changes: Any) -> PatchesConfig:
    return PatchesConfig.model_validate(
        {"observer": "net", "crops": 3, "candidates": 12, "images_per_class": 4, **changes}
    )


def dataset(pixels: Tensor | None = None, per_class: int = 12, classes: int = 3) -> Data:
    pixels = random_pixels(per_class * classes, SIZE) if pixels is None else pixels
    source = TensorSource(pixels, torch.arange(classes).repeat_interleave(len(pixels) // classes))
    names = tuple(f"class{label}" for label in range(classes))
    return Data(source, source, names, MEAN, STD, SIZE, "patches", {})


def flat_images(count: int = 12) -> Data:
    """Every image has a colour of its own, so that a crop tells where it comes from."""
    colours = torch.arange(count, dtype=torch.uint8).mul(20).view(count, 1, 1, 1).expand(count, 3, SIZE, SIZE)
    return dataset(colours.contiguous(), classes=1)


class Brightness(nn.Module):
    """The lighter the image, the lower the loss of class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        light = self.scale * x.mean(dim=(1, 2, 3))
        return torch.stack([light, -light], dim=1)


def origins(images: Tensor) -> list[int]:
    return (images.flatten(1).float().mean(dim=1) / 20).round().int().tolist()


def test_easy_takes_the_lowest_losses_in_order() -> None:
    images, losses = make_patches(flat_images(), Brightness(), config(difficulty="easy"), 0, seed=0)
    assert images.shape == (4, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert origins(images) == [11, 10, 9, 8]
    assert torch.equal(losses[:, 0], losses[:, 0].sort().values)


def test_hard_takes_the_highest_losses_in_order() -> None:
    images, losses = make_patches(flat_images(), Brightness(), config(difficulty="hard"), 0, seed=0)
    assert origins(images) == [0, 1, 2, 3]
    assert torch.equal(losses[:, 0], losses[:, 0].sort(descending=True).values)


def test_medium_starts_at_the_median_and_goes_outward() -> None:
    losses = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8])
    assert losses[select(losses, 5, "medium")].tolist() == pytest.approx([0.5, 0.7, 0.3, 0.8, 0.2])
    images, _ = make_patches(flat_images(), Brightness(), config(difficulty="medium"), 0, seed=0)
    assert origins(images) == [5, 4, 6, 3]


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_all_patches_are_taken_once_where_all_are_needed(difficulty: str) -> None:
    """One patch from each source image, whatever the order."""
    losses = torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert sorted(select(losses, 9, difficulty).tolist()) == list(range(9))
    images, _ = make_patches(flat_images(), Brightness(), config(difficulty=difficulty, images_per_class=12), 0, 0)
    assert sorted(origins(images)) == list(range(12))


def test_the_best_crop_of_each_image_is_kept() -> None:
    data, network = dataset(), small_network(3)
    setting = config(difficulty="easy", images_per_class=12)
    _, losses = make_patches(data, network, setting, 1, seed=5)
    one, _ = make_patches(data, network, config(difficulty="easy", images_per_class=12, crops=1), 1, seed=5)
    assert one.shape == (12, 3, SIZE, SIZE)
    _, more = make_patches(data, network, config(difficulty="easy", images_per_class=12, crops=40), 1, seed=5)
    assert more.mean() < losses.mean()
    # A stored loss is the one that the observer gives the stored patch.
    images, losses = make_patches(data, network, setting, 1, seed=5)
    with torch.no_grad():
        logits = network(normalise(images, MEAN, STD))
    again = nn.functional.cross_entropy(logits, torch.ones(12, dtype=torch.long), reduction="none")
    torch.testing.assert_close(losses[:, 0], again, rtol=1e-4, atol=1e-5)


def test_all_crops_of_as_many_candidates_as_asked_for_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each crop has its number as its colour, and later ones are better."""
    asked: list[Any] = []

    def cut(source: Any, chosen: Tensor, crops: int, side: int, scale: Any, random: torch.Generator) -> Tensor:
        asked.append((len(chosen), crops, side, scale))
        numbers = torch.arange(len(chosen) * crops, dtype=torch.uint8)
        return numbers.view(len(chosen), crops, 1, 1, 1).expand(-1, -1, 3, side, side)

    monkeypatch.setattr("cvdd.synthesis.patches.cut_crops", cut)
    monkeypatch.setattr(
        "cvdd.synthesis.patches.score_crops", lambda observer, crops, *others: -crops[:, 0, 0, 0].float()
    )
    setting = config(candidates=5, crops=3, crop_scale=(0.4, 0.5), difficulty="easy")
    images, _ = make_patches(dataset(), small_network(3), setting, 1, seed=0)
    assert asked == [(5, 3, SIZE, (0.4, 0.5))]
    assert images[:, 0, 0, 0].tolist() == [14, 11, 8, 5]


def test_patches_depend_on_seed_and_class() -> None:
    data, network = dataset(), small_network(3)
    first, _ = make_patches(data, network, config(), 0, seed=1)
    assert torch.equal(first, make_patches(data, network, config(), 0, seed=1)[0])
    assert not torch.equal(first, make_patches(data, network, config(), 0, seed=2)[0])


def test_a_smaller_set_is_the_beginning_of_a_larger() -> None:
    data, network = dataset(), small_network(3)
    large, _ = make_patches(data, network, config(images_per_class=8), 0, seed=1)
    small, _ = make_patches(data, network, config(images_per_class=3), 0, seed=1)
    assert torch.equal(large[:3], small)


def test_crops_are_square_and_within_the_area_range() -> None:
    """A horizontal ramp shows the width of a crop as the range of its values."""
    ramp = torch.arange(64, dtype=torch.uint8).mul(2).expand(1, 3, 64, 64).contiguous()
    source = TensorSource(ramp, torch.zeros(1, dtype=torch.long))
    crops = cut_crops(source, torch.tensor([0]), 200, 64, (0.25, 0.25), torch.Generator().manual_seed(0))[0]
    # A quarter of the area is a square of 32 pixels, hence 31 steps of 2.
    assert (crops.flatten(1).amax(1).int() - crops.flatten(1).amin(1).int()).unique().tolist() == [62]


def test_files_and_images_in_memory_give_crops_of_one_kind() -> None:
    class Files(TensorSource):
        in_memory = False

    pixels, labels = random_pixels(3, 20), torch.zeros(3, dtype=torch.long)
    chosen = torch.tensor([2, 0])
    for source in (TensorSource(pixels, labels), Files(pixels, labels)):
        crops = cut_crops(source, chosen, 4, SIZE, (1.0, 1.0), torch.Generator().manual_seed(0))
        assert crops.shape == (2, 4, 3, SIZE, SIZE)
        # The whole area leaves no choice, so all crops of an image are the image, resized.
        assert torch.equal(crops, crops[:, :1].expand_as(crops))
        assert not torch.equal(crops[0], crops[1])


def test_small_patches_are_scored_on_the_mean_colour() -> None:
    """Factor 2: a patch of half the side lies in the middle of zeros, which are the mean colour after normalising."""
    data, network = dataset(), small_network(3)
    crops = random_pixels(5, 7, seed=9)
    padded = torch.zeros(5, 3, SIZE, SIZE)
    padded[:, :, 5:12, 5:12] = normalise(crops, MEAN, STD)
    with torch.no_grad():
        logits = network(padded)
    expected = nn.functional.cross_entropy(logits, torch.full((5,), 2), reduction="none")
    torch.testing.assert_close(score_crops(network, crops, 2, data), expected)
    torch.testing.assert_close(score_crops(network, crops, 2, data, batch=2), expected)


@pytest.mark.parametrize("factor", [1, 2])
def test_rank_goes_to_its_cell(factor: int) -> None:
    """Rank q * n + t is cell q, row by row, of image t."""
    count, side = 3, SIZE // factor
    ranks = torch.arange(count * factor**2, dtype=torch.uint8)
    patches = ranks.view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()
    images = stitch(patches, count, factor, SIZE)
    assert images.shape == (count, 3, SIZE, SIZE)
    for t in range(count):
        for q in range(factor**2):
            row, column = divmod(q, factor)
            cell = images[t, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert cell.unique().tolist() == [q * count + t]


def test_sides_that_do_not_divide_are_filled() -> None:
    patches = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 7, 7).contiguous()
    image = stitch(patches, 1, 2, 15)[0, 0]
    assert image.shape == (15, 15)
    assert image[0, 0] == 0
    assert image[0, 14] == 1
    assert image[14, 0] == 2
    assert image[14, 14] == 3


def test_stitched_patches_use_four_images_each() -> None:
    images, losses = make_patches(
        flat_images(), Brightness(), config(difficulty="easy", factor=2, images_per_class=3), 0, 0
    )
    assert losses.shape == (3, 4)
    # Cell 0 of the three images holds the three best, cell 3 the worst that were kept.
    assert [int(image[0, 0, 0]) // 20 for image in images] == [11, 10, 9]
    assert [int(image[0, -1, -1]) // 20 for image in images] == [2, 1, 0]
    assert torch.equal(losses.T.flatten(), losses.flatten().sort().values)


@pytest.mark.parametrize("changes", [{"images_per_class": 13}, {"candidates": 3}, {"factor": 2, "images_per_class": 4}])
def test_too_few_images(changes: dict) -> None:
    with pytest.raises(ConfigError, match=r"class class1 has 12 images and offers \d+ candidates for \d+ patches"):
        make_patches(dataset(), small_network(3), config(**changes), 1, 0)
