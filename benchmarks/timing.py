"""Two programs against each other: alternating in one process, so that whatever else the machine does befalls both."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.limits import synchronise

STATUS = Path("/proc/self/status")


class Stopwatch:
    """Seconds of what is done inside, to the end of what a GPU was told.

    Args:
        device: to wait for, before and after.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def start(self) -> None:
        """Begin."""
        synchronise(self.device)
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End; the time is added to that of before."""
        synchronise(self.device)
        self.seconds += time.perf_counter() - self._started

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        self.start()
        yield
        self.stop()


class Program(Protocol):
    """One side of a comparison, ready to run."""

    def __call__(self) -> float:
        """Do one repetition; return the seconds that its steady work took, without what is done once per run."""
        ...


def timed(work: Callable[[], object], device: torch.device) -> Program:
    """Return the program that does some work, all of which is steady."""

    def program() -> float:
        stopwatch = Stopwatch(device)
        with stopwatch.running():
            work()
        return stopwatch.seconds

    return program


@dataclass(frozen=True)
class Samples:
    """Measurements of one program.

    Attributes:
        amount: units of work in a repetition: images times iterations, labels, or images.
        seconds: of the repetitions, each its steady work alone.
        warm_up: seconds that the repetitions before them took, each as a whole, compilation and all.
        outside: seconds of the repetitions outside their steady work: what is done once per run.
        peak_bytes: most memory, above what the process had before; None if it was not measured.
        total_bytes: most memory of the whole process; None if it was not measured.
    """

    amount: float
    seconds: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    total_bytes: int | None = None

    @property
    def per_unit(self) -> list[float]:
        """Seconds for one unit of work, by repetition."""
        return [seconds / self.amount for seconds in self.seconds]

    @property
    def median(self) -> float:
        """Median of the seconds for one unit of work."""
        return statistics.median(self.per_unit)

    @property
    def spread(self) -> float:
        """Slowest less fastest repetition, as a share of the median."""
        return (max(self.per_unit) - min(self.per_unit)) / self.median

    def as_dict(self) -> dict[str, Any]:
        """Raw samples and what follows from them."""
        return vars(self) | {"median_seconds_per_unit": self.median, "spread": self.spread}


def alternate(reference: Program, engine: Program, repetitions: int, warm_ups: int = 1) -> tuple[Samples, Samples]:
    """Run two programs in turn; neither always comes first.

    Returns:
        samples of the reference and of the engine, whose amounts of work are to be set.
    """
    samples = Samples(1.0), Samples(1.0)
    sides = list(zip((reference, engine), samples, strict=True))
    for program, taken in sides:
        for _ in range(warm_ups):
            taken.warm_up.append(_whole(program)[1])
    for repetition in range(repetitions):
        for program, taken in sides if repetition % 2 == 0 else reversed(sides):
            steady, whole = _whole(program)
            taken.seconds.append(steady)
            taken.outside.append(whole - steady)
    return samples


def _whole(program: Program) -> tuple[float, float]:
    started = time.perf_counter()
    steady = program()
    return steady, time.perf_counter() - started


def ratios(reference: Samples, engine: Samples) -> list[float]:
    """How many times faster the engine is, by repetition."""
    return [one / other for one, other in zip(reference.per_unit, engine.per_unit, strict=True)]


def ratio(reference: Samples, engine: Samples) -> float:
    """How many times faster the engine is, by the medians."""
    return reference.median / engine.median


class PeakOfFirst:
    """A program on a GPU that notes what PyTorch allocated there, at most, in its first repetition.

    Args:
        program: what is run.
        device: a GPU.

    Attributes:
        peak: most memory, above what there was before; None before the first repetition.
        total: most memory of the whole process.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program, self._device = program, device
        self.peak: int | None = None
        self.total: int | None = None

    def __call__(self) -> float:
        """Do one repetition."""
        if self.total is not None:
            return self._program()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        seconds = self._program()
        self.total = torch.cuda.max_memory_allocated(self._device)
        self.peak = self.total - before
        return seconds


def peak_memory(prepare: Callable[[], Program]) -> tuple[int, int]:
    """Run a program once on the CPU; return the most memory that it needed, without and with what was there before.

    This is what the process holds, which never shrinks: call this in a process of its own.
    """
    before = _resident_peak()
    prepare()()
    peak = _resident_peak()
    return peak - before, peak


def _resident_peak() -> int:
    """Most memory that this process has held, in bytes."""
    if STATUS.exists():
        # A child's ru_maxrss begins with that of its parent, even where it is another program.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
