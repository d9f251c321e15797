"""DD-Ranking's scores: what images are worth without their soft labels, and without augmentation (arXiv 2505.13300).

Accuracies of several rows of a comparison make one score. Rows are known by what they are, whatever their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cvdd.chain.compare import Result
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.report.headline import Difference, difference, is_real, parts_of, recipe_of_labels, teachers_of_labels

WEIGHT = 0.5
"""Of the first of two differences, as on DD-Ranking's board."""

_OF_NO_ACCOUNT = frozenset({"name", "seeds", "images", "full_data", "eval_every", "eval_batch"})
"""Fields of a protocol that change nothing of how a student is trained."""

_PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "crop_scale": [1.0, 1.0],
        "flip": False,
        "shuffle": 1,
        "randaugment": False,
        "dsa": False,
        "mix": "none",
        "mix_alpha": 1.0,
    }
)
"""Labels without augmentation."""


@dataclass(frozen=True)
class Ranking:
    """Scores of one row for one student; None where a row that a score needs is missing.

    Attributes:
        row: of the distilled set.
        student: name of the network.
        hlr: hard label recovery: accuracy of all real images on their classes minus that of these images on theirs, in
            points. Lower is better.
        ior: improvement over as many random real images with the same labels and protocol, in points.
        lrs: label-robust score of both, from 0 to 1.
        ars: augmentation-robust score: of the improvement over random real images with and without augmentation.
    """

    row: str
    student: str
    hlr: Difference | None
    ior: Difference
    lrs: Difference | None
    ars: Difference | None

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        scores = {"hlr": self.hlr, "ior": self.ior, "lrs": self.lrs, "ars": self.ars}
        shown = {key: one and {"value": one.value, "error": one.error} for key, one in scores.items()}
        return {"row": self.row, "student": self.student, **shown}


def rank(results: Sequence[Result]) -> list[Ranking]:
    """Score every row of a comparison for which the rows are there that a score needs (``compare=dd_ranking``).

    Args:
        results: all results of a run.
    """
    scored = (_rank(result, results) for result in results if result.labels is not None and not _hard(result))
    return [one for one in scored if one is not None and (one.lrs is not None or one.ars is not None)]


def score(first: Difference, second: Difference) -> Difference:
    """Bring a weighted sum of two differences in points between 0 and 1: ``(e^alpha - e^-1) / (e - e^-1)``.

    Returns:
        the score with its standard error, None where a difference has none.
    """
    alpha = (WEIGHT * first.value + (1 - WEIGHT) * second.value) / 100
    span = math.e - math.exp(-1)
    value = (math.exp(alpha) - math.exp(-1)) / span
    if first.error is None or second.error is None:
        return Difference(value, None)
    return Difference(
        value, math.exp(alpha) / span * math.hypot(WEIGHT * first.error, (1 - WEIGHT) * second.error) / 100
    )


def _rank(result: Result, results: Sequence[Result]) -> Ranking | None:
    evaluation = _evaluation(result)
    label = evaluation["label"]
    # What a recipe came to have later, it leaves out where it is at its default, which is plain.
    plain = {**evaluation, "label": label | {name: value for name, value in _PLAIN.items() if name in label}}
    if is_real(result) or evaluation == plain:
        # These are what others are held against.
        return None
    same = [other for other in results if other.student == result.student and other is not result]
    labelled = [other for other in same if other.labels is not None]
    # Of real images whole ones first, in both.
    real_ones = sorted(filter(is_real, labelled), key=parts_of)
    random = _first(real_ones, lambda other: _evaluation(other) == evaluation)
    if random is None:
        return None
    ior = difference(result, random)
    real = _first(same, lambda other: other.row == FULL_DATA_ROW)
    hard = _first(labelled, lambda other: _hard(other) and _images(other) == _images(result))
    hlr = None if real is None or hard is None else difference(real, hard)
    lrs = None if hlr is None else score(ior, Difference(-hlr.value, hlr.error))
    bare = _first(labelled, lambda other: _images(other) == _images(result) and _evaluation(other) == plain)
    bare_random = _first(real_ones, lambda other: _evaluation(other) == plain)
    ars = None if bare is None or bare_random is None else score(ior, difference(bare, bare_random))
    return Ranking(result.row, result.student, hlr, ior, lrs, ars)


def _first(results: Sequence[Result], wanted: Callable[[Result], bool]) -> Result | None:
    return next((result for result in results if wanted(result)), None)


def _hard(result: Result) -> bool:
    """Whether a row's students learn the images' own classes, and nothing that a method made with them."""
    assert result.labels is not None
    config = result.labels.context.config
    return config.label.hard and config.protocol.student == "protocol"


def _images(result: Result) -> str | None:
    return None if result.images is None else result.images.digest


def _evaluation(result: Result) -> dict[str, Any]:
    """What decides how a row's images are labelled and learnt from: two rows with the same differ in their images."""
    assert result.labels is not None
    assert result.images is not None
    labels, config = result.labels, result.labels.context.config
    said = recipe_of_labels(result, labels)
    label = {key: value for key, value in said.pop("label").items() if key not in ("dtype", "stack")}
    return {
        "label": label,
        "labels": {**said, "teachers": teachers_of_labels(labels)},
        "protocol": config.protocol.model_dump(mode="json", exclude=set(_OF_NO_ACCOUNT)),
        "dataset": config.dataset.model_dump(mode="json"),
        "images": result.images.metrics["images"],
    }
