"""What is kept of a sample's logits: all of them, or the largest, with the mean of the others or without them.

LPQLD (arXiv 2604.18135) keeps the largest alone, and gives other classes no probability. The mean is ours: at the
temperatures of soft labels small logits differ little in what they say, and it keeps their share.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cvdd.support.config_base import ConfigError

Rest = Literal["mean", "nothing"]
"""What stands for the logits that are left out."""


def check_top(top: int | None, classes: int, rest: Rest = "mean") -> None:
    """Refuse to keep as many logits as there are, or all but one that would be their mean.

    Raises:
        ConfigError: names numbers that work.
    """
    most = classes - (2 if rest == "mean" else 1)
    if top is not None and top > most:
        left, null = ("become their mean", "") if rest == "mean" else ("are left out", " label.rest=mean")
        raise ConfigError(
            f"label.top={top}: of {classes} logits at most {most} are kept where others {left}; set label.top to no "
            f"more, or label.top=null{null} for all"
        )


def shortened(logits: Tensor, top: int | None, rest: Rest = "mean") -> Tensor:
    """Put the mean of the others, or nothing, in the place of all but the largest logits of each sample.

    Args:
        logits: [n, classes], in the type in which they are stored.
        top: how many are kept as they are; None is all.
        rest: ``nothing`` is minus infinity, which is no probability.

    Returns:
        [n, classes] of the same type. What is kept is not smaller than that mean, which is rounded like it.
    """
    if top is None:
        return logits
    values, places = logits.topk(top, dim=1)
    if rest == "nothing":
        return torch.full_like(logits, -math.inf).scatter(1, places, values)
    others = logits.double().sum(dim=1) - values.double().sum(dim=1)
    mean = (others / (logits.shape[1] - top)).to(logits.dtype)
    return mean[:, None].expand_as(logits).scatter(1, places, values)


def row_type(dtype: str, classes: int, top: int | None, rest: Rest = "mean") -> np.dtype[Any]:
    """Return the type of a stored sample.

    Args:
        dtype: of a logit.
        classes: length of a logit vector.
        top: see :func:`shortened`.
        rest: likewise.
    """
    if top is None:
        return np.dtype((dtype, (classes,)))
    place = np.min_scalar_type(classes - 1)
    mean = [("rest", dtype)] if rest == "mean" else []
    return np.dtype([("places", place, (top,)), ("logits", dtype, (top,)), *mean])


def write_rows(logits: Tensor, top: int | None, rest: Rest = "mean") -> bytes:
    """Write logits [n, classes], shortened before, as rows of :func:`row_type`."""
    values = logits.numpy()
    if top is None:
        return values.tobytes()
    largest, places = logits.topk(top, dim=1)
    rows = np.empty(len(values), row_type(str(values.dtype), values.shape[1], top, rest))
    rows["places"], rows["logits"] = places.numpy(), largest.numpy()
    if rest == "mean":
        # All others are equal.
        rows["rest"] = values.min(axis=1)
    return rows.tobytes()


def read_rows(rows: np.ndarray, classes: int) -> Tensor:
    """Read rows of :func:`row_type`: [n, classes]."""
    if rows.dtype.names is None:
        return torch.from_numpy(np.array(rows))
    none = np.full(len(rows), -math.inf, rows["logits"].dtype)
    logits = np.repeat((rows["rest"] if "rest" in rows.dtype.names else none)[:, None], classes, axis=1)
    np.put_along_axis(logits, rows["places"].astype(np.int64), rows["logits"], axis=1)
    return torch.from_numpy(logits)
