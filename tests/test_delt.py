"""DELT: slots that begin one after the other, and the real images that they begin with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Compose
from helpers import PRIORS, method_config, tiny_context
from safetensors.torch import load_file
from torch import Tensor

from cvdd.chain.images import _work, make_images
from cvdd.chain.initial import make_start
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.real_choice import POSITIONS, drawn_images, whole_images
from cvdd.chain.recover import require_splittable
from cvdd.chain.stages import stage_of
from cvdd.chain.unit_files import load_images
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import MeasureStep, Overhead, VoteStep
from cvdd.cost.work import work_of
from cvdd.methods.delt import around_the_middle, first_stages
from cvdd.report.gallery import _start
from cvdd.schema import members_used
from cvdd.support.config_base import ConfigError
from cvdd.support.curves import cosine
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.patches import score_crops
from cvdd.synthesis.units import Stack, Stage, plan_stacks, plan_stages, plan_units

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


def test_middling_images_need_as_many_candidates_as_slots(chain_home: Path) -> None:
    wanted = ("method.init=medium", "patches.candidates=1", "patches.images_per_class=1")
    with pytest.raises(ConfigError, match=r"patches\.candidates=1 images of class .* Raise patches\.candidates"):
        check_before_work(tiny_context(chain_home, *wanted))
    assert stage_of("medium") == "patches"


def test_the_page_shows_what_middling_images_became(chain_home: Path) -> None:
    wanted = ("method.init=medium", "patches.candidates=9")
    context = tiny_context(chain_home, *wanted)
    shown, said = _start(context, make_images(context, PRIORS), [0, 3], 2)
    kept = make_images(tiny_context(chain_home, *wanted, "method.iterations=0", "method.name=kept"), PRIORS)
    assert said == "real images they started from"
    assert torch.equal(shown, load_images(kept)[0].unflatten(0, (10, 2))[[0, 3]])


def test_middling_images_need_their_observer(compose: Compose) -> None:
    others = ("method.voters=[resnet50]", "label=tiny_resnet18", "label.teachers=[resnet50]", "method.iterations=2")
    assert members_used(compose("evaluate", *others, "method.init=medium")) == ["resnet18", "resnet50"]


# --- settings and costs -----------------------------------------------------------------------------------------------


def test_a_single_stage_is_refused() -> None:
    usual = {"iterations": 4, "early_late": True}
    method_config(**usual, stages=2)
    with pytest.raises(
        ValueError, match=r"method\.early_late lets slots begin in different stages, and method\.stages=1"
    ):
        method_config(**usual)
    kept = method_config(**usual | {"iterations": 0, "init": "real"})
    assert not kept.begins_late


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


def test_code_is_compiled_for_one_number_of_images_and_for_any(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages show three numbers of images."""
    monkeypatch.setattr("cvdd.computing.automatic.has_compiler", lambda device: True)
    one = ("committee.size=1", "method.voters=[resnet18]", "engine.compile=true", f"paths.store={tmp_path}")
    config = tiny_context(chain_home, *LATE, *BY_CLASS, *one).config
    pieces = {piece.artifact.kind: piece for piece in plan_pieces(planning(config, torch.device("cpu")))}
    uses = work_of(pieces["images"]).uses
    assert len({step.images for step in uses if isinstance(step, VoteStep)}) == 3
    assert uses[Overhead("compile")] == 2


def test_costs_count_what_comes_back_to_what_had_begun(chain_home: Path, tmp_path: Path) -> None:
    """Of 40 images 20 have begun after the first stage, and 30 after the second."""
    fitting = ("method.residual=0.5", "method.retrieval={complexity: 0}", f"paths.store={tmp_path}")
    config = tiny_context(chain_home, *LATE, *fitting).config
    pieces = {piece.artifact.kind: piece for piece in plan_pieces(planning(config, torch.device("cpu")))}
    uses = work_of(pieces["images"]).uses
    assert [times for step, times in uses.items() if isinstance(step, MeasureStep)] == [50]


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
