"""The numbers that a benchmark divides by, and what it makes of them: worked out by hand."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import speed, timing
from benchmarks.cases import Case
from benchmarks.limits import Limits
from benchmarks.table import _means
from cvdd.support.allocator import give_back_memory

CPU = torch.device("cpu")
RECOVER = Case("recover", "digits", ("resnet18",), images=4, steps=2, units=3, reference_units=2)
STUDENT = Case("student", "digits", ("resnet18",), images=20, steps=6, reference_steps=2)
COMMITTEE = Case("committee", "digits", ("resnet18",), images=64, steps=1)


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the benchmark read a list of one number instead of the time."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_each_side_is_divided_by_the_work_that_it_did() -> None:
    assert RECOVER.amount("reference") == 4 * 2 * 2
    assert RECOVER.amount("engine") == 4 * 2 * 3
    assert replace(RECOVER, reference_steps=1).amount("reference") == 4 * 1 * 2
    assert STUDENT.amount("reference") == 20 * 2
    assert STUDENT.amount("engine") == 20 * 6


def test_the_time_of_a_unit_is_shown_in_the_quantity_of_its_row() -> None:
    assert RECOVER.shown(0.002) == pytest.approx(2)
    assert STUDENT.shown(0.002) == pytest.approx(500)
    assert COMMITTEE.shown(0.002) == pytest.approx(0.002 * 5188)


def test_a_share_of_the_limit_is_below_one() -> None:
    limits = Limits({"float32": 1e11, "bfloat16": 1e10}, {"float32": 1e10, "bfloat16": 1e10}, 1e10)
    row = {"flops_per_unit": 1e11, "elements_per_unit": 0.0, "engine": {"median_seconds_per_unit": 4.0}}
    found = speed.against_limits(row, limits)
    assert found["seconds_at_best"] == pytest.approx(1)
    assert found["fraction_of_limit"] == pytest.approx(0.25)


def test_the_mean_over_pairs_says_how_many_times_faster_the_engine_is() -> None:
    def pair(name: str, reference: float, engine: float) -> dict[str, Any]:
        sides = {"reference": {"shown": reference}, "engine": {"shown": engine}}
        return {"name": f"recover_cifar_10_{name}", "overrides": [], "quantity": "ms", **sides}

    (row,) = _means([pair("a_b", 5.0, 1.0), pair("c_d", 7.0, 2.0)])
    assert list(row[:5]) == ["mean of 2: recover_cifar_10", "ms", "6", "1.5", "4.00"]


def test_what_is_done_once_per_run_is_told_apart_from_steady_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)

    def program() -> float:
        now[0] += 5
        return 3.0

    _, engine = timing.alternate(program, program, repetitions=2)
    assert engine.seconds == [3, 3]
    assert engine.outside == [2, 2]
    assert engine.warm_up == [5]


def test_only_what_is_inside_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)

    def work() -> None:
        now[0] += 3

    program = timing.timed(work, CPU)
    now[0] += 10
    assert program() == 3
    stopwatch = timing.Stopwatch(CPU)
    for _ in range(2):
        now[0] += 10
        with stopwatch.running():
            work()
    assert stopwatch.seconds == 6


def sum_of_ones() -> timing.Program:
    """A program that holds 256 MiB; threads of the process before it are not there."""
    torch.set_num_threads(1)
    return lambda: float(torch.ones(2**26).sum())


def test_peak_memory_is_that_of_the_program() -> None:
    """In a process of its own, because other tests of this one may have held more."""
    give_back_memory()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        grown, total = process.submit(timing.peak_memory, sum_of_ones).result()
    assert 2**27 < grown < 2**29
    # What PyTorch itself holds is none of the program's.
    assert total - grown > 2**26
