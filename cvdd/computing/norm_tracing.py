"""Networks as graphs of operations, to make what follows a BatchNorm layer a part of it."""

from __future__ import annotations

import logging
import operator

import torch
from torch import fx, nn

log = logging.getLogger(__name__)

RECTIFIERS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)

SUMS = (operator.add, operator.iadd, torch.add)


class Norm(nn.Module):
    """What a BatchNorm layer has that others can become a part of.

    Attributes:
        rectifies: whether what is below zero becomes zero, after all else.
        after: what follows by itself, if anything.
    """

    rectifies: bool
    after: nn.Module


def with_parts(network: nn.Module, kind: type[Norm], whole: type[nn.Module], sums: bool) -> nn.Module:
    """Make rectifiers, and sums, a part of the BatchNorm layers whose maps only they see.

    Args:
        network: whose layers are told; it is not used any more afterwards.
        kind: of the layers; of a sum, they take the other term as their second argument.
        whole: kind of modules that are not looked into.
        sums: whether sums become a part too.

    Returns:
        the network, or another that holds its layers; the network itself if PyTorch cannot trace it.
    """
    for layer in network.modules():
        if isinstance(layer, kind) and _only_rectifies(layer.after):
            layer.rectifies, layer.after = True, nn.Identity()
    try:
        traced = fx.GraphModule(network, _Tracer(kind, whole).trace(network))
    except Exception as error:
        # Each network has errors of its own for what cannot be traced; it adds and rectifies by itself then.
        log.debug("%s cannot be traced: %s", type(network).__name__, error)
        return network
    for make_part in (_with_sum, _with_rectifier) if sums else (_with_rectifier,):
        for node in list(traced.graph.nodes):
            make_part(node, traced, kind)
    traced.recompile()
    return traced


def _only_rectifies(after: nn.Module) -> bool:
    """Whether it is what timm's BatchNorm layers with a rectifier have."""
    kinds = [type(module) for module in after.children() if type(module) is not nn.Identity]
    return kinds == [nn.ReLU]


class _Tracer(fx.Tracer):
    """Looks into modules only for the sake of the layers inside."""

    def __init__(self, kind: type[Norm], whole: type[nn.Module]) -> None:
        super().__init__()
        self._kind, self._leaves = kind, (kind, whole)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self._leaves) or not any(isinstance(part, self._kind) for part in module.modules())


def _with_sum(node: fx.Node, traced: fx.GraphModule, kind: type[Norm]) -> None:
    if node.op != "call_function" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return
    for own, other in (node.args, reversed(node.args)):
        if not isinstance(own, fx.Node) or not isinstance(other, fx.Node) or own is other:
            return
        given = own.args[0] if _called_by_one(own, traced, kind) else None
        # The layer is called later than before: nobody may have changed in place what it is given.
        if isinstance(given, fx.Node) and len(given.users) == 1:
            with traced.graph.inserting_before(node):
                both = traced.graph.call_module(str(own.target), (given, other))
            node.replace_all_uses_with(both)
            traced.graph.erase_node(node)
            traced.graph.erase_node(own)
            return


def _with_rectifier(node: fx.Node, traced: fx.GraphModule, kind: type[Norm]) -> None:
    own = node.args[0] if node.args and _is_rectifier(node, traced) else None
    if isinstance(own, fx.Node) and (layer := _called_by_one(own, traced, kind)) is not None:
        layer.rectifies = True
        node.replace_all_uses_with(own)
        traced.graph.erase_node(node)


def _called_by_one(node: object, traced: fx.GraphModule, kind: type[Norm]) -> Norm | None:
    """The layer that a node calls, if nobody else calls it and only one other node sees what it returns."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None
    layer = traced.get_submodule(str(node.target))
    if not isinstance(layer, kind) or layer.rectifies or not isinstance(layer.after, nn.Identity):
        return None
    same = [one for one in traced.graph.nodes if one.op == "call_module" and one.target == node.target]
    return layer if len(same) == 1 else None


def _is_rectifier(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in RECTIFIERS
