"""RETA's retrieval: the maths by hand, which real images come back, what is refused, and what it costs."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from helpers import PRIORS, as_files, method_config, same_files, small_network, tiny_context
from test_interruption import PulledPlug, stop_at
from torch import Tensor, nn

import cvdd.chain.recover
import cvdd.chain.retrieval
from cvdd.artifact import Artifact, Store
from cvdd.augmentation.augment import normalise
from cvdd.backbones import BackboneConfig, build_network
from cvdd.backbones.heads import require_head
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.retrieval import Retrieval, make_candidates
from cvdd.chain.unit_files import load_images
from cvdd.composition.config_directory import config_directory
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import MeasureStep, MoveStep
from cvdd.cost.work import work_of
from cvdd.methods.reta import best_fit, complexity
from cvdd.schema import members_used
from cvdd.schema.committee import MemberConfig
from cvdd.statistics.features import head_features
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.units import Unit

pytest_plugins = ["chain_fixtures"]

DRC = (
    "method=fadrm_drc",
    "method.iterations=6",
    "method.stages=3",
    "method.log_every=2",
    "method.checkpoint_every=2",
    "method.grid_every=2",
)


def images_of(home: Path, *overrides: str, store: Path | None = None) -> Artifact:
    return make_images(tiny_context(home, *DRC, *overrides, store=store), PRIORS)


# --- the maths --------------------------------------------------------------------------------------------------------


def test_complexity_is_the_variance_of_squared_gradients() -> None:
    """A slope changes everywhere alike but at the edges, where what is reflected is flat."""
    slope = torch.arange(32.0).expand(1, 3, 32, 32)
    assert complexity(torch.full((1, 3, 32, 32), 7.0), 1.0).item() == pytest.approx(0, abs=1e-6)
    assert complexity(slope, 0.01)[0] == pytest.approx(0, abs=1e-4)
    half = slope.clone()
    half[..., 16:] = 15
    # Left of the middle a slope of 1, right of it 0, and one half at it; three colours.
    squares = torch.tensor([3.0] * 15 + [0.75] + [0.0] * 16)
    assert complexity(half, 0.01)[0] == pytest.approx(float(squares.var(correction=0)), rel=1e-4)


def test_what_is_smoothed_first_is_less_complex() -> None:
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    assert (complexity(noise, 2.0) < 0.1 * complexity(noise, 0.5)).all()


def test_images_that_are_smaller_than_the_gaussian_have_a_complexity() -> None:
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert complexity(noise, 9.0).isfinite().all()


@pytest.mark.parametrize(("weight", "chosen"), [(0.0, [0, 1]), (0.5, [0, 2]), (1.0, [2, 2])])
def test_fit_and_complexity_are_weighed(weight: float, chosen: list[int]) -> None:
    """Directions 0, 90 and 60 degrees with complexities 1, 2, 0; images at 0 and 85 degrees.

    Squared distances of unit vectors are 2 - 2 cos: at 0 degrees 0, 2, 1; at 85 degrees 1.83, 0.008, 0.19.
    """

    def at(*degrees: float) -> Tensor:
        radians = torch.tensor(degrees) * math.pi / 180
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    lengths = torch.tensor([[5.0], [0.1]])
    candidates = at(0, 90, 60) * torch.tensor([[1.0], [3.0], [0.5]])
    assert best_fit(at(0, 85) * lengths, candidates, torch.tensor([0.9, 2.0, 0.0]), weight).tolist() == chosen


def test_features_are_what_goes_into_the_classifier() -> None:
    network = small_network().eval()
    shown = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    features = head_features(network, shown, "method.retrieval", batch=2)
    torch.testing.assert_close(network[-1](features), network(shown))
    with pytest.raises(ConfigError, match=r"method\.retrieval needs .* choose another backbone"):
        head_features(nn.Conv2d(3, 1, 3), shown, "method.retrieval")


# --- candidates -------------------------------------------------------------------------------------------------------


def found_in(context: Context) -> dict[str, Tensor]:
    """All candidates, class after class."""
    retrieval = Retrieval.of(context, make_candidates(context))
    found = [retrieval.of_class(label) for label in range(10)]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def test_candidates_are_of_each_class_with_what_the_observer_sees(chain_home: Path) -> None:
    context = tiny_context(chain_home, *DRC, "method.retrieval.candidates=7")
    data, found = context.data(), found_in(context)
    assert data.train.labels[found["positions"]].tolist() == [label for label in range(10) for _ in range(7)]
    assert len(found["positions"].unique()) == 70
    network = load_network(
        context, make_member(context, "resnet18"), context.config.committee.members["resnet18"].backbone
    )
    images = normalise(data.train.stacked()[found["positions"]], data.mean, data.std)
    torch.testing.assert_close(found["features"], head_features(network, images, "method.retrieval"))
    torch.testing.assert_close(found["complexities"], complexity(images, 1.0), rtol=1e-4, atol=1e-4)


def test_candidates_are_random_ones_or_all(chain_home: Path) -> None:
    few = [
        found_in(tiny_context(chain_home, *DRC, "method.retrieval.candidates=7", f"method.seed={seed}"))["positions"]
        for seed in (0, 1)
    ]
    assert not torch.equal(*few)
    whole = [
        make_candidates(tiny_context(chain_home, *DRC, "method.retrieval.candidates=null", f"method.seed={seed}"))
        for seed in (0, 1)
    ]
    assert whole[0].path == whole[1].path
    context = tiny_context(chain_home)
    positions = found_in(tiny_context(chain_home, *DRC, "method.retrieval.candidates=null"))["positions"]
    assert torch.equal(positions.sort().values, torch.arange(len(context.data().train)))
    # More than there are is all of them.
    assert make_candidates(tiny_context(chain_home, *DRC, "method.retrieval.candidates=9999")).path == whole[0].path


def test_candidates_are_the_same_from_files(chain_home: Path, tmp_path: Path) -> None:
    usual = images_of(chain_home, "method.init=real")
    decoded = as_files(tmp_path, tiny_context(chain_home, *DRC, "method.init=real", store=tmp_path / "store"))
    assert same_files(make_images(decoded, PRIORS), usual)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_an_image_that_is_a_candidate_finds_itself(chain_home: Path) -> None:
    """Of class 4 and 2, in units of another order, with no weight on complexity."""
    context = tiny_context(chain_home, *DRC, "method.retrieval.complexity=0")
    retrieval = Retrieval.of(context, make_candidates(context))
    data, positions = context.data(), {label: retrieval.of_class(label)["positions"] for label in (2, 4, 5)}
    chosen = torch.stack(
        [torch.stack([positions[4][3], positions[2][0]]), torch.stack([positions[4][1], positions[2][5]])]
    )
    images = normalise(data.train.stacked()[chosen], data.mean, data.std)
    images = images.transpose(0, 1).reshape(4, 1, *images.shape[2:])
    units = [Unit(slot, label, label, label + 1) for label in (4, 2) for slot in (0, 1)]
    assert torch.equal(retrieval.real_images(images, units), images)
    # Of another class no image of this one comes back.
    others = retrieval.real_images(images, [Unit(slot, 5, 5, 6) for slot in range(4)])
    of_five = normalise(data.train.stacked()[positions[5]], data.mean, data.std)
    assert all((of_five == image).flatten(1).all(dim=1).any() for image in others.flatten(0, 1))


@pytest.mark.parametrize("sizes", ["null", "[24,16,32]"])
def test_what_fits_is_blended_in_after_each_stage(
    sizes: str, made: object, chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor, float]] = []
    blend = cvdd.chain.recover.adjustable_residual

    def noting(images: Tensor, real: Tensor, kept: float, size: int) -> Tensor:
        calls.append((images, real, kept))
        return blend(images, real, kept, size)

    monkeypatch.setattr(cvdd.chain.recover, "adjustable_residual", noting)
    context = tiny_context(chain_home, *DRC, "method.seed=3", f"method.sizes={sizes}")
    make_images(replace(context, store=Store(copied(chain_home, tmp_path))), PRIORS)
    assert [kept for _, _, kept in calls] == [0.5] * len(calls)
    retrieval = Retrieval.of(context, make_candidates(context))
    for images, real, _ in calls:
        slots = [Unit(slot, 0, 0, 10) for slot in range(len(images))]
        assert torch.equal(real, retrieval.real_images(images, slots))
    assert len(calls) >= 2


@pytest.mark.parametrize("composed", [(), ("method.composer=classes", "method.classes_per_unit=2")])
def test_slots_may_have_candidates_of_their_own(composed: tuple[str, ...], chain_home: Path) -> None:
    """Every second candidate is of the second of two slots, so equal images get back different ones."""
    usual = (*DRC, *composed, "method.retrieval.complexity=0", "method.retrieval.candidates=9")
    shared, apart = (
        Retrieval.of(context, make_candidates(context))
        for context in (
            tiny_context(chain_home, *usual, f"method.retrieval.shared={value}") for value in ("true", "false")
        )
    )
    units = [Unit(0, 0, 0, 2, 2)] if composed else [Unit(slot, 0, 0, 2) for slot in range(2)]
    data = shared.context.data()
    wanted = [[shared.of_class(label)["positions"][3]] * 2 for label in (0, 1)]
    positions = torch.tensor(wanted)[None] if composed else torch.tensor(wanted).T[:, :, None]
    images = normalise(data.train.stacked()[positions.reshape(len(units), -1)], data.mean, data.std)
    assert torch.equal(shared.real_images(images, units), images)
    own = apart.real_images(images, units)
    for label in (0, 1):
        places = [(0, 2 * label + slot) if composed else (slot, label) for slot in (0, 1)]
        found = [own[place] for place in places]
        # Number 3 is of slot 1.
        assert torch.equal(found[1], images[places[1]])
        others = normalise(data.train.stacked()[apart.of_class(label)["positions"][::2]], data.mean, data.std)
        assert sum(torch.equal(found[0], other) for other in others) == 1


def test_too_few_candidates_for_all_slots_are_refused(chain_home: Path) -> None:
    context = tiny_context(chain_home, *DRC, "method.retrieval.shared=false", "method.retrieval.candidates=1")
    for check in (check_before_work, make_candidates):
        with pytest.raises(ConfigError, match=r"class 0 offers 1 .* method\.retrieval\.candidates=1"):
            check(context)
    check_before_work(tiny_context(chain_home, *DRC, "method.retrieval.candidates=1"))


def copied(home: Path, place: Path) -> Path:
    """A store that has members and patches alone."""
    for kind in ("data", "members", "patches"):
        shutil.copytree(home / "store" / kind, place / "store" / kind)
    return place / "store"


def test_retrieval_changes_images_and_complexity_changes_retrieval(chain_home: Path) -> None:
    fixed = load_images(images_of(chain_home, "method=fadrm", *DRC[1:], "method.retrieval=null"))[0]
    fitting = load_images(images_of(chain_home, "method.retrieval.complexity=0"))[0]
    simple = load_images(images_of(chain_home, "method.retrieval.complexity=1"))[0]
    assert not torch.equal(fixed, fitting)
    assert not torch.equal(fitting, simple)


def test_images_may_begin_as_noise(chain_home: Path) -> None:
    """And are mostly real after the first stage, so that neighbours are alike."""
    noise, real = (
        load_images(images_of(chain_home, "method.init=noise", "method.lr=0.001", f"method.residual={kept}"))[0].float()
        for kept in (0.9999, 0.1)
    )
    rough, smooth = ((made[..., 1:] - made[..., :-1]).abs().mean() for made in (noise, real))
    assert smooth < 0.5 * rough


def test_the_first_of_equals_is_chosen() -> None:
    same = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert best_fit(same[:1], same, torch.zeros(3), 0.1).tolist() == [0]


def test_images_of_another_size_are_shown_as_large_as_candidates(chain_home: Path) -> None:
    context = tiny_context(chain_home, *DRC)
    retrieval = Retrieval.of(context, make_candidates(context))
    small = torch.randn(1, 10, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    large = nn.functional.interpolate(small[0], (32, 32), mode="bilinear")[None]
    units = [Unit(0, 0, 0, 10)]
    assert torch.equal(retrieval.real_images(small, units), retrieval.real_images(large, units))


def test_candidates_that_are_there_are_not_made_again(
    made: object, chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each class is a part: what was interrupted goes on with the next."""
    context = replace(tiny_context(chain_home, *DRC), store=Store(copied(chain_home, tmp_path)))
    begun, look = 0, cvdd.chain.retrieval.head_features

    def pulling(*arguments: Any) -> Tensor:
        nonlocal begun
        begun += 1
        if begun == 4:
            raise PulledPlug
        return look(*arguments)

    monkeypatch.setattr(cvdd.chain.retrieval, "head_features", pulling)
    with pytest.raises(PulledPlug):
        make_candidates(context)
    begun = 100
    again = make_candidates(context)
    assert begun == 107
    assert same_files(again, make_candidates(tiny_context(chain_home, *DRC)))


def test_what_is_interrupted_goes_on(
    made: object, chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last stage; what was blended in is found again from the images of the stage before."""
    usual = images_of(chain_home)
    store = copied(chain_home, tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, Context, "fit", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            images_of(chain_home, store=store)
    again = images_of(chain_home, store=store)
    assert again.path != usual.path
    assert same_files(again, usual)


# --- settings and costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": 1.0}, r"method\.retrieval chooses what is blended in .* method\.residual=1"),
        (
            {"retrieval": {"complexity": 0, "sigma": 2.0}},
            r"method\.retrieval\.sigma=2\.0 is of method\.retrieval\.complexity, which is 0",
        ),
        ({"factor": 2}, r"method\.retrieval chooses whole real images, and with method\.factor=2"),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], message: str) -> None:
    usual = {"iterations": 4, "stages": 2, "residual": 0.5, "retrieval": {}, "init": "real"}
    method_config(**usual)
    with pytest.raises(ValueError, match=message):
        method_config(**usual | changes)
    method_config(**usual | changes | {"iterations": 0, "stages": 1, "residual": 1.0})


def test_noise_needs_images_that_come_back() -> None:
    usual = {"iterations": 4, "stages": 2, "residual": 0.5, "init": "noise"}
    method_config(**usual, retrieval={})
    with pytest.raises(ValueError, match=r"method\.init=noise has none; .*method\.retrieval"):
        method_config(**usual)


def test_the_observer_is_among_those_who_are_needed(compose: Compose) -> None:
    others = ("method.voters=[resnet50]", "label=tiny_resnet18", "label.teachers=[resnet50]", "method.init=real")
    assert members_used(compose("evaluate", "method=fadrm", *others)) == ["resnet50"]
    assert members_used(compose("evaluate", "method=fadrm_drc", *others)) == ["resnet18", "resnet50"]


def test_an_observer_without_a_classifier_is_refused_before_any_work(chain_home: Path) -> None:
    without = BackboneConfig(name="squeezenet", target="torchvision.models.squeezenet1_1")
    others = ("method.voters=[resnet50]", "label.teachers=[resnet50]", "method.init=real")
    context = tiny_context(chain_home, *DRC, *others)
    members = {**context.config.committee.members, "resnet18": MemberConfig(backbone=without)}
    committee = context.config.committee.model_copy(update={"members": members})
    context = replace(context, config=context.config.model_copy(update={"committee": committee}))
    with pytest.raises(ConfigError, match=r"method\.retrieval needs what goes into a network's linear classifier"):
        check_before_work(context)


def test_costs_count_candidates_and_what_comes_back(chain_home: Path, tmp_path: Path) -> None:
    config = tiny_context(chain_home, *DRC, "method.retrieval.candidates=7", f"paths.store={tmp_path}").config
    pieces = {piece.artifact.kind: piece for piece in plan_pieces(planning(config, torch.device("cpu")))}
    candidates, images = work_of(pieces["candidates"]), work_of(pieces["images"])
    (uses,) = [times for step, times in candidates.uses.items() if isinstance(step, MeasureStep)]
    assert uses == 70
    width = require_head(build_network(config.committee.members["resnet18"].backbone, 10, 0), "it")[1].in_features
    assert candidates.other_bytes == 70 * (4 * width + 4 + 8)
    assert candidates.parts["classes"] == 10
    # Twenty images after two of three stages.
    assert [times for step, times in images.uses.items() if isinstance(step, MeasureStep)] == [40]


@pytest.mark.parametrize("method", sorted(path.stem for path in (config_directory() / "method").glob("*.yaml")))
def test_the_iteration_of_every_method_can_be_timed(method: str, compose: Compose) -> None:
    """What is timed is a configuration like any other."""
    config = compose("distill", f"method={method}", *{"given": ("method.given=somewhere",)}.get(method, ())).method
    if config.recovers:
        assert MoveStep.of(1, 10, 32, config).settings.iterations == 16


def test_ranks_do_not_choose_for_themselves(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.split_units=true needs equal images .* method\.retrieval"):
        compose("distill", "method=fadrm_drc", "trainer=ddp", "trainer.devices=2", "trainer.split_units=true")


def test_a_square_of_no_pixel_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"method\.cutout=0\.01 of 32 pixels is no pixel; set it to at least 0\.016"):
        compose("distill", "method=cvdd", "method.cutout=0.01")
    compose("distill", "method=cvdd", "method.cutout=0.016")
