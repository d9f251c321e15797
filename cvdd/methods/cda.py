"""CDA: the crops of the recover loop go from the whole image to small parts (specification of the family, 2.2)."""

from __future__ import annotations

from cvdd.support.curves import cosine


def lowest_area(iteration: int, iterations: int, schedule: str, milestone: float, area: float) -> float:
    """Lower end of the crops' range of areas in one iteration.

    Args:
        iteration: 0 to ``iterations - 1``.
        iterations: of the whole recover loop.
        schedule: ``constant`` (``area`` always), ``step`` (1 until the milestone), ``linear``, or ``cosine``.
        milestone: share of the iterations after which ``area`` is reached.
        area: the lowest of all, as a share of the image.

    Raises:
        ValueError: there is no such schedule.
    """
    arrived = milestone * iterations
    if schedule == "constant" or iteration >= arrived:
        return area
    if schedule == "step":
        return 1.0
    if schedule == "linear":
        return area + (1 - area) * (1 - iteration / arrived)
    if schedule == "cosine":
        return area + (1 - area) * cosine(iteration, arrived)
    raise ValueError(f"method.crop_schedule={schedule}: choose constant, step, linear or cosine")
