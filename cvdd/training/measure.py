"""Accuracy of a network on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cvdd.augmentation.augment import normalise
from cvdd.data import Data, ImageSource, to_eval_tensor
from cvdd.support.config_base import ConfigError


@dataclass(frozen=True)
class Accuracy:
    """Performance on a set of images.

    Attributes:
        top1: percent whose highest logit is right.
        top5: percent whose class is among the five highest.
        loss: mean cross-entropy.
    """

    top1: float
    top5: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


class _EvalBatches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, source: ImageSource, image_size: int, test_resize: int | None, batch: int) -> None:
        self.source, self.image_size, self.test_resize, self.batch = source, image_size, test_resize, batch

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(index * self.batch, min((index + 1) * self.batch, len(self.source)))
        return to_eval_tensor(self.source, self.image_size, self.test_resize, chosen), self.source.labels[chosen]


class Evaluator:
    """Measures networks on the images of a data set; images that fit memory stay on the device.

    Args:
        data: the data set.
        batch: images per forward pass.
        device: where to measure.
        test_resize: shorter side before the central crop; None for images that have the right size.
        part: ``test`` or ``train``.
        workers: loader processes for images that do not fit memory.
    """

    def __init__(
        self,
        data: Data,
        batch: int,
        device: torch.device,
        *,
        test_resize: int | None,
        part: Literal["test", "train"] = "test",
        workers: int = 0,
    ) -> None:
        source = data.test if part == "test" else data.train
        if len(source) == 0:
            raise ConfigError(f"dataset.name={data.name} has no {part} images to measure on")
        self.data, self.device, self.count = data, device, len(source)
        loader = DataLoader(
            _EvalBatches(source, data.image_size, test_resize, batch),
            batch_size=None,
            num_workers=0 if source.in_memory else workers,
        )
        self._batches: Sequence[tuple[Tensor, Tensor]] | DataLoader[tuple[Tensor, Tensor]] = loader
        if source.in_memory:
            self._batches = [(pixels.to(device), labels.to(device)) for pixels, labels in loader]

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Accuracy:
        """Measure a network in evaluation mode; its mode is restored."""
        training = network.training
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for pixels, labels in self._batches:
            labels = labels.to(self.device)
            logits = network(normalise(pixels.to(self.device), self.data.mean, self.data.std))
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([ranked[:, 0].sum().double(), ranked.any(dim=1).sum().double(), loss.double()])
        network.train(training)
        top1, top5, total = (sums / self.count).tolist()
        return Accuracy(100 * top1, 100 * top5, total)
