"""What a student minimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def soft_label_loss(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, of_student: float | Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions, mean over the batch, without a factor T^2.

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes]; minus infinity is no probability.
        temperature: of the teachers' softmax.
        of_student: of the student's; None is the same.
    """
    target = torch.softmax(teacher / temperature, dim=1)
    softened = student / (temperature if of_student is None else of_student)
    return nn.functional.kl_div(torch.log_softmax(softened, dim=1), target, reduction="batchmean")


def logit_loss(student: Tensor, teacher: Tensor, classes: Tensor, hard_label_weight: float) -> Tensor:
    """Mean squared difference of logits, plus some cross-entropy (specification of G-VBSM, section 2.5; EDC, A2.5).

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes].
        classes: [n] of the images before they were mixed.
        hard_label_weight: of the cross-entropy.
    """
    loss = nn.functional.mse_loss(student, teacher)
    if hard_label_weight:
        loss = loss + hard_label_weight * nn.functional.cross_entropy(student, classes)
    return loss


SMOOTHING = 0.1
"""Share of the other classes in the labels that :func:`refined_cosine_loss` adds."""


def refined_cosine_loss(
    student: Tensor, teacher: Tensor, classes: Tensor, partners: Tensor, share: Tensor, hard_label_weight: float
) -> Tensor:
    """One minus the cosine of the student's logits and refined ones, mean over the batch (GIFT, arXiv 2405.14736).

    Refined are the teachers' logits, at length 1, plus the weighted smoothed labels, at length 1 as well: weight 0.1
    where it is released, 1/9 where it is described, as 0.1 beside 0.9 (the length of a sum does not count). Both have
    unmixed images; the label of a mixed one is mixed here.

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes].
        classes: [n] of the images themselves.
        partners: [n] classes of the images that they are mixed with.
        share: [n] of the image itself.
        hard_label_weight: of the smoothed labels; with 0 it is a plain cosine.
    """
    refined = nn.functional.normalize(teacher, dim=1)
    if hard_label_weight:
        every = torch.arange(student.shape[1], device=classes.device)
        low, high = SMOOTHING / max(len(every) - 1, 1), 1 - SMOOTHING
        own, other = (every == which[:, None] for which in (classes, partners))
        mixed = share[:, None] * own + (1 - share)[:, None] * other
        refined = refined + hard_label_weight * nn.functional.normalize(low + (high - low) * mixed, dim=1)
    return 1 - nn.functional.cosine_similarity(student, refined, dim=1).mean()


def mixed_cross_entropy(
    student: Tensor, classes: Tensor, partners: Tensor, share: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of mixed images: that of each of the two classes, by its share of the image.

    Args:
        student: logits [n, classes].
        classes: [n] of the images themselves.
        partners: [n] classes of the images that they are mixed with.
        share: [n] of the image itself.
        smoothing: share of a label that all classes have alike.
    """
    own, other = (
        nn.functional.cross_entropy(student, which, reduction="none", label_smoothing=smoothing)
        for which in (classes, partners)
    )
    return (share * own + (1 - share) * other).mean()
