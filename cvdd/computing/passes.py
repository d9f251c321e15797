"""How the networks that label and those that learn compute: compiled, recorded, in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from cvdd.backbones import BackboneConfig
from cvdd.computing.automatic import compiles, has_compiler, precision_of, records, uncompiled_seconds
from cvdd.computing.matrix_convolution import with_matrix_convolutions
from cvdd.schema import EngineConfig, LabelConfig


@dataclass(frozen=True)
class Passes:
    """How the networks that label and those that learn compute.

    Attributes:
        compile: whether their passes are compiled.
        compile_norms: whether BatchNorm layers with the statistics of each group are compiled, and nothing else.
        precision: of their convolutions and matrix products; all else, parameters included, is in fp32.
        record: whether passes are recorded as CUDA graphs, which launches the same kernels at once.
    """

    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    record: bool = False
    compile_norms: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What of it belongs to the identity of labels and students; nothing for PyTorch's plain kernels."""
        compiled: dict[str, Any] = {"compiled": True} if self.compile else {}
        if self.compile_norms:
            compiled["compiled"] = "norms"
        return compiled | ({"precision": self.precision} if self.precision != "fp32" else {})

    @property
    def multiplies(self) -> bool:
        """Whether convolutions become matrix products where that is faster (``matrix_convolution`` beside this)."""
        return self.precision == "bf16" and not self.compile

    def compiled(self, network: nn.Module) -> Callable[..., torch.Tensor] | None:
        """Return the compiled forward pass of a network, for one shape; None if nothing is compiled."""
        # A function and not a module, so that the network's parameters are not found twice.
        return torch.compile(network.forward, dynamic=False) if self.compile else None

    def prepare(self, network: nn.Module, device: torch.device) -> None:
        """Bring a network that learns into the form in which a device computes fastest, in place; names stay."""
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        elif self.multiplies:
            with_matrix_convolutions(network)

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """Return images [n, c, h, w] that lie in memory as a prepared network takes them best."""
        if images.device.type != "cuda" and self.precision == "fp32":
            # As they are: convolutions of another layout round otherwise.
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def around(self, device: torch.device) -> AbstractContextManager[object]:
        """Return what a forward pass is made inside."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def passes_of_labels(
    config: EngineConfig,
    label: LabelConfig,
    backbones: Sequence[BackboneConfig],
    samples: int,
    classes: int,
    size: int,
    device: torch.device,
) -> Passes:
    """Decide how teachers compute.

    Args:
        config: what is wanted.
        label: the recipe.
        backbones: of the teachers.
        samples: that each of them labels.
        classes: of the data set.
        size: side of the images in pixels.
        device: kind of device.
    """
    wanted, precision, on_cpu = config.compile_labels, config.precision_labels, device.type == "cpu"
    if wanted == "auto" and on_cpu and (precision == "fp32" or label.bn_mode != "batch"):
        # Nearly all of it is convolutions, which a compiler leaves to the same library.
        wanted = False
    compiled = compiles(wanted, lambda: uncompiled_seconds(backbones, samples, 1, classes, size, device), device)
    norms = compiled and on_cpu and label.bn_mode == "batch"
    return Passes(compiled and not norms, precision, records(config.cuda_graphs, device), norms)


def label_passes_elsewhere(config: EngineConfig) -> list[Passes]:
    """List what :func:`passes_of_labels` may decide on any kind of machine, but for what is recorded."""
    precision = config.precision_labels
    plain = Passes(precision=precision)
    return (
        [plain, replace(plain, compile=True), replace(plain, compile_norms=True)]
        if config.compile_labels == "auto"
        else []
    )


def passes_of_students(config: EngineConfig, device: torch.device) -> Passes:
    """Decide how students compute."""
    return _passes_while_learning(config.compile_students, config.precision_students, config, device)


def passes_of_members(config: EngineConfig, device: torch.device) -> Passes:
    """Decide how members compute while they are trained."""
    return _passes_while_learning(config.compile_members, config.precision_members, config, device)


def _passes_while_learning(
    compiled: bool, precision: Literal["auto", "fp32", "bf16"], config: EngineConfig, device: torch.device
) -> Passes:
    compiled = compiled and has_compiler(device.type)
    return Passes(compiled, precision_of(precision, device), records(config.cuda_graphs, device))
