"""Temperatures of a student's loss that change from epoch to epoch (LPQLD, arXiv 2604.18135)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvdd.schema import ProtocolConfig
from cvdd.training.losses import soft_label_loss
from cvdd.training.schedules import teacher_temperature

CALIBRATED = torch.linspace(0.01, 1, 100)
"""Among which a student's temperature is chosen."""


def temperatures_of(protocol: ProtocolConfig) -> Temperatures | None:
    """Return the temperatures of a protocol; None where both are one number."""
    changing = protocol.temperature_factor < 1 or protocol.student_temperature == "calibrated"
    return Temperatures(protocol) if changing else None


class Temperatures(nn.Module):
    """Divergence from the teachers at the temperatures of the epoch.

    They lie in memory that a recorded step reads. What the next epoch's student has was found by the last batch, so it
    is a part of a checkpoint.

    Args:
        protocol: of the student.
    """

    teachers: Tensor
    student: Tensor
    following: Tensor
    _grid: Tensor

    def __init__(self, protocol: ProtocolConfig) -> None:
        super().__init__()
        self._protocol, self._calibrated = protocol, protocol.student_temperature == "calibrated"
        self.register_buffer("teachers", torch.tensor(protocol.temperature), persistent=False)
        self.register_buffer("student", torch.tensor(protocol.temperature), persistent=False)
        self.register_buffer("following", torch.tensor(1.0), persistent=self._calibrated)
        self.register_buffer("_grid", CALIBRATED.clone(), persistent=False)

    def begin(self, epoch: int) -> None:
        """Take the temperatures of an epoch, counted from 0."""
        self.teachers.fill_(teacher_temperature(self._protocol, epoch))
        self.student.copy_(self.following if self._calibrated else self.teachers)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See :func:`cvdd.training.losses.soft_label_loss`; a calibrated student's next temperature is noted."""
        if self._calibrated:
            with torch.no_grad():
                self.following.copy_(calibrated_temperature(student, teacher, self.teachers, self._grid))
        return soft_label_loss(student, teacher, self.teachers, self.student)


def calibrated_temperature(student: Tensor, teacher: Tensor, temperature: Tensor, grid: Tensor) -> Tensor:
    """Return the student's temperature at which its predictions differ least from the teachers'.

    Args:
        student: logits [n, classes].
        teacher: logits [n, classes].
        temperature: of the teachers' softmax.
        grid: [m] to choose from.

    Returns:
        a scalar; of equals the lowest.
    """
    target = torch.softmax(teacher / temperature, dim=1)
    # The teachers' own entropy is the same for all.
    agreeing = (target * student).sum() / grid
    softened = student / grid[:, None, None]
    differing = torch.logsumexp(softened, dim=2).sum(dim=1) - agreeing
    # An index would be read by the processor, which waits for the device.
    return grid.take(differing.argmin())
