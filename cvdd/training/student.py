"""The LightningModule that trains a student on a distilled set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.computing.passes import Passes
from cvdd.labels.batches import LabelledBatch
from cvdd.labels.replay import replay
from cvdd.schema import ProtocolConfig
from cvdd.support.batch_parts import part_size, parts_of
from cvdd.training.classifier import Classifier
from cvdd.training.losses import logit_loss, mixed_cross_entropy, refined_cosine_loss, soft_label_loss
from cvdd.training.muon import matrices_and_others, muon
from cvdd.training.schedules import optimizer_of, student_rate
from cvdd.training.temperatures import temperatures_of

PartLoss = Callable[..., Tensor]
"""The share of a part in a batch's loss, forwarded through the network, or through another that it is given."""


class StudentModule(Classifier):
    """Trains a student on a distilled set and its labels (specification of the SRe2L family, section 2.4).

    Args:
        protocol: loss, optimiser, schedule, accumulation, and whether an average of the parameters is measured.
        images: [n, 3, size, size] uint8, the distilled set.
        classes: [n] of the images.
        batch_size: images per full label batch; parts of it are forwarded separately.
        mean: of the normalisation.
        std: of the normalisation.
        passes: how the network computes. Only those of full parts are compiled; others are as many shapes, each of
            which takes a compiler a while.
        shared: arguments of :class:`Classifier`.
    """

    images: Tensor
    classes: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        protocol: ProtocolConfig,
        images: Tensor,
        classes: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        passes: Passes | None = None,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.protocol = protocol
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.register_buffer("images", images, persistent=False)
        self.register_buffer("classes", classes, persistent=False)
        self.part = part_size(batch_size, protocol.accumulation)
        self._passes = passes or Passes()
        self._compiled = self._passes.compiled(self.network)
        self.temperatures = temperatures_of(protocol)
        self.average = None if protocol.ema is None else copy.deepcopy(self.network).requires_grad_(False)

    def on_fit_start(self) -> None:
        """Bring the network into the form in which the device trains it fastest."""
        for network in (self.network, self.average):
            if network is not None:
                self._passes.prepare(network, self.device)

    def on_train_epoch_start(self) -> None:
        """Set rate and temperatures of the epoch: from its number, so that an interrupted student goes on as it was."""
        super().on_train_epoch_start()
        self._set_rate(self.protocol.lr * student_rate(self.protocol, self.current_epoch))
        if self.temperatures is not None:
            self.temperatures.begin(self.current_epoch)

    def _set_rate(self, rate: float) -> None:
        for group in optimizer_of(self).param_groups:
            group["lr"] = rate

    def training_step(self, batch: LabelledBatch, batch_index: int) -> Tensor:
        """Loss of the protocol, each part of the mixed batch forwarded by itself."""
        losses = self._losses_by_part(batch)
        return self._note(losses[0]() if self._is_whole(losses) else self.loss_in_parts(losses, batch_index))

    def _is_whole(self, losses: Sequence[PartLoss]) -> bool:
        return self.protocol.accumulation == 1 and len(losses) == 1

    def _losses_by_part(self, batch: LabelledBatch) -> list[PartLoss]:
        samples = self._passes.laid_out(replay(self.images, batch.replay, self.mean, self.std))
        return [partial(self._part_loss, samples, batch, part) for part in parts_of(len(samples), self.part)]

    def _part_loss(
        self, samples: Tensor, batch: LabelledBatch, part: slice, network: nn.Module | None = None
    ) -> Tensor:
        shown = samples[part]
        forward = network or (self.network if self._compiled is None or len(shown) != self.part else self._compiled)
        with self._passes.around(shown.device):
            logits = forward(shown)
        loss = self._loss_of_part(logits.float(), batch, part)
        if self.protocol.part_weights == "by_size":
            return loss * (len(shown) / len(samples))
        return loss / self.protocol.accumulation

    def _loss_of_part(self, student: Tensor, batch: LabelledBatch, part: slice) -> Tensor:
        protocol, plan = self.protocol, batch.replay
        classes = self.classes[plan.index]
        hard = protocol.loss == "cross_entropy" or not batch.logits.shape[1]
        if hard or protocol.loss == "gift":
            both = classes[part], classes[plan.partner][part]
            share = plan.own_share(self.images.shape[-1])[part]
        if hard:
            return mixed_cross_entropy(student, *both, share, protocol.label_smoothing)
        teacher = batch.logits[part].float()
        if protocol.loss == "gift":
            return refined_cosine_loss(student, teacher, *both, share, protocol.hard_label_weight)
        if protocol.loss == "mse":
            # The released programs take the class of the unmixed image also for mixed ones.
            return logit_loss(student, teacher, classes[part], protocol.hard_label_weight)
        temperature: float | Tensor
        if self.temperatures is None:
            loss, temperature = soft_label_loss(student, teacher, protocol.temperature), protocol.temperature
        else:
            loss, temperature = self.temperatures.loss(student, teacher), self.temperatures.teachers
        return loss * temperature**2 if protocol.temperature_squared else loss

    def on_train_batch_end(self, outputs: Any, batch: LabelledBatch, batch_index: int) -> None:
        """Move the average towards the parameters of this step."""
        self._move_average()

    @torch.no_grad()
    def _move_average(self) -> None:
        if self.average is not None:
            assert self.protocol.ema is not None
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.network.parameters()), 1 - self.protocol.ema
            )

    @torch.no_grad()
    def measured_network(self) -> nn.Module:
        """Return the network itself, or the average of its parameters with the buffers that it has now."""
        if self.average is None:
            return self.network
        # As released: BatchNorm statistics are those of the network that was trained, not averaged.
        for mine, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mine.copy_(buffer)
        return self.average

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimiser of the protocol, with decay on what it says; :meth:`on_train_epoch_start` sets its rate."""
        return self._optimizer(self.protocol.lr)

    def _optimizer(self, rate: float | Tensor, **options: Any) -> torch.optim.Optimizer:
        protocol = self.protocol
        if protocol.optimizer == "sgd":
            return torch.optim.SGD(self._parameter_groups(), lr=rate, momentum=protocol.momentum, **options)
        if protocol.optimizer == "muon":
            of_others = protocol.weight_decay if protocol.decay == "all" else 0.0
            return muon(
                self.network, rate, protocol.momentum, protocol.betas, protocol.weight_decay, of_others, **options
            )
        return torch.optim.AdamW(self._parameter_groups(), lr=rate, betas=protocol.betas, fused=True, **options)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        protocol = self.protocol
        if protocol.decay == "all":
            return [{"params": list(self.network.parameters()), "weight_decay": protocol.weight_decay}]
        matrices, others = matrices_and_others(self.network)
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": protocol.weight_decay}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        return groups
