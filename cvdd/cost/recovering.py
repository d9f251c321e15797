"""All that the cost model knows of the recover engine: how stacks are cut, and what a step of one is.

Whoever changes the engine changes this file with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.augmentation.augment import apply_matrices, enlarged_parts
from cvdd.schema import MethodConfig
from cvdd.synthesis.committee import turn_weights
from cvdd.synthesis.engine import Engine, ready_voter
from cvdd.synthesis.units import Stage, Unit, plan_stacks, plan_stages, plan_units, unit_matrices, unit_views
from cvdd.synthesis.voting import judge

COMPILED_SHARE = 1 / 3
"""Share of the time of plain kernels that compiled ones take."""

COMPILE_SECONDS = 30.0
"""That a compiler takes for each member and number of units. Compiling once more to measure it would take as long."""


@dataclass(frozen=True)
class Pass:
    """How often a member judges so many units at once.

    Attributes:
        member: its index among those that vote.
        units: in one forward pass.
        times: forward and backward passes in all iterations of a stage.
    """

    member: int
    units: int
    times: float


@dataclass(frozen=True)
class StackWork:
    """One stage of one stack.

    Attributes:
        units: of the stack.
        images: of each unit.
        size: of the images in pixels.
        iterations: optimiser steps.
        rows: log rows, each a batch of Lightning.
        epochs: of Lightning.
        passes: of the members.
    """

    units: int
    images: int
    size: int
    iterations: int
    rows: int
    epochs: int
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class RecoverPlan:
    """All stacks of a distilled set.

    Attributes:
        units: all units.
        stacks: number of stacks.
        work: one for each stage of each stack.
    """

    units: tuple[Unit, ...]
    stacks: int
    work: tuple[StackWork, ...]


def plan_recover(
    method: MethodConfig,
    ipc: int,
    classes: int,
    size: int,
    draws: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    engine: Engine,
) -> RecoverPlan:
    """Cut a distilled set into stacks.

    Args:
        method: how images are made.
        ipc: images per class.
        classes: number of classes.
        size: side of the images in pixels.
        draws: of each unit, the members that vote.
        weights: of each unit, their shares.
        engine: how members judge.
    """
    units = plan_units(ipc, classes, method)
    voting = [tuple(draw) for draw in draws] or [()] * len(units)
    stacks = plan_stacks(units, voting, method)
    shares = dict(zip(units, weights, strict=True)) if method.iterations else {}
    work = []
    for stack in stacks if method.iterations else ():
        times = _times([list(shares[unit]) for unit in stack.units], method)
        for stage in plan_stages(method, size):
            units_begun = stack.begun(stage.index)
            if not units_begun:
                continue
            steps = stage.last - stage.first
            rows = math.ceil(steps / method.log_every)
            # Where all judge anyway, their gradients are there to be compared.
            compared = method.log_agreement and len(stack.draw) > 1 and method.turns != "all"
            passes = tuple(
                Pass(member, units_at_once, often * (share * steps + (rows if compared else 0)))
                for member, share in zip(stack.draw, times, strict=True)
                for units_at_once, often in _cut(len(units_begun), engine)
            )
            epochs = math.ceil(steps / method.checkpoint_every)
            images = len(units_begun[0].targets)
            work.append(StackWork(len(units_begun), images, stage.size, steps, rows, epochs, passes))
    return RecoverPlan(tuple(units), len(stacks), tuple(work))


def engine_of(identity: Mapping[str, Any]) -> Engine:
    """Return how members judge, from what determines a distilled set."""
    return Engine(**identity.get("engine", {}))


def _cut(units: int, engine: Engine) -> list[tuple[int, int]]:
    """Units in a forward pass, and how many passes have so many, for a whole stack."""
    most = engine.units_per_pass or units
    whole, rest = divmod(units, most)
    return [(size, often) for size, often in ((most, whole), (rest, 1)) if size and often]


def _times(shares: list[list[float]], method: MethodConfig) -> list[float]:
    """Share of the iterations that each member judges."""
    if method.turns == "all":
        return [1.0] * len(shares[0])
    turns = turn_weights(torch.tensor(shares).T, method.turns, method.iterations, method.seed)
    judged: list[float] = turns.bool().any(dim=2).double().mean(dim=0).tolist()
    return judged


def vote(
    network: nn.Module,
    units: int,
    images: int,
    classes: int,
    size: int,
    device: torch.device,
    *,
    matched: bool,
    engine: Engine,
) -> Callable[[], None]:
    """Return one member's judgement of random images with its gradient, as the engine computes it, but not compiled."""
    plain = replace(engine, compile=False)
    voter = ready_voter("", network.eval().requires_grad_(False).to(device), 1.0, plain)
    shown = torch.randn(units, images, 3, size, size, device=device, requires_grad=True)
    targets = (torch.arange(images, device=device) % classes).expand(units, images).contiguous()

    def step() -> None:
        judgement = judge(shown, targets, voter, r_bn=1.0 if matched else 0.0, first_bn_multiplier=1.0)
        torch.autograd.grad(judgement.value.sum(), shown)

    return step


def move(units: int, images: int, size: int, method: MethodConfig, device: torch.device) -> Callable[[], None]:
    """Return what ``method.iterations`` iterations do besides voting: views, the optimiser and the clamp."""
    stage = Stage(0, 0, method.iterations, size)
    parameter = nn.Parameter(torch.randn(units, images, 3, size, size, device=device))
    anchors = (
        None
        if method.anchored is None
        else torch.randn(units, images * method.parts_judged, 3, size, size, device=device)
    )
    optimizer = torch.optim.Adam([parameter], lr=method.lr, betas=method.betas, eps=method.eps, foreach=False)
    members = [Unit(0, block, 0, images) for block in range(units)]

    def steps() -> None:
        matrices = [unit_matrices(unit_views(unit, method, stage), size) for unit in members]
        rows = torch.stack([pair[0] for pair in matrices]).to(device)
        columns = torch.stack([pair[1] for pair in matrices]).to(device)
        left = torch.ones(units, 1, 1, size, size, device=device) if method.cutout else 1.0
        for index in range(method.iterations):
            optimizer.zero_grad()
            shown = parameter if anchors is None else enlarged_parts(parameter, method.factor)
            seen: Tensor = apply_matrices(shown, rows[:, index], columns[:, index]) * left
            seen.sum().backward()
            if anchors is not None:
                apply_matrices(anchors, rows[:, index], columns[:, index]) * left
            optimizer.step()
            with torch.no_grad():
                parameter.clamp_(-2, 2)

    return steps
