"""The plots of a page."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence, Set

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cvdd.chain.compare import Result
from cvdd.chain.training import load_curve
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.report.drawing import (
    INK,
    MUTED,
    RULE,
    canvas,
    draw_reference,
    draw_seeds,
    label_rows,
    line_style,
    series_colour,
    shortened,
    shortened_names,
    to_svg,
)
from cvdd.report.headline import accuracy
from cvdd.report.terms import TITLES, MemberTerms, terms_of

WIDTH = 9.6
POINTS = 300
"""More points of a line than this cannot be seen."""
TERM_POINTS = 30
"""A log row is one iteration with its own crop, too noisy to compare members by."""
LABEL = 44
"""Characters of a name that leave most of a plot to what it shows."""
LINEAR = 3
"""Values within a factor of less have hardly two round numbers between them that a logarithmic axis could mark."""
TICKS = 6


def row_colours(results: Sequence[Result]) -> dict[str, int]:
    """Number the rows in their order; the number is a row's colour and marker in all plots."""
    return {row: index for index, row in enumerate(dict.fromkeys(result.row for result in results))}


def dot_plot(results: Sequence[Result]) -> Markup:
    """Draw every seed of every row as a dot, with the mean and its standard error, student by student."""
    colours = row_colours(results)
    students = list(dict.fromkeys(result.student for result in results))
    ordered = sorted(results, key=lambda result: (students.index(result.student), colours[result.row]))
    places: list[float] = []
    place, previous = 0.0, ""
    for result in ordered:
        place += 1.0 if result.student in (previous, "") or not previous else 1.5
        places.append(place)
        previous = result.student
    with canvas(WIDTH, 0.62 + 0.27 * place) as (figure, (axes,)):
        distant = _distant(results)
        for result, y in zip(ordered, places, strict=True):
            if distant and result.row == FULL_DATA_ROW:
                continue
            summary = result.summary()
            values, mean, error = summary["top1_by_seed"], summary["top1"], summary["standard_error"]
            draw_seeds(axes, y, values, mean, error, colours[result.row])
        several = len(students) > 1
        names = [f"{result.row}, {result.student}" if several else result.row for result in ordered]
        label_rows(axes, places, shortened_names(names, LABEL))
        for result, y in zip(ordered, places, strict=True):
            if distant and result.row == FULL_DATA_ROW:
                text = f"{accuracy(result)} \u2192"
                axes.text(1.0, y, text, color=INK, ha="right", va="center", transform=axes.get_yaxis_transform())
        axes.set_xlabel("top-1 accuracy of the last epoch in percent")
        return to_svg(figure, "dots", "Top-1 accuracy of every seed, with mean and standard error, by row")


def accuracy_curves(results: Sequence[Result]) -> Markup | None:
    """Draw the students' accuracy by epoch; real data, which has other epochs, is a line at its last value."""
    return _curves(results, "top1", "accuracy", "accuracy in percent")


def loss_curves(results: Sequence[Result]) -> Markup | None:
    """Draw the students' training loss by epoch; not that of real data, which is another loss."""
    return _curves([result for result in results if result.row != FULL_DATA_ROW], "train_loss", "loss", "training loss")


def term_curves(members: Mapping[str, MemberTerms]) -> Markup:
    """Draw the terms of the loss by iteration, a line for each member that has any, on one scale."""
    terms = terms_of(members)
    with canvas(WIDTH if len(terms) > 1 else WIDTH / 2, 2.9, columns=len(terms)) as (figure, axes):
        positive = [
            value for member in members.values() for values in member.curves.values() for value in values if value > 0
        ]
        iterations = {value for member in members.values() for value in _means(member.iterations)}
        for one, term in zip(axes, terms, strict=True):
            for index, member in enumerate(members.values()):
                if term in member.curves:
                    points = _means(member.curves[term])
                    one.plot(_means(member.iterations), points, **line_style(index, len(points)))
            one.set_title(TITLES[term])
            one.set_xlabel("iteration")
            if positive:
                one.set_ylim(min(positive) * 0.8, max(positive) * 1.25)
                _scale(one, min(positive), max(positive))
            _open_grid(one, iterations)
        return to_svg(figure, "terms", "Terms of the loss of each member by iteration")


def _curves(results: Sequence[Result], metric: str, name: str, title: str) -> Markup | None:
    students = list(dict.fromkeys(result.student for result in results))
    colours = row_colours(results)
    if not students:
        return None
    columns = min(len(students), 3)
    rows = -(-len(students) // columns)
    # A single picture leaves room for another one beside it.
    width = WIDTH / 2 if columns == 1 else WIDTH
    with canvas(width, 2.5 * rows, rows, columns) as (figure, axes):
        for one, student in zip(axes, students, strict=False):
            epochs: set[float] = set()
            for result in results:
                if result.student == student and result.row != FULL_DATA_ROW:
                    epochs |= _curve(one, result, metric, colours[result.row])
            for result in results:
                if result.student == student and result.row == FULL_DATA_ROW:
                    _real_data(one, result, colours[result.row])
            one.set_title(f"{title}, {shortened(student, LABEL)}")
            one.set_xlabel("epoch")
            if metric == "train_loss":
                _scale(one, *one.dataLim.intervaly)
            _open_grid(one, epochs)
        for unused in axes[len(students) :]:
            unused.set_axis_off()
        return to_svg(figure, name, f"{title} by epoch, mean over seeds and range of seeds, by row and student")


def _curve(axes: Axes, result: Result, metric: str, index: int) -> set[float]:
    """Draw a row's curve with the range of its seeds; return its epochs."""
    curves = [
        {int(row["epoch"]): row[metric] for row in load_curve(student) if metric in row} for student in result.students
    ]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    epochs = epochs[:: max(len(epochs) // POINTS, 1)]
    by_epoch = [[curve[epoch] for curve in curves] for epoch in epochs]
    if len(curves) > 1:
        low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, low, high, color=series_colour(index), alpha=0.16, linewidth=0)
    axes.plot(epochs, [statistics.fmean(values) for values in by_epoch], **line_style(index, len(epochs)))
    return set(epochs)


def _means(values: Sequence[float]) -> list[float]:
    """Average neighbours until few enough values are left that the lines of several members can be told apart."""
    size = max(len(values) // TERM_POINTS, 1)
    return [statistics.fmean(values[first : first + size]) for first in range(0, len(values), size)]


def _distant(results: Sequence[Result]) -> bool:
    """Whether showing all real data in the same picture would leave no room for the differences between the others."""
    others = [value for result in results if result.row != FULL_DATA_ROW for value in result.values()]
    real = [value for result in results if result.row == FULL_DATA_ROW for value in result.values()]
    return bool(others and real) and max(real) > max(others) + 2 * (max(others) - min(others))


def _real_data(axes: Axes, result: Result, index: int) -> None:
    low, high = axes.get_ylim()
    if result.summary()["top1"] > high + (high - low):
        axes.set_title(f"{accuracy(result)} \u2191", loc="right", fontsize=8)
        return
    draw_reference(axes, result.summary()["top1"], index)


def _scale(axes: Axes, low: float, high: float) -> None:
    """Make the vertical axis logarithmic, unless the values are too close to each other for it to have ticks.

    Args:
        axes: whose limits stand.
        low: the lowest value.
        high: the highest.
    """
    if not high >= LINEAR * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_yscale("log")
    between: tuple[float, ...] = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    if high < 10 * low:
        between = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    # Plain numbers: powers of ten would be formulas, which inline SVG with the page's font cannot show.
    axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _open_grid(axes: Axes, places: Set[float]) -> None:
    axes.grid(False, axis="x")
    _mark_places(axes, sorted(places))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, which="both")
    axes.spines["bottom"].set_color(RULE)
    axes.xaxis.label.set_color(MUTED)


def _mark_places(axes: Axes, places: Sequence[float]) -> None:
    """Put the horizontal axis' ticks at epochs or iterations; between few ones there is nothing to be marked."""
    gaps = [after - before for before, after in itertools.pairwise(places)]
    if 1 <= len(places) <= TICKS and min(gaps, default=1.0) * 2 * TICKS >= sum(gaps):
        axes.set_xticks(places, [f"{place:g}" for place in places])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
