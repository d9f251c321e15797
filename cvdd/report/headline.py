"""What a comparison shows, in one sentence that does not claim more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import t as student_t

from cvdd.chain.compare import Result
from cvdd.chain.labels import Labels
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.support.readable import with_error

Verdict = Literal["ahead", "level", "behind", "unknown"]

CERTAINTY = 0.95
"""A difference that chance alone would exceed more often than this leaves is not called one."""

ANOTHER_RECIPE = "another label recipe"


@dataclass(frozen=True)
class Difference:
    """Top-1 accuracy of one row minus that of another, for one student.

    Attributes:
        value: difference of the means in percentage points.
        error: its standard error; None where one of the rows has a single seed.
        freedom: degrees of freedom of that error; infinite if it is known.
    """

    value: float
    error: float | None
    freedom: float = math.inf

    @property
    def verdict(self) -> Verdict:
        """Whether the first row is ahead, by Welch's test of two means; unknown without a spread."""
        if self.error is None:
            return "unknown"
        if self.value == 0 or abs(self.value) < self.error * student_t.ppf((1 + CERTAINTY) / 2, self.freedom):
            return "level"
        return "ahead" if self.value > 0 else "behind"


def difference(first: Result, second: Result) -> Difference:
    """Compare the means of two rows; the seeds are taken as independent."""
    one, two = first.summary(), second.summary()
    value, errors = one["top1"] - two["top1"], (one["standard_error"], two["standard_error"])
    if None in errors:
        return Difference(value, None)
    return Difference(value, math.hypot(*errors), _freedom(errors, (one["n"], two["n"])))


def _freedom(errors: tuple[float, float], counts: tuple[int, int]) -> float:
    """Degrees of freedom of the difference of two means with these standard errors (Welch and Satterthwaite)."""
    spread = sum(error**4 / (count - 1) for error, count in zip(errors, counts, strict=True))
    return math.hypot(*errors) ** 4 / spread if spread else math.inf


def find_baseline(results: Sequence[Result], main: Result) -> Result | None:
    """Return the row that a result is held against: random real images, whole ones first, or else any distilled set."""
    others = [
        result
        for result in results
        if result.student == main.student and result.row != main.row and result.images is not None
    ]
    real = [result for result in others if is_real(result)]
    # Those with the same labels before others, and whole images before those that are made of several.
    real.sort(key=lambda result: (_labels(result, main) == ANOTHER_RECIPE, parts_of(result)))
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
    ours, theirs = _counts(main, baseline)
    numbers = (
        f"{main.row}{ours} {accuracy(main)} against {accuracy(baseline)} for {_description(baseline, main, theirs)}; "
        f"{_seeds(main, baseline)}."
    )
    gap = with_error(abs(found.value), found.error)
    sentence = {
        "ahead": f"{main.row} is ahead by {gap}.",
        "behind": f"{main.row} is behind by {gap}.",
        "level": f"The difference of {gap} may be chance (Welch's test, 95 %): neither is shown to be better.",
        "unknown": f"One seed has no spread, so the difference of {gap} may be chance.",
    }[found.verdict]
    return f"{numbers} {sentence}{_left_out(main)}"


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


def _left_out(main: Result) -> str:
    """Say what a spread over seeds leaves out where all of them see the same images."""
    once = main.labels is not None and main.labels.context.config.protocol.images == "once"
    if not once or len(main.students) == 1:
        return ""
    return " All seeds saw the same images of a row: their choice is not in these errors (protocol.images=per_seed)."


def _method(result: Result) -> Mapping[str, Any]:
    identity: Mapping[str, Any] = {} if result.images is None else result.images.manifest["identity"]
    method: Mapping[str, Any] = identity.get("method", {})
    return method


def is_real(result: Result) -> bool:
    """Whether a row is random real images."""
    method = _method(result)
    return method.get("init") == "real" and method.get("iterations") == 0


def parts_of(result: Result) -> int:
    """How many real images there are on a side of each image of a row that is made of several."""
    return int(_method(result).get("factor", 1))


def _counts(main: Result, baseline: Result) -> tuple[str, str]:
    """Say how many images two rows have, where it is not the same number."""
    counts = [0 if result.images is None else int(result.images.metrics["images"]) for result in (main, baseline)]
    if counts[0] == counts[1]:
        return "", ""
    return f" ({counts[0]:,} images)", f" ({counts[1]:,} images)"


def _description(baseline: Result, main: Result, count: str) -> str:
    name = baseline.row
    if is_real(baseline):
        name = "random real images" + (", four in each" if parts_of(baseline) > 1 else "")
    elif _method(baseline).get("init") == "patches" and _method(baseline).get("iterations") == 0:
        name = "patches of real images, not optimised"
    suffix = f"{count} with {_labels(baseline, main)}"
    if baseline.protocol != main.protocol:
        suffix += f" under the protocol {baseline.protocol}"
    return name + suffix


def teachers_of_labels(labels: Labels) -> list[str]:
    """Return the digests of the networks that labelled."""
    return [one.digest for one in labels.parents if one.kind not in ("images", "labels")]


def recipe_of_labels(result: Result, labels: Labels) -> dict[str, Any]:
    """Return what determines a row's labels beside images and teachers.

    That images of several are shown one by one follows from the images.
    """
    recipe = dict(labels.identity.get("label", {}))
    if recipe.get("factor", 1) == parts_of(result):
        recipe.pop("factor", None)
    return {**labels.identity, "label": recipe}


def _labels(baseline: Result, main: Result) -> str:
    if baseline.labels is None or main.labels is None:
        return "other labels"
    theirs, ours = recipe_of_labels(baseline, baseline.labels), recipe_of_labels(main, main.labels)
    if {**theirs, "weights": None} != {**ours, "weights": None}:
        return ANOTHER_RECIPE
    if teachers_of_labels(baseline.labels) != teachers_of_labels(main.labels):
        return "the same label recipe but other teachers"
    return "the same labels" if theirs == ours else "the same label recipe but other weights of its teachers"
