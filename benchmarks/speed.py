"""The engine against plain references, in one run: ``make bench``, or ``python -m benchmarks.speed --help``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from benchmarks.cases import Case, Side, chosen, cpu_cases, gpu_cases, make_program, prepare_member, work_of
from benchmarks.compile_ahead import compile_all, specialise
from benchmarks.limits import Limits, Work, measure_limits, usable_cores
from benchmarks.table import markdown
from benchmarks.timing import PeakOfFirst, Program, Samples, alternate, peak_memory, ratio, ratios
from cvdd.running.process import hide_absent_gpus
from cvdd.support.allocator import give_back_memory, keep_freed_memory
from cvdd.support.hardware import processor_name
from cvdd.support.provenance import code_version

RESULTS = Path(__file__).parent / "results"
SHARE_TO_COMPILE = 0.6
"""Of the time. Cases whose networks are not compiled by then are left out."""

MINUTES_ON_A_GPU = 9.0
"""After which no further case is begun."""

SIDES: tuple[Side, Side] = ("reference", "engine")

COUNTED = {"inductor": "fxgraph_cache", "aot_autograd": "autograd_cache"}
"""Of the compilers' counters: those that say what other processes had compiled."""


def compare(case: Case, device: torch.device, repetitions: int, memory: bool) -> dict[str, Any]:
    """Run both sides of a case and return its row, raw samples included."""
    work = work_of(case, device)
    with tempfile.TemporaryDirectory() as folder:
        programs: list[Program] = []
        for side in SIDES:
            own = Path(folder) / side
            own.mkdir()
            programs.append(make_program(case, side, device, own))
        if memory and device.type == "cuda":
            programs = [PeakOfFirst(program, device) for program in programs]
        with found_or_compiled() as compiled:
            measured = alternate(programs[0], programs[1], repetitions)
    peaks: list[tuple[int | None, int | None]] = [
        (program.peak, program.total) if isinstance(program, PeakOfFirst) else (None, None) for program in programs
    ]
    if memory and device.type == "cpu":
        # The processes that measure it need as much as this one has kept.
        programs.clear()
        gc.collect()
        give_back_memory()
        peaks = [peak_of(case, side) for side in SIDES]
    sides: dict[str, Samples] = {}
    for side, samples, (peak, total) in zip(SIDES, measured, peaks, strict=True):
        sides[side] = replace(samples, amount=case.amount(side), peak_bytes=peak, total_bytes=total)
    reference, engine = sides["reference"], sides["engine"]
    paired = ratios(reference, engine)
    return {
        "name": case.name,
        "quantity": case.quantity,
        "steps": case.steps,
        "units": case.units,
        "images": case.images,
        "overrides": list(case.overrides),
        **{side: samples.as_dict() | {"shown": case.shown(samples.median)} for side, samples in sides.items()},
        "ratio": ratio(reference, engine),
        "ratio_range": [min(paired), max(paired)],
        "compiled": compiled,
        "flops_per_unit": work.flops,
        "elements_per_unit": work.elements,
    }


@contextlib.contextmanager
def found_or_compiled() -> Iterator[dict[str, dict[str, int]]]:
    """Count how many passes are found compiled inside, and how many are not; known at the end."""
    before = {kind: Counter(counters[kind]) for kind in COUNTED}
    counted: dict[str, dict[str, int]] = {}
    yield counted
    for kind, prefix in COUNTED.items():
        since = Counter(counters[kind]) - before[kind]
        counted[kind] = {key: since[f"{prefix}_{key}"] for key in ("hit", "miss", "bypass")}


def traced(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    """Trace a network that another process has compiled; return the seconds, and whether it was found."""
    started = time.monotonic()
    with found_or_compiled() as compiled:
        try:
            prepare_member(case, name, device)
        except Exception:  # its cases will fail likewise, and are named then
            traceback.print_exc()
    return {"seconds": time.monotonic() - started, "compiled": compiled}


def against_limits(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Return a row with the share of the machine's limit that the engine reaches."""
    best = Work(row["flops_per_unit"], row["elements_per_unit"]).seconds_at_best(limits)
    share = best / row["engine"]["median_seconds_per_unit"]
    return row | {"seconds_at_best": best, "fraction_of_limit": share}


def peak_of(case: Case, side: Side) -> tuple[int, int]:
    """Most memory of one side on the CPU, in a fresh process."""
    # A step needs as much memory as many do.
    short = replace(case, steps=1, reference_units=1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_here, short, side, torch.get_num_threads()).result()


def _peak_here(case: Case, side: Side, threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(lambda: make_program(case, side, torch.device("cpu"), Path(folder)))


def machine_of(device: torch.device) -> dict[str, Any]:
    """Describe the machine, without its name."""
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32},
    }


def run(
    cases: Sequence[Case],
    device: torch.device,
    repetitions: int,
    memory: bool,
    minutes: float = math.inf,
    ahead: bool = True,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Compare all cases and return everything that is known about them.

    Args:
        cases: to compare.
        device: where.
        repetitions: of each side.
        memory: whether peak memory is measured too.
        minutes: after which no further case is begun; those left out are listed.
        ahead: on a GPU, compile all networks before anything is measured.
        save: called with what is known after each case.
    """
    started = time.monotonic()
    version = code_version()
    result: dict[str, Any] = {
        "machine": machine_of(device),
        "versions": {key: value for key, value in version.items() if key not in ("commit", "changed")},
        "commit": version.get("commit"),
        "changed": version.get("changed"),
        "repetitions": repetitions,
        "limits": {},
        "cases": [],
        "left_out": [case.name for case in cases],
        "failed": {},
        "notes": NOTES,
        "compile_seconds": {},
        "traced": {},
        "seconds": 0.0,
    }
    if device.type == "cuda" and ahead:

        def ready(key: str, case: Case, name: str) -> None:
            result["traced"][key] = traced(case, name, device)

        result["compile_seconds"], cases = compile_all(cases, 60 * SHARE_TO_COMPILE * minutes, ready)
        print(f"compilers were done after {time.monotonic() - started:.0f} s", flush=True)
    limits = measure_limits(device)
    result["limits"] = limits.as_dict()
    for case in cases:
        if time.monotonic() - started > 60 * minutes:
            break
        try:
            row = compare(case, device, repetitions, memory)
        except Exception as error:  # one case that fails leaves the others
            traceback.print_exc()
            result["failed"][case.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            result["left_out"].remove(case.name)
            save(result)
            continue
        # Measured again beside every case, because others may have used the machine the last time.
        limits = limits.better(measure_limits(device))
        result["limits"] = limits.as_dict()
        result["cases"] = [against_limits(known, limits) for known in [*result["cases"], row]]
        result["left_out"].remove(case.name)
        result["seconds"] = time.monotonic() - started
        save(result)
        print(f"{row['name']}: {row['ratio']:.2f} times the reference", flush=True)
    return result


NOTES = [
    "Random weights and images; both sides have the same networks.",
    "Recover is timed without method.log_agreement, a few cosines of gradients at each log row.",
    "Relabelling includes writing; neither students nor members are measured on validation images.",
    "The fraction of the limit is of the larger of FLOPs at the matrix rate and bytes at the copy bandwidth, in the "
    "better of float32 and bfloat16; maps that stay in a cache can go beyond it.",
]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="full sizes and all pairs of the committee, on a GPU")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="CASE", help="cases, or the first words of their names"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each side of each case")
    parser.add_argument("--steps", type=int, help="iterations or epochs in a repetition, instead of each case's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="such as engine.precision=bf16")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; one for each core if not given")
    parser.add_argument("--minutes", type=float, help="begin no further case after so many (9 with --gpu)")
    parser.add_argument(
        "--compile-when-needed", action="store_true", help="on a GPU, not all networks before anything is measured"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--out",
        default=None,
        metavar="NAME",
        help="of the file in benchmarks/results (cpu, or gpu; of some cases alone cpu_part, or gpu_part)",
    )
    parser.add_argument("--list", action="store_true", help="only list the cases")
    return parser.parse_args()


def use_own_cache(folder: Path) -> None:
    """Let compilers keep what they make in a folder, unless the caller's environment names another than the usual one.

    PyTorch itself may have put the usual one there, as it was imported.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/triton")


def main() -> None:
    """Compare, print a table, write a file."""
    wanted = arguments()
    named = bool(wanted.only) or wanted.list
    cases = chosen(gpu_cases(more=named) if wanted.gpu else cpu_cases(), wanted.only)
    if wanted.steps:
        cases = [replace(case, steps=wanted.steps) for case in cases]
    cases = [replace(case, overrides=(*case.overrides, *wanted.set)) for case in cases]
    if wanted.list:
        print("\n".join(case.name for case in cases))
        return
    # As in every command, and for both sides.
    hide_absent_gpus()
    specialise()
    if not wanted.gpu:
        keep_freed_memory()
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    device = torch.device("cuda") if wanted.gpu else torch.device("cpu")
    RESULTS.mkdir(exist_ok=True)
    # A part of the cases must not take the place of all of them.
    part = "_part" if wanted.only or wanted.steps or wanted.set else ""
    path = RESULTS / f"{wanted.out or device.type + part}.json"

    def save(result: dict[str, Any]) -> None:
        path.write_text(json.dumps(result, indent=1) + "\n")

    ahead = not wanted.compile_when_needed
    minutes = wanted.minutes or (MINUTES_ON_A_GPU if wanted.gpu else math.inf)
    with tempfile.TemporaryDirectory() as compiled:
        # What was compiled before would make compilation look fast.
        use_own_cache(Path(compiled))
        result = run(cases, device, wanted.repetitions, not wanted.no_memory, minutes, ahead, save)
    print(f"\n{markdown(result)}\n")
    if result["failed"]:
        raise SystemExit(f"failed: {', '.join(result['failed'])}")


if __name__ == "__main__":
    main()
