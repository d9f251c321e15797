"""Table, plots and page of a sweep, read from its directories alone, also while it still runs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cvdd.artifact import write_atomically
from cvdd.composition.portable import portable_override, portable_text, portable_values
from cvdd.composition.sweep import STATE, SweepConfig, chosen_points, is_of_command, read_sweep, without_cost
from cvdd.report.columns import RESULT, best_shown, labels_shown, measured_images
from cvdd.report.multiruns import numbered_points
from cvdd.report.sweep_plots import Cell, plot, standalone
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import OUTCOME
from cvdd.support.readable import readable_bytes, with_error

TEMPLATE = "sweep.html.j2"
METRICS = "metrics.json"
TOGETHER = "settings"
"""The axis of a multirun that varies more than a plot can show apart."""
LOOKS = 10
"""At a sweep whose points go on while its report is written; each that ends later writes one of its own."""

Status = Literal["done", "failed", "not finished", "missing"]

COLUMNS = (*RESULT, "top1_by_seed")

SHOWN = ("row", "student", "protocol", "n", "top-1", "best epoch", "top-5", "images", "labels")
"""Columns of the tables for people; the best epoch was chosen on the images that it is measured on."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep, as its directory shows it.

    Attributes:
        name: of its directory.
        at: its place on each axis; None: all of that axis.
        status: not finished means running or interrupted, which a directory cannot tell apart.
        error: why it failed; empty otherwise.
        results: of the row that the point is about, one for each student; empty unless it is done, and where its verb
            measures none.
        beside: likewise of the rows that it is compared with, which plots do not show.
        agreement: of the gradients of members that voted together, mean over pairs; None for a row beside the
            configuration itself, and where there is no pair.
        commit: of the code that made them.
        measured: the images that accuracies are of, ``test`` or ``validation``; None where it was not noted.
        asked: whether the command asks for it; a sweep shows all its points, whichever were chosen.
        settings: in which it differs from other points of a multirun without names.
    """

    name: str
    at: tuple[str | None, ...]
    status: Status
    error: str = ""
    results: tuple[Mapping[str, Any], ...] = ()
    beside: tuple[Mapping[str, Any], ...] = ()
    agreement: float | None = None
    commit: str | None = None
    measured: str | None = None
    asked: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """All results that were measured there, its own first."""
        return (*self.results, *self.beside)


@dataclass(frozen=True)
class Sweep:
    """A sweep as its directory shows it.

    Attributes:
        name: of the directory.
        title: for people.
        axes: what varies, one or two.
        plot: curve or heat_map.
        command: that makes it.
        points: in the order of the sweep.
    """

    name: str
    title: str
    axes: tuple[str, ...]
    plot: Literal["curve", "heat_map"]
    command: str
    points: tuple[Point, ...]

    def students(self) -> list[str]:
        """List the students of all points, in their order."""
        return list(dict.fromkeys(str(result["student"]) for point in self.points for result in point.results))


def read_directory(directory: Path) -> Sweep:
    """Read a sweep from its directory.

    Raises:
        ConfigError: it is no directory of a multirun, or the file that describes it is damaged.
    """
    file = directory / "multirun.yaml"
    try:
        config = OmegaConf.load(file)
        overrides = without_cost([str(item) for item in config.hydra.overrides.task])
        name, verb = directory.resolve().name, config.hydra.job.name
    except OSError as error:
        raise ConfigError(f"{directory}: this is no directory of a sweep; it has no {file.name}") from error
    except (YAMLError, OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read; the sweep's own command writes it anew") from error
    assert isinstance(config, DictConfig)
    sweep = read_sweep(config)
    if sweep is None:
        axes, points = _points_without_names(directory, config)
        shape: Literal["curve", "heat_map"] = "curve" if len(axes) == 1 else "heat_map"
        command = [f"python {verb}.py --multirun", *map(portable_override, overrides)]
        return Sweep(name, name, axes, shape, " ".join(command), points)
    # The points are the sweep's own: they need not be typed.
    typed = [portable_override(item) for item in overrides if not item.startswith("+point=")]
    chosen = set(chosen_points(overrides) or sweep.points)
    found = [
        replace(_read_point(directory, point, sweep, verb, overrides), asked=point in chosen) for point in sweep.points
    ]
    line = " ".join([f"python {verb}.py", *typed])
    return Sweep(name, sweep.title, tuple(sweep.axes), sweep.plot, line, _without_directories(found))


def _without_directories(points: Sequence[Point]) -> tuple[Point, ...]:
    """Write the places of points as others may see them."""
    shown = [
        portable_values(place for place in axis if place is not None)
        for axis in zip(*(point.at for point in points), strict=True)
    ]
    return tuple(
        replace(point, at=tuple(place and names[place] for place, names in zip(point.at, shown, strict=True)))
        for point in points
    )


def _read_point(directory: Path, name: str, sweep: SweepConfig, verb: str, overrides: Sequence[str]) -> Point:
    point = sweep.points[name]
    at = tuple(None if place is None else _written(place) for place in point.at)
    folder = directory / name
    state = _load(folder / STATE)
    # What another command, or the same sweep with another definition of this point, has left there is not of this one.
    if state is None or state["node"] != sweep.node(name) or not is_of_command(state, verb, overrides):
        return Point(name, at, "missing")
    if state["status"] == "failed":
        return Point(name, at, "failed", portable_text(str(state["error"])))
    if state["status"] == "running":
        return Point(name, at, "not finished")
    found = _measured(folder, at, name if point.row else None)
    # What a row stands beside is the sweep's configuration, which has points of its own.
    return replace(found, beside=(), agreement=None) if point.row else found


def _points_without_names(directory: Path, config: DictConfig) -> tuple[tuple[str, ...], tuple[Point, ...]]:
    """Read the numbered directories of a multirun that was typed; what its points differ in are the axes."""
    numbered = numbered_points(directory, config)
    typed = [dict(map(_key_and_value, point.overrides)) for point in numbered]
    keys = list(dict.fromkeys(key for one in typed for key in one))
    differing = [key for key in keys if len({one.get(key) for one in typed}) > 1]
    shown = {key: portable_values(one[key] for one in typed if key in one) for key in differing}
    axes = tuple(differing) if 1 <= len(differing) <= 2 else (TOGETHER,)
    points = []
    for point, one in zip(numbered, typed, strict=True):
        name = point.folder.name
        settings = {key: shown[key][one[key]] for key in differing if key in one}
        label = " ".join(f"{key}={value}" for key, value in settings.items()) or name
        at = tuple(settings.get(axis, "-") for axis in axes) if axes != (TOGETHER,) else (label,)
        if point.begun:
            found = _numbered_point(point.folder, at, config.hydra.job.name, point.overrides)
        else:
            found = Point(name, at, "missing")
        points.append(replace(found, settings=settings))
    return axes, tuple(points)


def _numbered_point(folder: Path, at: tuple[str | None, ...], verb: str, overrides: Sequence[str]) -> Point:
    outcome = _load(folder / OUTCOME)
    if outcome is None:
        # Earlier versions noted none, and then only results tell a point that is done.
        status = "running" if _load(folder / METRICS) is None else "done"
        outcome = {"status": status, "error": "", "overrides": overrides}
    if not is_of_command(outcome, verb, overrides):
        return Point(folder.name, at, "missing")
    if outcome["status"] == "failed":
        return Point(folder.name, at, "failed", portable_text(str(outcome["error"])))
    if outcome["status"] == "running":
        return Point(folder.name, at, "not finished")
    return _measured(folder, at)


def _measured(folder: Path, at: tuple[str | None, ...], row: str | None = None) -> Point:
    """Return a point as its command measured it; without a row that of the configuration itself."""
    if not (folder / METRICS).exists():
        # Of a verb that measures no students.
        return Point(folder.name, at, "done")
    try:
        return _as_measured(folder.name, at, _load(folder / METRICS) or {}, row)
    except (LookupError, TypeError):
        error = f"its {METRICS} is damaged; the same command writes it anew from the store"
        return Point(folder.name, at, "failed", error)


def _as_measured(name: str, at: tuple[str | None, ...], metrics: Mapping[str, Any], row: str | None) -> Point:
    row = row or metrics["results"][0]["row"]
    results = tuple(result for result in metrics["results"] if result["row"] == row)
    beside = tuple(result for result in metrics["results"] if result["row"] != row)
    measured = measured_images(metrics["dataset"]) if "dataset" in metrics else None
    return Point(name, at, "done", "", results, beside, _agreement(metrics), _commit(metrics["code"]), measured)


def _commit(code: Mapping[str, Any]) -> str | None:
    """Name the code as short as a page has it, with what was changed since its commit."""
    if code.get("commit") is None:
        return None
    changed = f" with changes {code['changed']}" if code.get("changed") else ""
    return f"{code['commit'][:12]}{changed}"


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value.strip("'\"")


def _agreement(metrics: Mapping[str, Any]) -> float | None:
    pairs = metrics.get("agreement", {})
    return statistics.fmean(pairs.values()) if pairs else None


def _load(path: Path) -> dict[str, Any] | None:
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        # Not there yet, or being written.
        return None
    return tree


def _written(place: str | float) -> str:
    return place if isinstance(place, str) else f"{place:g}"


def csv_table(sweep: Sweep) -> str:
    """Write a row for each point, row of its comparison and student, points without a result included."""
    table = io.StringIO()
    writer = csv.writer(table)
    typed = list(dict.fromkeys(key for point in sweep.points for key in point.settings))
    # One for each setting also where a plot has them on one axis.
    places = typed if sweep.axes == (TOGETHER,) and typed else sweep.axes
    others = ("point", "status", *COLUMNS, "agreement", "error")
    # A group may be called as a column of the results, such as protocol.
    columns = [f"{place} (typed)" if place in others else place for place in places]
    writer.writerow(("point", *columns, "status", *COLUMNS, "agreement", "error"))
    for point in sweep.points:
        known = {**dict(zip(sweep.axes, point.at, strict=True)), **point.settings}
        for result in point.rows or ({},):
            writer.writerow(
                (
                    *(point.name, *(known.get(place) for place in places), point.status),
                    *(result.get(column) for column in COLUMNS),
                    *(point.agreement if result in point.results else None, point.error.partition("\n")[0]),
                )
            )
    return table.getvalue()


def markdown_table(sweep: Sweep) -> str:
    """Write the same for people, accuracies with their standard errors."""
    header = ["point", *sweep.axes, *SHOWN, "status"]
    rows = [header, ["---"] * len(header)]
    for point in sweep.points:
        place = [at or "" for at in point.at]
        rows += [[point.name, *place, *shown(result), point.status] for result in point.rows]
        if not point.results:
            nothing = [""] * len(SHOWN)
            rows.append([point.name, *place, *nothing, ": ".join(filter(None, (point.status, point.error)))])
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([f"# {sweep.title}", "", progress(sweep), "", *lines, ""])


def shown(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Write a result for people, by the columns of :data:`SHOWN`."""
    return (
        result["row"],
        result["student"],
        result["protocol"],
        str(result["n"]),
        with_error(result["top1"], result["standard_error"]),
        best_shown(result),
        f"{result['top5']:.1f}",
        readable_bytes(result.get("image_bytes")),
        labels_shown(result),
    )


def progress(sweep: Sweep) -> str:
    """Say in a sentence how many points there are, and which are missing or failed."""
    parts = []
    for status in ("failed", "not finished", "missing"):
        names = [point.name for point in sweep.points if point.status == status]
        if names:
            parts.append(f"{len(names)} {status} ({', '.join(names)})")
    done = sum(point.status == "done" for point in sweep.points)
    return "; ".join([f"{done} of {len(sweep.points)} points are done", *parts]) + "."


def write_report(directory: Path) -> Path:
    """Write results.csv, table.md, a plot for each student and report.html into a sweep's directory.

    Jobs that end together write them together; whoever writes last has looked again afterwards, so that what stays is
    of the end.

    Returns:
        the path of the page.

    Raises:
        ConfigError: it is no directory of a multirun.
    """
    sweep = read_directory(directory)
    for _ in range(LOOKS):
        _write(directory, sweep)
        seen, sweep = sweep, read_directory(directory)
        if sweep == seen:
            break
    return directory / "report.html"


def _write(directory: Path, sweep: Sweep) -> None:
    write_atomically(directory / "results.csv", csv_table(sweep).encode())
    write_atomically(directory / "table.md", markdown_table(sweep).encode())
    plots = {}
    for index, student in enumerate(sweep.students()):
        plots[student] = plot(sweep.plot, sweep.axes, _cells(sweep, student), f"plot{index}", student)
        write_atomically(directory / f"plot-{student}.svg", standalone(plots[student]).encode())
    environment = Environment(
        loader=PackageLoader("cvdd", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["shown"] = shown
    page = environment.get_template(TEMPLATE).render(
        sweep=sweep,
        progress=progress(sweep),
        plots=plots,
        measured=sorted({point.measured for point in sweep.points if point.measured}),
        counts=sorted({result["n"] for point in sweep.points for result in point.results}),
        columns=SHOWN,
        commits=sorted({point.commit or "unknown" for point in sweep.points if point.status == "done"}),
    )
    write_atomically(directory / "report.html", page.encode())


def _cells(sweep: Sweep, student: str) -> list[Cell]:
    cells = []
    for point in sweep.points:
        result = next((one for one in point.results if one["student"] == student), None)
        if result is None:
            cells.append(Cell(point.at, None, None, (), point.status))
        else:
            values = tuple(result["top1_by_seed"])
            cells.append(Cell(point.at, result["top1"], result["standard_error"], values, ""))
    return cells
