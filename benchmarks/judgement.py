"""How long members take to judge a stack, and which kernels that is: ``python -m benchmarks.judgement --help``.

Launched kernel by kernel and, on a GPU, recorded as a CUDA graph; and how far the gradient is from full precision.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
import torch._inductor.config as compilers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import engine, settings
from benchmarks.cases import FAMILIES
from benchmarks.compile_ahead import specialise
from benchmarks.limits import synchronise
from benchmarks.speed import RESULTS, machine_of
from cvdd.computing.graphs import Recorded
from cvdd.running.process import hide_absent_gpus
from cvdd.schema import EngineConfig
from cvdd.support.provenance import code_version
from cvdd.synthesis.engine import Engine, ready_voter
from cvdd.synthesis.voting import Voter


@dataclass(frozen=True)
class Kernel:
    """What a judgement spends on calls of one name.

    Attributes:
        name: as the profiler has it.
        calls: in one judgement.
        milliseconds: of all of them.
        gigabytes: that all of them read and write as their compiler counts it; None if it made no such kernel.
    """

    name: str
    calls: int
    milliseconds: float
    gigabytes: float | None = None


def milliseconds(step: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Mean time of a call, after three that do not count."""
    for _ in range(3):
        step()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repetitions):
        step()
    synchronise(device)
    return 1e3 * (time.perf_counter() - started) / repetitions


def likeness(one: Tensor, other: Tensor) -> float:
    """Mean cosine of the gradients [units, images, 3, size, size] of each image."""
    cosines = torch.nn.functional.cosine_similarity(one.flatten(2).float(), other.flatten(2).float(), dim=2)
    return float(cosines.mean())


def kernels_of(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Profile one call: its kernels, those that take longest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        step()
        synchronise(device)
    found, counted = [], counted_bytes(_made_by_compilers())
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        each = counted.get(event.key)
        if microseconds > 0:
            moved = None if each is None else each * event.count
            found.append(Kernel(event.key, event.count, microseconds / 1e3, moved))
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def counted_bytes(descriptions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Gigabytes that each compiled kernel reads and writes; none of kernels whose name two of different size have."""
    sizes: dict[str, set[float]] = {}
    for description in descriptions:
        if description.get("kernel_num_gb") is not None:
            sizes.setdefault(description["kernel_name"], set()).add(float(description["kernel_num_gb"]))
    return {name: min(found) for name, found in sizes.items() if len(found) == 1}


def _made_by_compilers() -> list[Mapping[str, Any]]:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    # Asked for its class, an object may compute one.
    return [found.inductor_meta for found in gc.get_objects() if issubclass(type(found), CachingAutotuner)]


def table(kernels: Sequence[Kernel], rows: int) -> str:
    """What takes longest, and at which rate it reads and writes."""
    lines = [f"{'ms':>9} {'calls':>5} {'GB':>8} {'TB/s':>5}  kernel"]
    for kernel in kernels[:rows]:
        moved, rate = "", ""
        if kernel.gigabytes is not None:
            moved, rate = f"{kernel.gigabytes:.4f}", f"{kernel.gigabytes / kernel.milliseconds:.2f}"
        lines.append(f"{kernel.milliseconds:9.4f} {kernel.calls:5d} {moved:>8} {rate:>5}  {kernel.name[:110]}")
    return "\n".join(lines)


def judge(wanted: argparse.Namespace, member: str, device: torch.device) -> dict[str, Any]:
    """Measure one member, print what was found and return it."""
    config = settings.configuration(wanted.data)
    network = settings.random_member(config, member, device)
    images, targets = (part.to(device) for part in settings.random_units(config, wanted.units, wanted.images))
    how = Engine(wanted.compile, wanted.precision or ("bf16" if device.type == "cuda" else "fp32"))
    exact = engine.judge_once(config, Voter("exact", network), Engine(), images, targets)
    voter = ready_voter(member, network, 1.0, how)

    def judged(shown: Tensor) -> Tensor:
        return engine.judge_once(config, voter, how, shown, targets)

    started = time.perf_counter()
    gradient = judged(images)
    synchronise(device)
    result: dict[str, Any] = {"member": member, "precision": how.precision, "compiled": how.compile}
    result["first"] = time.perf_counter() - started
    result["cosine"] = likeness(gradient, exact)
    print(f"{member}, {how.precision}: the first judgement took {result['first']:.1f} s")
    print(f"gradient's cosine to float32, mean over images: {result['cosine']:.4f}")
    shown, way = images.flatten(0, 1).shape[0], "compiled" if how.compile else "not compiled"
    result["launched"] = milliseconds(lambda: judged(images), device, wanted.repetitions)
    print(f"{way}, launched: {result['launched']:.3f} ms, {result['launched'] / shown:.4f} ms an image")
    step: Callable[[], object] = lambda: judged(images)  # noqa: E731
    if device.type == "cuda":
        recorded = Recorded(judged, device, "a judgement")
        step = lambda: recorded(images)  # noqa: E731
        result["recorded"] = milliseconds(step, device, wanted.repetitions)
        print(f"{way}, recorded: {result['recorded']:.3f} ms, {result['recorded'] / shown:.4f} ms an image")
    if wanted.kernels or wanted.out:
        kernels = kernels_of(step, device)
        result["kernels"] = [asdict(kernel) for kernel in kernels]
        print(table(kernels, wanted.kernels))
    return result


def compiler_settings(written: Sequence[str]) -> dict[str, Any]:
    """Read settings of PyTorch's compiler, ``triton.max_tiles=2``.

    Raises:
        ValueError: there is no such setting, or its value cannot be read.
    """
    chosen: dict[str, Any] = {}
    for item in written:
        name, _, value = item.partition("=")
        if name not in compilers._config:
            raise ValueError(f"{item}: the compiler has no setting {name}")
        try:
            chosen[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{item}: write a value of Python, such as True, 2 or 'text'") from error
    return chosen


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("members", nargs="+", choices=FAMILIES, metavar="member", help=", ".join(FAMILIES))
    parser.add_argument("--data", choices=list(settings.EXPERIMENTS), default="cifar", help="sizes and networks")
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--images", type=int, default=10, help="of a unit")
    parser.add_argument("--precision", choices=get_args(EngineConfig.model_fields["precision"].annotation)[1:])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--compiler", nargs="*", default=[], metavar="KEY=VALUE", help="of torch._inductor.config: triton.max_tiles=2"
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0, metavar="ROWS", help="show those that take longest")
    parser.add_argument("--out", metavar="NAME", help="keep everything, all kernels included, in benchmarks/results")
    wanted = parser.parse_args()
    try:
        wanted.compiler = compiler_settings(wanted.compiler)
    except ValueError as error:
        parser.error(str(error))
    return wanted


def main() -> None:
    """Measure members, one after the other."""
    wanted = arguments()
    hide_absent_gpus()
    specialise()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    version = code_version()
    known: dict[str, Any] = {"machine": machine_of(device), "code": version, "settings": vars(wanted), "members": []}
    # With what a kernel reads and writes noted beside it.
    with compilers.patch({"benchmark_kernel": True, **wanted.compiler}):
        for member in wanted.members:
            known["members"].append(judge(wanted, member, device))
            if wanted.out:
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / f"{wanted.out}.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
