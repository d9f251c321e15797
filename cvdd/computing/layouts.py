"""How what belongs to a parameter lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_as(values: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient or a moment of a parameter, lying in memory as the parameter does.

    Args:
        values: of the parameter's shape.
        parameter: that says how.
    """
    # Optimisers take both side by side, and their last bits depend on how a gradient lies in memory.
    if _steps(values) == _steps(parameter):
        # Axes of one place may have any stride, and are slow to copy.
        return values.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(values)


def _steps(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
