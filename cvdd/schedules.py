"""Learning rates of students by epoch, and how an optimiser is told."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from torch import Tensor

from cvdd.schema import ProtocolConfig

WARMUP_START = 0.01
"""First factor of a warm-up (specification of LPLD, section B3)."""


def student_rate(protocol: ProtocolConfig, epoch: int) -> float:
    """Return the factor on ``protocol.lr`` in an epoch, counted from 0.

    After the warm-up, with ``e`` and ``E`` counted from its end (specification of EDC, section A2.5):

    - ``cosine``: ``(1 + cos(pi e / (E eta))) / 2``;
    - ``linear``: ``1 - e / (E eta)``, never below 0;
    - ``early_late``: the cosine until ``e = 5E/6``, then its value there times ``1 - e / E``;
    - ``multistep``: halved at 80, 90 and 95 percent.
    """
    if epoch < protocol.warmup:
        return WARMUP_START + (1 - WARMUP_START) * epoch / protocol.warmup
    done, total = epoch - protocol.warmup, protocol.epochs - protocol.warmup
    if protocol.schedule == "linear":
        return max(1 - done / (total * protocol.eta), 0.0)
    if protocol.schedule == "multistep":
        return 0.5 ** sum(20 * done >= twentieths * total for twentieths in (16, 18, 19))
    if protocol.schedule == "early_late" and 6 * done > 5 * total:
        return 0.5 * (1 + math.cos(5 * math.pi / (6 * protocol.eta))) * (1 - done / total)
    return 0.5 * (1 + math.cos(math.pi * done / (total * protocol.eta)))


def optimizer_of(module: pl.LightningModule) -> torch.optim.Optimizer:
    """Return the only optimiser of a module that is fitted, without Lightning's wrapper."""
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float, device: torch.device) -> None:
    """Set the learning rate of an optimiser: on a GPU in place, where a recorded step reads it."""
    for group in optimizer.param_groups:
        known = group["lr"]
        if isinstance(known, Tensor) and known.device == device and device.type == "cuda":
            known.fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate
