"""Muon for networks of images: steps of matrices are orthogonal, those of everything else are AdamW's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def matrices_and_others(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of layers that multiply, and all that is added, scales or marks places; nothing frozen.

    Kernels of convolutions are matrices. Tokens and positions of a transformer have two axes as well, and are no
    weights.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if parameter.ndim > 1 and "weight" in name}
    return [p for name, p in named if name in matrices], [p for name, p in named if name not in matrices]


def muon(
    network: nn.Module,
    rate: Any,
    momentum: float,
    betas: tuple[float, float],
    weight_decay: float,
    decay_of_others: float,
    **options: Any,
) -> torch.optim.Optimizer:
    """Return timm's Muon with Nesterov momentum, whose steps are as large as AdamW's, so that its rates hold.

    Args:
        network: whose parameters it moves.
        rate: the learning rate, a number or a tensor.
        momentum: of matrices.
        betas: of everything else.
        weight_decay: of matrices, decoupled.
        decay_of_others: of everything else.
        options: of timm's class.
    """
    from timm.optim.muon import Muon

    matrices, others = matrices_and_others(network)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "nesterov": True},
        {"params": others, "weight_decay": decay_of_others, "use_fallback": True},
    ]
    kept = [group for group in groups if group["params"]]
    return Muon(kept, rate, momentum=momentum, betas=betas, adjust_lr_fn="match_rms_adamw", **options)
