"""From matplotlib to inline SVG whose text and colours follow the page, light or dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SERIES = 8
"""Number of colours that the style sheet defines; more lines take them again, with other dashes."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One for each colour, for people who cannot tell the colours apart; the style sheet has the same shapes."""

DASHES: tuple[Any, ...] = ("solid", (0, (1.2, 1.4)), (0, (7, 2, 1.2, 2)), (0, (7, 2, 1.2, 2, 1.2, 2)))
"""Of the first lines of each colour, the second ones and so on; the style sheet has the same."""

REFERENCE = (0, (5, 3))
"""Dashes of a value that is no curve, which no curve has."""

BAR: dict[str, Any] = {"markersize": 11, "elinewidth": 1.6, "capsize": 2.5}
"""A mean and its standard error, as matplotlib's arguments."""

MARKED = 5
"""About as many points of a line bear its marker."""

CHARACTER = 0.55
"""Width of a character on average, as a share of the size of its font."""

# Colours that nobody would choose stand for those of the style sheet until the picture is text.
INK, MUTED, RULE, PAPER, ACCENT = "#010000", "#010100", "#010200", "#010300", "#010400"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    ACCENT: "var(--accent)",
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Names are the user's: a dollar sign in one is no formula.
    "text.parse_math": False,
    "font.size": 8.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}


def series_colour(index: int) -> str:
    """Colour of a line, as a stand-in that becomes the style sheet's ``--series-<index>``."""
    return f"#0200{index % SERIES:02x}"


def marker_style(index: int) -> dict[str, Any]:
    """Return colour and marker of a line's points, as matplotlib's arguments."""
    return {"color": series_colour(index), "marker": MARKERS[index % SERIES], "markeredgewidth": 0}


def line_style(index: int, points: int = 1) -> dict[str, Any]:
    """Return colour, marker and dashes of a line, as matplotlib's arguments.

    Args:
        index: of the line.
        points: that it has; only some bear the marker, other ones than those of its neighbours.
    """
    step = max(points // MARKED, 1)
    first = index % SERIES * step // SERIES
    dashes = DASHES[index // SERIES % len(DASHES)]
    return {**marker_style(index), "linestyle": dashes, "markersize": 5, "markevery": (first, step)}


def draw_reference(axes: Axes, value: float, index: int) -> None:
    """Draw a value that holds for all of an axis as a level line, with its marker at both ends."""
    style = marker_style(index) | {"linestyle": REFERENCE, "linewidth": 1.2}
    axes.axhline(value, **style, markersize=5, clip_on=False)


def draw_seeds(axes: Axes, place: float, values: Sequence[float], mean: float, error: float | None, index: int) -> None:
    """Draw a row of a dot plot.

    Args:
        axes: of the plot.
        place: of the row.
        values: by seed, a dot each.
        mean: of them, a bar.
        error: its standard error, whiskers; None for a single seed.
        index: of the row, which its colour and marker follow.
    """
    axes.plot(values, [place] * len(values), linestyle="", **marker_style(index), markersize=4, alpha=0.45)
    axes.errorbar(mean, place, xerr=error, fmt="|", color=series_colour(index), markeredgewidth=1.8, **BAR)


def label_rows(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Write the names of the rows of a dot plot, the first one at the top."""
    axes.set_yticks(places, names, color=INK)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylim(places[-1] + 0.6, places[0] - 0.6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.04)


def shortened(text: str, limit: int) -> str:
    """Leave out the middle of a long text, because names that differ do so at either end."""
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}\u2026{text[-end:]}"


def shortened_names(names: Sequence[str], limit: int) -> list[str]:
    """Shorten names to a limit, or to as much more as tells them apart.

    Args:
        names: as they stand beside each other.
        limit: number of characters.
    """
    short = [shortened(name, limit) for name in names]
    while len(set(short)) < len(set(names)):
        limit += 1
        short = [shortened(name, limit) for name in names]
    return short


def fits(labels: Sequence[str], room: float, size: float) -> bool:
    """Whether labels can stand side by side.

    Args:
        labels: of ticks that are evenly spaced; they may have several lines.
        room: for all of them, in points.
        size: of the font, in points.
    """
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    # Two more characters keep neighbours apart.
    return (longest + 2) * CHARACTER * size * len(labels) <= room


@contextlib.contextmanager
def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure in the page's style and its axes, row by row.

    Args:
        width: of the figure in inches.
        height: of the figure in inches.
        rows: of axes.
        columns: of axes.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for one in axes:
            one.set_facecolor("none")
        yield figure, axes


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """Write a figure as an ``svg`` element.

    Args:
        figure: made by :func:`canvas`, inside its context.
        name: unique on the page; keeps the identifiers of several pictures apart.
        description: what it shows, for people who cannot see it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', opening)
    assert box is not None
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"#0200([0-9a-f]{2})", lambda found: f"var(--series-{int(found[1], 16)})", rest)
    for stand_in, variable in _VARIABLES.items():
        rest = rest.replace(stand_in, variable)
    # The page's own font; matplotlib's measures are close enough for labels of a few words.
    rest = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", rest)
    label = Markup.escape(description)
    return Markup(f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{label}">{rest}')
