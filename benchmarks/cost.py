"""Predicted beside measured time of a small real run on ``digits_photo``: ``python benchmarks/cost.py [overrides]``.

The run has a store of its own that is removed afterwards. Besides the clock on the wall, which on a machine with other
work mostly tells of that, everything is predicted and measured in processor time of this process, with one thread; a
prediction counts as good within 30 % of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from cvdd.artifact import Artifact, Store
from cvdd.commands.runtime import Invocation, run
from cvdd.composition.arguments import prepare
from cvdd.composition.command import checked
from cvdd.composition.config_directory import config_directory
from cvdd.cost import measured_seconds, plan_pieces, planning, predict_run
from cvdd.running.process import prepare_process
from cvdd.schema import RunConfig
from cvdd.support.provenance import code_version
from cvdd.support.readable import readable_seconds

SMALL = (
    "recipe.epochs=4",
    "prior.iterations=25",
    "prior.epochs=20",
    "method.iterations=60",
    "protocol.epochs=60",
    "protocol.seeds=[0,1]",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
)
"""A few minutes on one core, with every stage in it."""

WITHIN = 0.30

CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


class Row(NamedTuple):
    """Seconds of a stage.

    Attributes:
        stage: which.
        own: predicted processor time.
        own_measured: processor time.
        wall: predicted.
        wall_measured: from start to end.
    """

    stage: str
    own: float
    own_measured: float
    wall: float
    wall_measured: float


def main() -> int:
    """Predict, run, and compare; return 1 if the prediction was not good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as of evaluate.py, after those of the small run")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    overrides = (*SMALL, *arguments.overrides)
    with tempfile.TemporaryDirectory(prefix="cvdd-cost-") as folder:
        config = configure(Path(folder), overrides)
        device = prepare_process(config)
        predicted = {name: predict_run(config, device, clock=clock)[0] for name, clock in CLOCKS.items()}
        load, begin = os.getloadavg()[0], time.perf_counter()
        with counting() as computed:
            run(config, Invocation(()))
        seconds = time.perf_counter() - begin
        pieces = plan_pieces(planning(config, device))
    rows = []
    for wall, own in zip(predicted["wall"], predicted["process"], strict=True):
        mine = sum(computed[piece.name] for piece in pieces if piece.stage == wall.stage)
        measured = measured_seconds(pieces, wall)
        rows.append(Row(wall.stage, own.seconds or 0.0, mine, wall.seconds or 0.0, measured))
    rows.append(Row("all", *(sum(getattr(row, name) for row in rows) for name in Row._fields[1:])))
    show(rows)
    Console().print(f"command {seconds:.0f} s; load {load:.1f} when it began, {os.getloadavg()[0]:.1f} at the end")
    if arguments.json:
        content = {
            "code": code_version(),
            "overrides": overrides,
            "rows": [row._asdict() for row in rows],
            "load": load,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(abs(rows[-1].own / max(rows[-1].own_measured, 1e-9) - 1) > WITHIN)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the processor time of every artefact, by its name in the plan."""
    counted: Counter[str] = Counter()
    plain = {name: getattr(Store, name) for name in ("make", "make_parts")}

    def timed(make: Callable[..., Artifact]) -> Callable[..., Artifact]:
        def wrapped(*arguments: Any) -> Artifact:
            begin = time.process_time()
            artifact = make(*arguments)
            counted[f"{artifact.kind}/{artifact.path.name}"] += time.process_time() - begin  # type: ignore[assignment]
            return artifact

        return wrapped

    for name, make in plain.items():
        setattr(Store, name, timed(make))
    try:
        yield counted
    finally:
        for name, make in plain.items():
            setattr(Store, name, make)


def configure(root: Path, overrides: tuple[str, ...]) -> RunConfig:
    """Compose and check a configuration whose files lie under a folder."""
    places = [f"paths.{name}={root / name}" for name in ("data", "store", "output")]
    conf = config_directory()
    with initialize_config_dir(str(conf), version_base="1.3"):
        typed = prepare(["~local", *places, *overrides] if (conf / "local").is_dir() else [*places, *overrides], conf)
        return checked(compose("evaluate", typed), typed, None)


def show(rows: Sequence[Row]) -> None:
    """Print one line for each stage."""
    table = Table(title="time of each stage: of this process alone, and by the clock on the wall")
    table.add_column("stage")
    for column in ("predicted", "measured", "ratio", "wall: predicted", "measured", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for predicted, measured in ((row.own, row.own_measured), (row.wall, row.wall_measured)):
            ratio = predicted / max(measured, 1e-9)
            cells += [readable_seconds(predicted), readable_seconds(measured), f"{ratio:.2f}"]
        table.add_row(row.stage, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
