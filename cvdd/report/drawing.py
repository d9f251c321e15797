"""From matplotlib to inline SVG whose text and colours follow the page, light or dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SERIES = 8
"""Number of colours that the style sheet defines; more lines take them again."""

# Colours that nobody would choose stand for those of the style sheet until the picture is text.
INK, MUTED, RULE, PAPER = "#010000", "#010100", "#010200", "#010300"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

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
