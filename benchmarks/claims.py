"""Many processes share the units of one artefact, and some of them die: ``python benchmarks/claims.py``.

The store and its claims are the real ones; only the work is not: a unit sleeps for a sampled time and writes a small
file. Processes are killed with SIGKILL at random moments and replaced. Counted from files that the claims do not know:
every unit is finished exactly once, and no more units are begun in vain than processes died.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cvdd.artifact import Artifact, Maker, Parts, Store
from cvdd.artifact.cleaning import sealed

UNIT_SECONDS = 10.0
"""Length of a real unit, of which the overhead is a share."""


@dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
        units: parts of the artefact.
        processes: that share them.
        seconds: mean length of a unit here; lengths are sampled between half of it and twice as much as the rest.
        deaths: processes that are killed and replaced.
        seed: of the lengths and of the deaths.
    """

    units: int
    processes: int
    seconds: float
    deaths: int
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        finished: units whose file is there.
        twice: units that were finished when they had been finished before.
        begun: units that were begun; those that a killed process was in the middle of count again.
        deaths: processes killed.
        seals: processes that sealed the artefact.
        wall: seconds from the first process to the last.
        per_unit: mean seconds a process spent in the store for a unit that it made, waiting for the CPU included.
        cpu_per_unit: mean seconds of CPU of the same, over all processes.
        sealing: seconds that sealing took, once.
    """

    finished: int
    twice: int
    begun: int
    deaths: int
    seals: int
    wall: float
    per_unit: float
    cpu_per_unit: float
    sealing: float


def _work(root: Path, simulation: Simulation, logs: Path, worker: int) -> None:
    """One process: take part in making the artefact, and write down what it does."""
    lengths = random.Random(f"{simulation.seed} {worker}")
    descriptor = os.open(logs / f"{worker}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    last = [0.0, 0.0]

    def note(what: str, *numbers: float) -> None:
        os.write(descriptor, (" ".join([what, *(f"{number:.6f}" for number in numbers)]) + "\n").encode())

    def path(work: Path, index: int) -> Path:
        return work / "units" / f"{index // 1000:03d}" / f"{index:06d}"

    def prepare(work: Path) -> None:
        for block in range(-(-simulation.units // 1000)):
            path(work, 1000 * block).parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        def make(index: int) -> None:
            # From the end of the last unit to here, this process was in the store.
            wall, cpu = time.perf_counter(), time.process_time()
            note("begin", wall - last[0] if last[0] else -1, cpu - last[1])
            time.sleep(simulation.seconds * lengths.uniform(0.5, 1.5))
            try:
                made = os.open(path(work, index), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(made, f"{index}\n".encode())
                os.close(made)
                note("finish")
            except FileExistsError:
                note("twice")
            last[:] = time.perf_counter(), time.process_time()

        yield Maker(make)

    def finish(work: Path) -> Mapping[str, Any]:
        note("seal")
        last[0] = time.perf_counter()
        return {"units": simulation.units}

    parts = Parts(
        [f"unit{index:06d}" for index in range(simulation.units)],
        lambda work, index: path(work, index).exists(),
        maker,
        prepare,
    )
    sealing = _make(root, parts, finish)
    note("end", time.perf_counter() - last[0] if sealing.metrics else 0.0)


def _make(root: Path, parts: Parts, finish: Any) -> Artifact:
    return Store(root).make_parts("units", "simulated", {"units": len(parts.names)}, [], parts, finish)


def simulate(simulation: Simulation, root: Path) -> Outcome:
    """Run a simulation.

    Args:
        simulation: what to simulate.
        root: an empty directory for the store and the logs.
    """
    chance = random.Random(simulation.seed)
    context = multiprocessing.get_context("fork")
    logs = root / "logs"
    logs.mkdir(parents=True)
    started = time.perf_counter()
    workers, killed = [], 0

    def start() -> Any:
        process = context.Process(target=_work, args=(root / "store", simulation, logs, len(workers)))
        process.start()
        workers.append(process)
        return process

    running = [start() for _ in range(simulation.processes)]
    # Deaths are spread over the time that the work takes at best.
    pause = simulation.units * simulation.seconds / simulation.processes / (simulation.deaths + 1)
    while any(process.is_alive() for process in running):
        if killed == simulation.deaths:
            running[-1].join()
            running.pop()
            if not running:
                break
            continue
        time.sleep(pause * chance.uniform(0.5, 1.5))
        victim = chance.randrange(len(running))
        if running[victim].is_alive():
            os.kill(running[victim].pid, signal.SIGKILL)
            running[victim].join()
            killed += 1
            running[victim] = start()
    for process in running:
        process.join()
    wall = time.perf_counter() - started
    lines = [line.split() for log in sorted(logs.iterdir()) for line in log.read_text().splitlines()]
    return _count(lines, root / "store", killed, wall)


def _count(lines: Sequence[Sequence[str]], store: Path, killed: int, wall: float) -> Outcome:
    words = [line[0] for line in lines]
    claims = [(float(line[1]), float(line[2])) for line in lines if line[0] == "begin" and float(line[1]) >= 0]
    manifests = sealed(store)
    assert len(manifests) == 1
    seal = words.index("seal")
    return Outcome(
        finished=len(manifests[0].manifest["files"]),
        twice=words.count("twice"),
        begun=words.count("begin"),
        deaths=killed,
        seals=words.count("seal"),
        wall=wall,
        per_unit=sum(seconds for seconds, _ in claims) / len(claims),
        cpu_per_unit=sum(seconds for _, seconds in claims) / len(claims),
        sealing=next(float(line[1]) for line in lines[seal:] if line[0] == "end"),
    )


FULL = (
    Simulation(units=500, processes=8, seconds=0.05, deaths=4),
    Simulation(units=5_000, processes=8, seconds=0.05, deaths=8),
    Simulation(units=5_000, processes=64, seconds=0.5, deaths=32),
    Simulation(units=50_000, processes=64, seconds=0.2, deaths=64),
)


def main() -> None:
    """Run the simulations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="*", help="only the simulations of so many units")
    wanted = parser.parse_args().units
    table = Table("units", "processes", "killed", "lost", "twice", "begun in vain", "seals", "wall s")
    for column in ("store ms/unit", "CPU ms/unit", "% of a 10 s unit", "sealing s"):
        table.add_column(column)
    for simulation in FULL:
        if wanted and simulation.units not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = simulate(simulation, Path(folder))
        print(simulation, outcome, sep="\n", flush=True)
        table.add_row(
            f"{simulation.units:,}",
            str(simulation.processes),
            str(outcome.deaths),
            str(simulation.units - outcome.finished),
            str(outcome.twice),
            str(outcome.begun - simulation.units),
            str(outcome.seals),
            f"{outcome.wall:.0f}",
            f"{1e3 * outcome.per_unit:.2f}",
            f"{1e3 * outcome.cpu_per_unit:.2f}",
            f"{100 * outcome.per_unit / UNIT_SECONDS:.3f}",
            f"{outcome.sealing:.1f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
