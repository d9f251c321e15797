"""What a network sees of images before it decides, and how far that is from what it sees of others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cvdd.backbones.heads import find_head, require_head
from cvdd.schema.anchors import HEAD
from cvdd.statistics.layer_statistics import InputWatch
from cvdd.support.config_base import ConfigError

FEATURES_AT_ONCE = 500
"""Images in a forward pass that looks at features alone."""


@torch.no_grad()
def head_features(network: nn.Module, images: Tensor, needed_by: str, batch: int = FEATURES_AT_ONCE) -> Tensor:
    """What goes into a network's last linear layer.

    Args:
        network: in evaluation mode.
        images: [n, 3, size, size], normalised, on any device.
        needed_by: the setting that needs it, for messages.
        batch: images per forward pass.

    Returns:
        [n, k] float32, on the CPU.

    Raises:
        ConfigError: it has no linear layer.
    """
    layer, device = require_head(network, needed_by)[1], next(network.parameters()).device
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(1).float().cpu()))
    try:
        for some in images.split(batch):
            network(some.to(device))
    finally:
        handle.remove()
    return torch.cat(seen)


def feature_layer(network: nn.Module, layer: str, member: str) -> str:
    """Return the name of the module whose input are a network's features.

    Args:
        network: the network.
        layer: ``head``, or the name of a module.
        member: whose network it is, for messages.

    Raises:
        ConfigError: the network has no such module.
    """
    names = [name for name, _ in network.named_modules() if name]
    found = layer
    if layer == HEAD:
        head = find_head(network)
        if head is None:
            raise ConfigError(
                f"method.anchors.layer={HEAD}: member {member} does not end in a linear layer; name one of its modules "
                f"({_outermost(names)}), or leave it out of the vote (method.voters)"
            )
        found, _ = head
    if found not in names:
        raise ConfigError(
            f"method.anchors.layer={layer}: member {member} has no module of that name; choose {HEAD}, or one of "
            f"{_outermost(names)}"
        )
    return found


def require_features(network: nn.Module, layer: str, member: str, side: int) -> None:
    """Refuse a layer whose input are no features: one that a forward pass calls not once, or with something else.

    Args:
        network: the network, in evaluation mode.
        layer: ``head``, or the name of a module.
        member: whose network it is, for messages.
        side: of its images in pixels.

    Raises:
        ConfigError: the network has no such module, or its input is no single map.
    """
    name, given = feature_layer(network, layer, member), list[object]()
    handle = network.get_submodule(name).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, side, side))
    finally:
        handle.remove()
    if len(given) != 1 or not isinstance(given[0], Tensor):
        calls = "is given several maps" if len(given) == 1 else f"is called {len(given)} times in a forward pass"
        raise ConfigError(
            f"method.anchors.layer={layer}: module {name} of member {member} {calls}; choose {HEAD}, or a module that "
            "is called once, with one map"
        )


def _outermost(names: list[str]) -> str:
    return ", ".join(name for name in names if "." not in name)


class FeatureWatch(InputWatch[Tensor]):
    """Keeps what goes into one layer in each forward pass, for good.

    Args:
        network: the network to watch.
        layer: name of a module that is called once in a pass.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__({layer: network.get_submodule(layer)}, lambda name, inputs: inputs)
        self._layer = layer
        self.__enter__()

    def take(self) -> Tensor:
        """Return the features of the last pass, [n, k], in float32 at least, and let go of them.

        Raises:
            ConfigError: the network does not call the layer.
        """
        if self._layer not in self._measured:
            raise ConfigError(
                f"method.anchors.layer={self._layer}: a forward pass does not call this module; choose another"
            )
        features = self._measured[self._layer].flatten(1)
        self.forget()
        return features


def feature_distance(shown: Tensor, aims: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """Distance of each image's features from those of its anchor, [n], mean over features.

    Args:
        shown: [n, k].
        aims: [n, k], without gradient.
        kind: ``l1`` (absolute differences, as CIM's program has it) or ``l2`` (squared, equation 9).
    """
    difference = shown - aims
    return difference.abs().mean(dim=1) if kind == "l1" else difference.square().mean(dim=1)
