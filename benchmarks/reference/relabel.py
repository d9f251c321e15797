"""Relabel, plainly (specification of the SRe2L family, section 2.3): one forward pass for each half of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop


@dataclass(frozen=True)
class Settings:
    """Numbers of the labels.

    Attributes:
        batch_size: images in a batch.
        crop_scale: range of the crops' areas.
        flip: whether images are mirrored at random.
        mean: of the normalisation.
        std: of the normalisation.
    """

    batch_size: int
    crop_scale: tuple[float, float]
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    """What a batch showed and what the teachers said: one file.

    Attributes:
        index: [n] which images.
        boxes: of each image: top, left, height, width.
        flips: of each image.
        partner: [n] whom each image is mixed with.
        mix_box: region pasted from the partner: top, left, bottom, right.
        logits: [n, classes], half precision.
    """

    index: Tensor
    boxes: list[tuple[int, int, int, int]]
    flips: list[bool]
    partner: Tensor
    mix_box: tuple[int, int, int, int]
    logits: Tensor


def show(image: Tensor, box: tuple[int, int, int, int], flip: bool) -> Tensor:
    """Crop, resize and flip one image [3, size, size]."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    seen = F.interpolate(crop, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]
    return seen.flip(-1) if flip else seen


def draw_mix_box(size: int) -> tuple[int, int, int, int]:
    """Draw the region of a CutMix: its area uniform, its centre anywhere."""
    share = float(torch.rand(()))
    side = int(size * math.sqrt(1 - share))
    row, column = torch.randint(0, size, (2,)).tolist()
    top, bottom = max(row - side // 2, 0), min(row + side // 2, size)
    left, right = max(column - side // 2, 0), min(column + side // 2, size)
    return top, left, bottom, right


def cutmix(images: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Paste a region of each image's partner."""
    top, left, bottom, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    return mixed


def use_batch_statistics(network: nn.Module) -> nn.Module:
    """Let BatchNorm use the batch's statistics; dropout stays off."""
    network.train().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return network


@torch.no_grad()
def score(networks: Sequence[nn.Module], weights: Sequence[float], images: Tensor) -> Tensor:
    """Average the networks' logits of one batch, each half of it forwarded by itself."""
    half = len(images) // 2
    total = torch.zeros((), device=images.device)
    for network, weight in zip(networks, weights, strict=True):
        logits = torch.cat([network(images[:half]), network(images[half:])])
        total = total + weight * logits
    return total


def relabel(
    networks: Sequence[nn.Module],
    weights: Sequence[float],
    pixels: Tensor,
    settings: Settings,
    epochs: int,
    folder: Path,
) -> int:
    """Label images [count, 3, size, size] uint8 for so many epochs, one file a batch; return the number of labels."""
    mean = torch.tensor(settings.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(settings.std, device=pixels.device).view(-1, 1, 1)
    labels = 0
    for epoch in range(epochs):
        for number, index in enumerate(torch.randperm(len(pixels)).split(settings.batch_size)):
            batch, boxes, flips = [], [], []
            for image in pixels[index.to(pixels.device)]:
                boxes.append(tuple(RandomResizedCrop.get_params(image, list(settings.crop_scale), [3 / 4, 4 / 3])))
                flips.append(settings.flip and bool(torch.rand(()) < 0.5))
                batch.append((show(image.float() / 255, boxes[-1], flips[-1]) - mean) / std)
            partner = torch.randperm(len(index))
            mix_box = draw_mix_box(pixels.shape[-1])
            logits = score(networks, weights, cutmix(torch.stack(batch), partner.to(pixels.device), mix_box))
            record = Record(index, boxes, flips, partner, mix_box, logits.half().cpu())
            torch.save(vars(record), folder / f"epoch{epoch}_batch{number}.pt")
            labels += len(index)
    return labels
