"""A committee member, plainly (specification of CV-DD, section 1): a DataLoader with torchvision's transforms."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms.functional import to_pil_image


class Images(Dataset[tuple[Tensor, int]]):
    """Real images in memory, augmented one by one, as torchvision's CIFAR does.

    Args:
        pixels: [n, 3, h, w] uint8.
        labels: [n].
        mean: of the normalisation.
        std: of the normalisation.
        pad: pixels around an image before it is cropped.
        flip: whether images are mirrored at random.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], pad: int, flip: bool
    ) -> None:
        self.arrays, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        mirror = [RandomHorizontalFlip()] if flip else []
        self.transform = Compose([RandomCrop(pixels.shape[-1], padding=pad), *mirror, ToTensor(), Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.arrays[index])), self.labels[index]


def make_loader(
    images: Dataset[tuple[Tensor, int]], batch_size: int, workers: int | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return shuffled batches; the loader's processes live on between epochs."""
    count = min(os.cpu_count() or 1, 8) if workers is None else workers
    return DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=torch.cuda.is_available(),
    )


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> Tensor:
    """Train on every image once; return the last loss."""
    network.train()
    loss = torch.zeros(())
    for images, labels in loader:
        logits = network(images.to(device, non_blocking=True))
        loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()
