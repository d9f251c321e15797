"""LightningModules that train a classifier: a committee member on real data, a student on soft labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import Sampler

from cvdd.augment import Views, apply_views, draw_views, normalise
from cvdd.labels import LabelledBatch
from cvdd.measure import Accuracy
from cvdd.replay import replay
from cvdd.schema import ProtocolConfig, RecipeConfig
from cvdd.seeds import derive_seed, generator

Measure = Callable[[nn.Module], Accuracy]
EpochLog = Callable[[int, dict[str, float]], None]


class NonFiniteTraining(ValueError):
    """The loss of a classifier became NaN or infinite."""


class EpochSampler(Sampler[int]):
    """Items ``epoch * length`` to ``(epoch + 1) * length`` in order; Lightning sets the epoch."""

    def __init__(self, length: int) -> None:
        self.length, self._epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._epoch * self.length, (self._epoch + 1) * self.length))

    def __len__(self) -> int:
        return self.length


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

    def on_train_epoch_start(self) -> None:
        """Make the network's own draws depend on (seed, epoch) alone, also after an interruption."""
        torch.manual_seed(derive_seed(self.seed, "network", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        """Add a row to the curve."""
        row = {"epoch": self.current_epoch + 1, "train_loss": torch.stack(self._losses).mean().item()}
        self._losses.clear()
        if self._measured_at(self.current_epoch):
            row |= self._measure(self.network).as_dict()
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


class MemberModule(Classifier):
    """Trains a committee member on labelled real images.

    Args:
        recipe: optimiser, schedule and augmentation.
        pixels: [n, 3, size, size] uint8 training images on the device, or None if batches bring their own.
        labels: [n].
        mean: of the normalisation.
        std: of the normalisation.
        size: side of the network's input.
        shared: arguments of :class:`Classifier`.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        pixels: Tensor | None,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.recipe, self.mean, self.std, self.size = recipe, mean, std, size
        self._pixels, self._labels = pixels, labels

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._labels = self._labels.to(self.device)
        if self._pixels is not None:
            self._pixels = self._pixels.to(self.device)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of one augmented batch: indices into the images in memory, or (pixels, labels)."""
        if self._pixels is not None:
            assert isinstance(batch, Tensor)
            pixels, labels = self._pixels[batch], self._labels[batch]
        else:
            pixels, labels = batch
        source = generator(self.seed, "augment", self.current_epoch, batch_index)
        images = normalise(self.augment(pixels, source), self.mean, self.std)
        loss = nn.functional.cross_entropy(self.network(images), labels, label_smoothing=self.recipe.label_smoothing)
        return self._note(loss)

    def augment(self, pixels: Tensor, source: torch.Generator) -> Tensor:
        """Crop and flip each image by itself: [n, 3, h, w] uint8 to [n, 3, size, size] float 0..255."""
        recipe = self.recipe
        n, _, height, width = pixels.shape
        if recipe.crop == "resized":
            views = draw_views(n, height, width, recipe.crop_scale, recipe.flip, 0, source)
            return apply_views(pixels.float(), views, self.size)
        views = draw_views(n, height, width, None, recipe.flip, 0, source)
        pad = recipe.pad if recipe.crop == "pad" else 0
        offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=source).to(pixels.device)
        return _shifted(pixels, views, offsets, pad)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the recipe."""
        recipe = self.recipe
        parameters = self.network.parameters()
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
            )
        else:
            kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if recipe.schedule == "onecycle":
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        period = recipe.cosine_period or recipe.epochs
        shape = (lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / period))) if recipe.schedule == "cosine" else _one
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def _one(epoch: int) -> float:
    return 1.0


def _shifted(pixels: Tensor, views: Views, offsets: Tensor, pad: int) -> Tensor:
    n, _, height, width = pixels.shape
    device = pixels.device
    columns = torch.arange(width, device=device)
    columns = torch.where(views.flips.to(device)[:, None], width - 1 - columns, columns)
    rows = torch.arange(height, device=device)[None] + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    padded = nn.functional.pad(pixels.float(), (pad, pad, pad, pad))
    sample = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class StudentModule(Classifier):
    """Trains a student on a distilled set and its soft labels (specification of the SRe2L family, section 2.4).

    Args:
        protocol: optimiser, schedule, temperature and accumulation.
        images: [n, 3, size, size] uint8, the distilled set.
        batch_size: images per full label batch; parts of it are forwarded separately.
        mean: of the normalisation.
        std: of the normalisation.
        shared: arguments of :class:`Classifier`.
    """

    def __init__(
        self,
        protocol: ProtocolConfig,
        images: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.protocol, self.mean, self.std = protocol, mean, std
        self.register_buffer("images", images, persistent=False)
        self.part = max(batch_size // protocol.accumulation, 1)

    def training_step(self, batch: LabelledBatch, batch_index: int) -> Tensor:
        """Divergence from the teachers, each part of the mixed batch forwarded by itself."""
        assert isinstance(self.images, Tensor)
        samples = replay(self.images, batch.replay, self.mean, self.std)
        temperature = self.protocol.temperature
        loss = samples.new_zeros(())
        for part, logits in zip(self._parts(samples), self._parts(batch.logits.float()), strict=True):
            loss = loss + soft_label_loss(self.network(part), logits, temperature) / self.protocol.accumulation
        return self._note(loss)

    def _parts(self, samples: Tensor) -> list[Tensor]:
        parts = list(samples.split(self.part))
        if len(parts) > 1 and len(parts[-1]) == 1:
            # BatchNorm cannot normalise a single sample, so it joins the part before it.
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on weights of two or more axes; cosine per epoch, stretched by eta."""
        protocol = self.protocol
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": protocol.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=protocol.lr, betas=protocol.betas, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / (protocol.epochs * protocol.eta)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions, mean over the batch, without a factor T^2.

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes].
        temperature: of both softmaxes.
    """
    target = torch.softmax(teacher / temperature, dim=1)
    return nn.functional.kl_div(torch.log_softmax(student / temperature, dim=1), target, reduction="batchmean")
