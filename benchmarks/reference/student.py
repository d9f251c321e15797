"""Student, plainly (specification of the SRe2L family, section 2.4): image files, a DataLoader, and stored labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from benchmarks.reference.relabel import Record, cutmix


@dataclass(frozen=True)
class Settings:
    """Numbers of the training.

    Attributes:
        lr: of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices alone.
        temperature: of both softmaxes.
        accumulation: parts of a batch that are forwarded separately.
        mean: of the normalisation.
        std: of the normalisation.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    temperature: float
    accumulation: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def save_images(pixels: Tensor, folder: Path) -> list[Path]:
    """Write images [n, 3, h, w] uint8 as files without loss."""
    paths = [folder / f"{number:06d}.png" for number in range(len(pixels))]
    for image, path in zip(pixels, paths, strict=True):
        vision.to_pil_image(image).save(path)
    return paths


class ReplayedImages(Dataset[Tensor]):
    """Images as the records show them, one after the other, before the mix.

    Args:
        paths: of the image files.
        records: of all epochs, in order.
        mean: of the normalisation.
        std: of the normalisation.
    """

    def __init__(
        self, paths: Sequence[Path], records: Sequence[Record], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.paths, self.mean, self.std = list(paths), mean, std
        self.samples = [
            (image, box, flip)
            for record in records
            for image, box, flip in zip(record.index.tolist(), record.boxes, record.flips, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Tensor:
        index, box, flip = self.samples[position]
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image = vision.resized_crop(image, *box, [image.height, image.width], InterpolationMode.BILINEAR)
        if flip:
            image = vision.hflip(image)
        return vision.normalize(vision.to_tensor(image), list(self.mean), list(self.std))


def batches(records: Sequence[Record]) -> list[list[int]]:
    """Positions of the samples of each record."""
    positions, first = [], 0
    for record in records:
        positions.append(list(range(first, first + len(record.index))))
        first += len(record.index)
    return positions


def make_loader(
    paths: Sequence[Path], records: Sequence[Record], settings: Settings, workers: int | None = None
) -> DataLoader[Tensor]:
    """Return the loader of all epochs, in one pass, so that its processes start once."""
    count = min(os.cpu_count() or 1, 8) if workers is None else workers
    return DataLoader(
        ReplayedImages(paths, records, settings.mean, settings.std),
        batch_sampler=batches(records),
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=torch.cuda.is_available(),
    )


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, with decay on matrices alone."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions, without a factor T^2."""
    return F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Tensor],
    records: Sequence[Record],
    settings: Settings,
    device: torch.device,
) -> Tensor:
    """Train on every record once: mix, cut into parts, one step a record; return the mean loss.

    The learning rate falls from epoch to epoch, which costs nothing and is left out.
    """
    network.train()
    losses = []
    for images, record in zip(loader, records, strict=True):
        mixed = cutmix(images.to(device, non_blocking=True), record.partner.to(device), record.mix_box)
        teacher = record.logits.to(device).float()
        part = max(len(mixed) // settings.accumulation, 1)
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for some, said in zip(mixed.split(part), teacher.split(part), strict=True):
            loss = distillation_loss(network(some), said, settings.temperature) / settings.accumulation
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return torch.stack(losses).mean()
