"""What a comparison shows, in one sentence that does not claim more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cvdd.chain.compare import Result
from cvdd.readable import with_error
from cvdd.surroundings import FULL_DATA_ROW

Verdict = Literal["ahead", "level", "behind", "unknown"]

STANDARD_ERRORS = 2.0
"""A smaller difference, in standard errors of the difference, is not called one."""


@dataclass(frozen=True)
class Difference:
    """Top-1 accuracy of one row minus that of another, for one student.

    Attributes:
        value: difference of the means in percentage points.
        error: its standard error; None where one of the rows has a single seed.
    """

    value: float
    error: float | None

    @property
    def verdict(self) -> Verdict:
        """Whether the first row is ahead; unknown without a spread."""
        if self.error is None:
            return "unknown"
        if self.value == 0 or abs(self.value) < STANDARD_ERRORS * self.error:
            return "level"
        return "ahead" if self.value > 0 else "behind"


def difference(first: Result, second: Result) -> Difference:
    """Compare the means of two rows; the seeds are taken as independent."""
    one, two = first.summary(), second.summary()
    errors = (one["standard_error"], two["standard_error"])
    error = None if None in errors else math.hypot(*errors)
    return Difference(one["top1"] - two["top1"], error)


def find_baseline(results: Sequence[Result], main: Result) -> Result | None:
    """Return the row that a result is held against: random real images, or else the first other distilled set."""
    others = [
        result
        for result in results
        if result.student == main.student and result.row != main.row and result.images is not None
    ]
    real = [result for result in others if is_real(result)]
    return next(iter([*real, *others]), None)


def headline(results: Sequence[Result]) -> str:
    """Say how the first row does against its baseline.

    Args:
        results: all results of a run, the configuration's own first.
    """
    main = results[0]
    baseline = find_baseline(results, main)
    if baseline is None:
        return f"{main.row} {accuracy(main)}; {_seeds(main)}. There is no other row to hold it against."
    found = difference(main, baseline)
    numbers = (
        f"{main.row} {accuracy(main)} against {accuracy(baseline)} for {_description(baseline, main)}; "
        f"{_seeds(main, baseline)}."
    )
    gap = with_error(abs(found.value), found.error)
    sentence = {
        "ahead": f"{main.row} is ahead by {gap}.",
        "behind": f"{main.row} is behind by {gap}.",
        "level": f"The difference of {gap} is less than two standard errors: neither is shown to be better.",
        "unknown": f"One seed has no spread, so the difference of {gap} may be chance.",
    }[found.verdict]
    few = " Standard errors of two seeds are rough themselves." if _fewest(main, baseline) == 2 else ""
    return f"{numbers} {sentence}{few}"


def other_students(results: Sequence[Result]) -> str | None:
    """Count for how many students the first row is ahead of its baseline; None with a single student."""
    own = [result for result in results if result.row == results[0].row]
    pairs = [(result, baseline) for result in own if (baseline := find_baseline(results, result)) is not None]
    if len(pairs) < 2:
        return None
    verdicts = [difference(result, baseline).verdict for result, baseline in pairs]
    words = {"ahead": "ahead for", "level": "level for", "behind": "behind for", "unknown": "without a spread for"}
    counts = [f"{words[verdict]} {verdicts.count(verdict)}" for verdict in words if verdict in verdicts]
    return f"Over {len(pairs)} students, {results[0].row} is {', '.join(counts)}."


def reference(results: Sequence[Result]) -> str | None:
    """Say what the first student reaches with all real data, if that was measured."""
    for result in results:
        if result.row == FULL_DATA_ROW and result.student == results[0].student:
            return f"Trained on all real data, {result.student} reaches {accuracy(result)}; {_seeds(result)}."
    return None


def accuracy(result: Result) -> str:
    """Write a row's mean top-1 accuracy with its standard error."""
    summary = result.summary()
    return with_error(summary["top1"], summary["standard_error"])


def _seeds(*results: Result) -> str:
    counts = dict.fromkeys(len(result.students) for result in results)
    return f"n = {' and '.join(str(count) for count in counts)}"


def _fewest(*results: Result) -> int:
    return min(len(result.students) for result in results)


def _method(result: Result) -> Mapping[str, Any]:
    identity: Mapping[str, Any] = {} if result.images is None else result.images.manifest["identity"]
    method: Mapping[str, Any] = identity.get("method", {})
    return method


def is_real(result: Result) -> bool:
    """Whether a row is random real images."""
    method = _method(result)
    return method.get("init") == "real" and method.get("iterations") == 0


def _description(baseline: Result, main: Result) -> str:
    name = baseline.row
    if is_real(baseline):
        name = "random real images"
    elif _method(baseline).get("init") == "patches" and _method(baseline).get("iterations") == 0:
        name = "patches of real images, not optimised"
    suffix = f" with {_labels(baseline, main)}"
    if baseline.protocol != main.protocol:
        suffix += f" under the protocol {baseline.protocol}"
    return name + suffix


def _labels(baseline: Result, main: Result) -> str:
    if baseline.labels is None or main.labels is None:
        return "other labels"
    theirs, ours = baseline.labels.identity, main.labels.identity
    if theirs == ours:
        return "the same labels"
    if {**theirs, "weights": None} == {**ours, "weights": None}:
        return "the same label recipe but other weights of its teachers"
    return "another label recipe"
