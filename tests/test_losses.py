"""What students minimise, against numbers worked out by hand; their learning rates by epoch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import protocol_config

from cvdd.training.losses import logit_loss, mixed_cross_entropy, refined_cosine_loss, soft_label_loss
from cvdd.training.schedules import student_rate


def test_loss_is_kl_without_the_squared_temperature() -> None:
    """Written out; and about the variance of the logits' difference over 2 T^2, far below the usual T^2-scaled loss."""
    source = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(6, 5, generator=source).double() * 2 for _ in range(2))
    expected = 0.0
    for own, other in zip(mine, theirs, strict=True):
        p, q = (torch.softmax(logits / 20, dim=0) for logits in (other, own))
        expected += float((p * (p.log() - q.log())).sum()) / 6
    loss = soft_label_loss(mine, theirs, 20).item()
    assert loss == pytest.approx(expected, rel=1e-9)
    gap = (mine - theirs).var(dim=1, correction=0).mean().item() / (2 * 20**2)
    assert loss == pytest.approx(gap, rel=0.1)
    assert soft_label_loss(mine, mine + 3, 20).item() == pytest.approx(0, abs=1e-12)


def test_squared_difference_of_logits_is_a_mean_over_classes() -> None:
    """(1 + 4 + 0 + 9) / 4 = 3.5; the hard labels add a tenth of the mean of log 2 and log(1 + e^-2)."""
    student, teacher = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [2.0, 3.0]])
    classes = torch.tensor([1, 0])
    assert logit_loss(student, teacher, classes, 0.0).item() == pytest.approx(3.5)
    surprise = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert logit_loss(student, teacher, classes, 0.1).item() == pytest.approx(3.5 + 0.1 * surprise)


def test_cross_entropy_of_a_mixed_image() -> None:
    """Logits (0, log 3) say 1/4 and 3/4."""
    student = torch.tensor([[0.0, math.log(3)]])
    loss = mixed_cross_entropy(student, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))


def test_cosine_with_refined_logits() -> None:
    """Of three classes: teacher (3, 4, 0) / 5 and label (0.9, 0.05, 0.05) / 0.9028, of which a tenth is added."""
    student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 4.0, 0.0]])
    own, other, share = torch.tensor([0]), torch.tensor([2]), torch.tensor([1.0])
    assert refined_cosine_loss(student, teacher, own, other, share, 0.0).item() == pytest.approx(1 - 0.6)
    length = math.sqrt(0.9**2 + 2 * 0.05**2)
    refined = [0.6 + 0.09 / length, 0.8 + 0.005 / length, 0.005 / length]
    expected = 1 - refined[0] / math.sqrt(sum(value**2 for value in refined))
    assert refined_cosine_loss(student, teacher, own, other, share, 0.1).item() == pytest.approx(expected, rel=1e-6)
    # Lengths of neither logits count.
    assert refined_cosine_loss(7 * student, 2 * teacher, own, other, share, 0.1).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_the_smoothed_label_of_a_mixed_image_is_mixed() -> None:
    """With so much weight that nothing else counts: three quarters of class 0, a quarter of class 2."""
    student, teacher, share = torch.eye(3), torch.ones(3, 3), torch.full((3,), 0.75)
    label = [0.05 + 0.85 * 0.75, 0.05, 0.05 + 0.85 * 0.25]
    length = math.sqrt(sum(value**2 for value in label))
    for index, value in enumerate(label):
        row = slice(index, index + 1)
        loss = refined_cosine_loss(student[row], teacher[row], torch.tensor([0]), torch.tensor([2]), share[row], 1e6)
        assert loss.item() == pytest.approx(1 - value / length, abs=1e-5)


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "cosine"}, {0: 1.0, 30: 0.5, 59: 0.000685}),
        ({"schedule": "cosine", "eta": 2}, {0: 1.0, 30: 0.853553, 59: 0.513088}),
        ({"schedule": "linear"}, {0: 1.0, 15: 0.75, 59: 1 / 60}),
        ({"schedule": "linear", "eta": 2}, {0: 1.0, 30: 0.75, 59: 61 / 120}),
        ({"schedule": "early_late", "eta": 2}, {0: 1.0, 50: 0.629410, 51: 0.629410 * 9 / 60, 59: 0.629410 / 60}),
        ({"schedule": "two_steps", "warmup": 30}, {30: 1.0, 49: 1.0, 50: 0.2, 54: 0.2, 55: 0.04}),
        ({"schedule": "two_steps"}, {0: 1.0, 39: 1.0, 40: 0.2, 49: 0.2, 50: 0.04, 59: 0.04}),
        ({"schedule": "multistep"}, {47: 1.0, 48: 0.5, 53: 0.5, 54: 0.25, 56: 0.25, 57: 0.125, 59: 0.125}),
        ({"schedule": "cosine", "warmup": 5}, {0: 0.01, 1: 0.208, 4: 0.802, 5: 1.0, 16: 0.904508}),
    ],
)
def test_rates_of_sixty_epochs(changes: dict[str, Any], rates: dict[int, float]) -> None:
    """From the formulas: cos(45 deg) = 0.707107, cos(75 deg) = 0.258819, cos(36 deg) = 0.809017."""
    protocol = protocol_config(epochs=60, **changes)
    for epoch, rate in rates.items():
        assert student_rate(protocol, epoch) == pytest.approx(rate, abs=1e-6), epoch


def test_early_and_late_parts_of_edc() -> None:
    """0.629 of the rate at 5E/6, a sixth of that right after."""
    protocol = protocol_config(epochs=6000, schedule="early_late", eta=2)
    assert student_rate(protocol, 5000) == pytest.approx(0.629, abs=5e-4)
    assert student_rate(protocol, 5001) == pytest.approx(0.105, abs=5e-4)


def test_a_linear_schedule_stops_at_zero() -> None:
    assert student_rate(protocol_config(epochs=10, schedule="linear", eta=0.5), 8) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse", "temperature_squared": True}, r"protocol\.temperature_squared=true .* protocol\.loss=mse"),
        ({"hard_label_weight": 0.1}, r"protocol\.hard_label_weight=0\.1 .* protocol\.loss=kl"),
        ({"schedule": "multistep", "eta": 2}, r"protocol\.eta=2.* protocol\.schedule=multistep"),
        ({"warmup": 2}, r"protocol\.warmup=2 must be less than protocol\.epochs=2"),
        ({"ema": 1.0}, "less than 1"),
        ({"seeds": [1, 1]}, "repeats"),
    ],
)
def test_protocols_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol_config(**changes)
