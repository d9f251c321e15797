"""How members judge images fast: compiled, in half precision, so many units at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from cvdd.backbones import BackboneConfig
from cvdd.computing.automatic import compiles, has_compiler, precision_of, precisions_of, records, uncompiled_seconds
from cvdd.computing.copies import sharing_copy
from cvdd.computing.depthwise import without_strided_depthwise
from cvdd.computing.fusion import fuse_statistics
from cvdd.computing.matrix_convolution import with_matrix_convolutions
from cvdd.computing.stem import with_folded_stem
from cvdd.schema import AnchorsConfig, EngineConfig, MethodConfig
from cvdd.schema.anchors import HEAD
from cvdd.schema.method import StatisticsConfig
from cvdd.statistics.features import FeatureWatch, feature_layer
from cvdd.synthesis.voting import Judgement, Voter, judge

PIXELS_PER_PASS = 100 * 256 * 256
"""The most that a member is shown at once; more fills no device better and costs memory."""

PIXELS_PER_COMPILED_PASS = 100 * 32 * 32
"""On a CPU compiled code gains little from more, and memory grows."""


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
        split: whether ranks share each unit.
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


def why_not_compiled(method: MethodConfig, split: bool) -> str | None:
    """Say why judgements cannot be compiled; None where they can.

    Args:
        method: how images are made.
        split: whether ranks share each unit.
    """
    if split:
        # Their sums are made between the layers.
        return "where ranks share a unit (trainer.split_units)"
    if not judges_by_unit(method):
        return f"of method={method.name}, whose statistics are {_unusual(method)}"
    if method.anchored is not None and method.anchored.layer != HEAD:
        # Compiled code goes through a layer that has others inside as one piece.
        return f"of method={method.name}, whose features are those of a layer inside (method.anchors.layer)"
    return None


def can_be_compiled(method: MethodConfig, split: bool) -> bool:
    """Whether judgements can be compiled; arguments are those of :func:`why_not_compiled`."""
    return why_not_compiled(method, split) is None


def choose_engine(config: EngineConfig, method: MethodConfig, work: Work, device: torch.device) -> Engine:
    """Decide what is automatic; the choice depends on the configuration, the kind of device and the compiler alone.

    Warns if there is no compiler where one is wanted.
    """
    by_unit = judges_by_unit(method)
    compilable = can_be_compiled(method, work.split)
    compiled = compilable and compiles(config.compile, lambda: work.seconds(device), device)
    precision = precision_of(config.precision, device)
    units = _units_per_pass(config, work, compiled, device.type) if by_unit else None
    recorded = records(config.cuda_graphs, device) and iteration_can_be_recorded(method, work.split)
    return Engine(compiled, precision, units, recorded)


def vain_wishes(config: EngineConfig, method: MethodConfig, split: bool) -> list[str]:
    """Say what is wished for and cannot be, a line for each wish.

    Args:
        config: the wishes.
        method: how images are made.
        split: whether ranks share each unit.
    """
    said = []
    if config.compile is True and (why := why_not_compiled(method, split)):
        said.append(f"engine.compile=true: no judgement is compiled {why}")
    if config.units_per_pass != "auto" and not judges_by_unit(method):
        said.append(
            f"engine.units_per_pass={config.units_per_pass}: units of a stack are judged together by method="
            f"{method.name}, whose statistics are {_unusual(method)}"
        )
    return said


def _unusual(method: MethodConfig) -> str:
    if method.statistics_of == "stack":
        return "those of all units of a stack (method.statistics_of=stack)"
    changed = method.statistics.model_dump(exclude_defaults=True)
    return f"more than those of BatchNorm layers ({', '.join(f'method.statistics.{name}' for name in changed)})"


def engines_elsewhere(config: EngineConfig, method: MethodConfig, work: Work) -> list[Engine]:
    """List what :func:`choose_engine` may decide on any kind of machine, but for what is recorded."""
    by_unit, compilable = judges_by_unit(method), can_be_compiled(method, work.split)
    compiled = ([False, True] if config.compile == "auto" else [config.compile]) if compilable else [False]
    return [
        Engine(one, precision, _units_per_pass(config, work, one, kind) if by_unit else None)
        for kind in ("cpu", "cuda")
        for precision in precisions_of(config.precision, kind)
        for one in compiled
    ]


def _units_per_pass(config: EngineConfig, work: Work, compiled: bool, kind: str) -> int | None:
    most = max(PIXELS_PER_PASS // (work.unit_images * work.size**2), 1)
    if compiled and kind == "cpu":
        most = max(min(most, PIXELS_PER_COMPILED_PASS // (work.unit_images * work.size**2)), 1)
    units = most if config.units_per_pass == "auto" else config.units_per_pass
    return None if units >= work.units else units


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


def ready_voter(
    name: str, network: nn.Module, bn_scale: float, engine: Engine, anchors: AnchorsConfig | None = None
) -> Voter:
    """Bring a network into the form in which it judges fastest.

    Args:
        name: of the member.
        network: frozen, in evaluation mode; it is kept as it is where its weights change type.
        bn_scale: factor on its statistics term.
        engine: how it judges.
        anchors: of whose features; None for none.

    Raises:
        ConfigError: it has no layer whose input the features are.
    """
    layer = None if anchors is None else feature_layer(network, anchors.layer, name)
    if not engine.compile and engine.precision == "fp32":
        return Voter(name, network, bn_scale, features=_watched(network, layer))
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
    features = _watched(network, layer)
    return Voter(name, network, bn_scale, dtype=dtype, channels_last=True, watch=watch, features=features)


def _watched(network: nn.Module, layer: str | None) -> FeatureWatch | None:
    return None if layer is None else FeatureWatch(network, layer)


def hand_over(voter: Voter, other: Voter) -> None:
    """Give a voter the weights and statistics of another one that was made ready alike, and keep its compiled code.

    Args:
        voter: stays the same object.
        other: of the same network.
    """
    with torch.no_grad():
        for mine, theirs in zip(_tensors(voter), _tensors(other), strict=True):
            mine.copy_(theirs)


def _tensors(voter: Voter) -> list[torch.Tensor]:
    watched = voter.watch.tensors if voter.watch is not None else []
    return [*voter.network.parameters(), *voter.network.buffers(), *watched]


def _for_gpus(network: nn.Module) -> nn.Module:
    if not has_compiler("cuda"):
        return network
    # Its operations are made known to PyTorch as it is imported, which no other machine needs.
    from cvdd.computing.gpu_layers import with_gpu_layers

    return with_gpu_layers(network)


def _in_half_precision(network: nn.Module) -> nn.Module:
    cast = copy.deepcopy(network).to(torch.bfloat16)
    for original, module in zip(network.modules(), cast.modules(), strict=True):
        if isinstance(original, nn.BatchNorm2d):
            # Its statistics are what the images are matched to.
            module.float()
            module.load_state_dict(original.state_dict())
    return cast
