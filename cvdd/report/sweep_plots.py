"""The plots of a sweep: a heat map over two axes, or curves with error bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cvdd.readable import with_error
from cvdd.report.drawing import INK, MUTED, RULE, canvas, series_colour, to_svg

WIDTH = 9.6
PALEST, DARKEST = 0.08, 0.62
"""Opacity of the lowest and the highest accuracy of a heat map; text stays readable on both."""


@dataclass(frozen=True)
class Cell:
    """A point as it is drawn.

    Attributes:
        at: its place on each axis; None: all of that axis.
        mean: top-1 accuracy in percent; None where there is none.
        error: standard error of the mean; None for a single seed.
        values: by seed.
        word: what stands there instead of a number.
    """

    at: tuple[str | None, ...]
    mean: float | None
    error: float | None
    values: tuple[float, ...]
    word: str

    @property
    def text(self) -> str:
        """The accuracy with its standard error, or the word."""
        return self.word if self.mean is None else with_error(self.mean, self.error)


def places(cells: Sequence[Cell], axis: int) -> list[str]:
    """List the places on an axis: numbers in order, then the others as they come."""
    found = list(dict.fromkeys(place for cell in cells if (place := cell.at[axis]) is not None))
    numbers = [place for place in found if number(place) is not None]
    return [*sorted(numbers, key=float), *(place for place in found if number(place) is None)]


def number(place: str) -> float | None:
    """Return the number that a place is, if it is one."""
    try:
        return float(place)
    except ValueError:
        return None


def plot(
    kind: Literal["curve", "heat_map"], axes: Sequence[str], cells: Sequence[Cell], name: str, student: str
) -> Markup:
    """Draw the accuracies of one student.

    Args:
        kind: heat_map needs two axes; a curve has a line for each place on the second.
        axes: their names.
        cells: the points.
        name: of the picture, unique on its page.
        student: its name.
    """
    return (_heat_map if kind == "heat_map" else _curves)(axes, cells, name, student)


def _heat_map(names: Sequence[str], cells: Sequence[Cell], name: str, student: str) -> Markup:
    columns, rows = places(cells, 0) or [""], places(cells, 1) or [""]
    means = [cell.mean for cell in cells if cell.mean is not None]
    with canvas(WIDTH, 0.9 + 0.42 * len(rows)) as (figure, (axes,)):
        for cell in cells:
            first, last = _span(columns, cell.at[0])
            top, bottom = _span(rows, cell.at[1])
            opacity = 0.0
            if cell.mean is not None:
                share = (cell.mean - min(means)) / ((max(means) - min(means)) or 1.0)
                opacity = PALEST + share * (DARKEST - PALEST)
            corner, width, height = (first - 0.47, top - 0.45), last - first + 0.94, bottom - top + 0.9
            axes.add_patch(Rectangle(corner, width, height, facecolor=(series_colour(0), opacity), edgecolor=RULE))
            colour = MUTED if cell.mean is None else INK
            axes.text((first + last) / 2, (top + bottom) / 2, cell.text, ha="center", va="center", color=colour)
        axes.set_xlim(-0.55, len(columns) - 0.45)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(f"top-1 accuracy in percent, {student}")
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(figure, name, f"Top-1 accuracy of {student} by {names[0]} and {names[1]}")


def _span(labels: Sequence[str], place: str | None) -> tuple[int, int]:
    if place is None:
        return 0, len(labels) - 1
    index = labels.index(place)
    return index, index


def _curves(names: Sequence[str], cells: Sequence[Cell], name: str, student: str) -> Markup:
    ticks = places(cells, 0)
    lines = places(cells, 1) if len(names) > 1 else [""]
    with canvas(WIDTH, 3.2) as (figure, (axes,)):
        for index, line in enumerate(lines):
            own = [cell for cell in cells if len(names) == 1 or cell.at[1] in (line, None)]
            # Lines side by side, so that error bars do not hide each other.
            _curve(axes, ticks, own, series_colour(index), line, 0.08 * (index - (len(lines) - 1) / 2))
        axes.set_xlim(-0.5, max(len(ticks), 1) - 0.5)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(names[0])
        axes.set_title(f"top-1 accuracy in percent, {student}")
        axes.grid(False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if len(lines) > 1:
            axes.legend(title=names[1], frameon=False, fontsize=8, title_fontsize=8)
        return to_svg(figure, name, f"Top-1 accuracy of {student} by {' and '.join(names)}")


def _curve(axes: Axes, ticks: Sequence[str], cells: Sequence[Cell], colour: str, label: str, shift: float) -> None:
    drawn = sorted(
        ((ticks.index(place), cell) for cell in cells if (place := cell.at[0]) is not None), key=lambda one: one[0]
    )
    for index, cell in drawn:
        for value in cell.values:
            axes.plot(index + shift, value, "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
        if cell.mean is not None:
            axes.errorbar(
                index + shift,
                cell.mean,
                yerr=cell.error,
                fmt="_",
                color=colour,
                markersize=11,
                elinewidth=1.6,
                capsize=2.5,
            )
        else:
            axes.text(index + shift, 0.02, cell.word, color=colour, ha="center", transform=axes.get_xaxis_transform())
    # Names have no order that a line could follow.
    measured = [(index + shift, cell.mean) for index, cell in drawn if cell.mean is not None and _numeric(cell)]
    axes.plot([x for x, _ in measured], [y for _, y in measured], color=colour, linewidth=1.2, label=label or None)
    for cell in cells:
        if cell.at[0] is None and cell.mean is not None:
            axes.axhline(cell.mean, color=colour, linestyle=(0, (5, 3)), linewidth=1.2)


def _numeric(cell: Cell) -> bool:
    return cell.at[0] is not None and number(cell.at[0]) is not None


def standalone(picture: Markup) -> str:
    """Return an inline picture as a file of its own, with the colours of the page's style sheet."""
    style = (resources.files("cvdd.report") / "page.css").read_text()
    colours = re.match(r".*?(?=^\* \{)", style, re.DOTALL | re.MULTILINE)
    assert colours is not None
    font = "svg { background: var(--paper); font-family: system-ui, sans-serif; }"
    opening = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = str(picture).replace("<svg", opening, 1)
    return text.replace(">", f"><style>{colours[0]}{font}</style>", 1)
