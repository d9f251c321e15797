"""G-VBSM: images of a class that differ, and teachers that count alike (its specification, sections 2.3 and 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE = 32
"""Side in pixels to which images are pooled before they are compared."""

TAU = 4.0
"""Temperature of the target distribution."""


def densification(images: Tensor, targets: Tensor, scale: str) -> Tensor:
    """Data densification: how far the spectrum of each class's Gram matrix is from a flatter one.

    ``sum over classes of KL(softmax(lambda / tau) || softmax(lambda))`` with the eigenvalues ``lambda`` of the Gram
    matrix of the class's images and the first distribution held fixed; 0 where a class has one image. Only eigenvalues
    enter, so the gradient is finite where some are equal. As released the eigenvalues are in the hundreds or
    thousands, both distributions nearly one-hot, and the term and its gradient nearly 0; the other scales mend that.

    Finding the images of each class and the eigenvalues waits for the device.

    Args:
        images: [units, n, 3, h, w], normalised; pooled to 32x32 by adaptive averages.
        targets: [units, n] class indices.
        scale: ``none`` (as released), ``dimension`` (the Gram matrix divided by the number of values of a pooled
            image), or ``cosine`` (images scaled to unit length).

    Returns:
        [units].

    Raises:
        ValueError: there is no such scale.
    """
    units, count = targets.shape
    features = nn.functional.adaptive_avg_pool2d(images.flatten(0, 1), SIDE).flatten(1)
    if scale == "dimension":
        features = features / features.shape[1] ** 0.5
    elif scale == "cosine":
        features = nn.functional.normalize(features, dim=1)
    elif scale != "none":
        raise ValueError(f"method.density_scale={scale}: choose none, dimension or cosine")
    unit = torch.arange(units, device=targets.device).repeat_interleave(count)
    _, group, sizes = torch.unique(
        torch.stack([unit, targets.flatten()]), dim=1, return_inverse=True, return_counts=True
    )
    order = group.argsort(stable=True)
    total = features.new_zeros(units)
    for size in sizes.unique().tolist():
        if size == 1:
            continue
        chosen = order[sizes[group[order]] == size].view(-1, size)
        together = features[chosen]
        total = total.index_add(0, unit[chosen[:, 0]], _flatness(together @ together.mT))
    return total


def _flatness(gram: Tensor) -> Tensor:
    eigenvalues = torch.linalg.eigvalsh(gram)
    flatter = torch.softmax(eigenvalues.detach() / TAU, dim=1)
    return nn.functional.kl_div(torch.log_softmax(eigenvalues, dim=1), flatter, reduction="none").sum(dim=1)


def balanced_mean(logits: Tensor, block: int | None) -> Tensor:
    """Average teachers after giving their logits the same size.

    Each teacher's logits are divided by their Frobenius norm over a block of samples and multiplied by the mean of all
    teachers' norms over that block.

    Args:
        logits: [members, n, classes].
        block: consecutive samples that share a norm, the last block may be shorter; None takes all together.

    Returns:
        [n, classes].
    """
    parts = [logits] if block is None else logits.split(block, dim=1)
    return torch.cat([_balanced(part) for part in parts])


def _balanced(logits: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(logits, dim=(1, 2), keepdim=True)
    # A teacher that says nothing at all has no size to correct.
    balanced: Tensor = logits * (norms.mean() / norms.clamp(min=torch.finfo(logits.dtype).tiny))
    return balanced.mean(dim=0)
