"""The module whose parameters are the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.augmentation.augment import Views, apply_matrices, enlarged_parts, rounded_products
from cvdd.augmentation.dsa import left_by_cuts
from cvdd.computing.graphs import Recorded, side_by_side
from cvdd.methods.gvbsm import densification
from cvdd.running.distributed import sum_over_ranks
from cvdd.schema import MethodConfig
from cvdd.statistics.layer_statistics import HALVES
from cvdd.support.curves import cosine
from cvdd.synthesis.agreement import agreement, pairs_of
from cvdd.synthesis.committee import turn_weights
from cvdd.synthesis.log_rows import TERMS, LogRow, Said
from cvdd.synthesis.units import Stage, View, unit_matrices
from cvdd.synthesis.voting import Anchors, Judgement, Voter, judge, weigh
from cvdd.training.pace import note_pace, ranges_of_epoch, require_pace
from cvdd.training.schedules import compute_as_made, optimizer_of, set_rate

MATRIX_ELEMENTS = 2**24
"""Of the matrices of several iterations that are made together."""


class NonFiniteLoss(ValueError):
    """A member's loss became NaN or infinite."""


class DistillModule(pl.LightningModule):
    """A stack of units in one stage: the images are the parameters, the voting loss is the training step.

    An epoch is ``method.checkpoint_every`` iterations, because Lightning resumes exactly at the ends of epochs only.
    A batch is a range of iterations between two log rows, so that a step costs no host synchronisation.

    Args:
        images: [units, images, 3, size, size] initial images, normalised.
        targets: [units, images] class indices.
        views: per unit, the views of the stage's iterations; None shows the images as they are.
        voters: the members of the draw.
        weights: [members, units] shares of the vote.
        method: the method's configuration.
        bounds: lowest and highest value, each [3, 1, 1], to which images are clamped after every step.
        on_row: called with each log row and the images.
        stage: which iterations; None is all of them.
        split: whether ranks share the images of each unit. Every rank has all of them and their optimiser, which are
            small; it shows only its own to the voters, and gets the gradients of the others' from them.
        units_per_pass: units that a voter judges in one forward pass; None is all of the stack.
        opinion: what judges, :func:`cvdd.synthesis.voting.judge` or a compiled version of it.
        record: whether an iteration on a GPU is recorded as a CUDA graph, in which the voters judge side by side; only
            where all voters judge in every iteration, by statistics that do not move, of images that are not crowded.
        anchors: [units, images, parts, 3, size, size], normalised: the real image that each part is made of. Then the
            voters judge all parts, enlarged; None for images that are judged as they are.
    """

    targets: Tensor
    anchors: Tensor | None
    weights: Tensor
    turns: Tensor
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
        stage: Stage | None = None,
        split: bool = False,
        units_per_pass: int | None = None,
        opinion: Callable[..., Judgement] = judge,
        record: bool = False,
        anchors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.split = split
        self._record = record
        self._recorded: Callable[..., tuple[Any, ...]] | None = None
        self._streams: list[torch.cuda.Stream] = []
        self._per_pass = units_per_pass or len(images)
        self._opinion = opinion
        self.automatic_optimization = False
        self.images = nn.Parameter(images.clone())
        self.register_buffer("targets", targets.repeat_interleave(method.parts_judged, dim=1), persistent=False)
        self.register_buffer("anchors", None if anchors is None else anchors.flatten(1, 2), persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("low", bounds[0], persistent=False)
        self.register_buffer("high", bounds[1], persistent=False)
        # Kept out of the module tree: the members belong to their own artefacts, not to this checkpoint.
        self._voters = tuple(voters)
        self._rounded = all(voter.dtype in HALVES for voter in voters)
        self._views = None if views is None else tuple(views)
        self.method = method
        self.stage = stage or Stage(0, 0, method.iterations, images.shape[-1])
        # Whose turn it is must be known without asking the device.
        self._turns = turn_weights(weights.cpu(), method.turns, method.iterations, method.seed)
        self.register_buffer("turns", self._turns, persistent=False)
        self._on_row = on_row
        self.rows: list[LogRow] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the images; the learning rate is set at every step from the iteration's number."""
        method = self.method
        if self.device.type != "cuda":
            return torch.optim.Adam([self.images], lr=method.lr, betas=method.betas, eps=method.eps, foreach=False)
        # On the device, so that a recorded step reads the rate of its iteration.
        rate = torch.tensor(method.lr, device=self.device)
        return torch.optim.Adam([self.images], lr=rate, betas=method.betas, eps=method.eps, fused=True, capturable=True)

    def on_fit_start(self) -> None:
        """Bring the members to the images' device, and make ready to record iterations there."""
        for voter in self._voters:
            voter.network.to(self.device).eval().requires_grad_(False)
        if self._record and self.device.type == "cuda":
            self._recorded = Recorded(self._all_of_iteration, self.device, "an iteration of the images")
            self._streams = [torch.cuda.Stream(self.device) for _ in self._voters]
            if self._opinion is not judge:
                # Before any stream: from there what other processes had compiled was not found (docs/speed.md).
                for voter in self._voters:
                    self._ask(0, voter, self._seen(None).detach(), self._aims(None))

    @property
    def epochs(self) -> int:
        """Number of epochs that make up all iterations of the stage."""
        return math.ceil((self.stage.last - self.stage.first) / self.method.checkpoint_every)

    def train_dataloader(self) -> DataLoader[tuple[int, int]]:
        """Ranges of iterations of the current epoch."""
        stage, method = self.stage, self.method
        return ranges_of_epoch(self.current_epoch, stage.first, stage.last, method.checkpoint_every, method.log_every)

    def training_step(self, batch: tuple[int, int], batch_index: int) -> None:
        """Optimise the images from one log row to the next."""
        begin, end = int(batch[0]), int(batch[1])
        optimizer = optimizer_of(self)
        history: list[Said] = []
        cosines: dict[str, float] = {}
        rate = 0.0
        for iteration, view in zip(range(begin, end), self._matrices(begin, end), strict=True):
            rate = self._rate(iteration)
            set_rate(optimizer, rate, self.device)
            compared = iteration == end - 1 and self.method.log_agreement and len(self._voters) > 1
            if compared and self.method.turns != "all":
                cosines = self._agreement_of_all(iteration, view)
            if self._recorded is None:
                vote = self._iterate(iteration, view, compared and self.method.turns == "all")
            else:
                vote = Said(tuple(range(len(self._voters))), *self._recorded(*(view.tensors if view else ())))
            if compared and vote.gradients is not None:
                cosines = self._cosines(vote.gradients)
            history.append(vote.kept() if self._recorded is not None else vote)
        self._report(begin, history, rate, cosines)

    def _rate(self, iteration: int) -> float:
        method = self.method
        return method.lr * (cosine(iteration, method.iterations) if method.schedule == "cosine" else 1.0)

    def _iterate(self, iteration: int, view: View | None, apart: bool) -> Said:
        """Move the images by one step; return what was said of them before."""
        seen = self._seen(view)
        gradient, vote = self._vote(iteration, seen.detach(), apart, self._aims(view))
        with rounded_products(self._rounded):
            (self.images.grad,) = torch.autograd.grad(seen, self.images, gradient)
        if self.split:
            # Of each image one rank has the gradient, and the others 0.
            dist.all_reduce(self.images.grad)
        optimizer_of(self).step()
        with torch.no_grad():
            self.images.clamp_(self.low, self.high)
        return vote

    def _all_of_iteration(self, *view: Tensor) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """What of an iteration happens on the device; the number of the iteration shows in the learning rate alone."""
        vote = self._iterate(0, View(*view) if view else None, True)
        assert vote.gradients is not None
        return vote.loss, vote.ce, vote.bn, vote.features, vote.density, vote.gradients

    def _seen(self, view: View | None) -> Tensor:
        images = self.images[:, self._own]
        if self.anchors is not None:
            images = enlarged_parts(images, self.method.factor)
        return self._through(images, view)

    def _through(self, images: Tensor, view: View | None) -> Tensor:
        if view is None:
            return images
        with rounded_products(self._rounded):
            seen = apply_matrices(images, view.rows, view.columns)
        return seen if view.left is None else seen * view.left[:, None, None]

    def _aims(self, view: View | None) -> Anchors | None:
        """Return the anchors as the voters see them, [units, images * parts, 3, size, size]."""
        settings = self.method.anchored
        if self.anchors is None or settings is None:
            return None
        return Anchors(self._through(self.anchors, view), settings.weight, settings.distance)

    @property
    def _own(self) -> slice:
        """Images of each unit that this rank shows to the voters."""
        if not self.split:
            return slice(None)
        count, size = self.images.shape[1], self.trainer.world_size
        return slice(self.trainer.global_rank * count // size, (self.trainer.global_rank + 1) * count // size)

    def _vote(self, iteration: int, seen: Tensor, apart: bool, aims: Anchors | None = None) -> tuple[Tensor, Said]:
        """Return the gradient of the loss with respect to what is seen, and what was said.

        Each voter is asked alone, so that memory holds one graph at a time, unless they are recorded side by side.
        """
        method = self.method
        everyone = method.turns == "all"
        judging = range(len(self._voters)) if everyone else self._turns[iteration].any(dim=1).nonzero()[:, 0].tolist()
        weights = self.weights if everyone else self.turns[iteration, judging]
        calls = [partial(self._ask, iteration, self._voters[index], seen, aims) for index in judging]
        vote = weigh(side_by_side(calls, self._streams), weights, keep=apart)
        loss, gradient, density = vote.loss, vote.gradient, seen.new_zeros(())
        if method.density:
            crowded = seen.requires_grad_()
            crowding = densification(crowded, self.targets, method.density_scale).sum()
            # Images that are alone in their class crowd nobody.
            if crowding.requires_grad:
                gradient += method.density * torch.autograd.grad(crowding, crowded)[0]
            density = crowding.detach()
            loss = loss + method.density * density
        return gradient, Said(tuple(judging), loss, vote.ce, vote.bn, vote.features, density, vote.slopes)

    def _ask(self, iteration: int, voter: Voter, seen: Tensor, aims: Anchors | None = None) -> tuple[Judgement, Tensor]:
        """Return what a voter says, without gradient, and the gradient of its values with respect to what is seen."""
        method, targets = self.method, self.targets[:, self._own]
        if voter.matcher is not None:
            voter.matcher.begin(iteration)
        said, slopes = [], []
        for first in range(0, len(seen), self._per_pass):
            units = slice(first, first + self._per_pass)
            shown = seen[units].detach().requires_grad_()
            judgement = self._opinion(
                shown,
                targets[units],
                voter,
                ce=method.ce,
                r_bn=method.r_bn,
                first_bn_multiplier=method.first_bn_multiplier,
                statistics_of=method.statistics_of,
                across=sum_over_ranks if self.split else None,
                anchors=None if aims is None else aims._replace(images=aims.images[units]),
            )
            slopes.append(torch.autograd.grad(judgement.value.sum(), shown)[0])
            said.append(Judgement(*(part.detach() for part in judgement)))
        return Judgement(*(torch.cat(parts) for parts in zip(*said, strict=True))), torch.cat(slopes)

    def _cosines(self, gradients: Sequence[Tensor]) -> dict[str, float]:
        return pairs_of(agreement(torch.stack(list(gradients))), [voter.name for voter in self._voters])

    def _agreement_of_all(self, iteration: int, view: View | None) -> dict[str, float]:
        """Ask all voters where the vote asks only some, and forget that it was done."""
        with torch.no_grad():
            seen, aims = self._seen(view), self._aims(view)
        gradients = []
        for voter in self._voters:
            averages = voter.matcher.state() if voter.matcher is not None else {}
            gradients.append(self._ask(iteration, voter, seen, aims)[1])
            if voter.matcher is not None:
                voter.matcher.load_state(averages)
        return self._cosines(gradients)

    def _matrices(self, begin: int, end: int) -> Iterator[View | None]:
        if self._views is None:
            yield from [None] * (end - begin)
            return
        size, units, offset = self.images.shape[-1], len(self._views), self.stage.first
        at_once = max(MATRIX_ELEMENTS // (units * size**2), 1)
        for first in range(begin, end, at_once):
            last = min(first + at_once, end)
            views = Views.cat([view[first - offset : last - offset] for view in self._views]).to(self.device)
            rows, columns = unit_matrices(views, size)
            rows = rows.view(units, last - first, size, size)
            columns = columns.view(units, last - first, size, size)
            left = None
            if views.cuts is not None:
                left = left_by_cuts(views.cuts, size, self.method.cutout).to(rows.dtype)
                left = left.view(units, last - first, size, size)
            for index in range(last - first):
                yield View(rows[:, index], columns[:, index], None if left is None else left[:, index])

    def _report(self, begin: int, history: Sequence[Said], lr: float, cosines: dict[str, float]) -> None:
        iteration, last = begin + len(history), history[-1]
        names = [voter.name for voter in self._voters]
        terms = [dict(getattr(self.rows[-1], term)) if self.rows else {} for term in TERMS]
        heard = history if self.method.turns != "all" else history[-1:]
        for vote in heard:
            for term, values in zip(TERMS, terms, strict=True):
                means = getattr(vote, term).mean(dim=1).tolist()
                values |= {names[index]: mean for index, mean in zip(vote.voters, means, strict=True)}
        if not all(math.isfinite(value) for values in terms for value in values.values()):
            self._blame(begin, history)
        ce, bn, features = terms
        if not bool(self.images.isfinite().all()):
            raise NonFiniteLoss(
                f"the images are not finite after iteration {iteration}, though the losses of {', '.join(names)} are: "
                f"a gradient is not. Finished units and the last checkpoint are kept. Lower {self._to_lower}."
            )
        row = LogRow(
            iteration=iteration,
            loss=float(last.loss) / len(self.images),
            ce=ce,
            bn=bn,
            lr=lr,
            density=float(last.density) / len(self.images),
            agreement=cosines,
            features={} if self.anchors is None else features,
        )
        self.rows.append(row)
        self._on_row(row, self.images.detach())

    @property
    def _to_lower(self) -> str:
        """What to lower where a loss is not finite."""
        of_terms = ["method.r_bn"] if self.method.r_bn else []
        of_terms += [] if self.anchors is None else ["method.anchors.weight"]
        return " or ".join(["method.lr", *of_terms])

    def _blame(self, begin: int, history: Sequence[Said]) -> NoReturn:
        # One iteration later the images are not finite either, and with them the terms of all members.
        for iteration, vote in enumerate(history, begin + 1):
            said = zip(vote.voters, *(getattr(vote, term).mean(dim=1) for term in TERMS), strict=True)
            for index, ce, bn, features in said:
                name = self._voters[index].name
                if not bool((ce + bn + features).isfinite()):
                    far = "" if self.anchors is None else f", distance of features {float(features)}"
                    raise NonFiniteLoss(
                        f"the loss of member {name} is not finite in iteration {iteration} (cross-entropy "
                        f"{float(ce)}, BatchNorm term {float(bn)}{far}). Finished units and the last checkpoint are "
                        f"kept. Lower {self._to_lower}, or leave {name} out of the committee."
                    )
        raise AssertionError("called without a term that is not finite")

    def on_train_start(self) -> None:
        """Compute steps as this device does, also where another kind of device had begun."""
        compute_as_made(optimizer_of(self), self.device)

    def on_fit_end(self) -> None:
        """Let go of what was recorded: it refers to this module, so its memory would wait for the garbage collector."""
        self._recorded = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the log rows and the moving averages of statistics, so that a resumed run has all of them."""
        note_pace(checkpoint, self.method.checkpoint_every)
        checkpoint["rows"] = [asdict(row) for row in self.rows]
        checkpoint["statistics"] = [voter.matcher.state() if voter.matcher else {} for voter in self._voters]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the log rows and the moving averages.

        Raises:
            ConfigError: ``method.checkpoint_every`` is another than it was.
        """
        require_pace(checkpoint, self.method.checkpoint_every)
        self.rows = [LogRow(**row) for row in checkpoint["rows"]]
        for voter, state in zip(self._voters, checkpoint["statistics"], strict=True):
            if voter.matcher is not None:
                voter.matcher.load_state(state)
