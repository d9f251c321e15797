"""What a machine can do at best, and what a step of work asks of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cvdd.running.process import hide_absent_gpus
from cvdd.support.allocator import keep_freed_memory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Limits:
    """What was measured of a machine.

    Attributes:
        matrix: floating-point operations per second of a large matrix product, by precision.
        convolution: of a large convolution, by precision.
        copy: bytes per second, read and written, of a large copy.
    """

    matrix: dict[str, float]
    convolution: dict[str, float]
    copy: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def better(self, other: Limits) -> Limits:
        """The higher of two measurements of each: what shares the machine can only lower them."""
        return Limits(
            {name: max(rate, other.matrix[name]) for name, rate in self.matrix.items()},
            {name: max(rate, other.convolution[name]) for name, rate in self.convolution.items()},
            max(self.copy, other.copy),
        )

    def rate(self, precision: str) -> float:
        """The higher of the two rates of a precision."""
        return max(self.matrix[precision], self.convolution[precision])


@dataclass(frozen=True)
class Work:
    """What a piece of work needs whoever does it.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions, forward and backward.
        elements: numbers that these read and write; everything between them could be fused into them.
    """

    flops: float
    elements: float

    @staticmethod
    def sum(works: Sequence[Work]) -> Work:
        """All of several works."""
        return Work(sum(work.flops for work in works), sum(work.elements for work in works))

    def scaled(self, factor: float) -> Work:
        """So many times this work."""
        return Work(self.flops * factor, self.elements * factor)

    def seconds_at_best(self, limits: Limits) -> float:
        """Time that arithmetic or memory takes, whichever is longer, in the precision that suits the machine best.

        Both at the rates that were measured. Only what stays in a cache between two layers can be faster.
        """
        return min(
            max(self.flops / limits.rate(name), self.elements * torch.finfo(kind).bits / 8 / limits.copy)
            for name, kind in PRECISIONS.items()
        )


class _Traffic(TorchDispatchMode):
    """Counts the elements that matrix products and convolutions read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if "convolution" in name or name in ("mm", "addmm", "bmm", "baddbmm"):
            outputs = result if isinstance(result, (tuple, list)) else [result]
            self.elements += sum(value.numel() for value in (*arguments, *outputs) if isinstance(value, Tensor))
        return result


def count_work(step: Callable[[], object]) -> Work:
    """Run a step once and count what it asks for."""
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        step()
    return Work(float(flops.get_total_flops()), float(traffic.elements))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_device() -> torch.device:
    """A GPU if there is one, or else the CPU with what every command does there."""
    hide_absent_gpus()
    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_freed_memory()
    return torch.device("cpu")


def measure_limits(device: torch.device, seconds: float | None = None) -> Limits:
    """Measure a machine: each rate is the best of repetitions that take so many seconds."""
    large = device.type == "cuda"
    if seconds is None:
        seconds = 0.02 if large else 0.3
    side, channels, count, copied = (8192, 512, 256, 2**31) if large else (2048, 128, 64, 2**28)
    matrix, convolution = {}, {}
    for name, kind in PRECISIONS.items():
        square = torch.randn(side, side, device=device).to(kind)
        matrix[name] = 2 * side**3 / _fastest(lambda square=square: torch.mm(square, square), device, seconds)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device, kind)
        layer = layer.to(memory_format=torch.channels_last).requires_grad_(False)
        images = torch.randn(count, channels, 32, 32, device=device).to(kind, memory_format=torch.channels_last)
        flops = 2 * count * channels**2 * 9 * 32**2
        convolution[name] = flops / _fastest(lambda layer=layer, images=images: layer(images), device, seconds)
    source = torch.zeros(copied // 4, device=device)
    target = torch.zeros_like(source)
    copy = 2 * copied / _fastest(lambda: target.copy_(source), device, seconds)
    return Limits(matrix, convolution, copy)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of several calls; the first, which may prepare something, does not count."""
    work()
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= stop:
            return best
