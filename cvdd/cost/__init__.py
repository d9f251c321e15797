"""What a command would cost, known before it runs: ``cost=true``.

The chain itself is walked with a store that makes nothing, so pieces, their identities, and what rows of a comparison
share are those of the run. Each piece is counted in steps of a few kinds, and each distinct step is timed.
"""

from __future__ import annotations

import time

import torch

from cvdd.chain.preflight import check_before_work
from cvdd.computing.automatic import records
from cvdd.cost.calibrate import SECONDS, Clock, Profiles, time_steps
from cvdd.cost.plan import plan_pieces, planning, planning_beside
from cvdd.cost.prediction import (
    StageCost,
    held_now,
    load_prediction,
    measured_seconds,
    needed_steps,
    predict,
    save_prediction,
)
from cvdd.cost.steps import Overhead, Step
from cvdd.cost.table import print_costs
from cvdd.cost.work import work_of
from cvdd.schema import RunConfig
from cvdd.support.hardware import machine_name

__all__ = [
    "StageCost",
    "load_prediction",
    "measured_seconds",
    "plan_pieces",
    "planning",
    "planning_beside",
    "predict_run",
    "show_cost",
]

QUIET = 0.7
"""Share of a core that a process gets at least where there is little other work."""


def predict_run(
    config: RunConfig, device: torch.device, seconds: float = SECONDS, clock: Clock = time.perf_counter
) -> tuple[list[StageCost], list[str]]:
    """Predict the cost of every stage of a command.

    Args:
        config: of the run.
        device: where it would run.
        seconds: for timing, roughly.
        clock: in whose seconds.

    Returns:
        the stages, and what should be known with them.

    Raises:
        ConfigError: the size of the data set is not known, or the configuration cannot run.
    """
    context = planning(config, device)
    # Nobody should learn the price of what cannot be had.
    check_before_work(context)
    works = [(piece, work_of(piece)) for piece in plan_pieces(context)]
    profiles, baseline = Profiles(), held_now(device)
    needed = needed_steps(works)
    begin, busy = time.perf_counter(), time.process_time()
    times = time_steps(needed, profiles, context, seconds, clock)
    notes = [*context.notes, *_notes(config, needed, records(config.engine.cuda_graphs, device))]
    share = (time.process_time() - busy) / (time.perf_counter() - begin)
    if needed and device.type == "cpu" and share < QUIET:
        notes.append(
            f"the machine was busy: this process got {share:.0%} of a core while steps were timed, and on a quiet one "
            "everything is faster by about that factor"
        )
    return predict(works, times, profiles, baseline), notes


def show_cost(config: RunConfig, device: torch.device) -> None:
    """Print what a command would cost, and keep the prediction for the page of its run."""
    stages, notes = predict_run(config, device)
    machine = machine_name(device)
    path = save_prediction(config, stages, machine, notes)
    print_costs(stages, f"predicted cost of {config.verb}.py on {machine}", [*notes, f"kept in {path}"])


def _notes(config: RunConfig, needed: list[Step], recorded: bool) -> list[str]:
    notes = []
    if recorded:
        notes.append(
            "steps are timed as they are launched; recorded as CUDA graphs (engine.cuda_graphs), as they will be, "
            "those of small networks take a fourth of that or less"
        )
    if config.trainer.devices > 1 or config.trainer.assistants:
        notes.append("time is that of one process; several share images and labels, and members and students in parts")
    if config.method.statistics.recorded or config.method.density:
        notes.append("method.statistics and method.density cost more than is counted here")
    if Overhead("compile") in needed:
        notes.append(
            "what is compiled is not timed: judgements are taken as a third of plain ones, labels and students as long "
            "as plain ones, and 30 s for each to be compiled"
        )
    if config.method.brings_students:
        notes.append(f"how method={config.method.name} makes images and students is unknown to the prediction")
    return notes
