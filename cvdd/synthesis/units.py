"""Units and stacks: what is optimised together, what shares a forward pass, and what each unit sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cvdd.augmentation.augment import Views, draw_views, in_cells, view_matrices
from cvdd.augmentation.dsa import draw_cuts
from cvdd.methods.cda import lowest_area
from cvdd.methods.delt import first_stages
from cvdd.schema import MethodConfig, RunConfig
from cvdd.support.seeds import generator
from cvdd.synthesis.committee import Draw


@dataclass(frozen=True)
class Unit:
    """Images that are optimised together and depend on nothing outside: one or more slots of a block of classes.

    Attributes:
        slot: its first IPC slot, 0 to IPC - 1.
        block: index of the block of classes.
        start: first class.
        stop: class after the last.
        slots: number of consecutive slots.
    """

    slot: int
    block: int
    start: int
    stop: int
    slots: int = 1

    @property
    def classes(self) -> int:
        """How many classes it has images of."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"slot{self.slot:04d}_block{self.block:04d}"

    @property
    def targets(self) -> Tensor:
        """Class of each image, [images]: class after class, and slot after slot within a class."""
        return torch.arange(self.start, self.stop).repeat_interleave(self.slots)

    @property
    def slots_of_images(self) -> Tensor:
        """Slot of each image, [images]."""
        return torch.arange(self.slot, self.slot + self.slots).repeat(self.stop - self.start)

    def of(self, images: Tensor) -> Tensor:
        """Pick this unit's images out of [classes, ipc, ...]: [images, ...]."""
        return images[self.start : self.stop, self.slot : self.slot + self.slots].flatten(0, 1)


@dataclass(frozen=True)
class Stack:
    """Units with the same draw and the same shape that share a forward pass.

    The partition into stacks is fixed by the configuration, because floating point makes it show in the last bits.

    Attributes:
        index: its number.
        draw: the members that vote.
        units: by slot, ascending.
        begins: stage in which each slot of the whole set begins, ascending; empty where all begin with the first.
    """

    index: int
    draw: Draw
    units: tuple[Unit, ...]
    begins: tuple[int, ...] = ()

    def first_stage(self, unit: Unit) -> int:
        """Stage in which the first slot of a unit begins."""
        return self.begins[unit.slot] if self.begins else 0

    def begun(self, stage: int) -> tuple[Unit, ...]:
        """Units of which at least a slot has begun by a stage, with the slots that have: the first, and their first."""
        if not self.begins:
            return self.units
        cut = (
            replace(unit, slots=sum(begins <= stage for begins in self.begins[unit.slot : unit.slot + unit.slots]))
            for unit in self.units
        )
        return tuple(unit for unit in cut if unit.slots)

    def take_begun(self, images: Tensor, stage: int) -> Tensor:
        """Pick what has begun by a stage out of [units, images, ...] of the whole stack."""
        units = self.begun(stage)
        if units == self.units:
            return images
        by_slot: Tensor = images.unflatten(1, (units[0].classes, -1))
        return by_slot[: len(units), :, : units[0].slots].flatten(1, 2)

    def put_begun(self, images: Tensor, stage: int, into: Tensor) -> Tensor:
        """Return ``into``, [units, images, ...] of what has begun by a later stage, with that of this one replaced."""
        units = self.begun(stage)
        shape = (units[0].classes, -1)
        joined: Tensor = into.unflatten(1, shape).clone()
        joined[: len(units), :, : units[0].slots] = images.unflatten(1, shape)
        return joined.flatten(1, 2)


def as_composed(config: RunConfig) -> MethodConfig:
    """Return the method as its images are composed into units.

    Where nothing is optimised a unit is no more than a file, so that equal images are one artefact, whatever method
    they stand beside.
    """
    if config.method.iterations:
        return config.method
    slots = {"composer": "slots", "classes_per_unit": config.dataset.classes_per_unit, "slots_per_unit": None}
    return config.method.model_copy(update=slots)


def plan_units(ipc: int, classes: int, method: MethodConfig) -> list[Unit]:
    """List all units of a distilled set, in the order in which committees are drawn for them.

    With ``composer=slots`` a unit is one slot of a block of classes; with ``composer=classes`` it is all slots of a
    block, or ``slots_per_unit`` of them.
    """
    per_unit = 1 if method.composer == "slots" else min(method.slots_per_unit or ipc, ipc)
    return [
        Unit(slot, block, start, min(start + method.classes_per_unit, classes), min(per_unit, ipc - slot))
        for slot in range(0, ipc, per_unit)
        for block, start in enumerate(range(0, classes, method.classes_per_unit))
    ]


def plan_stacks(units: Sequence[Unit], draws: Sequence[Draw], method: MethodConfig) -> list[Stack]:
    """Partition units into stacks: by draw and shape, in order, at most ``method.units_per_stack`` each.

    Where voters have statistics of their own for each slot, a stack has units of one slot; where slots begin in
    different stages, and a unit has several of them, units whose slots begin alike.

    Args:
        units: all units.
        draws: the members that vote on each.
        method: how images are made.
    """
    begins: tuple[int, ...] = ()
    if method.begins_late:
        begins = tuple(first_stages(max(unit.slot + unit.slots for unit in units), method.stages))
    groups: dict[tuple[Draw, int, int, int, tuple[int, ...]], list[Unit]] = {}
    for unit, draw in zip(units, draws, strict=True):
        slot = 0 if method.grades is None else unit.slot
        alike = begins[unit.slot : unit.slot + unit.slots] if unit.slots > 1 else ()
        groups.setdefault((draw, unit.classes, unit.slots, slot, alike), []).append(unit)
    most = method.units_per_stack
    parts = [
        (draw, tuple(group[first : first + most]))
        for (draw, *_), group in groups.items()
        for first in range(0, len(group), most)
    ]
    return [Stack(index, draw, part, begins) for index, (draw, part) in enumerate(parts)]


def draw_per_unit(units: Sequence[Unit], method: MethodConfig, draw: Callable[[int], Draw]) -> list[Draw]:
    """Draw a committee for every unit: one for each slot, or, where a unit has several slots, one for each unit."""
    if method.composer == "slots":
        return [draw(unit.slot) for unit in units]
    return [draw(index) for index in range(len(units))]


@dataclass(frozen=True)
class Stage:
    """A part of the iterations with an optimiser and a size of its own (specification of FADRM, section 2).

    Attributes:
        index: 0 for the first.
        first: its first iteration.
        last: the iteration after its last.
        size: side of the images in pixels.
    """

    index: int
    first: int
    last: int
    size: int


def plan_stages(method: MethodConfig, size: int) -> list[Stage]:
    """Cut the iterations into equal stages; ``size`` is the side of the data set's images."""
    length = method.iterations // method.stages
    sizes = method.sizes or [size] * method.stages
    return [Stage(index, index * length, (index + 1) * length, side) for index, side in enumerate(sizes)]


def unit_views(unit: Unit, method: MethodConfig, stage: Stage) -> Views:
    """Draw the crops, flips and shifts of a unit in one stage from (``method.seed``, slot, block, stage) alone.

    With ``method.pad`` a box has the size of the image and may begin up to so many pixels outside it. With
    ``method.factor`` it lies in one of the images that each image is made of, in one iteration in the same of all, but
    with ``method.anchors`` all of these are seen through the same view.
    """
    source = generator(method.seed, "recover", unit.slot, unit.block, *([stage.index] if stage.index else []))
    parts = method.factor if method.anchored is None else 1
    count, size = stage.last - stage.first, stage.size // parts
    jitter = 2 * method.jitter if method.jitter_both_ways else method.jitter
    if method.crop_schedule == "constant" or method.crop_scale is None:
        views = draw_views(count, size, size, method.crop_scale, method.flip, jitter, source)
    else:
        low, high = method.crop_scale
        lowest = [
            lowest_area(iteration, method.iterations, method.crop_schedule, method.crop_milestone, low)
            for iteration in range(stage.first, stage.last)
        ]
        views = Views.cat([draw_views(1, size, size, (a, max(a, high)), method.flip, jitter, source) for a in lowest])
    if parts > 1:
        cells = generator(method.seed, "cells", unit.slot, unit.block, stage.index)
        views = in_cells(views, parts, size, cells)
    boxes, shifts = views.boxes, views.shifts
    if method.pad:
        offsets = torch.randint(-method.pad, method.pad + 1, (count, 2), generator=source)
        boxes = torch.cat([offsets, boxes[:, 2:]], dim=1)
    if method.jitter_both_ways:
        shifts = shifts - method.jitter
    cuts = None
    if method.cutout:
        # From a generator of its own, so that it changes nothing else.
        squares = generator(method.seed, "cutout", unit.slot, unit.block, stage.index)
        cuts = draw_cuts(count, stage.size, squares, method.cutout)
    return Views(boxes, views.flips, shifts, cuts)


def unit_matrices(views: Views, size: int) -> tuple[Tensor, Tensor]:
    """Return the row and column matrices of a unit's views, each [n, size, size].

    A box that begins outside the image shows the mean colour there: images are normalised, so that is 0.
    """
    boxes = views.boxes
    outside = boxes[:, :2].amin(dim=1) < 0
    if not bool((outside | (boxes[:, :2] + boxes[:, 2:] > size).any(dim=1)).any()):
        return view_matrices(views, size, size, size)
    all_of_it = torch.tensor([0, 0, size, size], device=boxes.device).expand(len(boxes), 4)
    rows, columns = view_matrices(Views(all_of_it, views.flips, views.shifts), size, size, size)
    place = torch.arange(size, device=boxes.device)
    shifted = [(place[:, None] + offset[:, None, None] == place).float() for offset in boxes[:, :2].unbind(dim=1)]
    return rows @ shifted[0], columns @ shifted[1]


class View(NamedTuple):
    """What voters see of a stack in an iteration.

    Attributes:
        rows: [units, size, size] of :func:`unit_matrices`.
        columns: likewise.
        left: [units, size, size] 0 where a square is cut out, else 1; None where none is.
    """

    rows: Tensor
    columns: Tensor
    left: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is of it, in order."""
        return tuple(part for part in self if part is not None)
