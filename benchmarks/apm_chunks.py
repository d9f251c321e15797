"""Memory and time of APM's image gradient by chunk size, measured; and the memory of a whole run, computed.

python benchmarks/apm_chunks.py
python benchmarks/apm_chunks.py --batch 500 --size 64 --depth 4 --classes 1000 --per-class 50 --chunks 500 250 100
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from cvdd.backbones.convnet import convnet
from cvdd.methods.apm import Snapshots, chunked_gradient

SNAPSHOTS = 5
FIT_BATCH = 256


def make_network(options: argparse.Namespace, seed: int) -> nn.Module:
    """Build one ConvNet with instance norm."""
    torch.manual_seed(seed)
    return convnet(options.classes, depth=options.depth, width=options.width, norm="instance")


def problem(options: argparse.Namespace) -> tuple[Tensor, Tensor, nn.Module, Snapshots]:
    """Return a batch of noise with classes, a teacher, and snapshots."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = [make_network(options, seed).to(device).state_dict() for seed in range(SNAPSHOTS)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    teacher = make_network(options, SNAPSHOTS).to(device).eval().requires_grad_(False)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size).to(device)
    targets = torch.arange(options.batch, device=device) % options.classes
    return images, targets, teacher, Snapshots(make_network(options, 0).to(device), stacked)


def resident(what: str) -> float:
    """Memory of this process in MB: VmRSS now, VmHWM at most."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(options: argparse.Namespace, chunk: int, at_once: bool, answers: multiprocessing.SimpleQueue) -> None:
    """Put peak memory above what was held before (MB), seconds, and the gradient's sum of squares."""
    images, targets, teacher, snapshots = problem(options)
    on_gpu = images.is_cuda
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident("VmRSS")
    # On the CPU the processor's time: other programs on the machine do not change it.
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = []
    for _ in range(options.repeats):
        started = clock()
        gradient, _ = chunked_gradient(
            images, targets, teacher, snapshots, discrepancy=1.0, ce=0.1, chunk=chunk, at_once=at_once
        )
        norm = float(gradient.double().square().sum().sqrt())
        seconds.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM")
    answers.put((peak - before, min(seconds), norm))


def saved_bytes(options: argparse.Namespace, *, training: bool) -> int:
    """Bytes that one network's graph holds for one image, its weights left out."""
    network = make_network(options, 0).requires_grad_(training)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Held, so that no address is used twice.
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), note(tensor))[1], lambda t: t):
        network(torch.randn(1, 3, options.size, options.size, requires_grad=not training))
    return sum(storages.values())


def computed(options: argparse.Namespace) -> list[str]:
    """Rows of the computed table."""
    count = options.classes * options.per_class
    weights = 4 * sum(parameter.numel() for parameter in make_network(options, 0).parameters())
    # Images and momentum; teacher, snapshots, and a surrogate with gradient and momentum.
    held = 2 * count * 3 * options.size**2 * 4 + weights * (1 + SNAPSHOTS + 3)
    fit = saved_bytes(options, training=True) * min(FIT_BATCH, options.batch)
    rows = []
    for chunk in options.chunks:
        # One snapshot's graph beside the teacher's.
        graph = 2 * saved_bytes(options, training=False) * chunk
        gigabytes = [value / 1e9 for value in (held, fit, graph, held + max(fit, graph))]
        rows.append(f"| {chunk} | " + " | ".join(f"{value:.2f}" for value in gigabytes) + " |")
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 500), ("size", 32), ("depth", 3), ("width", 128), ("classes", 10), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--per-class", type=int, default=50, help="IPC of the computed table")
    parser.add_argument("--chunks", type=int, nargs="+", default=[500, 250, 100, 50, 25, 10])
    parser.add_argument("--computed-only", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    if not options.computed_only:
        print("| chunk | snapshots | peak MB | seconds | norm of the gradient |\n|---|---|---|---|---|", flush=True)
        for chunk in options.chunks:
            for at_once in (False, True):
                answers = context.SimpleQueue()
                # A process of its own, because the most that a process ever held cannot be forgotten.
                process = context.Process(target=measure, args=(options, chunk, at_once, answers))
                process.start()
                process.join()
                if process.exitcode:
                    print(f"| {chunk} | {'at once' if at_once else 'in turn'} | failed | | |", flush=True)
                    continue
                peak, seconds, norm = answers.get()
                how = "at once" if at_once else "in turn"
                print(f"| {chunk} | {how} | {peak:.0f} | {seconds:.2f} | {norm:.9f} |", flush=True)
        print()
    print("| chunk | set and networks GB | surrogate's step GB | chunk's graphs GB | peak GB |\n|---|---|---|---|---|")
    print("\n".join(computed(options)))


if __name__ == "__main__":
    main()
