"""The module of adversarial prediction matching, whose parameters are the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.methods.apm import ImageTerms, Snapshots, chunked_gradient, is_refresh
from cvdd.schema.apm import ApmConfig
from cvdd.support.seeds import derive_seed, generator, own_draws
from cvdd.training.pace import note_pace, ranges_of_epoch, require_pace
from cvdd.training.surrogate import Augment, fit_surrogate


@dataclass(frozen=True)
class AdversarialRow:
    """State of a part at one iteration.

    Attributes:
        iteration: number of finished steps.
        loss: what the images descend.
        discrepancy: mean absolute difference of teacher's and student's logits, summed over snapshots.
        ce: the teacher's cross-entropy.
        fit: the surrogate's loss in its last epoch.
        teacher: index of the teacher.
        lr: learning rate of the images.
    """

    iteration: int
    loss: float
    discrepancy: float
    ce: float
    fit: float
    teacher: int
    lr: float


class NonFiniteImages(ValueError):
    """The images, or a student that judges them, became NaN or infinite."""


@dataclass(frozen=True)
class Pace:
    """How long the images are optimised, and when that is told.

    Attributes:
        iterations: optimiser steps.
        log_every: iterations between log rows.
        checkpoint_every: iterations between checkpoints.
    """

    iterations: int
    log_every: int
    checkpoint_every: int


class ImageSgd(torch.optim.Optimizer):
    """SGD with momentum on a set of images of which an iteration touches some.

    Args:
        images: [n, ...], the only parameter.
        lr: learning rate.
        momentum: of all images.
        drift: as released, go on moving images without a gradient by their momentum; otherwise those, and their
            momentum, wait until their next turn.
    """

    def __init__(self, images: nn.Parameter, lr: float, momentum: float, drift: bool) -> None:
        super().__init__([images], {"lr": lr, "momentum": momentum})
        self.drift = drift

    @torch.no_grad()
    def move(self, indices: Tensor, gradient: Tensor) -> None:
        """Step.

        Args:
            indices: [b] images with a gradient, none twice.
            gradient: [b, ...] of these.
        """
        (group,) = self.param_groups
        (images,) = group["params"]
        state = self.state[images]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(images)
        buffer = state["momentum_buffer"]
        if self.drift:
            buffer.mul_(group["momentum"]).index_add_(0, indices, gradient)
            images.add_(buffer, alpha=-group["lr"])
        else:
            buffer[indices] = group["momentum"] * buffer[indices] + gradient
            images[indices] -= group["lr"] * buffer[indices]


class AdversarialModule(pl.LightningModule):
    """Adversarial prediction matching of a set of images (specification of APM, section 3, stage B).

    Every ``surrogate.gap + 1`` iterations a fresh student learns to predict a teacher on the images; in every iteration
    the images climb the disagreement of the two, held to their classes by the teacher's cross-entropy. The images are
    neither augmented nor clamped, and an iteration without a new student draws its own batch, as released.

    An epoch is ``pace.checkpoint_every`` iterations, because Lightning resumes exactly at the ends of epochs only.

    Args:
        images: [n, 3, size, size] initial images, as networks see them.
        targets: [n] classes.
        teachers: networks of one architecture; one of them is drawn for each surrogate.
        new_student: from a seed to a network with a fresh initialisation.
        augment: of the surrogate's training.
        config: the method's settings.
        pace: iterations, log rows and checkpoints.
        seed: of batches, teachers, students and their training.
        on_row: called with each log row and the images.
    """

    targets: Tensor

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        teachers: Sequence[nn.Module],
        new_student: Callable[[int], nn.Module],
        augment: Augment,
        config: ApmConfig,
        pace: Pace,
        seed: int,
        on_row: Callable[[AdversarialRow, Tensor], None],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.images = nn.Parameter(images.clone())
        self.register_buffer("targets", targets, persistent=False)
        # Kept out of the module tree: the teachers belong to their own artefacts, not to this checkpoint.
        self._teachers = tuple(teacher.eval().requires_grad_(False) for teacher in teachers)
        self._new_student, self._augment, self._on_row = new_student, augment, on_row
        self.config, self.pace, self.seed = config, pace, seed
        self.rows: list[AdversarialRow] = []
        self._teacher = 0
        self._fit = math.nan
        self._snapshots: Snapshots | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on the images; the learning rate is set at every step from the iteration's number."""
        return ImageSgd(self.images, self.config.lr_images, self.config.momentum, self.config.momentum_drift)

    def on_fit_start(self) -> None:
        """Bring the teachers to the images' device."""
        for teacher in self._teachers:
            teacher.to(self.device)
        if self._snapshots is not None:
            states = {name: state.to(self.device) for name, state in self._snapshots.states.items()}
            self._snapshots = Snapshots(self._snapshots.network.to(self.device), states)

    @property
    def epochs(self) -> int:
        """Number of epochs that make up all iterations."""
        return math.ceil(self.pace.iterations / self.pace.checkpoint_every)

    def train_dataloader(self) -> DataLoader[tuple[int, int]]:
        """Ranges of iterations of the current epoch, each up to the next log row."""
        pace = self.pace
        return ranges_of_epoch(self.current_epoch, 0, pace.iterations, pace.checkpoint_every, pace.log_every)

    def training_step(self, batch: tuple[int, int], batch_index: int) -> None:
        """Optimise the images from one log row to the next."""
        begin, end = int(batch[0]), int(batch[1])
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, ImageSgd)
        history: list[ImageTerms] = []
        for iteration in range(begin, end):
            optimizer.param_groups[0]["lr"] = self.lr_at(iteration)
            chosen = self.batch(iteration)
            if is_refresh(iteration, self.config.surrogate.gap):
                self._refresh(iteration, chosen)
            gradient, terms = self.gradient(chosen)
            optimizer.move(chosen, gradient)
            history.append(terms)
        self._report(begin, history, optimizer.param_groups[0]["lr"])

    def lr_at(self, iteration: int) -> float:
        """Learning rate of the images: lower from the middle on."""
        middle = (self.pace.iterations - 1) // 2
        # One or two iterations have no second half.
        late = iteration >= middle > 0
        return self.config.lr_images * (self.config.factor if late else 1.0)

    def batch(self, iteration: int) -> Tensor:
        """Indices of the images of an iteration, drawn without regard to their classes."""
        order = torch.randperm(len(self.images), generator=generator(self.seed, "batch", iteration))
        return order[: self.config.batch_size].to(self.device)

    def gradient(self, chosen: Tensor) -> tuple[Tensor, ImageTerms]:
        """Gradient and terms of some images, by the teacher and the students at hand."""
        assert self._snapshots is not None
        config = self.config
        return chunked_gradient(
            self.images.detach()[chosen],
            self.targets[chosen],
            self._teachers[self._teacher],
            self._snapshots,
            discrepancy=config.discrepancy,
            ce=config.ce,
            chunk=config.chunk,
            at_once=config.snapshots_at_once,
        )

    def _refresh(self, iteration: int, chosen: Tensor) -> None:
        source = generator(self.seed, "teacher", iteration)
        self._teacher = int(torch.randint(len(self._teachers), (), generator=source))
        images = self.images.detach()[chosen]
        student = self._new_student(derive_seed(self.seed, "surrogate", iteration)).to(self.device)
        said = teacher_logits(self._teachers[self._teacher], images, self.config.chunk)
        with own_draws(derive_seed(self.seed, "surrogate dropout", iteration), self.device):
            states, fit = fit_surrogate(
                student, images, said, self.config.surrogate, self._augment, generator(self.seed, "fit", iteration)
            )
        self._fit = float(fit)
        if not math.isfinite(self._fit):
            raise NonFiniteImages(
                f"the loss of the student of iteration {iteration + 1} is {self._fit}. Finished parts and the last "
                "checkpoint are kept. Lower method.apm.surrogate.lr or method.apm.lr_images."
            )
        self._snapshots = Snapshots(student, states)

    def _report(self, begin: int, history: Sequence[ImageTerms], lr: float) -> None:
        config, iteration = self.config, begin + len(history)
        losses = torch.stack([terms.loss(config.discrepancy, config.ce) for terms in history]).tolist()
        for number, loss in enumerate(losses, begin + 1):
            if not math.isfinite(loss):
                self._blame(f"the images' loss is {loss} in iteration {number}")
        if not bool(self.images.isfinite().all()):
            self._blame(f"the images are not finite after iteration {iteration}, though their loss is")
        row = AdversarialRow(
            iteration,
            losses[-1],
            float(history[-1].discrepancy),
            float(history[-1].ce),
            self._fit,
            self._teacher,
            lr,
        )
        self.rows.append(row)
        self._on_row(row, self.images.detach())

    def _blame(self, what: str) -> None:
        raise NonFiniteImages(
            f"{what} (teacher {self._teacher}). Finished parts and the last checkpoint are kept. Lower "
            "method.apm.lr_images."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the log rows, and the students and the teacher that judge until the next refresh."""
        note_pace(checkpoint, self.pace.checkpoint_every)
        checkpoint["rows"] = [asdict(row) for row in self.rows]
        assert self._snapshots is not None
        checkpoint["surrogate"] = {"states": self._snapshots.states, "teacher": self._teacher, "fit": self._fit}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the log rows, the students and the teacher.

        Raises:
            ConfigError: ``method.checkpoint_every`` is another than it was.
        """
        require_pace(checkpoint, self.pace.checkpoint_every)
        self.rows = [AdversarialRow(**row) for row in checkpoint["rows"]]
        surrogate = checkpoint["surrogate"]
        self._teacher, self._fit = int(surrogate["teacher"]), float(surrogate["fit"])
        self._snapshots = Snapshots(self._new_student(0), surrogate["states"])


@torch.no_grad()
def teacher_logits(teacher: nn.Module, images: Tensor, chunk: int | None) -> Tensor:
    """Logits [n, classes] of a teacher for images [n, 3, h, w] as they are; no gradient and no graph."""
    return torch.cat([teacher(some) for some in images.split(chunk or len(images))])
