"""What is kept of a sample's logits: all of them, or the largest and the mean of the others.

The second is after LPQLD (arXiv 2604.18135), of which we know no more than that it keeps the largest. At the
temperatures of soft labels small logits differ little in what they say, and their mean keeps their share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvdd.config_base import ConfigError


def check_top(top: int | None, classes: int) -> None:
    """Refuse to keep as many logits as there are.

    Raises:
        ConfigError: names numbers that work.
    """
    if top is not None and top > classes - 2:
        raise ConfigError(
            f"label.top={top}: of {classes} logits at most {classes - 2} are kept where others become their mean; set "
            "label.top to no more, or label.top=null for all"
        )


def shortened(logits: Tensor, top: int | None) -> Tensor:
    """Put the mean of the others in the place of all but the largest logits of each sample.

    Args:
        logits: [n, classes], in the type in which they are stored.
        top: how many are kept as they are; None is all.

    Returns:
        [n, classes] of the same type. What is kept is not smaller than that mean, which is rounded like it.
    """
    if top is None:
        return logits
    values, places = logits.topk(top, dim=1)
    others = logits.double().sum(dim=1) - values.double().sum(dim=1)
    rest = (others / (logits.shape[1] - top)).to(logits.dtype)
    return rest[:, None].expand_as(logits).scatter(1, places, values)


def row_type(dtype: str, classes: int, top: int | None) -> np.dtype[Any]:
    """Return the type of a stored sample.

    Args:
        dtype: of a logit.
        classes: length of a logit vector.
        top: see :func:`shortened`.
    """
    if top is None:
        return np.dtype((dtype, (classes,)))
    place = np.min_scalar_type(classes - 1)
    return np.dtype([("places", place, (top,)), ("logits", dtype, (top,)), ("rest", dtype)])


def write_rows(logits: Tensor, top: int | None) -> bytes:
    """Write logits [n, classes], shortened before, as rows of :func:`row_type`."""
    values = logits.numpy()
    if top is None:
        return values.tobytes()
    largest, places = logits.topk(top, dim=1)
    rows = np.empty(len(values), row_type(str(values.dtype), values.shape[1], top))
    rows["places"], rows["logits"] = places.numpy(), largest.numpy()
    # All others are equal.
    rows["rest"] = values.min(axis=1)
    return rows.tobytes()


def read_rows(rows: np.ndarray, classes: int) -> Tensor:
    """Read rows of :func:`row_type`: [n, classes]."""
    if rows.dtype.names is None:
        return torch.from_numpy(np.array(rows))
    logits = np.repeat(rows["rest"][:, None], classes, axis=1)
    np.put_along_axis(logits, rows["places"].astype(np.int64), rows["logits"], axis=1)
    return torch.from_numpy(logits)
