"""The module whose parameters are the images, the step size and, where they are learned, the labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.methods.mtt import FlatNetwork, Matched, Step, Synthetic, Task, draw_batches, draw_step, first_bad_step, match
from cvdd.schema import MethodConfig
from cvdd.support.seeds import generator
from cvdd.synthesis.trajectories import Trajectories
from cvdd.training.pace import note_pace, ranges_of_epoch, require_pace


class ExplodingGradients(ValueError):
    """The matched loss, its gradient or the step size left the range in which an update means anything."""


@dataclass(frozen=True)
class MatchRow:
    """State at one iteration.

    Attributes:
        iteration: number of finished updates.
        loss: matched loss, mean over the iterations since the last row.
        step_size: of the student, after the update.
        lr: of the images.
    """

    iteration: int
    loss: float
    step_size: float
    lr: float


@dataclass(frozen=True)
class Iteration:
    """What is drawn for one iteration.

    Attributes:
        expert: whose trajectory.
        start: epochs after which the student takes over.
        steps: what the student sees.
    """

    expert: int
    start: int
    steps: tuple[Step, ...]


def draw_iteration(
    method: MethodConfig, iteration: int, experts: int, count: int, size: int, families: tuple[str, ...]
) -> Iteration:
    """Draw an iteration; it depends on (seed, iteration) alone, so that a resumed run draws the same.

    Experts are taken in random order, all of them before one comes again.

    Args:
        method: the method's configuration.
        iteration: counted from 0.
        experts: number of trajectories.
        count: number of synthetic images.
        size: side of what networks see.
        families: of DSA.
    """
    settings = method.mtt
    assert settings is not None
    order = torch.randperm(experts, generator=generator(method.seed, "expert order", iteration // experts))
    source = generator(method.seed, "matching", iteration)
    start = int(torch.randint(settings.start_epochs, (), generator=source))
    batches = draw_batches(count, settings.batch_size, settings.steps, source)
    steps = tuple(
        draw_step(batch, families, size, settings.canvas, settings.canvas_samples, source) for batch in batches
    )
    return Iteration(int(order[iteration % experts]), start, steps)


class MatchingModule(pl.LightningModule):
    """Moves the synthetic set so that students follow the experts (specification of MTT, section 2.5).

    An epoch is ``method.checkpoint_every`` iterations, because Lightning resumes exactly at the ends of epochs only; a
    batch is a range of iterations between two log rows.

    Args:
        network: of experts and students.
        trajectories: of the experts.
        images: [n, 3, side, side] initial images, as networks see them.
        targets: [n, classes] initial probabilities.
        method: the method's configuration, with ``mtt``.
        size: side of what networks see; the images' own unless they are canvases.
        families: of DSA.
        on_row: called with each log row and the images.
    """

    targets: Tensor

    def __init__(
        self,
        network: FlatNetwork,
        trajectories: Trajectories,
        images: Tensor,
        targets: Tensor,
        method: MethodConfig,
        size: int,
        families: tuple[str, ...],
        on_row: Callable[[MatchRow, Tensor], None],
    ) -> None:
        super().__init__()
        assert method.mtt is not None
        self.automatic_optimization = False
        self.method, self.settings, self.size, self.families = method, method.mtt, size, families
        self.images = nn.Parameter(images.clone())
        self.raw_step_size = nn.Parameter(torch.tensor(_raw(self.settings.step_size, self.settings.step_size_form)))
        self.label_logits: nn.Parameter | None = None
        if self.settings.labels == "learned":
            self.label_logits = nn.Parameter(targets.log())
        else:
            self.register_buffer("targets", targets, persistent=False)
        # The network's own parameters are never used: it is a function of those that the experts bring.
        self._network, self._trajectories = network, trajectories
        self._on_row = on_row
        self.rows: list[MatchRow] = []

    @property
    def epochs(self) -> int:
        """Number of epochs that make up all iterations."""
        return math.ceil(self.method.iterations / self.method.checkpoint_every)

    def step_size(self) -> Tensor:
        """The student's step size, a scalar; differentiable in what is learned."""
        plain = self.settings.step_size_form == "plain"
        return self.raw_step_size if plain else nn.functional.softplus(self.raw_step_size)

    def probabilities(self) -> Tensor:
        """Labels of the images, [n, classes]; differentiable where they are learned."""
        return self.targets if self.label_logits is None else self.label_logits.softmax(dim=1)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for the images, for the step size and for the labels, each with a rate of its own."""
        settings = self.settings
        rated: list[tuple[nn.Parameter, float]] = [
            (self.images, settings.lr_images),
            (self.raw_step_size, settings.lr_step_size),
        ]
        if self.label_logits is not None:
            assert settings.lr_labels is not None
            rated.append((self.label_logits, settings.lr_labels))
        return [torch.optim.SGD([parameter], lr, momentum=settings.momentum) for parameter, lr in rated]

    def on_fit_start(self) -> None:
        """Bring the network to the images' device."""
        self._network.network.to(self.device).requires_grad_(False)

    def train_dataloader(self) -> DataLoader[tuple[int, int]]:
        """Ranges of iterations of the current epoch."""
        method = self.method
        return ranges_of_epoch(self.current_epoch, 0, method.iterations, method.checkpoint_every, method.log_every)

    def training_step(self, batch: tuple[int, int], batch_index: int) -> None:
        """Update the synthetic set from one log row to the next.

        Raises:
            ExplodingGradients: the parameters are then those before the iteration that is named.
        """
        begin, end = int(batch[0]), int(batch[1])
        losses = [self._update(iteration) for iteration in range(begin, end)]
        row = MatchRow(end, sum(losses) / len(losses), float(self.step_size().detach()), self.settings.lr_images)
        self.rows.append(row)
        self._on_row(row, self.images.detach())

    def synthetic(self) -> Synthetic:
        """The set as it is now; differentiable in what is learned."""
        return Synthetic(self.images, self.probabilities(), self.step_size())

    def task(self, drawn: Iteration) -> Task:
        """What the student has to do in one iteration."""
        start, target = self._trajectories.segment(drawn.expert, drawn.start, self.settings.target_epochs)
        return Task(self._network, start.to(self.device), target.to(self.device), drawn.steps, self.size)

    def draw(self, iteration: int) -> Iteration:
        """What is drawn for an iteration."""
        experts = self._trajectories.layout.experts
        return draw_iteration(self.method, iteration, experts, len(self.images), self.size, self.families)

    def _update(self, iteration: int) -> float:
        drawn = self.draw(iteration)
        task, settings = self.task(drawn), self.settings
        matched = match(task, self.synthetic(), settings.gradient, settings.steps_in_graph)
        loss = float(matched.loss)
        limit = settings.loss_limit
        if not matched.is_finite() or (limit is not None and loss > limit):
            self._blame(iteration, drawn, task, matched)
        optimizers = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.images.grad = matched.gradient.images
        torch.autograd.backward([self.step_size()], [matched.gradient.step_size])
        if self.label_logits is not None:
            torch.autograd.backward([self.probabilities()], [matched.gradient.targets])
        before = [parameter.detach().clone() for parameter in self.parameters()]
        for optimizer in optimizers:
            optimizer.step()
        self._check_update(iteration, before)
        return loss

    def _check_update(self, iteration: int, before: list[Tensor]) -> None:
        step_size = float(self.step_size().detach())
        finite = all(bool(parameter.isfinite().all()) for parameter in self.parameters())
        if finite and step_size > 0:
            return
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), before, strict=True):
                parameter.copy_(value)
        if finite:
            raise ExplodingGradients(
                f"the learned step size became {step_size:.3g} in iteration {iteration + 1}; the set before it is "
                f"kept. Lower method.mtt.lr_step_size={self.settings.lr_step_size}"
                + (", or set method.mtt.step_size_form=softplus" if self.settings.step_size_form == "plain" else "")
            )
        raise ExplodingGradients(
            f"the update of iteration {iteration + 1} is not finite, though the loss is; the set before it is kept. "
            f"Lower method.mtt.lr_images={self.settings.lr_images} or "
            f"method.mtt.lr_step_size={self.settings.lr_step_size}"
        )

    def _blame(self, iteration: int, drawn: Iteration, task: Task, matched: Matched) -> NoReturn:
        bad = first_bad_step(task, self.synthetic())
        where = f"; the student's parameters are not finite after step {bad} of {len(drawn.steps)}" if bad else ""
        what = "loss or its gradient is not finite" if not matched.is_finite() else "loss exceeds method.mtt.loss_limit"
        raise ExplodingGradients(
            f"the matched {what} in iteration {iteration + 1} (loss {float(matched.loss):.4g}, step size "
            f"{float(self.step_size().detach()):.3g}, expert {drawn.expert} from epoch {drawn.start}{where}). The set "
            f"before it is kept. Lower method.mtt.lr_step_size={self.settings.lr_step_size}, then "
            f"method.mtt.lr_images={self.settings.lr_images} or method.mtt.step_size={self.settings.step_size}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the log rows, so that a resumed run has all of them."""
        note_pace(checkpoint, self.method.checkpoint_every)
        checkpoint["rows"] = [asdict(row) for row in self.rows]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the log rows.

        Raises:
            ConfigError: ``method.checkpoint_every`` is another than it was.
        """
        require_pace(checkpoint, self.method.checkpoint_every)
        self.rows = [MatchRow(**row) for row in checkpoint["rows"]]


def _raw(step_size: float, form: str) -> float:
    """What is learned, at first: the inverse of the softplus where the step size is one."""
    return step_size if form == "plain" else math.log(math.expm1(step_size))
