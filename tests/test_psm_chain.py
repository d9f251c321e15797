"""The chain with PSM: ranks of real images, statistics of groups, images, costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PRIORS, as_files, same_files, tiny_context
from safetensors.torch import load_file
from torch import Tensor, nn

import cvdd.chain.difficulty
import cvdd.chain.images
import cvdd.chain.real_batches
from cvdd.artifact import Artifact, Store, parents_of
from cvdd.augmentation.augment import normalise
from cvdd.chain.compare import distil
from cvdd.chain.context import Context
from cvdd.chain.difficulty import SCORES, graded_images, make_difficulty, make_group_statistics
from cvdd.chain.images import make_images
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.real_batches import plain_batches
from cvdd.chain.unit_files import load_history, load_images
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import MeasureStep
from cvdd.cost.work import work_of
from cvdd.data import to_eval_tensor
from cvdd.methods.psm import precision_distance, ranks_in_class
from cvdd.report.gallery import make_gallery
from cvdd.schema import members_used, with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.engine import Engine

pytest_plugins = ["chain_fixtures"]

PSM = ("method=psm", "method.iterations=4", "recipe.epochs=2")
BOTH = (0, 1)
"""The slots of two images per class."""
KEPT = ("method.iterations=0", "method.stages=1", "method.residual=1")


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


def test_a_random_start_is_another_in_each_class_and_slot(chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM, *KEPT, "method.difficulty.start=random")
    images, labels = load_images(make_images(context, {}))
    train, places = context.data().train.stacked(), set()
    for label in range(10):
        order = ordered(context, label)
        for slot, image in enumerate(images[labels == label]):
            (place,) = (train[order] == image).flatten(1).all(dim=1).nonzero()[:, 0].tolist()
            assert place // 15 == slot
            places.add(place % 15)
    assert len(places) > 5


def test_the_weight_of_variances_counts(chain_home: Path) -> None:
    def scores(weight: int) -> Tensor:
        context = tiny_context(chain_home, *PSM, f"method.difficulty.variance_weight={weight}")
        return load_file(make_difficulty(context).path / SCORES)["scores"]

    assert not torch.equal(scores(0), scores(1))


def test_every_pass_has_an_order_and_crops_of_its_own(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Tensor]] = []

    def keep(network: nn.Module, batches: Any) -> None:
        seen.append(list(batches))

    monkeypatch.setattr(cvdd.chain.difficulty, "update_statistics", keep)
    longer = (*PSM, "method.difficulty.forward_share=1", "recipe.crop=none", "recipe.flip=true")
    context = with_store(tiny_context(chain_home, *longer), tmp_path, chain_home, "group_statistics")
    make_group_statistics(context, "resnet18", make_difficulty(context), [1])
    first, second = (torch.cat(batches) for batches in seen)
    assert [len(batch) for batch in seen[0]] == [50, 50, 50]
    assert not torch.equal(first, second)
    # The same images in another order, some of them the other way round.
    plain = {image.sum().round(decimals=2).item() for image in first}
    assert plain == {image.sum().round(decimals=2).item() for image in second}
    as_sets = [{image.numpy().tobytes() for image in images} for images in (first, second)]
    assert 20 < len(as_sets[0] & as_sets[1]) < 130


def test_parts_of_a_batch_move_the_statistics_by_themselves(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def keep(network: nn.Module, batches: Any) -> None:
        sizes.extend(len(batch) for batch in batches)

    monkeypatch.setattr(cvdd.chain.difficulty, "update_statistics", keep)
    parts = (*PSM, "recipe.accumulation=2")
    context = with_store(tiny_context(chain_home, *parts), tmp_path, chain_home, "group_statistics")
    make_group_statistics(context, "resnet18", make_difficulty(context), [0])
    assert sizes == [25] * 6


def test_members_have_statistics_of_the_slots_on_which_they_vote(chain_home: Path) -> None:
    alone = ("committee.size=1", "committee.draw=fixed", "committee.fixed=[[resnet18],[resnet50]]")
    made = images_of(chain_home, "method.voters=drawn", *alone)
    kept = [one for one in parents_of(made) if one.kind == "group_statistics"]
    assert [sorted(one.manifest["files"]) for one in kept] == [["group0000.safetensors"], ["group0001.safetensors"]]


def test_voters_have_the_statistics_of_the_group_of_their_slot(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("method.voters=[resnet18,resnet50]", "method.turns=in_turn", "method.name=looked_at")
    context = tiny_context(chain_home, *PSM, *overrides)
    difficulty = make_difficulty(context)
    stored = {name: make_group_statistics(context, name, difficulty, BOTH) for name in ("resnet18", "resnet50")}
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
    statistics = make_group_statistics(context, "resnet18", make_difficulty(context), BOTH)
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
    usual = make_group_statistics(tiny_context(chain_home, *longer), "resnet18", make_difficulty_of(chain_home), BOTH)
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
            make_group_statistics(context, "resnet18", make_difficulty(context), BOTH)
    monkeypatch.setattr(cvdd.chain.difficulty, "update_statistics", once)
    again = make_group_statistics(context, "resnet18", make_difficulty(context), BOTH)
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


def test_files_are_ranked_as_they_are_tested(chain_home: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    wider = (*PSM, "dataset.test_resize=40")
    context = as_files(tmp_path / "files", tiny_context(chain_home, *wider, store=tmp_path / "store"))
    data, order = context.data(), torch.arange(len(context.data().train)).split(100)
    expected = to_eval_tensor(data.train, data.image_size, 40, torch.arange(len(data.train)))
    found = torch.cat(list(plain_batches(context, order)))
    torch.testing.assert_close(found, normalise(expected, data.mean, data.std))


def test_a_group_that_does_not_fit_memory_is_decoded_pass_by_pass(
    chain_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    context = as_files(tmp_path / "files", tiny_context(chain_home, *PSM, store=tmp_path / "store"))
    usual = make_group_statistics(tiny_context(chain_home, *PSM), "resnet18", make_difficulty_of(chain_home), BOTH)
    monkeypatch.setattr(cvdd.chain.real_batches, "free_memory", lambda device: 1000.0)
    assert same_files(usual, make_group_statistics(context, "resnet18", make_difficulty(context), BOTH))


def test_costs_count_what_is_shown(chain_home: Path, tmp_path: Path) -> None:
    longer = ("recipe.epochs=10", "method.voters=[resnet18,shufflenetv2]", "method.turns=in_turn")
    context = tiny_context(chain_home, *PSM, *longer, store=tmp_path / "store")
    pieces = plan_pieces(planning(context.config, torch.device("cpu")))
    (ranking,) = [piece for piece in pieces if piece.artifact.kind == "difficulty"]
    statistics = [piece for piece in pieces if piece.artifact.kind == "group_statistics"]
    assert ranking.stage == "patches"
    shown = {
        json.loads(step.network.backbone)["name"]: times
        for step, times in work_of(ranking).uses.items()
        if isinstance(step, MeasureStep)
    }
    assert shown == {"resnet18": 300, "shufflenetv2": 300}
    assert len(statistics) == 2
    for piece in statistics:
        (times,) = [times for step, times in work_of(piece).uses.items() if isinstance(step, MeasureStep)]
        assert times == 300 * 9
        assert work_of(piece).parts["groups"] == 2


def test_a_page_shows_what_the_images_began_with(chain_home: Path) -> None:
    context = tiny_context(chain_home, *PSM)
    distilled = distil(context, "psm")
    gallery = make_gallery(distilled)
    assert gallery.start_title == "real images they started from"
    assert all(row.start and row.start != row.distilled for row in gallery.rows)


def test_all_that_may_vote_rank_even_if_nobody_votes(chain_home: Path) -> None:
    config = tiny_context(chain_home, *PSM, *KEPT, "method.voters=[resnet50]", "label=hard", "protocol=hard").config
    assert members_used(config) == ["resnet50"]


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
    many = ("ipc.images_per_class=31", "patches.images_per_class=31", "patches.candidates=10")
    for more in ((), ("method.init=patches", "patches.candidates=40")):
        context = tiny_context(chain_home, *PSM, *many, *more)
        told = r"class 0 has 30 images; ipc\.images_per_class=31 needs as many\. Or raise dataset\.train_per_class=30"
        with pytest.raises(ConfigError, match=told):
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
    with pytest.raises(ConfigError, match=r"none of plain has any"):
        check_before_work(tiny_context(chain_home, *PSM, *plain, "method.voters=[plain]", "method.init=patches"))
    context = tiny_context(chain_home, *PSM, *plain, "method.voters=[resnet18,plain]")
    check_before_work(context)
    assert make_difficulty(context).metrics["members"] == 1
    assert len(load_images(make_images(context, {**PRIORS, "plain": 40.0}))[0]) == 20
