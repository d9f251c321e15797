"""The plots of pages: lines and labels that can be told apart, by everybody and however many there are."""

from __future__ import annotations

import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Compose
from report_helpers import Maker, pair

from cvdd.artifact import Store
from cvdd.report import plots
from cvdd.report.drawing import DASHES, MARKERS, SERIES, fits, line_style, shortened, shortened_names
from cvdd.report.sweep_plots import Cell, plot

STYLE = (resources.files("cvdd.report") / "page.css").read_text()
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in STYLE.split("@media")[:2])

# What the colours of a screen look like to people who lack a kind of cone (Machado and others 2009, severity 1).
SIGHT = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def light(colour: str) -> np.ndarray:
    """Red, green and blue as amounts of light."""
    parts = np.array([int(colour[first : first + 2], 16) / 255 for first in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def seen(colour: str, sight: Any) -> np.ndarray:
    """The colour in CIELAB, where distances are about as large as they look."""
    xyz = TO_XYZ @ np.clip(np.array(sight) @ light(colour), 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(TO_XYZ[1] @ light(colour)) + 0.05 for colour in (one, other))
    return high / low


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart_by_everybody(colours: dict[str, str], sight: str) -> None:
    series = [colours[f"series-{index}"] for index in range(SERIES)]
    assert all(contrast(colour, colours["paper"]) > 2.95 for colour in series)
    for one, other in itertools.combinations(series, 2):
        assert np.linalg.norm(seen(one, SIGHT[sight]) - seen(other, SIGHT[sight])) > 15, (one, other)


def test_no_two_lines_look_the_same_and_the_style_sheet_has_all_signs() -> None:
    signs = [line_style(index, 300) for index in range(SERIES * len(DASHES))]
    assert len({(sign["color"], sign["linestyle"]) for sign in signs}) == len(signs)
    assert len(set(MARKERS)) == SERIES
    assert {f".marker-{index}::after" for index in range(SERIES)} <= set(STYLE.split())
    assert {f".dashes-{index}" for index in range(1, len(DASHES))} <= set(STYLE.split())


def test_names_stay_different_however_short() -> None:
    assert shortened("a" * 60 + "b" * 37, 21) == "a" * 10 + "\u2026" + "b" * 10
    assert shortened("short", 5) == "short"
    names = [f"the_same_beginning_{index}_the_same_end" for index in range(12)]
    short = shortened_names(names, 12)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) < len(names[0])
    assert shortened_names(["same" * 9, "same" * 9], 12) == [shortened("same" * 9, 12)] * 2
    assert fits(["1\nmissing"] * 8, 560, 8)
    assert not fits(["committee.size=1"] * 8, 560, 8)


# --- a run's ----------------------------------------------------------------------------------------------------------


def test_a_long_name_leaves_room_for_the_dots(compose: Compose, tmp_path: Path) -> None:
    maker, name = Maker(compose("evaluate", "method=random_real"), Store(tmp_path / "store")), "a" * 60 + "b" * 37
    results = [maker.result(maker.distilled(row, "real", 0), [50.0]) for row in ("other", name)]
    assert f">{shortened(name, plots.LABEL)}<" in plots.dot_plot(results)
    page = maker.page([maker.distilled(name, "real", 0)], results)
    assert ("td", {"class": "name wrap"}) in page.tags
    # Wide plots scroll in a box of their own.
    assert len(re.findall(r'<div class="scroll"><svg class="plot"', page.source)) == page.source.count("<svg")


@pytest.mark.parametrize(
    ("epochs", "losses", "ticks", "logarithmic"),
    [
        ([1], [2.0], ["1"], False),
        ([1, 2, 4], [5.0, 4.0, 2.0], ["1", "2", "4"], False),
        ([1, 2, 3], [3.2, 2.0, 1.01], ["1", "2", "3"], True),
        ([1, 2, 300], [9.0, 1.0, 0.1], ["0", "60", "120", "180", "240", "300"], True),
    ],
)
def test_axes_have_ticks_where_there_are_values(
    epochs: list[int],
    losses: list[float],
    ticks: list[str],
    logarithmic: bool,
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maker = Maker(compose("evaluate", "method.iterations=100"), Store(tmp_path / "store"))
    rows = [{"epoch": epoch, "train_loss": loss} for epoch, loss in zip(epochs, losses, strict=True)]
    monkeypatch.setattr(plots, "load_curve", lambda student: rows)
    picture = str(plots.loss_curves(pair(maker, [1.0, 2.0], [3.0, 4.0])))
    bottom, left = re.split(r'id="loss-matplotlib.axis_2"', picture)
    assert re.findall(r">([\d.]+)</text>", bottom) == ticks
    assert len(re.findall(r">([\d.]+)</text>", left)) >= 2
    assert (">1.5</text>" in left or ">0.5</text>" in left) == logarithmic


# --- a sweep's --------------------------------------------------------------------------------------------------------


def cell(*at: str | None, mean: float | None = 50.0, word: str = "") -> Cell:
    return Cell(at, mean, None if mean is None else 1.0, (49.0,), word)


def test_settings_too_long_to_stand_side_by_side_are_rows() -> None:
    names = [f"committee.size={size} temperature={heat} protocol.lr=0.001" for size in range(1, 4) for heat in (1, 5)]
    cells = [*map(cell, names[:-1]), cell(names[-1], mean=None, word="failed")]
    picture = plot("curve", ["settings"], cells, "test", "net")
    heights = [float(height) for height in re.findall(r'y="([\d.]+)"[^>]*>committee', picture)]
    assert heights == sorted(heights)
    assert len(heights) == 6
    assert min(after - before for before, after in itertools.pairwise(heights)) > 8
    assert ">failed<" in picture


def test_many_lines_stay_at_their_tick_and_in_the_legend() -> None:
    lines = [f"_{index}" for index in range(16)]
    cells = [cell("1", line) for line in lines[2:]] + [cell("1", line, mean=None, word="failed") for line in lines[:2]]
    picture = plot("curve", ["x", "line"], cells, "test", "net")
    assert all(f">{line}<" in picture for line in lines)
    assert picture.count(">2 failed<") == 1
    left, width = map(float, re.findall(r'<clipPath.*?<rect x="([\d.]+)".*?width="([\d.]+)"', picture, re.DOTALL)[0])
    points = re.findall(r'<g clip-path[^>]*>\s*<use [^>]*? x="([\d.]+)"', picture)
    assert len(points) >= 14
    assert all(left < float(x) < left + width for x in points)


@pytest.mark.parametrize(("columns", "shown"), [(4, ">50.0 \u00b1 1.0<"), (16, ">\u00b1 1.0<")])
def test_numbers_fit_the_fields_of_a_heat_map(columns: int, shown: str) -> None:
    cells = [cell(str(index), "a") for index in range(columns)]
    assert plot("heat_map", ["x", "y"], cells, "test", "net").count(shown) == columns


@pytest.mark.parametrize(("axis", "lies"), [("N", False), ("IPC", False), ("committee.size", True)])
def test_a_short_name_beside_a_heat_map_stands_upright(axis: str, lies: bool) -> None:
    """N on its side is read as Z."""
    picture = plot("heat_map", ["x", axis], [cell("1", "a"), cell("2", "b")], "test", "net")
    assert f">{axis}<" in picture
    assert ("rotate(-90" in picture) == lies


def test_long_names_below_a_plot_lean() -> None:
    cells = [cell(f"a_name_of_some_length_{index}", "a") for index in range(8)]
    assert plot("curve", ["x", "y"], cells, "test", "net").count("rotate(-35") == 8
    assert "rotate(-35" not in plot("curve", ["x", "y"], cells[:2], "test", "net")
