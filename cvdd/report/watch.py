"""How far sweeps are and which job works on what, told from their directories and their store while they run."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cvdd.artifact.claims import Claims, claims_for
from cvdd.artifact.parts import FINISHED, TAKEN
from cvdd.artifact.parts import Table as States
from cvdd.artifact.places import PARTIAL
from cvdd.artifact.sessions import process_seconds, read_sessions
from cvdd.artifact.uses import used_by
from cvdd.composition.sweep import STATE
from cvdd.report.sweeps import METRICS, Point, read_directory
from cvdd.running.jobs import JOB, read_job
from cvdd.support.console import new_console
from cvdd.support.outcome import OUTCOME

UNFINISHED = ("missing", "not finished")


@dataclass(frozen=True)
class Work:
    """An artefact that is being made.

    Attributes:
        name: its kind and name.
        made: finished parts; None if it is made in one piece.
        parts: all of them; None likewise.
        at_once: parts that are being made now, each by one process.
        seconds: of one process for a part; None while no part is finished.
    """

    name: str
    made: int | None = None
    parts: int | None = None
    at_once: int = 0
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        """Parts in a second, by all processes together."""
        return max(self.at_once, 1) / self.seconds if self.seconds else None

    @property
    def left(self) -> float | None:
        """Seconds until all parts are finished."""
        if self.rate is None or self.made is None or self.parts is None:
            return None
        return (self.parts - self.made) / self.rate


@dataclass(frozen=True)
class Row:
    """A point of a sweep that somebody works on, or that was interrupted.

    Attributes:
        point: its name.
        job: who works on it, or did last; empty if that is not known.
        alive: whether that process runs.
        seconds: since it began; None if it is not known or does not run.
        work: what it makes; None if it makes nothing that the store knows of.
    """

    point: str
    job: str
    alive: bool
    seconds: float | None
    work: Work | None


@dataclass(frozen=True)
class View:
    """A sweep at one moment.

    Attributes:
        title: of the sweep.
        points: as their directories show them.
        mean: seconds of a point that is done; None if none is, or if nothing tells.
        rows: points that are neither done nor failed nor untouched; a point has a row for each of its jobs.
    """

    title: str
    points: tuple[Point, ...]
    mean: float | None
    rows: tuple[Row, ...]

    def count(self, status: str) -> int:
        """Number of points in a state; missing are only those that were asked for."""
        return sum(point.status == status and (point.asked or status != "missing") for point in self.points)

    @property
    def unasked(self) -> int:
        """Number of points that the command does not ask for and no other has made."""
        return sum(point.status == "missing" and not point.asked for point in self.points)

    @property
    def waiting(self) -> list[str]:
        """Points that the command asks for and that are neither over nor worked on."""
        begun = {row.point for row in self.rows if row.alive}
        unfinished = (point.name for point in self.points if point.asked and point.status in UNFINISHED)
        return [name for name in unfinished if name not in begun]

    @property
    def working(self) -> int:
        """Number of points that a running process works on."""
        return len({row.point for row in self.rows if row.alive})

    @property
    def left(self) -> float | None:
        """Seconds until all points are done if so many of them stay at work; None if that cannot be said."""
        if self.mean is None or not self.working:
            return None
        begun = {row.point: row.seconds or 0.0 for row in self.rows if row.alive}
        remaining = [max(self.mean - seconds, 0.0) for seconds in begun.values()]
        return max(max(remaining), (sum(remaining) + len(self.waiting) * self.mean) / self.working)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        return not self.working and not self.waiting


class Watch:
    """Looks at sweeps again and again.

    Leases can be told from those of the dead only by whoever watches them for a while, so one object does all looks.
    """

    def __init__(self) -> None:
        self._claims: dict[str, Claims] = {}

    def look(self, directory: Path) -> View:
        """Return how far a sweep is.

        Raises:
            ConfigError: it is no directory of a multirun.
        """
        sweep = read_directory(directory)
        seconds = [_seconds(directory / point.name) for point in sweep.points if point.status == "done"]
        known = [value for value in seconds if value is not None]
        rows = [row for point in sweep.points if point.status == "not finished" for row in self._rows(directory, point)]
        return View(sweep.title, sweep.points, math.fsum(known) / len(known) if known else None, tuple(rows))

    def _rows(self, directory: Path, point: Point) -> list[Row]:
        folder = directory / point.name
        # Jobs that share a point have directories below it.
        files = sorted(file for pattern in (JOB, f"workers/*/{JOB}") for file in folder.glob(pattern))
        rows = [self._row(point.name, file.parent) for file in files]
        alive = [row for row in rows if row.alive]
        # A helper that ended, where others work, has nothing left to say.
        return alive or rows[:1] or [Row(point.name, "", False, None, None)]

    def _row(self, point: str, folder: Path) -> Row:
        job = read_job(folder)
        if job is None:
            return Row(point, "", False, None, None)
        root = Path(job.store)
        if job.store not in self._claims:
            self._claims[job.store] = claims_for(root)
        used = used_by(root, self._claims[job.store], job.user)
        if used is None:
            return Row(point, job.name, False, None, None)
        began = None
        with contextlib.suppress(OSError):
            began = max(time.time() - (folder / JOB).stat().st_mtime, 0.0)
        making = [path for path in used if path.parent.name == PARTIAL and path.is_dir()]
        # A process makes one thing after another; an earlier one that is still there was given up with an error.
        return Row(point, job.name, True, began, _work(making[-1]) if making else None)


def _seconds(folder: Path) -> float | None:
    """Seconds that the jobs of a finished point took together."""
    try:
        return float(json.loads((folder / STATE).read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        pass
    # A multirun without named points notes when the first job began; its files tell when the last one ended. Earlier
    # versions noted no beginning, or left only results.
    for last in (OUTCOME, METRICS):
        with contextlib.suppress(OSError, ValueError):
            seconds = (folder / last).stat().st_mtime - _began(folder)
            # Asking for the cost of a point that is finished begins it anew, as its files have it.
            return seconds if seconds >= 0 else None
    return None


def _began(folder: Path) -> float:
    """Return when the first job of a point of a multirun began, in seconds of the clock."""
    try:
        return float(json.loads((folder / OUTCOME).read_text())["began"])
    except (OSError, KeyError):
        return (folder / ".hydra" / "overrides.yaml").stat().st_mtime


def _work(folder: Path) -> Work:
    name = f"{folder.parents[1].name}/{folder.name}"
    try:
        states = States(folder).read()
    except FileNotFoundError:
        return Work(name)
    made = states.count(FINISHED)
    spent = process_seconds(read_sessions(folder))
    return Work(name, made, len(states), states.count(TAKEN), spent / made if made and spent else None)


def watch_sweeps(arguments: Sequence[str]) -> None:
    """Print how far sweeps are, once or again and again until they are over.

    Args:
        arguments: of the command.

    Raises:
        ConfigError: one of the directories is no sweep's.
    """
    options = _parser().parse_args(arguments)
    watch, console = Watch(), new_console()
    # Whoever interrupts a view is done with it, not in trouble.
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            views = [watch.look(directory) for directory in options.sweeps]
            if options.every is not None and console.is_terminal:
                console.clear()
            for view in views:
                show(view, console)
            if options.every is None or all(view.over for view in views):
                return
            time.sleep(options.every)


def show(view: View, console: Console) -> None:
    """Print a view."""
    console.print(f"{view.title}: {_headline(view)}", markup=False, highlight=False, soft_wrap=True)
    if not view.rows:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("point", "job", "since", "works on"):
        table.add_column(column, overflow="fold")
    for column in ("parts", "rate", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in view.rows:
        since = _duration(row.seconds) if row.alive else "ended"
        table.add_row(escape(row.point), escape(row.job) or "?", since, *_cells(row))
    console.print(table)


def _headline(view: View) -> str:
    stopped = view.count("not finished") - view.working
    states = [
        f"{view.count('done')} of {len(view.points)} points done",
        f"{view.working} at work",
        *([f"{stopped} interrupted"] if stopped else []),
        *([f"{count} failed"] if (count := view.count("failed")) else []),
        *([f"{count} not begun"] if (count := view.count("missing")) else []),
        *([f"{view.unasked} not asked for"] if view.unasked else []),
    ]
    sentence = ", ".join(states)
    if view.mean is not None:
        sentence += f"; {_duration(view.mean)} a point"
        if view.mean and view.working:
            sentence += f", {_rate(view.working / view.mean)}"
    left = view.left
    if view.over:
        return sentence
    if left is not None:
        return f"{sentence}, about {_duration(left)} left"
    return f"{sentence}; " + (
        "nobody works; repeat the sweep's command" if not view.working else "too early to say when"
    )


def _cells(row: Row) -> tuple[str, str, str, str]:
    work = row.work
    if work is None:
        return ("reads, or waits for others" if row.alive else "the sweep's command goes on with it"), "", "", ""
    parts = "in one piece" if work.made is None else f"{work.made} of {work.parts}"
    rate = _rate(work.rate) if work.rate is not None else ""
    return escape(work.name), parts, rate, _duration(work.left) if work.left is not None else ""


def _rate(per_second: float) -> str:
    if per_second >= 1:
        return f"{per_second:.3g}/s"
    return f"{60 * per_second:.3g}/min" if 60 * per_second >= 1 else f"{3600 * per_second:.3g}/h"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 48 else f"{hours / 24:.1f} days"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cvdd.report watch", description="How far sweeps are.")
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="multirun/NAME", help="directories of sweeps")
    parser.add_argument("--every", type=_interval, metavar="SECONDS", help="look again so often, until all is over")
    return parser


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: seconds between two looks are more than 0")
    return seconds
