"""The project's own GPU kernels beside PyTorch's: ``python -m benchmarks.kernels``, on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.limits import measure_limits
from cvdd.computing.gpu_layers import with_gpu_layers

IMAGES, CALLS, REPLAYS = 100, 10, 3

DEPTHWISE = (
    (32, 112, 1),
    (96, 112, 2),
    (144, 56, 1),
    (144, 56, 2),
    (192, 28, 1),
    (192, 28, 2),
    (384, 14, 1),
    (960, 7, 1),
)
"""Channels, side of the images, and stride: MobileNetV2's at 224 pixels."""

POOLING = ((64, 112),)
"""Channels and side of the images: the residual networks' at 224 pixels."""


def milliseconds(work: Callable[[], object]) -> float:
    """Time of a call: the fastest replay of several recorded as one graph, so that launching takes no time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken = []
    for _ in range(REPLAYS + 1):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / CALLS)
    return min(taken[1:])


def compare(name: str, layer: nn.Module, channels: int, side: int, copy: float) -> None:
    """Print the times of a layer and of the project's own, forward and backward."""
    layer = layer.to("cuda", torch.bfloat16).requires_grad_(False)
    (own,) = with_gpu_layers(nn.Sequential(layer)).children()
    given = torch.randn(IMAGES, channels, side, side, device="cuda").bfloat16()
    given = given.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(layer(given))
    shown = []
    for module in (layer, own):

        def forward(module: nn.Module = module) -> Tensor:
            out: Tensor = module(given)
            return out

        def both(module: nn.Module = module) -> object:
            leaf = given.detach().requires_grad_()
            return torch.autograd.grad(module(leaf), leaf, gradient)

        first, all_of_it = milliseconds(forward), milliseconds(both)
        shown.append((first, all_of_it - first))
    (plain, plain_back), (ours, ours_back) = shown
    floor = 1e3 * 2 * (given.numel() + gradient.numel()) / copy
    forwards, backwards = f"{plain:.3f} -> {ours:.3f} ms", f"{plain_back:.3f} -> {ours_back:.3f} ms"
    print(f"{name}, {channels} channels, {side} pixels: forward {forwards}, backward {backwards}", end="; ")
    print(f"read and written once {floor:.3f} ms", flush=True)


def main() -> None:
    """Compare max-pooling and depthwise convolutions of these shapes with PyTorch's on a GPU."""
    argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=main.__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels for GPUs need one, and PyTorch finds none")
    rate = measure_limits(torch.device("cuda")).copy
    for channels, side, stride in DEPTHWISE:
        layer = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        compare(f"depthwise, stride {stride}", layer, channels, side, rate)
    for channels, side in POOLING:
        compare("max-pooling", nn.MaxPool2d(3, 2, 1), channels, side, rate)


if __name__ == "__main__":
    main()
