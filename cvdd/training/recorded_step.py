"""An optimiser's step that is recorded together with the loss and the gradient that it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cvdd.training.schedules import optimizer_of


def with_step(
    known: Callable[..., list[Tensor]], parameters: Sequence[nn.Parameter], module: pl.LightningModule
) -> Callable[..., list[Tensor]]:
    """Return the function that also takes the step: from the rate and the tensors of a batch to its loss alone.

    The rate is a tensor, so that a schedule can change it from one replay to the next.

    Args:
        known: from the tensors of a batch to its loss and its gradient.
        parameters: that are trained, in the order of the gradient.
        module: whose only optimiser takes the step, and can be recorded with a rate that is a tensor.
    """

    def function(rate: Tensor, *tensors: Tensor) -> list[Tensor]:
        loss, *gradient = known(*tensors)
        for parameter, slope in zip(parameters, gradient, strict=True):
            parameter.grad = slope
        with _at(rate, optimizer_of(module)):
            optimizer_of(module).step()
        return [loss]

    return function


def rate_of(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Return the learning rate that all groups have now, as a tensor; nothing waits for the device.

    Args:
        optimizer: whose schedule is one for all groups.
        device: where the tensor is to lie.
    """
    (rate,) = {float(group["lr"]) for group in optimizer.param_groups}
    return torch.full((), rate, device=device)


@contextlib.contextmanager
def _at(rate: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimiser read its rate from a tensor inside; a schedule finds its numbers again."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        yield
    finally:
        for group, number in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = number
