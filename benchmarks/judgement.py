"""How long one member takes to judge a stack, and which kernels that is: ``python -m benchmarks.judgement --help``.

Launched kernel by kernel and, on a GPU, recorded as a CUDA graph; and how far its gradient is from full precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import engine, settings
from benchmarks.cases import FAMILIES
from benchmarks.limits import synchronise
from cvdd.engine import Engine, ready_voter
from cvdd.graphs import Recorded
from cvdd.schema import EngineConfig
from cvdd.voting import Voter


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


def show_kernels(step: Callable[[], object], device: torch.device, rows: int) -> None:
    """Print what takes longest of a call."""
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        step()
        synchronise(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=120))


def main() -> None:
    """Measure one member."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("member", choices=FAMILIES)
    parser.add_argument("--data", choices=list(settings.EXPERIMENTS), default="cifar", help="sizes and networks")
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--images", type=int, default=10, help="of a unit")
    parser.add_argument("--precision", choices=get_args(EngineConfig.model_fields["precision"].annotation)[1:])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0, metavar="ROWS", help="show those that take longest")
    wanted = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = settings.configuration(wanted.data)
    network = settings.random_member(config, wanted.member, device)
    images, targets = (part.to(device) for part in settings.random_units(config, wanted.units, wanted.images))
    how = Engine(wanted.compile, wanted.precision or ("bf16" if device.type == "cuda" else "fp32"))
    exact = engine.judge_once(config, Voter("exact", network), Engine(), images, targets)
    voter = ready_voter(wanted.member, network, 1.0, how)

    def judged(shown: Tensor) -> Tensor:
        return engine.judge_once(config, voter, how, shown, targets)

    started = time.perf_counter()
    gradient = judged(images)
    synchronise(device)
    print(f"{wanted.member}, {how.precision}: the first judgement took {time.perf_counter() - started:.1f} s")
    print(f"gradient's cosine to float32, mean over images: {likeness(gradient, exact):.4f}")
    shown, way = images.flatten(0, 1).shape[0], "compiled" if how.compile else "not compiled"
    launched = milliseconds(lambda: judged(images), device, wanted.repetitions)
    print(f"{way}, launched: {launched:.3f} ms, {launched / shown:.4f} ms an image")
    step: Callable[[], object] = lambda: judged(images)  # noqa: E731
    if device.type == "cuda":
        recorded = Recorded(judged, device, "a judgement")
        step = lambda: recorded(images)  # noqa: E731
        replayed = milliseconds(step, device, wanted.repetitions)
        print(f"{way}, recorded: {replayed:.3f} ms, {replayed / shown:.4f} ms an image")
    if wanted.kernels:
        show_kernels(step, device, wanted.kernels)


if __name__ == "__main__":
    main()
