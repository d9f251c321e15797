"""What LightningModules that train a classifier share, whatever they train it on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from cvdd.measure import Accuracy
from cvdd.seeds import derive_seed, generator

Measure = Callable[[nn.Module], Accuracy]
EpochLog = Callable[[int, dict[str, float]], None]


class NonFiniteTraining(ValueError):
    """The loss of a classifier became NaN or infinite."""


class ShuffledBatches(Sampler[Tensor]):
    """Batches of shuffled indices; the order depends on (seed, epoch) alone. Lightning sets the epoch.

    Args:
        count: images.
        batch_size: images per batch; a last batch of one image is left out, BatchNorm cannot use it.
        seed: of the order.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self._epoch = count, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.count, generator=generator(self.seed, "order", self._epoch))
        return (batch for batch in order.split(self.batch_size) if len(batch) > 1)

    def __len__(self) -> int:
        return self.count // self.batch_size + (self.count % self.batch_size > 1)


class Classifier(pl.LightningModule):
    """What members and students share: a network, its curve, and a stop at the first loss that is not finite.

    Args:
        network: to train.
        name: for messages.
        seed: of everything random in the training; the network's own draws (dropout) are reseeded for every epoch.
        measure: accuracy on held-out images.
        measured_at: whether to measure after an epoch (counted from 0).
        on_epoch: called after each epoch with its number and what is known about it.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        seed: int,
        measure: Measure,
        measured_at: Callable[[int], bool],
        on_epoch: EpochLog,
    ) -> None:
        super().__init__()
        self.network = network
        self.seed = seed
        self._name = name
        self._measure, self._measured_at, self._on_epoch = measure, measured_at, on_epoch
        self.curve: list[dict[str, float]] = []
        self._losses: list[Tensor] = []

    def _note(self, loss: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss

    def measured_network(self) -> nn.Module:
        """Return the network whose accuracy counts."""
        return self.network

    def on_train_epoch_start(self) -> None:
        """Make the network's own draws depend on (seed, epoch) alone, also after an interruption."""
        torch.manual_seed(derive_seed(self.seed, "network", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        """Add a row to the curve."""
        row = {"epoch": self.current_epoch + 1, "train_loss": torch.stack(self._losses).mean().item()}
        self._losses.clear()
        if self._measured_at(self.current_epoch):
            row |= self._measure(self.measured_network()).as_dict()
        for key in ("train_loss", "loss"):
            if not math.isfinite(row.get(key, 0.0)):
                raise NonFiniteTraining(
                    f"the {key.replace('_', ' ')} of {self._name} is {row[key]} in epoch {self.current_epoch + 1}. The "
                    "last checkpoint is kept; choose a smaller learning rate (recipe.lr or protocol.lr)."
                )
        self.curve.append(row)
        self._on_epoch(self.current_epoch, row)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Keep the curve, so that a resumed run has all of it."""
        checkpoint["curve"] = list(self.curve)

    def on_load_checkpoint(self, checkpoint: dict[str, list[dict[str, float]]]) -> None:
        """Restore the curve."""
        self.curve = list(checkpoint["curve"])
