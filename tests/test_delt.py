"""DELT: slots that begin one after the other, and the real images that they begin with."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from helpers import PRIORS, method_config, same_files, small_network, tiny_context
from safetensors.torch import load_file
from test_interruption import PulledPlug
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.augment import denormalise, normalise
from cvdd.chain.images import _work, make_images
from cvdd.chain.initial import make_start
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_choice import POSITIONS, drawn_images, whole_images
from cvdd.chain.recover import RealSources, recover_stack, require_splittable
from cvdd.chain.unit_files import UNITS, load_images
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import VoteStep
from cvdd.cost.work import work_of
from cvdd.engine import Engine
from cvdd.methods.delt import around_the_middle, first_stages
from cvdd.patches import score_crops
from cvdd.schedules import cosine
from cvdd.schema import members_used
from cvdd.seeds import derive_seed, generator
from cvdd.units import Stack, Stage, Unit, plan_stacks, plan_stages, plan_units, unit_views
from cvdd.voting import Voter

pytest_plugins = ["chain_fixtures"]

LATE = ("method.stages=3", "method.early_late=true", "ipc.images_per_class=4", "patches.images_per_class=4")
"""Four slots that begin in stages 0, 0, 1 and 2, of two iterations each."""

BY_CLASS = ("method.composer=classes", "method.classes_per_unit=5")


# --- when slots begin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [1, 5, 8, 10, 50])
def test_slots_begin_as_evenly_as_they_can(ipc: int) -> None:
    begins = first_stages(ipc, 8)
    assert len(begins) == ipc
    assert begins == sorted(begins)
    counts = [begins.count(stage) for stage in range(8)]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_the_published_setting() -> None:
    """Of ten slots two begin with each of the first two rounds; 4000 iterations become 2550 in the mean."""
    begins = first_stages(10, 8)
    assert begins == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    assert sum(4000 - 500 * stage for stage in begins) / 10 == 2550


def test_the_middle_comes_first_and_easier_ones_before_harder() -> None:
    """By the probability of the class, ascending; of six the fourth is in the middle."""
    losses = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.6, 0.4])
    hardest_first = [4, 2, 5, 0, 3, 1]
    assert around_the_middle(losses, 6).tolist() == [hardest_first[place] for place in (3, 4, 2, 5, 1, 0)]
    assert around_the_middle(losses[:5], 2).tolist() == [3, 1]
    assert around_the_middle(losses[:1], 1).tolist() == [0]


# --- stacks -----------------------------------------------------------------------------------------------------------


def numbered(stack: Stack, classes: int) -> Tensor:
    """[units, images]: a hundred times the slot of each image, and its class."""
    assert all(unit.classes == classes for unit in stack.units)
    return torch.stack([100 * unit.slots_of_images + unit.targets for unit in stack.units])


@pytest.mark.parametrize("composer", ["slots", "classes"])
def test_what_has_begun_is_picked_and_put_back(composer: str) -> None:
    method = method_config(
        composer=composer, classes_per_unit=3, stages=3, iterations=6, early_late=True, units_per_stack=99
    )
    units = plan_units(5, 6, method)
    (stack,) = plan_stacks(units, [(0,)] * len(units), method)
    assert stack.begins == (0, 0, 1, 1, 2)
    everything = numbered(stack, 3)
    for stage, slots in ((0, 2), (1, 4), (2, 5)):
        begun = stack.begun(stage)
        picked = stack.take_begun(everything, stage)
        expected = [100 * unit.slots_of_images + unit.targets for unit in begun]
        assert picked.tolist() == torch.stack(expected).tolist()
        assert sorted(picked.flatten().tolist()) == [100 * slot + label for slot in range(slots) for label in range(6)]
    later = stack.take_begun(everything, 1)
    joined = stack.put_begun(-1 - stack.take_begun(everything, 0), 0, later)
    # Slots 0 and 1 are those of the first stage.
    assert torch.equal(joined, torch.where(later < 200, -1 - later, later))


def test_units_of_several_slots_share_a_stack_where_these_begin_alike() -> None:
    method = method_config(
        composer="classes", classes_per_unit=3, slots_per_unit=2, stages=4, iterations=8, early_late=True
    )
    units = plan_units(8, 6, method)
    stacks = plan_stacks(units, [(0,)] * len(units), method)
    assert [sorted({unit.slot for unit in stack.units}) for stack in stacks] == [[0], [2], [4], [6]]
    assert [stack.begun(1) == () for stack in stacks] == [False, False, True, True]
    together = method.model_copy(update={"early_late": False})
    assert len(plan_stacks(units, [(0,)] * len(units), together)) == 1


# --- images -----------------------------------------------------------------------------------------------------------


def images_of(home: Path, *overrides: str, store: Path | None = None) -> Artifact:
    return make_images(tiny_context(home, *LATE, *overrides, store=store), PRIORS)


def recovered(context: Context, stack: Stack, network: nn.Module, start: Tensor) -> list[Tensor]:
    """Images of each unit of a stack, uint8, of one member's vote."""
    output = context.config.paths.output
    (output / UNITS).mkdir(parents=True, exist_ok=True)
    members = [(Voter("resnet18", network), None)]
    done: list[int] = []
    weights = torch.ones(1, len(stack.units))
    recover_stack(context, Engine(), stack, members, weights, RealSources(start), output, done.append)
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
    stack = Stack(0, (0,), (Unit(0, 0, 0, 5, 4),), tuple(first_stages(4, 3)))
    start = torch.randint(0, 256, (10, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (made,) = recovered(context, stack, small_network(10).eval(), start)
    expected = as_released(context, stack, small_network(10).eval(), start)
    # A step of Adam may flip where a gradient is all but 0.
    assert ((made.int() - expected.int()).abs() <= 1).double().mean() > 0.995
    moved = (made.int() - stack.units[0].of(start).int()).abs().double().flatten(1).mean(dim=1)
    by_slot = moved.view(5, 4).mean(dim=0).tolist()
    assert by_slot[0] > 2 * by_slot[3] > 0


def test_slots_that_begin_late_are_those_of_fewer_stages(tmp_path: Path) -> None:
    """Units know nothing of each other: what begins at once is as without the others, to the last bits."""
    start = torch.randint(0, 256, (10, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    units = tuple(Unit(slot, 0, 0, 10) for slot in range(4))
    network = small_network(10).eval()
    late = tiny_context(tmp_path / "late", *LATE)
    usual = tiny_context(tmp_path / "usual", *LATE, "method.early_late=false")
    with_late = recovered(late, Stack(0, (0,), units, tuple(first_stages(4, 3))), network, start)
    at_once = recovered(usual, Stack(0, (0,), units), network, start)
    for slot in (0, 1):
        assert (with_late[slot].int() - at_once[slot].int()).abs().max() <= 1
    for slot in (2, 3):
        assert not torch.equal(with_late[slot], at_once[slot])
    # The last slot sees the last stage alone.
    alone = recovered(
        tiny_context(tmp_path / "alone", *LATE), Stack(0, (0,), units[3:], tuple(first_stages(4, 3))), network, start
    )
    assert (with_late[3].int() - alone[0].int()).abs().max() <= 1
    moved = [(made.int() - start[:, slot].int()).abs().double().mean() for slot, made in enumerate(with_late)]
    assert all(earlier > later for earlier, later in pairwise(moved[1:]))


@pytest.mark.parametrize("composed", [(), BY_CLASS])
@pytest.mark.parametrize("residual", [(), ("method.residual=0.5", "method.sizes=[24,16,32]")])
def test_what_begins_later_is_not_blended_before(
    composed: tuple[str, ...], residual: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins with a stage is the initial image at the stage's size, whatever the others went through."""
    context = tiny_context(tmp_path, *LATE, *composed, *residual)
    method, data = context.config.method, context.data()
    units = (Unit(0, 0, 0, 5, 4),) if composed else tuple(Unit(slot, 0, 0, 10) for slot in range(4))
    stack = Stack(0, (0,), units, tuple(first_stages(4, 3)))
    start = torch.randint(0, 256, (10, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    began: list[Tensor] = []
    fit = Context.fit

    def noting(self: Context, module: Any, *arguments: Any) -> None:
        began.append(module.images.detach().clone())
        fit(self, module, *arguments)

    monkeypatch.setattr(Context, "fit", noting)
    recovered(context, stack, small_network(10).eval(), start)
    initial = torch.stack([normalise(unit.of(start), data.mean, data.std) for unit in units])
    assert len(began) == 3
    for stage, images in zip(plan_stages(method, 32), began, strict=True):
        slots = torch.stack([unit.slots_of_images for unit in stack.begun(stage.index)])
        now = torch.tensor(stack.begins)[slots] == stage.index
        expected = stack.take_begun(initial, stage.index)
        if stage.size != 32:
            shape = (stage.size, stage.size)
            expected = nn.functional.interpolate(expected.flatten(0, 1), shape, mode="bilinear").view_as(images)
        assert now.any()
        assert torch.equal(images[now], expected[now])
        if stage.index:
            assert not (images[~now] == expected[~now]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_what_is_interrupted_goes_on(
    composed: tuple[str, ...], made: object, chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, fit, begun = images_of(chain_home, *composed), Context.fit, 0

    def pulling(self: Context, *arguments: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 3:
            raise PulledPlug
        fit(self, *arguments)

    store = tmp_path / "store"
    for kind in ("data", "members", "patches"):
        (store / kind).parent.mkdir(parents=True, exist_ok=True)
        (store / kind).symlink_to(chain_home / "store" / kind)
    with monkeypatch.context() as patch:
        patch.setattr(Context, "fit", pulling)
        with pytest.raises(PulledPlug):
            images_of(chain_home, *composed, store=store)
    again = images_of(chain_home, *composed, store=store)
    assert again.path != usual.path
    assert same_files(again, usual)


def test_equal_images_are_one_artefact_whatever_begins_late(chain_home: Path) -> None:
    """Where nothing is optimised nothing begins."""
    kept = ("method.iterations=0", "method.name=patches")
    assert images_of(chain_home, *kept).path == images_of(chain_home, *kept, "method.early_late=false").path


# --- what they begin with ---------------------------------------------------------------------------------------------


def test_middling_images_are_those_around_the_median(chain_home: Path) -> None:
    context = tiny_context(chain_home, "method.init=medium", "patches.candidates=9", "method.iterations=0")
    start = make_start(context)
    assert start is not None
    positions = load_file(start.path / POSITIONS)["positions"]
    data = context.data()
    backbone = context.config.committee.members["resnet18"].backbone
    observer = load_network(context, make_member(context, "resnet18"), backbone)
    seed = derive_seed(context.config.method.seed, "medium")
    for label, chosen in enumerate(positions):
        looked_at = drawn_images(context, label, generator(seed, "candidates", label), 9)
        losses = score_crops(observer, whole_images(context, looked_at), label, data)
        # Of nine the fifth from the easiest is the median; as released they begin with the fourth.
        fourth, third = losses.sort().indices[[3, 2]]
        assert chosen.tolist() == [looked_at[fourth], looked_at[third]]
    kept, _ = load_images(make_images(context, PRIORS))
    assert torch.equal(kept, whole_images(context, positions).flatten(0, 1))


def test_middling_images_need_their_observer(compose: Compose) -> None:
    others = ("method.voters=[resnet50]", "label=tiny_resnet18", "label.teachers=[resnet50]", "method.iterations=2")
    assert members_used(compose("evaluate", *others, "method.init=medium")) == ["resnet18", "resnet50"]


# --- settings and costs -----------------------------------------------------------------------------------------------


def test_a_single_stage_is_refused() -> None:
    usual = {"iterations": 4, "early_late": True}
    method_config(**usual, stages=2)
    with pytest.raises(ValueError, match=r"method\.early_late begins some slots with each stage, and method\.stages=1"):
        method_config(**usual)
    method_config(**usual | {"iterations": 0, "init": "real"})


def test_ranks_need_an_image_each_from_the_first_stage(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *LATE, "method.composer=classes", "method.classes_per_unit=1")
    context = replace(context, world=replace(context.world, size=3))
    method = context.config.method
    units = plan_units(4, 10, method)
    with pytest.raises(ConfigError, match="a unit has 2 images, too few for 3 processes"):
        require_splittable(context, plan_stacks(units, [(0,)] * len(units), method))
    at_once = method.model_copy(update={"early_late": False})
    require_splittable(context, plan_stacks(units, [(0,)] * len(units), at_once))


@pytest.mark.parametrize("composed", [(), BY_CLASS])
def test_costs_count_what_has_begun(composed: tuple[str, ...], chain_home: Path, tmp_path: Path) -> None:
    """40 images for six iterations, but 10 begin after two and 10 after four: 240 less 20 and 40."""
    context = tiny_context(chain_home, *LATE, *composed, "committee.size=1", "method.voters=[resnet18]")
    method, classes = context.config.method, 10
    units = plan_units(4, classes, method)
    shown = _work(context, plan_stacks(units, [(0,)] * len(units), method)).image_passes
    assert shown == 240 - 20 - 40
    config = context.config.model_copy(update={"paths": context.config.paths.model_copy(update={"store": tmp_path})})
    pieces = {piece.artifact.kind: piece for piece in plan_pieces(planning(config, torch.device("cpu")))}
    uses = work_of(pieces["images"]).uses
    assert sum(step.units * step.images * times for step, times in uses.items() if isinstance(step, VoteStep)) == shown


def test_the_method_is_that_of_the_release(compose: Compose) -> None:
    method = compose("distill", "method=delt").method
    assert (method.iterations, method.stages, method.lr, method.r_bn) == (4000, 8, 0.25, 0.01)
    assert (method.init, method.composer, method.crop_schedule, method.voters) == (
        "medium",
        "classes",
        "cosine",
        ["resnet18"],
    )
    assert Stage(7, 3500, 4000, 32) in plan_stages(method, 32)
    assert math.isclose(method.lr * cosine(3500, 4000), 0.0095, rel_tol=0.01)
