"""FLOPs and bytes of one image in a network, counted without computing anything; and how many images fit."""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvdd.backbones import BackboneConfig, build_network
from cvdd.computing.memory_limit import left_to_process

Mode = Literal["train", "vote", "forward"]

MEMORY = Path("/proc/meminfo")
"""Where Linux says what is free."""

SHARE = 0.8
"""Of the free memory that is planned with: what a step takes besides is not counted to the byte."""

BYTES_PER_PIXEL = 50_000
"""More than a published family takes for a pixel of an image: DenseNet121 takes 39,000 at 32 pixels, 2,600 at 224."""

_IMAGES = 2
"""BatchNorm cannot normalise a single sample that has shrunk to one pixel."""


@dataclass(frozen=True)
class Profile:
    """What one image costs.

    Attributes:
        flops: floating-point operations, two for each multiplication with its addition; backwards too, unless only a
            forward pass was asked for.
        activations: bytes that are held for the way back, or, of a forward pass alone, at its widest layer.
        weights: bytes of parameters and buffers.
    """

    flops: float
    activations: float
    weights: int


def profile(network: nn.Module, classes: int, size: int, mode: Mode) -> Profile:
    """Count the FLOPs and bytes of one image.

    Args:
        network: is left as it is.
        classes: its outputs.
        size: side of its input in pixels.
        mode: ``train`` (gradients of the parameters), ``vote`` (of the image alone), or ``forward`` (none).
    """
    weights = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    try:
        flops, activations = _trace(copy.deepcopy(network).to("meta"), classes, size, mode, torch.device("meta"))
    except NotImplementedError:
        # An operation that needs values cannot be followed without them.
        flops, activations = _trace(copy.deepcopy(network), classes, size, mode, torch.device("cpu"))
    return Profile(flops / _IMAGES, activations / _IMAGES, weights)


def _trace(network: nn.Module, classes: int, size: int, mode: Mode, device: torch.device) -> tuple[float, float]:
    network.train(mode == "train").requires_grad_(mode == "train")
    images = torch.zeros(_IMAGES, 3, size, size, device=device, requires_grad=mode == "vote")
    counter = FlopCounterMode(display=False)
    if mode == "forward":
        widest = _Widest(network)
        with counter, torch.no_grad():
            network(images)
        return float(counter.get_total_flops()), float(widest.bytes)
    held = _Held(network)
    targets = torch.zeros(_IMAGES, dtype=torch.int64, device=device)
    with counter, torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        nn.functional.cross_entropy(network(images), targets).backward()
    return float(counter.get_total_flops()), float(held.bytes)


class _Held:
    """Adds up the storages that are saved for the way back, each once, without those of the network itself."""

    def __init__(self, network: nn.Module) -> None:
        self._seen: dict[int, Any] = {}
        self.bytes = 0
        for tensor in (*network.parameters(), *network.buffers()):
            self._seen[_storage(tensor)] = tensor

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor. It is kept, so that no other one gets its place in memory."""
        if _storage(tensor) not in self._seen:
            self._seen[_storage(tensor)] = tensor.detach()
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        """Return it."""
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Widest:
    """Input and output of the layer where they are largest together, and as much again for its working memory."""

    def __init__(self, network: nn.Module) -> None:
        self.bytes = 0
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, 2 * sum(t.numel() * t.element_size() for t in tensors))


def free_memory(device: torch.device) -> float:
    """Bytes that could be taken now; what PyTorch holds of a GPU for later use is one's own to take."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return min(_free_in_machine(), left_to_process())


def _free_in_machine(information: Path = MEMORY) -> float:
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    # Other systems do not say what is free; half of what there is leaves the rest to what else runs.
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (OSError, ValueError):
        return 4e9


def profile_of(backbone: BackboneConfig, classes: int, size: int, mode: Mode) -> Profile:
    """Return the profile of a backbone, counted once; random weights do."""
    return _profile_of(backbone.model_copy(update={"pretrained": False}).model_dump_json(), classes, size, mode)


@functools.cache
def _profile_of(backbone: str, classes: int, size: int, mode: Mode) -> Profile:
    network = build_network(BackboneConfig.model_validate_json(backbone), classes, 0)
    return profile(network, classes, size, mode)


def surely_fits(images: int, size: int, networks: int, device: torch.device) -> bool:
    """Whether so many images would fit in any network, so that nothing needs to be counted."""
    return images * size**2 * networks * BYTES_PER_PIXEL < SHARE * free_memory(device)
