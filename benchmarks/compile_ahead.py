"""Compilers of all networks side by side, before anything is measured: ``compile_all``, or one of its processes.

A compiler uses one core most of the time, and a GPU has many beside it. What the processes leave in the compilers'
cache is what the measuring process would have compiled itself; it traces each network meanwhile, which takes it long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from benchmarks.cases import Case, compile_member
from benchmarks.limits import usable_cores


def compile_all(
    cases: Sequence[Case], seconds: float, ready: Callable[[str, Case, str], object] = lambda key, case, name: None
) -> tuple[dict[str, float], list[Case]]:
    """Compile what recover cases need, a process for each network and size.

    Args:
        cases: all cases.
        seconds: after which compilers are stopped.
        ready: called with each network that is compiled, while others still are: what it is called, a case that needs
            it, and its name.

    Returns:
        the seconds that each took, and the cases without those whose networks are not compiled.
    """
    wanted = {_key(case, name): (case, name) for case in cases for name in _compiled_members(case)}
    threads = str(max(2 * usable_cores() // max(len(wanted), 1), 2))
    surroundings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "1"}
    taken = dict[str, float]()
    with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
        running = {
            pool.submit(_compile, _arguments(case, name), surroundings, seconds): key
            for key, (case, name) in wanted.items()
        }
        for done in as_completed(running):
            key, spent = running[done], done.result()
            if spent is not None:
                taken[key] = spent
                ready(key, *wanted[key])
    return taken, [case for case in cases if all(_key(case, name) in taken for name in _compiled_members(case))]


def _compile(arguments: Sequence[str], surroundings: Mapping[str, str], seconds: float) -> float | None:
    """Run a compiler; return the seconds that it took, or None if it failed or was stopped."""
    command, started = [sys.executable, "-m", "benchmarks.compile_ahead", *arguments], time.monotonic()
    try:
        code = subprocess.run(command, env=surroundings, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return None
    return time.monotonic() - started if code == 0 else None


def _compiled_members(case: Case) -> Sequence[str]:
    return case.members if case.kind == "recover" else ()


def _key(case: Case, name: str) -> str:
    return f"{case.data}_{case.images}_{name}"


def _arguments(case: Case, name: str) -> list[str]:
    return [case.data, str(case.images), str(case.units), name, *case.overrides]


def specialise() -> None:
    """Let each size have code of its own, as the first of a run has; a second one would be compiled for any size."""
    torch._dynamo.config.automatic_dynamic_shapes = False


def _main(arguments: Sequence[str]) -> None:
    data, images, units, name, *overrides = arguments
    torch.set_num_threads(1)
    specialise()
    case = Case("recover", data, (name,), int(images), 1, units=int(units), overrides=tuple(overrides))
    compile_member(case, name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    _main(sys.argv[1:])
