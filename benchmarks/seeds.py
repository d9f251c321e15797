"""Several seeds of one student: one after the other, a process each, or as one network of stacked weights.

``python -m benchmarks.seeds --help``. The first two train as the engine does; the third is the passes of a step alone,
forward and backward, next to the same passes of one student.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks.cases import Case, make_program
from benchmarks.limits import usable_cores, usable_device
from benchmarks.timing import alternate, ratio, timed
from cvdd.backbones import build_network
from cvdd.running.process import hide_absent_gpus

PASSES = 5
"""In a repetition of stacked weights."""

STUDENTS = {"digits": ("mobilenetv2",), "cifar": ("resnet18",)}


def beside(case: Case, device: str, threads: int, start: Barrier, results: Any, repetitions: int) -> None:
    """Train one of several students that begin together, in a process of its own."""
    torch.set_num_threads(threads)
    hide_absent_gpus()
    with tempfile.TemporaryDirectory() as folder:
        program = make_program(case, "engine", torch.device(device), Path(folder))
        program()
        for _ in range(repetitions):
            start.wait()
            seconds = timed(program, torch.device(device))()
            start.wait()
            results.put(seconds)


def in_processes(case: Case, device: torch.device, seeds: int, repetitions: int) -> list[float]:
    """Seconds in which all processes trained their students, by repetition: those of the slowest."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(seeds), context.Queue()
    threads = max(usable_cores() // seeds, 1)
    arguments = (case, device.type, threads, start, results, repetitions)
    processes = [context.Process(target=beside, args=arguments) for _ in range(seeds)]
    for process in processes:
        process.start()
    taken = [results.get() for _ in range(seeds * repetitions)]
    for process in processes:
        process.join()
    return [max(taken[first : first + seeds]) for first in range(0, len(taken), seeds)]


def in_turn(case: Case, device: torch.device, seeds: int, repetitions: int) -> list[float]:
    """Seconds in which this process trained as many students one after the other, by repetition."""
    with tempfile.TemporaryDirectory() as folder:
        program = make_program(case, "engine", device, Path(folder))
        program()
        all_of_them = timed(lambda: [program() for _ in range(seeds)], device)
        return [all_of_them() for _ in range(repetitions)]


def stacked(case: Case, device: torch.device, seeds: int, repetitions: int) -> float:
    """How many times faster the passes of stacked students are than those of one after the other."""
    config = case.config
    backbone = config.committee.members[case.members[0]].backbone
    networks = [build_network(backbone, config.dataset.num_classes, seed).to(device) for seed in range(seeds)]
    size, side = max(config.label.batch_size // config.protocol.accumulation, 2), config.dataset.image_size
    images = torch.randn(size, 3, side, side, device=device)
    targets = torch.randn(size, config.dataset.num_classes, device=device).softmax(dim=1)
    parameters, buffers = stack_module_state(networks)
    template = networks[0]

    def loss(weights: dict[str, Tensor], statistics: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(template, (weights, statistics), (images,)), targets)

    together = vmap(grad(loss))

    def all_at_once() -> None:
        for _ in range(PASSES):
            together(parameters, buffers)

    def one_by_one() -> None:
        for network in networks * PASSES:
            torch.autograd.grad(nn.functional.cross_entropy(network(images), targets), list(network.parameters()))

    return ratio(*alternate(timed(one_by_one, device), timed(all_at_once, device), repetitions))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(STUDENTS), default="cifar", help="sizes and networks")
    parser.add_argument("--seeds", type=int, default=3, help="of the student")
    parser.add_argument("--epochs", type=int, default=1, help="in a repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="of each way")
    wanted = parser.parse_args()
    device = usable_device()
    case = Case("student", wanted.data, STUDENTS[wanted.data], images=100, steps=wanted.epochs)
    singly = statistics.median(in_turn(case, device, wanted.seeds, wanted.repetitions))
    beside_each_other = statistics.median(in_processes(case, device, wanted.seeds, wanted.repetitions))
    print(f"{wanted.seeds} seeds of {case.name}, medians of {wanted.repetitions}, {device.type}")
    print(f"one after the other: {singly:.2f} s")
    print(f"a process each: {beside_each_other:.2f} s, {singly / beside_each_other:.2f} times as fast")
    print(f"passes of stacked weights: {stacked(case, device, wanted.seeds, wanted.repetitions):.2f} times as fast")


if __name__ == "__main__":
    main()
