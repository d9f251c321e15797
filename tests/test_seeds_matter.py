"""Seeds, and what else a draw is named after, decide what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import (
    MEAN,
    PRIORS,
    STD,
    TINY,
    configure,
    fit,
    method_config,
    random_pixels,
    small_network,
    tiny_context,
    training_arguments,
)
from test_apm import module_of as adversarial_module
from test_mtt import ALL, mtt_method
from torch import Tensor
from torch.utils.data import DataLoader

import cvdd.chain.priors
import cvdd.chain.real_batches
import cvdd.synthesis.adversarial
from cvdd.chain.apm import _make_part, plan_parts
from cvdd.chain.compare import _full_data
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.initial import initial_images
from cvdd.chain.labels import make_labels
from cvdd.chain.members import make_member
from cvdd.chain.priors import measure_prior
from cvdd.chain.recover import _start
from cvdd.chain.statistics import _batches
from cvdd.chain.students import make_student
from cvdd.chain.unit_files import load_images
from cvdd.chain.votes import Vote, plan_draws, plan_votes
from cvdd.data import Data, TensorSource
from cvdd.schema import PatchesConfig
from cvdd.synthesis.adversarial import AdversarialModule, Pace
from cvdd.synthesis.committee import Draw
from cvdd.synthesis.patches import make_patches
from cvdd.synthesis.trajectory_matching import draw_iteration
from cvdd.synthesis.units import plan_units
from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.sgd_training import SgdModule, SgdRecipe

WITHOUT_MEMBERS = (
    "method.init=real",
    "method.iterations=0",
    "label.teachers=none",
    "label.store=none",
    "protocol.loss=cross_entropy",
)
"""Real images with hard labels, for which nothing is trained but students."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


# --- networks ---------------------------------------------------------------------------------------------------------


class Begun(Exception):
    """A training is about to begin."""


Started = Callable[[Callable[[], object]], Tensor]


@pytest.fixture
def start_of(monkeypatch: pytest.MonkeyPatch) -> Started:
    """From what trains a network to the weights with which it begins."""
    starts: list[Tensor] = []

    def begin(context: Context, module: pl.LightningModule, *arguments: Any) -> None:
        starts.append(torch.nn.utils.parameters_to_vector(module.network.parameters()).detach().clone())
        raise Begun

    monkeypatch.setattr(Context, "fit", begin)

    def started(train: Callable[[], object]) -> Tensor:
        with pytest.raises(Begun):
            train()
        return starts[-1]

    return started


def test_students_of_two_seeds_start_from_different_weights(home: Path, start_of: Started) -> None:
    context = tiny_context(home, *WITHOUT_MEMBERS)
    labels = make_labels(context, make_images(context, {}), {})
    backbone = context.config.students["tiny_resnet18"]
    one, other, again = (
        start_of(lambda seed=seed: make_student(context, labels, "student", backbone, seed)) for seed in (0, 1, 0)
    )
    assert not torch.equal(one, other)
    assert torch.equal(one, again)


def test_students_of_all_real_data_start_from_different_weights_too(home: Path, start_of: Started) -> None:
    def trained(seed: int) -> Callable[[], object]:
        return lambda: _full_data(tiny_context(home, "protocol.full_data=true", f"protocol.seeds=[{seed}]"))

    assert not torch.equal(start_of(trained(0)), start_of(trained(1)))


def test_members_of_one_network_start_from_different_weights(home: Path, start_of: Started) -> None:
    context = tiny_context(home)
    backbone = context.config.committee.members["resnet18"].backbone.model_dump()
    twins = context.differing({"committee.members.resnet50.backbone": backbone}, "")
    one, other = (start_of(lambda name=name: make_member(twins, name)) for name in ("resnet18", "resnet50"))
    assert len(one) == len(other)
    assert not torch.equal(one, other)
    other_seed = tiny_context(home, "seed=1")
    assert not torch.equal(one, start_of(lambda: make_member(other_seed, "resnet18")))


def test_every_step_of_sgd_is_augmented_anew() -> None:
    sources: list[int] = []

    def noting(images: Tensor, source: torch.Generator) -> Tensor:
        sources.append(source.initial_seed())
        return images

    module = SgdModule(
        SgdRecipe(2, 0.1, 0.0, 0.0, False),
        random_pixels(12, 4).float(),
        torch.arange(12) % 2,
        lambda pixels: pixels / 255,
        torch.nn.functional.cross_entropy,
        noting,
        **training_arguments(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))),
    )
    fit(module, DataLoader(Positions(), sampler=ShuffledBatches(12, 4, seed=0), batch_size=None), 2)
    assert len(set(sources)) == len(sources) == 6


# --- labels and priors ------------------------------------------------------------------------------------------------


def test_labels_of_two_seeds_show_the_same_images_differently(home: Path) -> None:
    context = tiny_context(home, *WITHOUT_MEMBERS)
    images = make_images(context, {})
    pixels, _ = load_images(images)
    plans = [
        make_labels(context.differing({"seed": seed}, ""), images, {}).open(pixels).epoch(0)[0] for seed in (0, 1, 0)
    ]
    assert not torch.equal(plans[0].index, plans[1].index)
    assert torch.equal(plans[0].index, plans[2].index)


def test_a_prior_is_the_mean_of_its_students(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def student(context: Context, labels: object, name: str, backbone: object, seed: int, part: str) -> Any:
        seeds.append(seed)
        return SimpleNamespace(metrics={"top1": (40.0, 50.0, 90.0)[seed]})

    monkeypatch.setattr(cvdd.chain.priors, "make_images", lambda *arguments: None)
    monkeypatch.setattr(cvdd.chain.priors, "make_labels", lambda *arguments: None)
    monkeypatch.setattr(cvdd.chain.priors, "make_student", student)
    for count, mean in ((1, 40.0), (2, 45.0), (3, 60.0)):
        found = measure_prior(tiny_context(home, f"prior.seeds={count}"), "resnet50")
        assert found.values == {"resnet50": mean}
        assert len(found.students) == count
    assert seeds == [0, 0, 1, 0, 1, 2]


def test_statistics_of_two_batches_are_those_of_different_views(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both batches have the same images."""
    batch = random_pixels(8, 32), torch.zeros(8, dtype=torch.long)
    monkeypatch.setattr(cvdd.chain.real_batches, "_pixels", lambda context, order, side: [batch, batch])
    context = tiny_context(home, "recipe.crop=resized")
    views = [[seen for seen, _ in _batches(context, seed, lambda count: None)] for seed in (0, 1, 0)]
    assert not torch.equal(views[0][0], views[0][1])
    assert not torch.equal(views[0][0], views[1][0])
    assert torch.equal(torch.stack(views[0]), torch.stack(views[2]))


# --- votes ------------------------------------------------------------------------------------------------------------


Planned = Callable[..., tuple[list[Draw], list[Vote]]]


@pytest.fixture
def votes(tmp_path: Path) -> Planned:
    """From overrides to the draws, and the votes, of six slots."""

    def planned(*overrides: str) -> tuple[list[Draw], list[Vote]]:
        config = configure(tmp_path, *TINY, "ipc.images_per_class=6", *overrides)
        units = plan_units(6, 10, config.method)
        return plan_draws(config, units, PRIORS), plan_votes(config, units, PRIORS)

    return planned


def test_random_draws_depend_on_the_methods_seed(votes: Planned) -> None:
    draws = [votes("committee.draw=random", f"method.seed={seed}")[0] for seed in (0, 1, 0)]
    assert draws[0] != draws[1]
    assert draws[0] == draws[2]
    assert len(set(draws[0])) > 1


def test_random_weights_depend_on_the_methods_seed_and_the_slot(votes: Planned) -> None:
    """All slots have the same two voters."""
    random = ("committee.voter=random", "committee.draw=best")
    one, other, again = (votes(*random, f"method.seed={seed}")[1] for seed in (0, 1, 0))
    assert {vote.draw for vote in one} == {vote.draw for vote in other}
    assert len({vote.weights for vote in one}) == 6
    assert {vote.weights for vote in one}.isdisjoint(vote.weights for vote in other)
    assert one == again


# --- initial images ---------------------------------------------------------------------------------------------------


def test_patches_of_two_classes_are_cut_differently() -> None:
    """Both classes have the same images, each of which gives one crop."""
    pixels = random_pixels(12, 16)
    source = TensorSource(torch.cat([pixels, pixels]), torch.arange(2).repeat_interleave(12))
    data = Data(source, source, ("one", "two"), MEAN, STD, 16, "twice", {})
    config = PatchesConfig(observer="net", crops=1, candidates=12, images_per_class=12)
    cut = [make_patches(data, small_network(2), config, label, seed=0)[0] for label in (0, 1)]
    sums = [images.flatten(1).sum(dim=1).sort().values.tolist() for images in cut]
    assert sums[0] != sums[1]


def test_real_images_of_two_classes_are_chosen_at_different_places(home: Path) -> None:
    context = tiny_context(home, *WITHOUT_MEMBERS, "ipc.images_per_class=4")
    train = context.data().train
    places = []
    for label, chosen in enumerate(initial_images(context, None)):
        own = train.stacked()[train.labels == label]
        assert len(own) == 30
        places.append(tuple(int((own == image).flatten(1).all(dim=1).nonzero()[0]) for image in chosen))
    assert len(set(places)) == 10


# --- iterations -------------------------------------------------------------------------------------------------------


def test_every_new_student_draws_its_teacher_and_its_batches_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def fitted(
        student: object, images: Tensor, logits: Tensor, config: object, augment: object, source: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        seeds.append(source.initial_seed())
        return {}, torch.zeros(())

    monkeypatch.setattr(cvdd.synthesis.adversarial, "fit_surrogate", fitted)
    module, teachers = adversarial_module(Pace(30, 30, 30)), []
    for iteration in range(0, 30, 3):
        module._refresh(iteration, torch.arange(8))
        teachers.append(module._teacher)
    assert set(teachers) == {0, 1}
    assert len(set(seeds)) == 10


def test_parts_of_prediction_matching_draw_differently(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part draws depends on the method's seed and on its first slot, however many parts there are."""
    seeds: list[int] = []

    def begin(context: Context, module: AdversarialModule, *arguments: Any) -> None:
        seeds.append(module.seed)
        raise Begun

    small = ("method=apm_tiny", "method.init=noise", "method.apm.teachers.backbone.arguments.width=8")
    context = tiny_context(home, *small, "ipc.images_per_class=4")

    def seeds_of(parts: int, seed: int = 0) -> list[int]:
        seeds.clear()
        changed = context.differing({"method.apm.parts": parts, "method.seed": seed}, "")
        for part in plan_parts(changed):
            with pytest.raises(Begun):
                _make_part(changed, part, [], None, None)
        return list(seeds)

    monkeypatch.setattr(Context, "fit", begin)
    four, two, other = seeds_of(4), seeds_of(2), seeds_of(2, seed=1)
    assert len(set(four)) == 4
    assert two == four[::2]
    assert set(two).isdisjoint(other)


def test_every_round_of_experts_has_an_order_of_its_own() -> None:
    orders = [
        tuple(draw_iteration(mtt_method(40), iteration, 5, 6, 8, ALL).expert for iteration in range(first, first + 5))
        for first in range(0, 40, 5)
    ]
    assert len(set(orders)) > 4


def test_initial_noise_depends_on_seed_slot_and_block(home: Path) -> None:
    images = []
    for seed in (0, 1):
        context = tiny_context(home, "method.init=noise", "method.classes_per_unit=5", f"method.seed={seed}")
        images += [_start(context, unit, None) for unit in plan_units(2, 10, method_config(classes_per_unit=5))]
    assert len({float(image.sum()) for image in images}) == 8
