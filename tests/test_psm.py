"""Real images by difficulty, groups of them for the slots, and voters with the statistics of a group (PSM)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PRIORS, as_files, judged, same_files, small_network, tiny_context
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v2, shufflenet_v2_x0_5

import cvdd.chain.difficulty
import cvdd.chain.images
from cvdd.artifact import Artifact, Store
from cvdd.chain.difficulty import SCORES, graded_images, make_difficulty, make_group_statistics
from cvdd.chain.images import make_images
from cvdd.chain.members import load_network, make_member
from cvdd.chain.unit_files import load_history, load_images
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.data import to_eval_tensor
from cvdd.engine import Engine, hand_over, ready_voter
from cvdd.methods.psm import choose_start, difficulty_groups, precision_distance, ranks_in_class, update_statistics
from cvdd.preflight import check_before_work
from cvdd.schema import with_overrides
from cvdd.voting import Voter

pytest_plugins = ["chain_fixtures"]

PSM = ("method=psm", "method.iterations=4", "recipe.epochs=2")
KEPT = ("method.iterations=0", "method.stages=1", "method.residual=1")


def normal(count: int, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- maths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_distance_is_that_of_the_paper(weight: float) -> None:
    network, images = small_network(), normal(3)
    first, second = network[1], network[4]
    with torch.no_grad():
        inputs = {first: network[0](images), second: network[:4](images)}
    expected = torch.zeros(3, dtype=torch.float64)
    for layer, maps in inputs.items():
        for index, each in enumerate(maps.double()):
            mean = (each.mean(dim=(1, 2)) - layer.running_mean).square().sum().sqrt()
            ratio = (each.var(dim=(1, 2), correction=0) + 1e-6) / (layer.running_var.double() + 1e-6)
            expected[index] += (mean + weight * ratio.log().square().sum().sqrt()) / len(each) ** 0.5 / 2
    torch.testing.assert_close(precision_distance(network, images, weight), expected, rtol=1e-5, atol=1e-6)


def test_a_distance_is_that_of_the_image_alone() -> None:
    network, images = small_network(), normal(5)
    alone = torch.cat([precision_distance(network, image[None], 1.0) for image in images])
    torch.testing.assert_close(precision_distance(network, images, 1.0), alone, rtol=1e-5, atol=1e-6)
    assert len(set(alone.tolist())) == 5


def test_ranks_are_those_of_the_class() -> None:
    distances = torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 9.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    assert ranks_in_class(distances, labels).tolist() == [2, 0, 1, 1, 0, 3]
    assert ranks_in_class(torch.zeros(4), torch.tensor([2, 2, 0, 2])).tolist() == [0, 1, 0, 2]


def test_groups_divide_each_class_from_easy_to_hard() -> None:
    labels = torch.tensor([0, 1] * 7 + [0])
    scores = torch.randn(15, generator=torch.Generator().manual_seed(1))
    groups = difficulty_groups(scores, labels, 2, 3)
    assert [[len(images) for images in group] for group in groups] == [[3, 3], [3, 2], [2, 2]]
    assert sorted(int(index) for group in groups for images in group for index in images) == list(range(15))
    for label in range(2):
        ordered = torch.cat([group[label] for group in groups])
        assert (labels[ordered] == label).all()
        assert scores[ordered].diff().ge(0).all()


@pytest.mark.parametrize(("choice", "expected"), [("front", 7), ("middle", 9), ("back", 4)])
def test_a_slot_starts_with_the_image_that_is_asked_for(choice: Any, expected: int) -> None:
    assert choose_start(torch.tensor([7, 1, 9, 4]), choice, torch.Generator()) == expected


def test_any_image_of_a_group_may_start() -> None:
    group = torch.tensor([7, 1, 9, 4])
    chosen = [choose_start(group, "random", torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert set(chosen) == {7, 1, 9, 4}


def test_statistics_move_as_in_training_and_nothing_else_does() -> None:
    network = small_network(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mean, variance = before["1.running_mean"], before["1.running_var"]
    batches = [normal(4, seed) for seed in range(3)]
    drawn = torch.get_rng_state()
    update_statistics(network, batches)
    assert torch.equal(torch.get_rng_state(), drawn)
    for images in batches:
        maps = nn.functional.conv2d(images, network[0].weight, padding=1)
        mean = 0.9 * mean + 0.1 * maps.mean(dim=(0, 2, 3))
        variance = 0.9 * variance + 0.1 * maps.var(dim=(0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, variance)
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{layer}.{kind}" for layer in (1, 4) for kind in kinds}
    assert not any(module.training for module in network.modules())


# --- voters -----------------------------------------------------------------------------------------------------------


def moved(network: nn.Module, seed: int) -> nn.Module:
    """Give the layers other running statistics, and the weights other values."""
    source = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=source) / 10)
            module.running_var.copy_(torch.rand(module.num_features, generator=source) + 0.5)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("engine", [Engine(), Engine(compile=True), Engine(precision="bf16"), Engine(True, "bf16")])
@pytest.mark.parametrize("build", [densenet121, mobilenet_v2, shufflenet_v2_x0_5, small_network])
def test_a_voter_that_was_handed_over_judges_like_a_new_one(build: Any, engine: Engine) -> None:
    """Fused layers and rows of statistics are compared in the very objects that a compiler knows."""
    torch.manual_seed(0)
    classes = {} if build is small_network else {"num_classes": 4}
    plain = build(**classes).eval()
    images = normal(8, size=32).view(2, 4, 3, 32, 32)

    def voter(seed: int) -> Voter:
        own = build(**classes)
        own.load_state_dict(plain.state_dict())
        return ready_voter("a", moved(own, seed), 1.0, engine)

    mine, other = voter(1), voter(2)
    before, _ = judged(mine, images)
    hand_over(mine, other)
    found, slope = judged(mine, images)
    expected, gradient = judged(voter(2), images)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(slope, gradient)
    assert not torch.equal(found.bn, before.bn)


# --- the chain --------------------------------------------------------------------------------------------------------


def images_of(home: Path, *overrides: str) -> Artifact:
    return make_images(tiny_context(home, *PSM, *overrides), PRIORS)


def ordered(context: Context, label: int) -> Tensor:
    """Positions of the images of a class, from easy to hard."""
    scores = load_file(make_difficulty(context).path / SCORES)["scores"]
    of_class = (context.data().train.labels == label).nonzero()[:, 0]
    return of_class[scores[of_class].argsort(stable=True)]


def test_ranks_are_the_mean_over_all_that_may_vote(chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM, "method.voters=[resnet18,shufflenetv2]")
    data = context.data()
    pixels = to_eval_tensor(data.train, data.image_size, None, torch.arange(len(data.train)))
    shown = (pixels / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    ranks = []
    for name in ("resnet18", "shufflenetv2"):
        network = load_network(context, make_member(context, name), context.config.committee.members[name].backbone)
        distances = torch.cat([precision_distance(network, images, 1.0) for images in shown.split(256)])
        ranks.append(ranks_in_class(distances, data.train.labels))
    scores = load_file(make_difficulty(context).path / SCORES)["scores"]
    assert torch.equal(scores, torch.stack(ranks).double().mean(dim=0))
    assert not torch.equal(ranks[0], ranks[1])


@pytest.mark.parametrize(("choice", "places"), [("front", (0, 15)), ("middle", (7, 22)), ("back", (14, 29))])
def test_slots_start_in_their_groups(choice: str, places: tuple[int, int], chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM, *KEPT, f"method.difficulty.start={choice}")
    images, labels = load_images(make_images(context, {}))
    train = context.data().train
    for label in range(10):
        expected = train.stacked()[ordered(context, label)[list(places)]]
        assert torch.equal(images[labels == label], expected)


def test_a_random_start_depends_on_the_methods_seed(chain_home: Path) -> None:
    def start(seed: int) -> Tensor:
        context = tiny_context(chain_home, *PSM, "method.difficulty.start=random", f"method.seed={seed}")
        return graded_images(context, make_difficulty(context))

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_voters_have_the_statistics_of_the_group_of_their_slot(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("method.voters=[resnet18,resnet50]", "method.turns=in_turn", "method.name=looked_at")
    context = tiny_context(chain_home, *PSM, *overrides)
    difficulty = make_difficulty(context)
    stored = {name: make_group_statistics(context, name, difficulty) for name in ("resnet18", "resnet50")}
    seen: list[tuple[int, str]] = []
    recover = cvdd.chain.images.recover_stack

    def looked_at(*arguments: Any) -> Engine:
        _, _, stack, members, *_ = arguments
        (slot,) = {unit.slot for unit in stack.units}
        for voter, _ in members:
            values = load_file(stored[voter.name].path / f"group{slot:04d}.safetensors")
            state = voter.network.state_dict()
            buffers = {"mean": "running_mean", "variance": "running_var", "batches": "num_batches_tracked"}
            for key, value in values.items():
                layer, kind = key.rsplit("/", 1)
                assert torch.equal(state[f"{layer}.{buffers[kind]}"], value)
            assert values
            seen.append((slot, voter.name))
        return recover(*arguments)

    monkeypatch.setattr(cvdd.chain.images, "recover_stack", looked_at)
    made = make_images(with_store(context, tmp_path, chain_home, "images"), PRIORS)
    assert sorted(seen) == [(slot, name) for slot in range(2) for name in ("resnet18", "resnet50")]
    assert made.metrics["stacks"] == 2


def with_store(context: Context, place: Path, home: Path, kind: str) -> Context:
    """The same with a store that holds all but artefacts of a kind."""
    shutil.copytree(home / "store", place / "store", ignore=shutil.ignore_patterns(kind))
    return replace(context, store=Store(place / "store"))


def test_groups_have_statistics_of_their_own_that_come_near_those_of_their_images(chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM, "recipe.crop=none", "recipe.flip=false", "recipe.batch_size=150")
    statistics = make_group_statistics(context, "resnet18", make_difficulty(context))
    assert statistics.metrics["groups"] == 2
    member = context.config.committee.members["resnet18"]
    network = load_network(context, make_member(context, "resnet18"), member.backbone)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    data, maps = context.data(), []
    for group in range(2):
        chosen = torch.cat([ordered(context, label).tensor_split(2)[group] for label in range(10)])
        pixels = data.train.stacked()[chosen] / 255
        shown = (pixels - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
        seen: list[Tensor] = []
        handle = first.register_forward_pre_hook(lambda layer, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            network(shown)
        handle.remove()
        maps.append(seen[0].mean(dim=(0, 2, 3)))
    for group in range(2):
        values = load_file(statistics.path / f"group{group:04d}.safetensors")
        name = next(key for key in values if key.endswith("/mean"))
        # One epoch of one batch of all 150 images: a tenth of the way.
        torch.testing.assert_close(values[name], 0.9 * first.running_mean + 0.1 * maps[group], rtol=1e-4, atol=1e-5)


class PulledPlug(Exception):
    pass


def test_an_interrupted_group_goes_on_after_its_last_pass(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = (*PSM, "method.difficulty.forward_share=1")
    usual = make_group_statistics(tiny_context(chain_home, *longer), "resnet18", make_difficulty_of(chain_home))
    passes: list[int] = []
    update = cvdd.chain.difficulty.update_statistics

    def once(*arguments: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise PulledPlug
        update(*arguments)

    context = with_store(tiny_context(chain_home, *longer), tmp_path, chain_home, "group_statistics")
    with monkeypatch.context() as patch:
        patch.setattr(cvdd.chain.difficulty, "update_statistics", once)
        with pytest.raises(PulledPlug):
            make_group_statistics(context, "resnet18", make_difficulty(context))
    monkeypatch.setattr(cvdd.chain.difficulty, "update_statistics", once)
    again = make_group_statistics(context, "resnet18", make_difficulty(context))
    # Two passes over each of two groups; one was made before, and one was begun in vain.
    assert len(passes) == 5
    assert same_files(usual, again)


def make_difficulty_of(home: Path) -> Artifact:
    return make_difficulty(tiny_context(home, *PSM))


def test_statistics_and_start_can_be_had_one_without_the_other(chain_home: Path) -> None:
    both, start = images_of(chain_home), images_of(chain_home, "method.difficulty.forward_share=0")
    statistics = images_of(chain_home, "method.init=patches")
    for one in (both, start, statistics):
        assert len(load_images(one)[0]) == 20
        assert all(list(unit["weights"]) == ["resnet18"] for unit in load_history(one).values())
    parents = [{parent["kind"] for parent in one.manifest["parents"]} for one in (both, start, statistics)]
    assert parents[0] == {"members", "difficulty", "group_statistics"}
    assert parents[1] == {"members", "difficulty"}
    assert parents[2] == {"members", "patches", "group_statistics"}


def test_images_are_the_same_from_files(chain_home: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    usual = images_of(chain_home)
    context = tiny_context(chain_home, *PSM, store=tmp_path / "store")
    made = make_images(as_files(tmp_path / "files", context), PRIORS)
    assert same_files(made, usual)


def test_other_images_stand_beside_it_as_beside_any_method(chain_home: Path) -> None:
    real = ("method.init=real", "method.name=random_real")
    beside = make_images(tiny_context(chain_home, *PSM, *KEPT, *real), {})
    alone = make_images(tiny_context(chain_home, "method=random_real", "method.iterations=0"), {})
    assert beside == alone


def refused(home: Path, **changes: Any) -> str:
    config = tiny_context(home, *PSM).config
    with pytest.raises(ValueError, match="method") as caught:
        with_overrides(config, {f"method.{key.replace('__', '.')}": value for key, value in changes.items()})
    return str(caught.value)


def test_what_nothing_would_read_is_refused(chain_home: Path) -> None:
    assert "method.init=difficulty chooses from the groups of method.difficulty" in refused(chain_home, difficulty=None)
    told = refused(chain_home, init="patches", difficulty__forward_share=0.0)
    assert "method.difficulty is for method.init=difficulty" in told
    told = refused(chain_home, init="patches", difficulty__start="front")
    assert "method.difficulty.start=front is of method.init=difficulty, and method.init=patches" in told
    assert "set method.composer=slots" in refused(chain_home, composer="classes")
    told = refused(chain_home, statistics=yaml.safe_load("{class_share: 0.5}"))
    assert "method.difficulty.forward_share=0" in told


def test_a_class_with_too_few_images_is_refused_by_name(chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM, "ipc.images_per_class=31", "patches.images_per_class=31")
    with pytest.raises(ConfigError, match=r"class 0 has 30 images; ipc\.images_per_class=31 needs as many"):
        check_before_work(context)


def test_members_without_batchnorm_rank_nothing(chain_home: Path) -> None:
    plain = (
        "+backbone@committee.members.plain.backbone=tiny_convnet3",
        "committee.members.plain.backbone.arguments.norm=instance",
        "+committee.members.plain.bn_scale=0",
        "+prior.values.plain=40",
    )
    with pytest.raises(ConfigError, match=r"none of plain has any; choose other method\.voters"):
        check_before_work(tiny_context(chain_home, *PSM, *plain, "method.voters=[plain]"))
    context = tiny_context(chain_home, *PSM, *plain, "method.voters=[resnet18,plain]")
    check_before_work(context)
    assert make_difficulty(context).metrics["members"] == 1
    assert len(load_images(make_images(context, {**PRIORS, "plain": 40.0}))[0]) == 20
