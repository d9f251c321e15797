"""A student on a GPU, whose optimiser steps are recorded as CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.computing.copies import sharing_copy
from cvdd.computing.graphs import Recorded, draws_by_itself, side_by_side
from cvdd.computing.passes import Passes
from cvdd.labels.batches import EpochSampler, LabelledBatch, SoftLabelDataset, WholeEpochs
from cvdd.labels.replay import Replay
from cvdd.schema import ProtocolConfig
from cvdd.training.classifier import Part, RunningStatistics, added_up, differentiated
from cvdd.training.schedules import optimizer_of, set_rate
from cvdd.training.student import PartLoss, StudentModule

PIXELS_SIDE_BY_SIDE = 2**21
"""Of a batch whose parts are forwarded at the same time; more fill a GPU one by one, and need less memory."""


class RecordedStudent(StudentModule):
    """Trains as :class:`StudentModule` does, with an item for all batches of an epoch.

    A whole optimiser step is one launch: showing the images, forward and backward passes, the optimiser and the average
    of the parameters. Parts of a batch are forwarded side by side, each through a network of its own that shares the
    parameters; its statistics enter the running ones in the order of the parts.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False
        self._names: tuple[str, ...] = ()
        self._factor = 1
        self._replicas: list[tuple[nn.Module, RunningStatistics]] = []
        self._streams: list[torch.cuda.Stream] = []
        self._step: Any = self._optimise

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimiser of the protocol, whose rate lies where a recorded step reads it."""
        on_gpu, rate = self.device.type == "cuda", self.protocol.lr
        return self._optimizer(torch.tensor(rate, device=self.device) if on_gpu else rate, capturable=on_gpu)

    def _set_rate(self, rate: float) -> None:
        set_rate(optimizer_of(self), rate, self.device)

    def on_fit_start(self) -> None:
        """Make ready to record steps."""
        super().on_fit_start()
        if self.device.type == "cuda":
            self._step = Recorded(self._optimise, self.device, f"a step of {self._name}")
            if self.part * self.protocol.accumulation * self.images.shape[-1] ** 2 <= PIXELS_SIDE_BY_SIDE:
                self._streams = [torch.cuda.Stream(self.device) for _ in range(self.protocol.accumulation + 1)]

    def on_fit_end(self) -> None:
        """Let go of what was recorded: it refers to this module, so its memory would wait for the garbage collector."""
        self._step = self._optimise
        self._replicas.clear()

    def training_step(self, batch: list[LabelledBatch], batch_index: int) -> None:  # type: ignore[override]
        """Optimise the network by all batches of an epoch."""
        for one in batch:
            drawn = one.replay.drawn()
            self._names, self._factor = tuple(drawn), one.replay.factor
            # The next step overwrites the loss.
            self._note(self._step(*drawn.values(), one.logits).clone())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Nothing: the average moves in every step."""

    def _optimise(self, *tensors: Tensor) -> Tensor:
        drawn = dict(zip(self._names, tensors, strict=False))
        batch = LabelledBatch(Replay(**drawn, factor=self._factor), tensors[-1])
        losses, parameters = self._losses_by_part(batch), self.trained_parameters()
        whole = self._is_whole(losses)
        loss, *gradient = differentiated(losses[0](), parameters) if whole else self._by_replicas(losses, parameters)
        for parameter, slope in zip(parameters, gradient, strict=True):
            parameter.grad = slope
        optimizer_of(self).step()
        self._move_average()
        return loss

    def _by_replicas(self, losses: list[PartLoss], parameters: list[nn.Parameter]) -> list[Tensor]:
        """Loss and gradient of a batch in parts; the running statistics move on."""
        while len(self._replicas) < len(losses):
            self._replicas.append(self._replica())
        calls = [
            partial(self._of_part, loss, *replica, parameters)
            for loss, replica in zip(losses, self._replicas, strict=False)
        ]
        return added_up(side_by_side(calls, self._streams), len(losses), RunningStatistics(self.network))

    def _replica(self) -> tuple[nn.Module, RunningStatistics]:
        """A network with the same parameters, whose running statistics are those of its last pass alone."""
        copied = sharing_copy(self.network, buffers=False)
        statistics = RunningStatistics(copied)
        for module in copied.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
                module.momentum = 1.0
        return copied, statistics

    def _of_part(
        self, loss: PartLoss, network: nn.Module, statistics: RunningStatistics, parameters: list[nn.Parameter]
    ) -> Part:
        return differentiated(loss(network=network), parameters), statistics.now()


def steps_can_be_recorded(protocol: ProtocolConfig, looks: bool, network: nn.Module, passes: Passes) -> bool:
    """Whether all steps of a student are the same for the device.

    Args:
        protocol: of the student.
        looks: whether its images are changed by what was drawn for them, as RandAugment does.
        network: of the student; dropout in parts of a batch needs a seed for each.
        passes: how it computes.
    """
    drawn = protocol.accumulation > 1 and draws_by_itself(network)
    return passes.record and not passes.compile and protocol.optimizer != "sgd" and not looks and not drawn


def make_student_module(
    protocol: ProtocolConfig,
    dataset: SoftLabelDataset,
    pixels: Tensor,
    classes: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    passes: Passes,
    network: nn.Module,
    *,
    looks: bool,
    shared: bool,
    **options: Any,
) -> tuple[StudentModule, DataLoader[Any]]:
    """Return the module that trains a student, and what it is given.

    Args:
        protocol: of the student.
        dataset: labelled batches.
        pixels: [n, 3, size, size] uint8, the distilled set.
        classes: [n].
        mean: of the normalisation.
        std: likewise.
        passes: how the network computes.
        network: to train.
        looks: see :func:`steps_can_be_recorded`.
        shared: whether ranks share the parts of a batch.
        options: see :class:`cvdd.training.classifier.Classifier`.
    """
    recorded = not shared and steps_can_be_recorded(protocol, looks, network, passes)
    kind = RecordedStudent if recorded else StudentModule
    module = kind(protocol, pixels, classes, dataset.labels.batch_size, mean, std, passes, network=network, **options)
    if recorded:
        return module, DataLoader(WholeEpochs(dataset), sampler=EpochSampler(1), batch_size=None)
    return module, DataLoader(dataset, sampler=EpochSampler(len(dataset.bounds)), batch_size=None)
