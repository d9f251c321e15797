"""Units, stacks and the module whose parameters are the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.augment import Views, apply_matrices, draw_views, view_matrices
from cvdd.committee import Draw
from cvdd.schema import MethodConfig
from cvdd.seeds import generator
from cvdd.voting import Voter, VoteTerms, voting_loss


@dataclass(frozen=True)
class Unit:
    """One image of each of a block of classes, optimised together and depending on nothing outside.

    Attributes:
        slot: IPC slot, 0 to IPC - 1.
        block: index of the block of classes.
        start: first class.
        stop: class after the last.
    """

    slot: int
    block: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"slot{self.slot:04d}_block{self.block:04d}"


@dataclass(frozen=True)
class Stack:
    """Units with the same draw and the same number of classes that share a forward pass.

    The partition into stacks is fixed by the configuration, because floating point makes it show in the last bits.
    """

    index: int
    draw: Draw
    units: tuple[Unit, ...]


def plan_units(ipc: int, classes: int, classes_per_unit: int) -> list[Unit]:
    """List all units of a distilled set, slot by slot."""
    return [
        Unit(slot, block, start, min(start + classes_per_unit, classes))
        for slot in range(ipc)
        for block, start in enumerate(range(0, classes, classes_per_unit))
    ]


def plan_stacks(units: Sequence[Unit], draw_of: Callable[[int], Draw], units_per_stack: int) -> list[Stack]:
    """Partition units into stacks: by draw and number of classes, in order, at most ``units_per_stack`` each."""
    groups: dict[tuple[Draw, int], list[Unit]] = {}
    for unit in units:
        groups.setdefault((draw_of(unit.slot), unit.stop - unit.start), []).append(unit)
    parts = [
        (draw, tuple(group[first : first + units_per_stack]))
        for (draw, _), group in groups.items()
        for first in range(0, len(group), units_per_stack)
    ]
    return [Stack(index, draw, part) for index, (draw, part) in enumerate(parts)]


def unit_views(unit: Unit, method: MethodConfig, size: int, seed: int) -> Views:
    """Draw the crops, flips and shifts of all iterations of a unit; they depend on (seed, slot, block) alone."""
    source = generator(seed, "recover", unit.slot, unit.block)
    return draw_views(method.iterations, size, size, method.crop_scale, method.flip, method.jitter, source)


def cosine(step: int, total: int) -> float:
    """Cosine from 1 at step 0 to 0 at ``total``."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass(frozen=True)
class LogRow:
    """State of a stack at one iteration.

    Attributes:
        iteration: number of finished optimiser steps.
        loss: voting loss, mean over units.
        ce: cross-entropy by member, mean over units.
        bn: BatchNorm term by member, mean over units.
        lr: learning rate.
    """

    iteration: int
    loss: float
    ce: dict[str, float]
    bn: dict[str, float]
    lr: float


class NonFiniteLoss(ValueError):
    """A member's loss became NaN or infinite."""


class DistillModule(pl.LightningModule):
    """A stack of units: the images are the parameters, the voting loss is the training step.

    An epoch is ``method.checkpoint_every`` iterations, because Lightning resumes exactly at the ends of epochs only.
    A batch is a range of iterations between two log rows, so that a step costs no host synchronisation.

    Args:
        images: [units, images, 3, size, size] initial images, normalised.
        targets: [units, images] class indices.
        views: per unit, the views of all iterations; None shows the images as they are.
        voters: the members of the draw.
        weights: [members, units] shares of the vote.
        method: the method's configuration.
        bounds: lowest and highest value, each [3, 1, 1], to which images are clamped after every step.
        on_row: called with each log row and the images.
    """

    targets: Tensor
    weights: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        views: Sequence[Views] | None,
        voters: Sequence[Voter],
        weights: Tensor,
        method: MethodConfig,
        bounds: tuple[Tensor, Tensor],
        on_row: Callable[[LogRow, Tensor], None],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.images = nn.Parameter(images.clone())
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("low", bounds[0], persistent=False)
        self.register_buffer("high", bounds[1], persistent=False)
        # Kept out of the module tree: the members belong to their own artefacts, not to this checkpoint.
        self._voters = tuple(voters)
        self._views = None if views is None else tuple(views)
        self.method = method
        self._on_row = on_row
        self.rows: list[LogRow] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the images; the learning rate is set at every step from the iteration's number."""
        method = self.method
        return torch.optim.Adam([self.images], lr=method.lr, betas=method.betas, eps=method.eps, foreach=False)

    def on_fit_start(self) -> None:
        """Bring the members to the images' device."""
        for voter in self._voters:
            voter.network.to(self.device).eval().requires_grad_(False)

    @property
    def epochs(self) -> int:
        """Number of epochs that make up all iterations."""
        return math.ceil(self.method.iterations / self.method.checkpoint_every)

    def train_dataloader(self) -> DataLoader[tuple[int, int]]:
        """Ranges of iterations of the current epoch."""
        first = self.current_epoch * self.method.checkpoint_every
        last = min(first + self.method.checkpoint_every, self.method.iterations)
        step = self.method.log_every
        ranges = [(begin, min(begin + step, last)) for begin in range(first, last, step)]
        return DataLoader(ranges, batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch: tuple[int, int], batch_index: int) -> None:
        """Optimise the images from one log row to the next."""
        begin, end = int(batch[0]), int(batch[1])
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        history: list[VoteTerms] = []
        for iteration, view in zip(range(begin, end), self._matrices(begin, end), strict=True):
            optimizer.param_groups[0]["lr"] = self.method.lr * cosine(iteration, self.method.iterations)
            terms = self.loss(view)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            history.append(replace(terms, loss=terms.loss.detach()))
            with torch.no_grad():
                self.images.clamp_(self.low, self.high)
        self._report(begin, history, optimizer.param_groups[0]["lr"])

    def loss(self, view: tuple[Tensor, Tensor] | None) -> VoteTerms:
        """Voting loss of the images through one view per unit: row and column matrices [units, size, size]."""
        seen = self.images if view is None else apply_matrices(self.images, *view)
        method = self.method
        return voting_loss(
            seen,
            self.targets,
            self._voters,
            self.weights,
            ce=method.ce,
            r_bn=method.r_bn,
            first_bn_multiplier=method.first_bn_multiplier,
            statistics_of=method.statistics_of,
        )

    def _matrices(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor] | None]:
        if self._views is None:
            yield from [None] * (end - begin)
            return
        size = self.images.shape[-1]
        units = len(self._views)
        views = Views.cat([view[begin:end] for view in self._views])
        rows, columns = (matrix.to(self.device) for matrix in view_matrices(views, size, size, size))
        rows = rows.view(units, end - begin, size, size)
        columns = columns.view(units, end - begin, size, size)
        for index in range(end - begin):
            yield rows[:, index], columns[:, index]

    def _report(self, begin: int, history: Sequence[VoteTerms], lr: float) -> None:
        terms, iteration = history[-1], begin + len(history)
        ce, bn = terms.ce.mean(dim=1).tolist(), terms.bn.mean(dim=1).tolist()
        names = [voter.name for voter in self._voters]
        if not all(math.isfinite(value) for value in [*ce, *bn]):
            self._blame(begin, history)
        if not bool(self.images.isfinite().all()):
            raise NonFiniteLoss(
                f"the images are not finite after iteration {iteration}, though the losses of {', '.join(names)} are: "
                "a gradient is not. Finished units and the last checkpoint are kept. Lower method.lr or method.r_bn."
            )
        row = LogRow(
            iteration=iteration,
            loss=float(terms.loss) / len(self.images),
            ce=dict(zip(names, ce, strict=True)),
            bn=dict(zip(names, bn, strict=True)),
            lr=lr,
        )
        self.rows.append(row)
        self._on_row(row, self.images.detach())

    def _blame(self, begin: int, history: Sequence[VoteTerms]) -> NoReturn:
        # One iteration later the images are not finite either, and with them the terms of all members.
        for iteration, terms in enumerate(history, begin + 1):
            for voter, ce, bn in zip(self._voters, terms.ce.mean(dim=1), terms.bn.mean(dim=1), strict=True):
                if not bool((ce + bn).isfinite()):
                    raise NonFiniteLoss(
                        f"the loss of member {voter.name} is not finite in iteration {iteration} (cross-entropy "
                        f"{float(ce)}, BatchNorm term {float(bn)}). Finished units and the last checkpoint are kept. "
                        f"Lower method.lr or method.r_bn, or leave {voter.name} out of the committee."
                    )
        raise AssertionError("called without a term that is not finite")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the log rows, so that a resumed run has all of them."""
        checkpoint["rows"] = [asdict(row) for row in self.rows]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the log rows."""
        self.rows = [LogRow(**row) for row in checkpoint["rows"]]


def pixel_bounds(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Normalised values of black and white: two tensors [3, 1, 1]."""
    mean_t, std_t = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return -mean_t / std_t, (1 - mean_t) / std_t
