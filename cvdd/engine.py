"""How members judge images fast: compiled, in half precision, so many units at a time."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from cvdd.backbones import BackboneConfig
from cvdd.config_base import ConfigError
from cvdd.copies import sharing_copy
from cvdd.depthwise import without_strided_depthwise
from cvdd.footprint import profile_of
from cvdd.fusion import fuse_statistics
from cvdd.matrix_convolution import with_matrix_convolutions
from cvdd.schema import EngineConfig, MethodConfig
from cvdd.schema.method import StatisticsConfig
from cvdd.stem import with_folded_stem
from cvdd.voting import Judgement, Voter, judge

log = logging.getLogger(__name__)

PIXELS_PER_PASS = 100 * 256 * 256
"""The most that a member is shown at once; more fills no device better and costs memory."""

PIXELS_PER_COMPILED_PASS = 100 * 32 * 32
"""On a CPU compiled code gains little from more, and memory grows."""

SECONDS_WORTH_COMPILING = 300.0
"""Of uncompiled work. A compiler takes one to three minutes for a pair of members, and leaves about half of it."""

RATES = {"cpu": (60e9, 1e-3), "cuda": (60e12, 2e-5)}
"""Roughly, of uncompiled networks: operations per second, and seconds that each image takes besides.

On an H200 a recorded, uncompiled judgement of ResNet18 at 32 pixels took 5.6 ms for 100 images, compiled 1.6 ms.
"""


@dataclass(frozen=True)
class Engine:
    """What the configuration comes to for one set of images.

    Attributes:
        compile: whether judgements are compiled.
        precision: of the members' convolutions.
        units_per_pass: units that a member judges in one forward pass; None is all of a stack.
        record: whether iterations are recorded as CUDA graphs, which launches the same kernels at once.
    """

    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    units_per_pass: int | None = None
    record: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What of it belongs to the identity of images; nothing for PyTorch's plain kernels."""
        shown = {key: value for key, value in asdict(self).items() if key != "record"}
        return {} if replace(self, record=False) == Engine() else {"engine": shown}

    @property
    def opinion(self) -> Callable[..., Judgement]:
        """What judges."""
        return _compiled() if self.compile else judge

    def fewer(self, units: int) -> Engine | None:
        """The same with less memory: half as many units a pass, or at last members that judge one after the other.

        Args:
            units: of the stack.

        Returns:
            None if nothing needs less.
        """
        present = min(self.units_per_pass or units, units)
        if present > 1:
            return replace(self, units_per_pass=present // 2)
        # Recorded, they judge side by side.
        return replace(self, record=False) if self.record else None


@dataclass(frozen=True)
class Work:
    """What lies ahead, for the choices that depend on it.

    Attributes:
        backbones: networks that judge.
        image_passes: images that each of them is shown, iterations included; the same for all.
        unit_images: images of the largest unit.
        units: of the largest stack.
        size: side of the images in pixels.
        classes: of the data set.
        split: whether ranks share each unit: their sums are made between the layers, where nothing is compiled.
    """

    backbones: tuple[BackboneConfig, ...]
    image_passes: int
    unit_images: int
    units: int
    size: int
    classes: int
    split: bool = False

    def seconds(self, device: torch.device) -> float:
        """Estimate how long all of it takes without a compiler."""
        # Forward, and backward to the images alone.
        return uncompiled_seconds(self.backbones, self.image_passes, 2, self.classes, self.size, device)


def uncompiled_seconds(
    backbones: Sequence[BackboneConfig], images: int, passes: int, classes: int, size: int, device: torch.device
) -> float:
    """Estimate how long networks take for so many images without a compiler.

    Args:
        backbones: of the networks; each is shown all images.
        images: shown to each of them.
        passes: 1 for forward alone, 2 with the gradient of the images, 3 with that of the parameters as well.
        classes: of the data set.
        size: side of the images in pixels.
        device: kind of device.
    """
    rate, overhead = RATES["cuda" if device.type == "cuda" else "cpu"]
    return images * sum(passes * forward_flops(one, classes, size) / rate + overhead for one in backbones)


@dataclass(frozen=True)
class Passes:
    """How the networks that label and those that learn compute.

    Attributes:
        compile: whether their passes are compiled.
        precision: of their convolutions and matrix products; all else, parameters included, is in fp32.
        record: whether passes are recorded as CUDA graphs, which launches the same kernels at once.
    """

    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    record: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What of it belongs to the identity of labels and students; nothing for PyTorch's plain kernels."""
        compiled = {"compiled": True} if self.compile else {}
        return compiled | ({"precision": self.precision} if self.precision != "fp32" else {})

    @property
    def multiplies(self) -> bool:
        """Whether convolutions become matrix products where that is faster (:mod:`cvdd.matrix_convolution`)."""
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


def precision_of(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Decide what is automatic: bf16 on a GPU that has it."""
    if wanted != "auto":
        return wanted
    # Where it is emulated, convolutions are slower than in full precision, or missing.
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def records(wanted: Literal["auto"] | bool, device: torch.device) -> bool:
    """Decide whether steps are recorded as CUDA graphs: on a GPU, unless it is not wanted.

    Raises:
        ConfigError: it is wanted where there is no GPU.
    """
    if wanted is True and device.type != "cuda":
        raise ConfigError(
            "engine.cuda_graphs=true needs a GPU, and this command computes on the CPU. Set engine.cuda_graphs=auto, "
            "which records on GPUs alone"
        )
    return wanted is not False and device.type == "cuda"


def compiles(wanted: Literal["auto"] | bool, seconds: Callable[[], float], device: torch.device) -> bool:
    """Decide whether to compile: if there is a compiler, and if wanted, or automatic and so much work that it pays.

    Args:
        wanted: what the configuration says.
        seconds: estimates the work without a compiler; only called where that matters.
        device: kind of device.
    """
    if wanted == "auto":
        wanted = seconds() > SECONDS_WORTH_COMPILING
    return wanted and has_compiler(device.type)


def passes_of_labels(
    config: EngineConfig,
    backbones: Sequence[BackboneConfig],
    samples: int,
    classes: int,
    size: int,
    device: torch.device,
) -> Passes:
    """Decide how teachers compute.

    Args:
        config: what is wanted.
        backbones: of the teachers.
        samples: that each of them labels.
        classes: of the data set.
        size: side of the images in pixels.
        device: kind of device.
    """
    wanted = config.compile_labels
    if wanted == "auto" and device.type == "cpu":
        # Forward alone there is a tenth to win, with some networks nothing, and a minute a network to lose.
        wanted = False
    compiled = compiles(wanted, lambda: uncompiled_seconds(backbones, samples, 1, classes, size, device), device)
    return Passes(compiled, config.precision_labels, records(config.cuda_graphs, device))


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


def iteration_can_be_recorded(method: MethodConfig, split: bool) -> bool:
    """Whether an iteration of a method is the same for the device every time.

    Args:
        method: the method.
        split: whether ranks share each unit.
    """
    return method.turns == "all" and method.statistics == StatisticsConfig() and not method.density and not split


def judges_by_unit(method: MethodConfig) -> bool:
    """Whether units of a stack can be judged apart: not with statistics of a stack, nor with moving averages."""
    return method.statistics == StatisticsConfig() and method.statistics_of == "unit"


def choose_engine(config: EngineConfig, method: MethodConfig, work: Work, device: torch.device) -> Engine:
    """Decide what is automatic; the choice depends on the configuration, the kind of device and the compiler alone.

    Warns if there is no compiler where one is wanted, and of what is wanted and cannot be.
    """
    by_unit = judges_by_unit(method)
    if config.compile is True and (work.split or not by_unit):
        log.warning("engine.compile=true: nothing is compiled where ranks share a unit or statistics are of a stack")
    if config.units_per_pass != "auto" and not by_unit:
        log.warning(
            "engine.units_per_pass=%s: units of a stack are judged together where its statistics are matched",
            config.units_per_pass,
        )
    compiled = by_unit and not work.split and compiles(config.compile, lambda: work.seconds(device), device)
    precision = precision_of(config.precision, device)
    units: int | None = None
    if by_unit:
        most = max(PIXELS_PER_PASS // (work.unit_images * work.size**2), 1)
        if compiled and device.type == "cpu":
            most = max(min(most, PIXELS_PER_COMPILED_PASS // (work.unit_images * work.size**2)), 1)
        units = most if config.units_per_pass == "auto" else config.units_per_pass
        units = None if units >= work.units else units
    recorded = records(config.cuda_graphs, device) and iteration_can_be_recorded(method, work.split)
    return Engine(compiled, precision, units, recorded)


@functools.cache
def _compiled() -> Callable[..., Judgement]:
    # Trying several block sizes for each of hundreds of kernels takes longer than all else, and wins little.
    compiled = torch.compile(judge, options={"triton.autotune_pointwise": False})

    def judged(images: torch.Tensor, *arguments: Any, **options: Any) -> Judgement:
        for side in (-2, -1):
            # Stages may have two sizes of images. Code for all of them would be slower, and PyTorch 2.11 fails at it.
            torch._dynamo.mark_static(images, images.ndim + side)
        said: Judgement = compiled(images, *arguments, **options)
        return said

    return judged


@functools.cache
def has_compiler(device: Literal["cpu", "cuda"] | str) -> bool:
    """Whether PyTorch finds what it compiles with; says once what is missing."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        # Triton builds what launches its kernels with it.
        builder = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        found, missing = has_triton() and bool(builder), "triton, or the C compiler that it needs"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            found, missing = shutil.which(get_cpp_compiler()) is not None, "a C++ compiler"
        except Exception:
            # Each platform has errors of its own for that.
            found, missing = False, "a C++ compiler"
    if not found:
        log.warning("torch.compile lacks %s: nothing is compiled, and votes take several times as long", missing)
    return found


def forward_flops(backbone: BackboneConfig, classes: int, size: int) -> int:
    """Floating-point operations of a network's forward pass for one image; a multiplication and an addition are two."""
    return int(profile_of(backbone, classes, size, "forward").flops)


def ready_voter(name: str, network: nn.Module, bn_scale: float, engine: Engine) -> Voter:
    """Bring a network into the form in which it judges fastest.

    Args:
        name: of the member.
        network: frozen, in evaluation mode; it is kept as it is where its weights change type.
        bn_scale: factor on its statistics term.
        engine: how it judges.
    """
    if not engine.compile and engine.precision == "fp32":
        return Voter(name, network, bn_scale)
    on_gpu = next(network.parameters()).device.type == "cuda"
    dtype = torch.float32
    if engine.precision == "bf16":
        network, dtype = _in_half_precision(network), torch.bfloat16
        if not on_gpu:
            network = without_strided_depthwise(network)
        if not engine.compile:
            network = with_matrix_convolutions(network)
    network = network.to(memory_format=torch.channels_last)
    watch = None
    if engine.compile:
        if on_gpu:
            network = with_folded_stem(sharing_copy(network))
        network, watch = fuse_statistics(network)
        if on_gpu:
            network = _for_gpus(network)
    return Voter(name, network, bn_scale, dtype=dtype, channels_last=True, watch=watch)


def _for_gpus(network: nn.Module) -> nn.Module:
    if not has_compiler("cuda"):
        return network
    # Its operations are made known to PyTorch as it is imported, which no other machine needs.
    from cvdd.gpu_layers import with_gpu_layers

    return with_gpu_layers(network)


def _in_half_precision(network: nn.Module) -> nn.Module:
    cast = copy.deepcopy(network).to(torch.bfloat16)
    for original, module in zip(network.modules(), cast.modules(), strict=True):
        if isinstance(original, nn.BatchNorm2d):
            # Its statistics are what the images are matched to.
            module.float()
            module.load_state_dict(original.state_dict())
    return cast
