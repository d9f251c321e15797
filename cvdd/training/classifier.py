"""What LightningModules that train a classifier share, whatever they train it on."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils.data import Dataset, Sampler

from cvdd.backbones import has_batchnorm
from cvdd.computing.graphs import Recorded, draws_by_itself
from cvdd.computing.layouts import laid_out_as
from cvdd.running.distributed import gather_parts
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed, generator, seed_networks
from cvdd.training.measure import Accuracy
from cvdd.training.recorded_step import rate_of, with_step
from cvdd.training.schedules import compute_as_made, optimizer_of

Measure = Callable[[nn.Module], Accuracy]
EpochLog = Callable[[int, dict[str, float]], None]

Part = tuple[list[Tensor], Tensor]
"""Loss and gradients of a part of a batch, and the statistics of its BatchNorm layers."""


class NonFiniteTraining(ValueError):
    """The loss of a classifier became NaN or infinite."""


class ShuffledBatches(Sampler[Tensor]):
    """Batches of shuffled indices; the order depends on (seed, epoch) alone. Lightning sets the epoch.

    Args:
        count: images.
        batch_size: images per batch.
        seed: of the order.
        least: images of a batch; a last one with fewer is left out. BatchNorm needs two.
        field: that holds the batch size, for messages.

    Raises:
        ConfigError: no batch has as many images.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, least: int = 2, field: str = "recipe.batch_size"
    ) -> None:
        if batch_size < least:
            raise ConfigError(f"{field}={batch_size}: BatchNorm layers need batches of at least {least} images")
        if count < least:
            raise ConfigError(f"there are {count} images to train on; at least {least} are needed")
        self.count, self.batch_size, self.seed, self.least, self._epoch = count, batch_size, seed, least, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.count, generator=generator(self.seed, "order", self._epoch))
        return (batch for batch in order.split(self.batch_size) if len(batch) >= self.least)

    def __len__(self) -> int:
        last = self.count % self.batch_size
        return self.count // self.batch_size + (last >= max(self.least, 1))


def smallest_batch(network: nn.Module) -> int:
    """Images that a network needs in a batch: two with BatchNorm, one without."""
    return 2 if has_batchnorm(network) else 1


class Positions(Dataset[Tensor]):
    """Batches of positions of images that are in memory."""

    def __getitem__(self, index: Tensor) -> Tensor:
        return index


class Classifier(pl.LightningModule):
    """What members and students share: a network, its curve, and a stop at the first loss that is not finite.

    A batch may come in parts (:meth:`loss_in_parts`), which ranks share. A part is what a rank would see under DDP:
    it is forwarded by itself, and BatchNorm normalises it with its own statistics. The gradients of all parts are
    added up in their order, and their statistics enter the running ones in that order, on every rank alike; so the
    bits of the result depend on the number of parts, and not on that of ranks.

    Args:
        network: to train.
        name: for messages.
        seed: of everything random in the training; the network's own draws (dropout) are reseeded for every epoch.
        measure: accuracy on held-out images.
        measured_at: whether to measure after an epoch (counted from 0).
        on_epoch: called after each epoch with its number and what is known about it.
        rate: the field that holds the learning rate, for messages.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        seed: int,
        measure: Measure,
        measured_at: Callable[[int], bool],
        on_epoch: EpochLog,
        rate: str = "recipe.lr or protocol.lr",
    ) -> None:
        super().__init__()
        self.network = network
        self.seed = seed
        self._name, self._rate = name, rate
        self._measure, self._measured_at, self._on_epoch = measure, measured_at, on_epoch
        self.curve: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._gradient: list[Tensor] | None = None
        self._recorded: Callable[..., list[Tensor]] | None = None
        self._takes_steps = False

    def record(
        self, losses: Callable[..., Sequence[Callable[[], Tensor]]], divided: bool, *, step: bool = False
    ) -> None:
        """Make ready to record loss and gradient of a batch as CUDA graphs, for :meth:`recorded_loss`.

        Nothing is recorded on a CPU, where ranks share the parts of a batch, and where a network with dropout needs a
        seed for each part.

        Args:
            losses: from the tensors of a batch to the share of each part in its loss; it waits for nothing.
            divided: whether BatchNorm normalises each part with its own statistics, as :meth:`loss_in_parts` does.
            step: whether the optimiser's step is recorded with them (:func:`cvdd.training.recorded_step.with_step`).
        """
        alone = self._ranks[1] == 1 and not (divided and draws_by_itself(self.network))
        if self.device.type == "cuda" and alone:
            function = self.loss_and_gradient(losses, divided)
            self._takes_steps = step
            self._recorded = Recorded(
                with_step(function, self.trained_parameters(), self) if step else function,
                self.device,
                f"a step of {self._name}",
            )

    def loss_and_gradient(
        self, losses: Callable[..., Sequence[Callable[[], Tensor]]], divided: bool
    ) -> Callable[..., list[Tensor]]:
        """Return the function that is recorded: from the tensors of a batch to its loss and its gradient.

        Args:
            losses: see :meth:`record`, like what follows.
            divided: likewise.
        """

        def function(*tensors: Tensor) -> list[Tensor]:
            parameters = self.trained_parameters()
            if divided:
                return self._sum_of_parts(losses(*tensors), None, parameters)
            (share,) = losses(*tensors)
            return differentiated(share(), parameters)

        return function

    @property
    def is_recorded(self) -> bool:
        """Whether :meth:`recorded_loss` is to be used."""
        return self._recorded is not None

    def recorded_loss(self, *tensors: Tensor) -> Tensor:
        """Loss of a batch from its tensors on the device; its gradient is known then, as in :meth:`loss_in_parts`."""
        assert self._recorded is not None
        if self._takes_steps:
            tensors = (rate_of(optimizer_of(self), self.device), *tensors)
        loss: Tensor
        loss, *self._gradient = self._recorded(*tensors)
        # The next call overwrites it.
        return loss.clone().requires_grad_()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the network that are trained."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def own_parts(self, count: int) -> list[int]:
        """Indices of the parts of a batch that this rank forwards, of ``count``."""
        return list(range(self._ranks[0], count, self._ranks[1]))

    @property
    def _ranks(self) -> tuple[int, int]:
        """This rank, and how many train together."""
        return (0, 1) if self._trainer is None else (self._trainer.global_rank, self._trainer.world_size)

    def loss_in_parts(self, losses: Sequence[Callable[[], Tensor]], batch_index: int) -> Tensor:
        """Loss of a batch that is forwarded in parts; its gradient is known then, and :meth:`backward` hands it out.

        Args:
            losses: the share of each part in the loss; those of :meth:`own_parts` are called.
            batch_index: of the batch in its epoch.
        """
        loss, *self._gradient = self._sum_of_parts(losses, batch_index, self.trained_parameters())
        return loss.detach().requires_grad_()

    def _sum_of_parts(
        self, losses: Sequence[Callable[[], Tensor]], batch_index: int | None, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """Loss and gradient of a batch; the running statistics move on. Without an index nobody is seeded."""
        statistics = RunningStatistics(self.network)
        parts = self._differentiated(losses, batch_index, parameters, statistics)
        if self._ranks[1] > 1:
            parts = self._of_all_ranks(list(parts), len(losses), parameters, statistics)
        return added_up(parts, len(losses), statistics)

    def _differentiated(
        self,
        losses: Sequence[Callable[[], Tensor]],
        batch_index: int | None,
        parameters: list[nn.Parameter],
        statistics: RunningStatistics,
    ) -> Iterator[Part]:
        """Loss and gradient of each of this rank's parts, one after the other, and the statistics of each."""
        for part in self.own_parts(len(losses)):
            if batch_index is not None:
                seed_networks(derive_seed(self.seed, "network", self.current_epoch, batch_index, part), self.device)
            with statistics.of_one_part():
                known = differentiated(losses[part](), parameters)
            yield known, statistics.measured()

    def _of_all_ranks(
        self, own: Sequence[Part], count: int, parameters: list[nn.Parameter], statistics: RunningStatistics
    ) -> Iterator[Part]:
        """All parts in their order, gathered in one tensor for each."""
        shapes = [torch.zeros((), device=self.device), *parameters]
        ends = sum(shape.numel() for shape in shapes)
        rows = [torch.cat([_flat(known), measured.to(self.device)]) for known, measured in own]
        empty = torch.zeros(ends + statistics.length, device=self.device)
        for row in gather_parts(rows or [empty], count):
            yield list(_unflatten_dense_tensors(row[:ends], shapes)), row[ends:]

    def backward(self, loss: Tensor, *arguments: object, **options: object) -> None:
        """Hand out the gradient that is known; that of any other batch is computed as usual."""
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            loss.backward()
            return
        # Without any, the optimiser leaves all parameters alone: their step was taken with the loss.
        for parameter, slope in zip(self.trained_parameters() if gradient else [], gradient, strict=True):
            parameter.grad = laid_out_as(slope, parameter)

    def _note(self, loss: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss

    def measured_network(self) -> nn.Module:
        """Return the network whose accuracy counts."""
        return self.network

    def on_train_start(self) -> None:
        """Compute steps as this kind of module does here, also where another kind, of it or of a device, had begun."""
        compute_as_made(optimizer_of(self), self.device)

    def on_train_epoch_start(self) -> None:
        """Make the network's own draws depend on (seed, epoch) alone, also after an interruption."""
        seed_networks(derive_seed(self.seed, "network", self.current_epoch), self.device)

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
                    f"last checkpoint is kept; choose a smaller learning rate ({self._rate})."
                )
        self.curve.append(row)
        self._on_epoch(self.current_epoch, row)

    def on_fit_end(self) -> None:
        """Let go of what was recorded: it refers to this module, so its memory would wait for the garbage collector."""
        self._recorded = None

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Keep the curve, so that a resumed run has all of it."""
        checkpoint["curve"] = list(self.curve)

    def on_load_checkpoint(self, checkpoint: dict[str, list[dict[str, float]]]) -> None:
        """Restore the curve."""
        self.curve = list(checkpoint["curve"])


class RunningStatistics:
    """The running statistics of a network's BatchNorm layers, moved on by the parts of a batch in their order.

    Args:
        network: in training mode; layers without running statistics, or with a cumulative average, are left alone.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [
            layer
            for layer in network.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and layer.running_mean is not None
            and layer.momentum is not None
            and layer.training
        ]
        self._counts = [layer.num_batches_tracked.clone() for layer in self._layers]  # type: ignore[union-attr]
        # Those of one momentum together: one call for all of them costs no more than for one.
        self._buffers: dict[float, list[Tensor]] = {}
        for layer in self._layers:
            assert layer.momentum is not None
            assert layer.running_mean is not None
            assert layer.running_var is not None
            self._buffers.setdefault(layer.momentum, []).extend([layer.running_mean, layer.running_var])
        self._all = [buffer for buffers in self._buffers.values() for buffer in buffers]
        self._part = torch.empty(0)

    @property
    def length(self) -> int:
        """Number of statistics."""
        return sum(buffer.numel() for buffer in self._all)

    @contextlib.contextmanager
    def of_one_part(self) -> Iterator[None]:
        """Measure the statistics of what is forwarded and differentiated inside; the running ones stay as they are."""
        before = _flat(self._all)
        momenta = [layer.momentum for layer in self._layers]
        for layer in self._layers:
            layer.momentum = 1.0
        try:
            yield
        finally:
            for layer, momentum in zip(self._layers, momenta, strict=True):
                layer.momentum = momentum
            self._part = _flat(self._all)
            if self._all:
                torch._foreach_copy_(self._all, _unflatten_dense_tensors(before, self._all))

    def now(self) -> Tensor:
        """Statistics as they are, [length]."""
        return _flat(self._all)

    def measured(self) -> Tensor:
        """Statistics of the last part, [length]."""
        return self._part

    def update(self, part: Tensor) -> None:
        """Move the running statistics by those of a part, [length]."""
        pieces = iter(_unflatten_dense_tensors(part, self._all) if self._all else ())
        for momentum, buffers in self._buffers.items():
            torch._foreach_lerp_(buffers, list(itertools.islice(pieces, len(buffers))), momentum)

    def count(self, parts: int) -> None:
        """Let every layer have seen so many batches more than when this was made."""
        for layer, before in zip(self._layers, self._counts, strict=True):
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.copy_(before + parts)


def differentiated(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return a loss and its gradient, which lies in memory as the parameters do."""
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return [loss.detach(), *map(laid_out_as, gradients, parameters)]


def added_up(parts: Iterable[Part], count: int, statistics: RunningStatistics) -> list[Tensor]:
    """Return loss and gradient of a batch from those of its parts; running statistics move on, part by part.

    Args:
        parts: in their order.
        count: of the parts.
        statistics: the running ones.
    """
    total: list[Tensor] | None = None
    for known, measured in parts:
        # Not in place: two parameters may have got the same tensor.
        total = known if total is None else list(torch._foreach_add(total, known))
        statistics.update(measured)
    statistics.count(count)
    assert total is not None
    return total


def _flat(tensors: list[Tensor]) -> Tensor:
    flat: Tensor = _flatten_dense_tensors(tensors) if tensors else torch.empty(0)
    return flat
