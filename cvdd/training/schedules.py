"""Learning rates by step or epoch, and how an optimiser is told."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from cvdd.computing.layouts import laid_out_as
from cvdd.schema import ProtocolConfig
from cvdd.support.curves import cosine

WARMUP_START = 0.01
"""First factor of a warm-up (specification of LPLD, section B3)."""
HOW_IT_COMPUTES = ("capturable", "foreach", "fused")
"""What PyTorch keeps of an optimiser's kernels among the settings that a checkpoint holds."""


def student_rate(protocol: ProtocolConfig, epoch: int) -> float:
    """Return the factor on ``protocol.lr`` in an epoch, counted from 0.

    After the warm-up, with ``e`` and ``E`` counted from its end (specification of EDC, section A2.5):

    - ``cosine``: ``(1 + cos(pi e / (E eta))) / 2``;
    - ``linear``: ``1 - e / (E eta)``, never below 0;
    - ``early_late``: the cosine until ``e = 5E/6``, then its value there times ``1 - e / E``;
    - ``multistep``: halved at 80, 90 and 95 percent;
    - ``two_steps``: a fifth of it from epoch ``2E // 3`` on, and of that from ``5E // 6`` (CIM, arXiv 2607.00916).
    """
    if epoch < protocol.warmup:
        return WARMUP_START + (1 - WARMUP_START) * epoch / protocol.warmup
    done, total = epoch - protocol.warmup, protocol.epochs - protocol.warmup
    if protocol.schedule == "linear":
        return max(1 - done / (total * protocol.eta), 0.0)
    if protocol.schedule == "multistep":
        return 0.5 ** sum(20 * done >= twentieths * total for twentieths in (16, 18, 19))
    if protocol.schedule == "two_steps":
        return 0.2 ** sum(done >= milestone for milestone in (2 * total // 3, 5 * total // 6))
    if protocol.schedule == "early_late" and 6 * done > 5 * total:
        return cosine(5, 6 * protocol.eta) * (1 - done / total)
    assert protocol.schedule in ("cosine", "early_late")
    return cosine(done, total * protocol.eta)


def teacher_temperature(protocol: ProtocolConfig, epoch: int) -> float:
    """Return the temperature of the teachers' softmax in an epoch, counted from 0 (LPQLD, arXiv 2604.18135).

    As released, epochs are counted from 1 when they are divided into steps.
    """
    lowered = protocol.temperature * protocol.temperature_factor ** ((epoch + 1) // protocol.temperature_epochs)
    return max(lowered, protocol.temperature_least) if protocol.temperature_factor < 1 else protocol.temperature


def optimizer_of(module: pl.LightningModule) -> torch.optim.Optimizer:
    """Return the only optimiser of a module that is fitted, without Lightning's wrapper."""
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def compute_as_made(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let an optimiser compute as it was made to on this device, whatever a checkpoint says of another kind of device.

    Args:
        optimizer: whose state was loaded, if any. How it computes was loaded with it; what it was made with was not.
        device: of its parameters.
    """
    how = {name: optimizer.defaults[name] for name in HOW_IT_COMPUTES if name in optimizer.defaults}
    for group in optimizer.param_groups:
        group.update(how)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name == "step":
                state[name] = value.to(device)
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                # Fused steps go through memory in order: a moment that lies otherwise would be that of other weights.
                state[name] = laid_out_as(value, parameter)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, device: torch.device) -> None:
    """Set the learning rate of an optimiser: on a GPU in place, where a recorded step reads it."""
    for group in optimizer.param_groups:
        known = group["lr"]
        if isinstance(known, Tensor) and known.device == device and device.type == "cuda":
            known.fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate
