"""A measured number beside the published one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvdd.schema import ExpectedConfig

if TYPE_CHECKING:
    # The list of recipes needs the words of this module, and no PyTorch.
    from cvdd.chain.compare import Result


def hold_against(
    expected: ExpectedConfig | None, results: Sequence[Result], changed: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Compare the first row with a published number.

    Args:
        expected: the published number; None where there is none.
        results: all results of a run, the configuration's own first.
        changed: fields in which the run is not the recipe of that number.

    Returns:
        As JSON: ``measured`` in percent with its ``standard_error`` (None with a single seed), ``n``, whether it is
        ``within`` the tolerance (None without a published value, or where something was changed), what was ``changed``,
        and the published number; None where there is none.
    """
    if expected is None:
        return None
    (own,) = [result for result in results if (result.row, result.student) == (results[0].row, expected.student)]
    metric = "best_top1" if expected.epoch == "best" else "top1"
    values = own.values(metric)
    measured = statistics.fmean(values)
    within = None
    if expected.value is not None and expected.tolerance is not None and not changed:
        within = abs(measured - expected.value) <= expected.tolerance
    return {
        "expected": expected.model_dump(mode="json"),
        "measured": measured,
        "standard_error": own.standard_error(metric),
        "n": len(values),
        "within": within,
        "changed": list(changed),
    }


def verdict_sentence(verdict: Mapping[str, Any]) -> str:
    """Say what was expected, what was measured, and whether they agree.

    Args:
        verdict: of :func:`hold_against`.
    """
    expected = verdict["expected"]
    where = f"{expected['source']}, {expected['table']}: {expected['cell']}"
    error = verdict["standard_error"]
    spread = "" if error is None else f" +- {error:.1f}"
    measured = f"measured {verdict['measured']:.1f}{spread} ({expected['epoch']} epoch), n = {verdict['n']}"
    changed = verdict.get("changed")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return (
            f"{measured}; not held against {published(expected)} ({where}), because this run has other "
            f"{', '.join(changed[:3])}{more}"
        )
    if verdict["within"] is None:
        return f"no published number to expect ({where}), {measured}: {expected['note']}"
    side = "within" if verdict["within"] else "outside"
    note = f"; {expected['note']}" if expected["note"] else ""
    return f"expected {published(expected)} ({where}{note}), {measured}: {side} the tolerance"


def published(expected: Mapping[str, Any]) -> str:
    """Write a published number with its tolerance."""
    if expected["value"] is None:
        return "unreadable"
    # No spread: papers give none.
    return f"{expected['value']:.1f} (tolerance {expected['tolerance']:.1f})"
