"""What ``engine=auto`` comes to: whether to compile, to record, and in which precision."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from cvdd.backbones import BackboneConfig
from cvdd.computing.footprint import profile_of
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

SECONDS_WORTH_COMPILING = 300.0
"""Of uncompiled work. A compiler takes one to three minutes for a pair of members, and leaves about half of it."""


RATES = {"cpu": (60e9, 1e-3), "cuda": (60e12, 2e-5)}
"""Roughly, of uncompiled networks: operations per second, and seconds that each image takes besides.

On an H200 a recorded, uncompiled judgement of ResNet18 at 32 pixels took 5.6 ms for 100 images, compiled 1.6 ms.
"""


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


def precision_of(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Decide what is automatic: bf16 on a GPU that has it."""
    if wanted != "auto":
        return wanted
    # Where it is emulated, convolutions are slower than in full precision, or missing.
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def precisions_of(wanted: Literal["auto", "fp32", "bf16"], kind: str) -> list[Literal["fp32", "bf16"]]:
    """List what :func:`precision_of` may decide on devices of a kind."""
    if wanted != "auto":
        return [wanted]
    return ["fp32", "bf16"] if kind == "cuda" else ["fp32"]


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
