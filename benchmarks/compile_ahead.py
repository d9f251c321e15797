"""Compilers of all networks side by side, before anything is measured: ``compile_all``, or one of its processes.

A compiler uses one core most of the time, and a GPU has many beside it. What the processes leave in the compilers'
cache is what the measuring process would have compiled itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.cases import Case, compile_member
from benchmarks.limits import usable_cores

SECONDS_BETWEEN_LOOKS = 0.2


def compile_all(cases: Sequence[Case], seconds: float) -> tuple[dict[str, float], list[Case]]:
    """Compile what recover cases need, a process for each network and size.

    Args:
        cases: all cases.
        seconds: after which compilers are stopped.

    Returns:
        the seconds that each took, and the cases without those whose networks are not compiled.
    """
    wanted = {_key(case, name): _arguments(case, name) for case in cases for name in _compiled_members(case)}
    threads = str(max(2 * usable_cores() // max(len(wanted), 1), 2))
    surroundings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "1"}
    started, taken = time.monotonic(), dict[str, float]()
    command = [sys.executable, "-m", "benchmarks.compile_ahead"]
    running = {key: subprocess.Popen([*command, *arguments], env=surroundings) for key, arguments in wanted.items()}
    try:
        while running and time.monotonic() - started < seconds:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for key in [key for key, process in running.items() if process.poll() is not None]:
                if running.pop(key).returncode == 0:
                    taken[key] = time.monotonic() - started
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return taken, [case for case in cases if all(_key(case, name) in taken for name in _compiled_members(case))]


def _compiled_members(case: Case) -> Sequence[str]:
    return case.members if case.kind == "recover" else ()


def _key(case: Case, name: str) -> str:
    return f"{case.data}_{case.images}_{name}"


def _arguments(case: Case, name: str) -> list[str]:
    return [case.data, str(case.images), str(case.units), name, *case.overrides]


def _main(arguments: Sequence[str]) -> None:
    data, images, units, name, *overrides = arguments
    torch.set_num_threads(1)
    case = Case("recover", data, (name,), int(images), 1, units=int(units), overrides=tuple(overrides))
    compile_member(case, name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    _main(sys.argv[1:])
