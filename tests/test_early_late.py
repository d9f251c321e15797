"""What happens in the stages of a stack whose slots begin one after the other (DELT)."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PRIORS, same_files, small_network, tiny_context
from safetensors import safe_open
from safetensors.torch import load_file
from test_delt import BY_CLASS, LATE
from test_interruption import PulledPlug, stop_at
from test_reta import copied
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.augmentation.augment import denormalise, normalise
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.real_choice import anchors_of_units, chosen_positions, whole_images
from cvdd.chain.recover import RealSources, recover_stack
from cvdd.chain.retrieval import Retrieval, make_candidates
from cvdd.chain.unit_files import UNITS
from cvdd.methods.delt import first_stages
from cvdd.methods.fadrm import resized
from cvdd.support.curves import cosine
from cvdd.support.memory import OutOfMemory
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.units import Stack, Unit, plan_stages, unit_views
from cvdd.synthesis.voting import Voter

pytest_plugins = ["chain_fixtures"]


FOUR_UNITS = tuple(Unit(slot, 0, 0, 10) for slot in range(4))
START = torch.randint(0, 256, (10, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
"""Initial images of ten classes."""


def late_stack(composed: tuple[str, ...] = ()) -> Stack:
    """Four slots, in a unit of five classes or in four units of ten."""
    units = (Unit(0, 0, 0, 5, 4),) if composed else FOUR_UNITS
    return Stack(0, (0,), units, tuple(first_stages(4, 3)))


def images_of(home: Path, *overrides: str, store: Path | None = None) -> Artifact:
    return make_images(tiny_context(home, *LATE, *overrides, store=store), PRIORS)


def recovered(
    context: Context,
    stack: Stack,
    network: nn.Module,
    start: Tensor,
    weights: Tensor | None = None,
    **real: Any,
) -> list[Tensor]:
    """Images of each unit of a stack, uint8, of one member's vote."""
    output = context.config.paths.output
    (output / UNITS).mkdir(parents=True, exist_ok=True)
    members = [(Voter("resnet18", network), None)]
    done: list[int] = []
    weights = torch.ones(1, len(stack.units)) if weights is None else weights
    recover_stack(context, Engine(), stack, members, weights, RealSources(start, **real), output, done.append)
    assert sum(done) == context.config.method.iterations
    return [load_file(output / UNITS / f"{unit.name}.safetensors")["images"] for unit in stack.units]


def as_released(context: Context, stack: Stack, network: nn.Module, start: Tensor) -> Tensor:
    """The published loop for one unit: all images are one parameter, of which a round shows those that have begun.

    Adam is fresh in every round, as in every stage here.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    method, (unit,) = context.config.method, stack.units
    size = start.shape[-1]
    data = context.data()
    images = normalise(unit.of(start), data.mean, data.std)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, given, index=index: inputs.__setitem__(index, given[0]))
    begins = torch.tensor(first_stages(4, method.stages))[unit.slots_of_images]
    rounds = method.iterations // method.stages
    for stage in plan_stages(method, size):
        leaf = images.clone().requires_grad_()
        optimizer = torch.optim.Adam([leaf], lr=method.lr, betas=method.betas, eps=method.eps)
        views = unit_views(unit, method, stage)
        shown = (begins <= stage.index).nonzero()[:, 0]
        for step in range(rounds):
            iteration = stage.first + step
            optimizer.param_groups[0]["lr"] = method.lr * cosine(iteration, method.iterations)
            box = views.boxes[step].tolist()
            seen = vision.resized_crop(leaf[shown], *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
            seen = vision.hflip(seen) if views.flips[step] else seen
            seen = torch.roll(seen, views.shifts[step].tolist(), dims=(-2, -1))
            loss = nn.functional.cross_entropy(network(seen), unit.targets[shown])
            for index, layer in enumerate(layers):
                variance, mean = torch.var_mean(inputs[index], dim=(0, 2, 3), correction=0)
                term = (layer.running_var - variance).norm() + (layer.running_mean - mean).norm()
                loss = loss + method.r_bn * (10 if index == 0 else 1) * term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            low, high = ((bound - torch.tensor(data.mean)) / torch.tensor(data.std) for bound in (0.0, 1.0))
            with torch.no_grad():
                leaf.clamp_(low.view(3, 1, 1), high.view(3, 1, 1))
        images = leaf.detach()
    return denormalise(images, data.mean, data.std)


def test_a_unit_of_classes_is_optimised_as_released(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *LATE, *BY_CLASS, "method.crop_schedule=cosine", "method.lr=0.05")
    stack = late_stack(BY_CLASS)
    (made,) = recovered(context, stack, small_network(10).eval(), START)
    expected = as_released(context, stack, small_network(10).eval(), START)
    # A step of Adam may flip where a gradient is all but 0.
    assert ((made.int() - expected.int()).abs() <= 1).double().mean() > 0.995
    moved = (made.int() - stack.units[0].of(START).int()).abs().double().flatten(1).mean(dim=1)
    by_slot = moved.view(5, 4).mean(dim=0).tolist()
    assert by_slot[0] > 2 * by_slot[3] > 0


def test_slots_that_begin_late_are_those_of_fewer_stages(tmp_path: Path) -> None:
    """Units know nothing of each other: what begins at once is as without the others, to the last bits."""
    network = small_network(10).eval()
    late = tiny_context(tmp_path / "late", *LATE)
    usual = tiny_context(tmp_path / "usual", *LATE, "method.early_late=false")
    with_late = recovered(late, late_stack(), network, START)
    at_once = recovered(usual, Stack(0, (0,), FOUR_UNITS), network, START)
    for slot in (0, 1):
        assert (with_late[slot].int() - at_once[slot].int()).abs().max() <= 1
    for slot in (2, 3):
        assert not torch.equal(with_late[slot], at_once[slot])
    # The last slot sees the last stage alone.
    alone = recovered(
        tiny_context(tmp_path / "alone", *LATE), replace(late_stack(), units=FOUR_UNITS[3:]), network, START
    )
    assert (with_late[3].int() - alone[0].int()).abs().max() <= 1
    moved = [(made.int() - START[:, slot].int()).abs().double().mean() for slot, made in enumerate(with_late)]
    assert all(earlier > later for earlier, later in pairwise(moved[1:]))


@pytest.mark.parametrize("composed", [(), BY_CLASS])
@pytest.mark.parametrize("residual", [(), ("method.residual=0.5", "method.sizes=[24,16,32]")])
def test_what_begins_later_is_not_blended_before(
    composed: tuple[str, ...], residual: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins with a stage is the initial image at the stage's size, whatever the others went through."""
    context = tiny_context(tmp_path, *LATE, *composed, *residual)
    method, data = context.config.method, context.data()
    stack = late_stack(composed)
    seen = stages_of(context, stack, START, monkeypatch)
    initial = torch.stack([normalise(unit.of(START), data.mean, data.std) for unit in stack.units])
    left = initial[:0]
    for stage, (begins, ends, _) in zip(plan_stages(method, 32), seen, strict=True):
        slots = torch.stack([unit.slots_of_images for unit in stack.begun(stage.index)])
        now = torch.tensor(stack.begins)[slots] == stage.index
        expected = resized(stack.take_begun(initial, stage.index), stage.size)
        assert now.any()
        assert torch.equal(begins[now], expected[now])
        if stage.index:
            before = resized(left, stage.size)
            back = resized(stack.take_begun(initial, stage.index - 1), stage.size)
            blended = method.residual * before + (1 - method.residual) * back
            torch.testing.assert_close(begins[~now].view_as(blended), blended)
        left = ends


def stages_of(
    context: Context, stack: Stack, start: Tensor, monkeypatch: pytest.MonkeyPatch, **real: Any
) -> list[tuple[Tensor, Tensor, DistillModule]]:
    """Recover a stack; return of each stage the images that it begins and ends with, and its module."""
    seen: list[tuple[Tensor, Tensor, DistillModule]] = []
    fit = Context.fit

    def noting(self: Context, module: DistillModule, *arguments: Any) -> None:
        begins = module.images.detach().clone()
        fit(self, module, *arguments)
        seen.append((begins, module.images.detach().clone(), module))

    with monkeypatch.context() as patch:
        patch.setattr(Context, "fit", noting)
        recovered(context, stack, small_network(10).eval(), start, **real)
    return seen


def test_each_unit_has_its_own_shares_of_the_vote_in_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = late_stack()
    weights = torch.tensor([[1.0, 0.5, 0.25, 0.125]])
    seen = stages_of(
        tiny_context(tmp_path, *LATE), stack, torch.zeros(10, 4, 3, 32, 32).byte(), monkeypatch, weights=weights
    )
    assert [module.weights.tolist() for _, _, module in seen] == [weights[:, :count].tolist() for count in (2, 3, 4)]


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_a_unit_has_the_log_rows_since_it_began(composed: tuple[str, ...], tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *LATE, *composed)
    stack = late_stack(composed)
    recovered(context, stack, small_network(10).eval(), torch.zeros(10, 4, 3, 32, 32).byte())
    rows = []
    for unit in stack.units:
        with safe_open(context.config.paths.output / UNITS / f"{unit.name}.safetensors", "pt") as file:
            history = json.loads(file.metadata()["history"])
        rows.append([row["iteration"] for row in history["rows"]])
    assert rows == ([[2, 4, 6]] if composed else [[2, 4, 6], [2, 4, 6], [4, 6], [6]])


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_anchors_are_those_of_what_has_begun(
    composed: tuple[str, ...], chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = ("method.factor=2", "label.factor=2", "method.init=real", "method.anchors={weight: 1.0}")
    context = tiny_context(chain_home, *LATE, *composed, *four, f"paths.output={tmp_path}")
    stack = late_stack(composed)
    positions = chosen_positions(context, None)
    with monkeypatch.context() as patch:
        # Features are not what is looked at.
        patch.setattr("cvdd.synthesis.distill_module.DistillModule._aims", lambda self, view: None)
        seen = stages_of(context, stack, torch.zeros(10, 4, 3, 32, 32).byte(), monkeypatch, anchors=positions)
    for stage, (_, _, module) in enumerate(seen):
        assert torch.equal(module.anchors, anchors_of_units(context, positions, stack.begun(stage)).flatten(1, 2))


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_what_fits_is_blended_into_what_had_begun(
    composed: tuple[str, ...], chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = ("method.residual=0.5", "method.retrieval={complexity: 0}", f"paths.output={tmp_path}")
    context = tiny_context(chain_home, *LATE, *composed, *fitting)
    stack = late_stack(composed)
    retrieval = Retrieval.of(context, make_candidates(context))
    start = whole_images(context, chosen_positions(context, None))[:, :, 0]
    seen = stages_of(context, stack, start, monkeypatch, retrieval=retrieval)
    initial = torch.stack([normalise(unit.of(start), context.data().mean, context.data().std) for unit in stack.units])
    for stage in (1, 2):
        left, (begins, _, _) = seen[stage - 1][1], seen[stage]
        blended = 0.5 * left + 0.5 * retrieval.real_images(left, stack.begun(stage - 1))
        expected = stack.put_begun(blended, stage - 1, stack.take_begun(initial, stage))
        torch.testing.assert_close(begins, expected)


def test_units_of_a_pass_are_halved_of_those_that_have_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of four would be as many as have begun."""
    tried: list[tuple[int, int]] = []
    fit = Context.fit

    def short(self: Context, module: DistillModule, *arguments: Any) -> None:
        tried.append((len(module.images), module._per_pass))
        if module._per_pass > 1:
            raise OutOfMemory("too little")
        fit(self, module, *arguments)

    monkeypatch.setattr(Context, "fit", short)
    stack = late_stack()
    recovered(tiny_context(tmp_path, *LATE), stack, small_network(10).eval(), torch.zeros(10, 4, 3, 32, 32).byte())
    assert tried == [(2, 2), (2, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_what_is_interrupted_goes_on(
    composed: tuple[str, ...], made: object, chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = images_of(chain_home, *composed)
    store = copied(chain_home, tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, Context, "fit", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            images_of(chain_home, *composed, store=store)
    again = images_of(chain_home, *composed, store=store)
    assert again.path != usual.path
    assert same_files(again, usual)


def test_equal_images_are_one_artefact_whatever_begins_late(chain_home: Path) -> None:
    """Where nothing is optimised nothing begins."""
    kept = ("method.iterations=0", "method.name=patches")
    assert images_of(chain_home, *kept).path == images_of(chain_home, *kept, "method.early_late=false").path
