"""The plots of a sweep: a heat map over two axes, curves with error bars, or a row of dots for each of long names."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from cvdd.report.drawing import (
    ACCENT,
    BAR,
    CHARACTER,
    INK,
    MUTED,
    RULE,
    canvas,
    draw_reference,
    draw_seeds,
    fits,
    label_rows,
    line_style,
    marker_style,
    series_colour,
    shortened_names,
    to_svg,
)
from cvdd.support.readable import with_error

WIDTH = 9.6
ROOM = 0.9 * 72 * WIDTH
"""For what stands side by side in a plot, in points."""
KEY = 40.0
"""For the line before a name in a legend, in points."""
PALEST, DARKEST = 0.08, 0.62
"""Opacity of the lowest and the highest accuracy of a heat map; text stays readable on both."""
FONT, SMALLEST = 8.0, 5.0
"""Sizes of the text in a heat map, in points."""
LABEL = 28
"""Characters of a name on an axis or in a legend."""
LINE = 48
"""Characters of a line where settings are the names of rows; names that differ in their middle are not shortened."""
SHORT = 3
"""Letters of a name that stands upright beside the axis."""
LEANING = 35
"""Degrees by which labels lean that have no room side by side."""
APART, TOGETHER = 0.08, 0.7
"""Of the distance between ticks: from a line's points to those of the next, and from the first to the last at most."""


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
    if kind == "heat_map":
        return _heat_map(axes, cells, name, student)
    names = places(cells, 0)
    in_order = any(number(place) is not None for place in names)
    if len(axes) == 1 and not in_order and not fits(names, ROOM, FONT):
        return _rows(axes[0], cells, name, student)
    return _curves(axes, cells, name, student)


def _heat_map(names: Sequence[str], cells: Sequence[Cell], name: str, student: str) -> Markup:
    columns, rows = places(cells, 0) or [""], places(cells, 1) or [""]
    means = [cell.mean for cell in cells if cell.mean is not None]
    room = ROOM - _width_of(rows)
    labels, lower = _tick_labels(columns, room)
    with canvas(WIDTH, 0.9 + 0.42 * len(rows) + lower) as (figure, (axes,)):
        for cell in cells:
            first, last = _span(columns, cell.at[0])
            top, bottom = _span(rows, cell.at[1])
            opacity = 0.0
            if cell.mean is not None:
                share = (cell.mean - min(means)) / ((max(means) - min(means)) or 1.0)
                opacity = PALEST + share * (DARKEST - PALEST)
            corner, width, height = (first - 0.47, top - 0.45), last - first + 0.94, bottom - top + 0.9
            axes.add_patch(Rectangle(corner, width, height, facecolor=(ACCENT, opacity), edgecolor=RULE))
            text, size = _fitted(cell, room * (last - first + 1) / len(columns))
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "linespacing": 0.95}
            colour = MUTED if cell.mean is None else INK
            axes.text((first + last) / 2, (top + bottom) / 2, text, color=colour, **style)
        axes.set_xlim(-0.55, len(columns) - 0.45)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _label_ticks(axes, labels, lean=lower > 0)
        axes.set_yticks(range(len(rows)), shortened_names(rows, LABEL))
        axes.set_xlabel(names[0])
        # A letter that lies on its side may be taken for another: N for Z.
        upright: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"} if len(names[1]) <= SHORT else {}
        axes.set_ylabel(names[1], **upright)
        axes.set_title(f"top-1 accuracy in percent, {student}")
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(figure, name, f"Top-1 accuracy of {student} by {names[0]} and {names[1]}")


def _fitted(cell: Cell, width: float) -> tuple[str, float]:
    """Return what stands in a field, in two lines where it must, and the size of its font, which fits its width."""
    text = cell.text
    if not fits([text], width, FONT):
        text = text.replace(" ", "\n") if cell.mean is None else text.replace(" \u00b1", "\n\u00b1")
    longest = max(map(len, text.split("\n")))
    return text, min(max(width / (CHARACTER * (longest + 1)), SMALLEST), FONT)


def _width_of(names: Sequence[str]) -> float:
    """Return the points that names beside a plot take."""
    return max(map(len, shortened_names(names, LABEL))) * CHARACTER * FONT


def _tick_labels(names: Sequence[str], room: float, words: Sequence[str] = ()) -> tuple[list[str], float]:
    """Return what stands at the ticks of the horizontal axis, and the inches below a plot that it needs if it leans.

    Args:
        names: of the places.
        room: for all of them side by side, in points.
        words: that stand below each, in lines; nothing where there are none.
    """
    short = shortened_names(names, LABEL)
    labels = [f"{name}\n{word}".strip() for name, word in itertools.zip_longest(short, words, fillvalue="")]
    if fits(labels, room, FONT):
        return labels, 0.0
    # Lines of neighbours would cross each other.
    labels = [label.replace("\n", ", ") for label in labels]
    return labels, max(map(len, labels)) * CHARACTER * FONT * math.sin(math.radians(LEANING)) / 72


def _label_ticks(axes: Axes, labels: Sequence[str], *, lean: bool) -> None:
    leaning: dict[str, Any] = {"rotation": LEANING, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(labels)), labels, **(leaning if lean else {}))


def _span(labels: Sequence[str], place: str | None) -> tuple[int, int]:
    if place is None:
        return 0, len(labels) - 1
    index = labels.index(place)
    return index, index


def _rows(axis: str, cells: Sequence[Cell], name: str, student: str) -> Markup:
    """Draw a row of dots for each point, whose names are too long to stand side by side."""
    names = ["all" if cell.at[0] is None else cell.at[0] for cell in cells]
    labels = ["\n".join(textwrap.wrap(one, LINE, break_on_hyphens=False)) for one in names]
    lines = max(label.count("\n") + 1 for label in labels)
    with canvas(WIDTH, 0.8 + (0.13 + 0.14 * lines) * len(cells)) as (figure, (axes,)):
        for place, cell in enumerate(cells):
            if cell.mean is None:
                across = axes.get_yaxis_transform()
                axes.text(0.01, place, cell.word, color=MUTED, va="center", transform=across)
            else:
                draw_seeds(axes, place, cell.values, cell.mean, cell.error, 0)
        label_rows(axes, range(len(cells)), labels)
        axes.set_title(f"top-1 accuracy in percent, {student}")
        return to_svg(figure, name, f"Top-1 accuracy of {student} by {axis}")


def _curves(names: Sequence[str], cells: Sequence[Cell], name: str, student: str) -> Markup:
    ticks = places(cells, 0)
    lines = places(cells, 1) if len(names) > 1 else [""]
    own = [[cell for cell in cells if len(names) == 1 or cell.at[1] in (line, None)] for line in lines]
    apart = min(APART, TOGETHER / max(len(lines), 1))
    room = ROOM - (_width_of([names[1], *lines]) + KEY if len(lines) > 1 else 0.0)
    labels, lower = _tick_labels(ticks, room, [_words(place, cells) for place in ticks])
    with canvas(WIDTH, max(3.2, 0.7 + 0.16 * len(lines)) + lower) as (figure, (axes,)):
        for index, drawn in enumerate(own):
            # Lines side by side, so that error bars do not hide each other.
            _curve(axes, ticks, drawn, index, apart * (index - (len(lines) - 1) / 2))
        axes.set_xlim(-0.5, max(len(ticks), 1) - 0.5)
        _label_ticks(axes, labels, lean=lower > 0)
        axes.set_xlabel(names[0])
        axes.set_title(f"top-1 accuracy in percent, {student}")
        axes.grid(False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if len(lines) > 1:
            _legend(figure, names[1], lines)
        return to_svg(figure, name, f"Top-1 accuracy of {student} by {' and '.join(names)}")


def _words(place: str, cells: Sequence[Cell]) -> str:
    """Say what stands at a place instead of numbers, and how often where there are numbers or other words as well."""
    found = [cell for cell in cells if cell.at[0] == place]
    words = Counter(cell.word for cell in found if cell.mean is None)
    return "\n".join(word if count == len(found) else f"{count} {word}" for word, count in words.items())


def _legend(figure: Figure, title: str, lines: Sequence[str]) -> None:
    """Name the lines beside the plot, where they hide no point."""
    handles = [Line2D([], [], **line_style(index)) for index in range(len(lines))]
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "handlelength": 3.2}
    legend = figure.legend(handles, [""] * len(lines), loc="outside right upper", title=title, **style)
    # Afterwards, because matplotlib leaves out names that begin with an underscore.
    for text, line in zip(legend.get_texts(), shortened_names(lines, LABEL), strict=True):
        text.set_text(line)


def _curve(axes: Axes, ticks: Sequence[str], cells: Sequence[Cell], index: int, shift: float) -> None:
    drawn = sorted(
        ((ticks.index(place) + shift, cell) for cell in cells if (place := cell.at[0]) is not None),
        key=lambda one: one[0],
    )
    for x, cell in drawn:
        for value in cell.values:
            axes.plot(x, value, **marker_style(index), markersize=3.5, alpha=0.45)
        if cell.mean is not None:
            axes.errorbar(x, cell.mean, yerr=cell.error, fmt="_", color=series_colour(index), **BAR)
    # Names have no order that a line could follow.
    measured = [(x, cell.mean) for x, cell in drawn if cell.mean is not None and _numeric(cell)]
    style = line_style(index) | {"linewidth": 1.2, "marker": ""}
    axes.plot([x for x, _ in measured], [y for _, y in measured], **style)
    for cell in cells:
        if cell.at[0] is None and cell.mean is not None:
            draw_reference(axes, cell.mean, index)


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
