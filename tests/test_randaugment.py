"""RandAugment with drawn parameters is torchvision's."""

from __future__ import annotations

import pytest
import torch
from helpers import random_pixels
from torchvision.transforms import RandAugment

from cvdd.augmentation.randaugment import OPERATIONS, apply_operations, draw_operations

SIGNED = range(1, 10)


def drawn_by_torchvision(seed: int) -> list[int]:
    """The numbers that torchvision's class draws: an operation, then a sign where the operation has one."""
    torch.manual_seed(seed)
    numbers = []
    for _ in range(2):
        number = int(torch.randint(14, (1,)))
        negative = number in SIGNED and bool(torch.randint(2, (1,)))
        numbers.append(-number if negative else number)
    return numbers


@pytest.mark.parametrize("size", [16, 33])
def test_images_are_those_of_torchvision(size: int) -> None:
    """One by one with torchvision, all together here; every operation with both signs is among them."""
    count = 120
    images, reference, numbers = random_pixels(count, size), RandAugment(), []
    expected = []
    with torch.random.fork_rng(devices=[]):
        for seed, image in enumerate(images):
            numbers.append(drawn_by_torchvision(seed))
            torch.manual_seed(seed)
            expected.append(reference(image))
    operations = torch.tensor(numbers)
    assert set(operations.flatten().tolist()) == {*range(14), *(-number for number in SIGNED)}
    assert torch.equal(apply_operations(images, operations), torch.stack(expected))


def test_nothing_is_done_in_place() -> None:
    images = random_pixels(8)
    before = images.clone()
    assert torch.equal(apply_operations(images, torch.zeros(8, 2, dtype=torch.long)), before)
    apply_operations(images, torch.full((8, 2), 13))
    assert torch.equal(images, before)


def test_operations_are_equally_likely() -> None:
    numbers = draw_operations(7000, torch.Generator().manual_seed(0))
    assert numbers.shape == (7000, 2)
    counts = torch.bincount(numbers.abs().flatten(), minlength=len(OPERATIONS))
    assert len(counts) == 14
    assert bool((counts - 1000).abs().max() < 150)
    signs = [int((numbers == -number).sum()) for number in range(14)]
    assert all(400 < signs[number] < 600 for number in SIGNED)
    assert not any(signs[10:])
    assert torch.equal(numbers, draw_operations(7000, torch.Generator().manual_seed(0)))
