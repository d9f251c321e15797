"""The whole chain on tiny data: made once, the same bits again, and what each choice changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import PRIORS, same_files, tiny_context

import cvdd.chain.images
from cvdd.artifact import cleaning
from cvdd.chain.compare import Distilled, Result, compare, distil, warn_of_equal_rows
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.initial import make_initial_patches
from cvdd.chain.priors import Priors, find_priors
from cvdd.chain.recover import jpeg_round_trip
from cvdd.chain.training import load_curve
from cvdd.chain.unit_files import load_history, load_images
from cvdd.report.costs import all_artifacts, stage_costs

pytest_plugins = ["chain_fixtures"]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_results_of_the_chain(made: tuple[Distilled, Result]) -> None:
    distilled, result = made
    images, labels = load_images(distilled.images)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert distilled.priors.values == PRIORS
    assert (result.row, result.student, result.seeds) == ("cvdd", "tiny_resnet18", (0,))
    summary = result.summary()
    curve = load_curve(result.students[0])
    assert [row["epoch"] for row in curve] == [1, 2, 3]
    assert summary["top1"] == curve[-1]["top1"]
    assert summary["best_top1"] == max(row["top1"] for row in curve)
    assert summary["label_bytes"] == 3 * 20 * (10 * 2 + 29)


def test_units_tell_their_members_weights_and_terms(made: tuple[Distilled, Result]) -> None:
    histories = load_history(made[0].images)
    assert list(histories) == ["slot0000_block0000", "slot0001_block0000"]
    first, second = histories.values()
    assert list(first["weights"]) == ["resnet18", "resnet50"]
    assert list(second["weights"]) == ["resnet18", "shufflenetv2"]
    assert first["weights"]["resnet18"] == pytest.approx(1 / (1 + torch.tensor(-10 / 5).exp().item()), rel=1e-5)
    assert [row["iteration"] for row in first["rows"]] == [2, 4, 6]
    assert sorted(first["rows"][0]["bn"]) == ["resnet18", "resnet50"]


def test_the_same_configuration_makes_nothing_anew(
    made: tuple[Distilled, Result], chain_home: Path, sealed: list[str]
) -> None:
    _, results = compare(tiny_context(chain_home))
    assert sealed == []
    assert results[0].summary() == made[1].summary()


def test_another_store_gets_the_same_bits(made: tuple[Distilled, Result], chain_home: Path, tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    compare(context)
    mine = {artifact.path.name: artifact for artifact in cleaning.sealed(tiny_context(chain_home).store.root)}
    theirs = {artifact.path.name: artifact for artifact in cleaning.sealed(context.store.root)}
    assert {artifact.kind for artifact in theirs.values()} == {
        "data",
        "members",
        "patches",
        "images",
        "labels",
        "students",
    }
    for name, artifact in theirs.items():
        assert same_files(artifact, mine[name]), name
        assert artifact.metrics == mine[name].metrics, name


# --- choices ----------------------------------------------------------------------------------------------------------


def images_with(chain_home: Path, *overrides: str) -> torch.Tensor:
    return load_images(make_images(tiny_context(chain_home, *overrides), PRIORS))[0]


def test_stacks_of_other_size_are_other_artefacts_with_nearly_the_same_images(chain_home: Path) -> None:
    """One draw for both slots, so that they share a stack or do not."""
    best = "committee.draw=best"
    together = make_images(tiny_context(chain_home, best), PRIORS)
    apart = make_images(tiny_context(chain_home, best, "method.units_per_stack=1"), PRIORS)
    assert (together.metrics["stacks"], apart.metrics["stacks"]) == (1, 2)
    assert together.digest != apart.digest
    one, two = (load_images(artifact)[0].float() for artifact in (together, apart))
    assert (one - two).abs().max() <= 3
    assert (one - two).abs().mean() < 0.05


def test_a_smaller_set_is_the_beginning_of_a_larger(made: tuple[Distilled, Result], chain_home: Path) -> None:
    assert torch.equal(images_with(chain_home, "ipc.images_per_class=1"), load_images(made[0].images)[0][::2])


def test_optimisation_moves_the_patches(made: tuple[Distilled, Result], chain_home: Path) -> None:
    context = tiny_context(chain_home)
    patches = cvdd.chain.images.initial_images(context, make_initial_patches(context)).flatten(0, 1)
    images = load_images(made[0].images)[0]
    assert 5 < (images.float() - patches.float()).abs().mean() < 60
    kept = images_with(chain_home, "method=patches", "method.iterations=0")
    assert torch.equal(kept, patches)


def test_noise_and_other_seeds_start_elsewhere(chain_home: Path) -> None:
    noise, other = images_with(chain_home, "method.init=noise"), images_with(chain_home, "method.init=noise", "seed=1")
    assert (noise.float() - other.float()).abs().mean() > 20


def test_jpeg_round_trip_of_images_that_nobody_changed(made: tuple[Distilled, Result], chain_home: Path) -> None:
    """They have 8 bits already, and no fractions that the release would cut off before it compresses."""
    lossy = images_with(chain_home, "method.jpeg_round_trip=true", "method.iterations=0")
    exact = images_with(chain_home, "method.iterations=0")
    assert torch.equal(lossy, torch.stack([jpeg_round_trip(image) for image in exact]))
    assert 1 < (lossy.float() - exact.float()).abs().mean() < 30


def test_labels_on_the_fly_give_the_same_student(
    made: tuple[Distilled, Result], again: Callable[..., Context], chain_home: Path
) -> None:
    store = again("labels", "students").store.root
    context = tiny_context(chain_home, "label.store=none", store=store)
    distilled, results = compare(context)
    assert distilled[0].labels.artifact is None
    assert not (store / "labels").exists()
    assert same_files(results[0].students[0], made[1].students[0])
    assert results[0].values() == made[1].values()


def test_parameters_from_the_seed_give_the_same_student(
    made: tuple[Distilled, Result], again: Callable[..., Context], chain_home: Path
) -> None:
    context = tiny_context(chain_home, "label.parameters=seed", store=again("labels", "students").store.root)
    distilled, results = compare(context)
    assert sorted(distilled[0].labels.artifact.manifest["files"]) == ["logits.bin"]
    assert same_files(results[0].students[0], made[1].students[0])


def test_rows_of_a_comparison_differ_in_what_they_say(made: tuple[Distilled, Result], chain_home: Path) -> None:
    context = tiny_context(chain_home, "compare=random_real")
    distilled, results = compare(context)
    assert [row.row for row in distilled] == [row.row for row in results] == ["cvdd", "random_real"]
    assert results[0].students[0].digest == made[1].students[0].digest
    real, labels = load_images(distilled[1].images)
    train = context.data().train
    for image, label in zip(real, labels.tolist(), strict=True):
        found = (train.stacked() == image).flatten(1).all(dim=1).nonzero().flatten()
        assert label in train.labels[found].tolist()
    protocols = [result.students[0].manifest["identity"]["protocol"] for result in results]
    assert protocols[0] == protocols[1]


def test_rows_that_are_the_same_are_named(chain_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = tiny_context(chain_home, "+compare.again={method.checkpoint_every: 4}", "compare=random_real")
    _, results = compare(context)
    assert not [message for message in caplog.messages if "one and the same" in message]
    warn_of_equal_rows(results)
    assert [result.row for result in results] == ["cvdd", "random_real", "again"]
    assert "rows cvdd and again are one and the same: they differ in nothing that is read" in caplog.messages
    assert len([message for message in caplog.messages if "one and the same" in message]) == 1


def test_full_data_is_a_row_of_its_own(chain_home: Path) -> None:
    _, results = compare(tiny_context(chain_home, "protocol.full_data=true"))
    full = results[-1]
    assert (full.row, full.protocol, full.images, full.labels) == ("full_data", "recipe tiny", None, None)
    assert full.values() == [float(full.students[0].metrics["top1"])]


def measuring(chain_home: Path, *overrides: str) -> Context:
    budget = {"prior.images_per_class": 2, "prior.iterations": 2, "prior.epochs": 2}
    context = tiny_context(chain_home, *overrides)
    return context.differing({"prior.source": "measured", "prior.values": {}, **budget}, "")


def test_priors_are_measured_once(chain_home: Path, sealed: list[str]) -> None:
    found = find_priors(measuring(chain_home))
    priors = found.values
    assert list(priors) == list(PRIORS)
    students = [
        a for a in cleaning.sealed(tiny_context(chain_home).store.root) if "prior-" in a.name and a.kind == "students"
    ]
    assert {student.digest for student in found.students} == {student.digest for student in students}
    assert sorted(priors.values()) == sorted(student.metrics["top1"] for student in students)
    assert all(student.manifest["identity"]["measured_on"] == "train" for student in students)
    assert all(0 < prior < 100 for prior in priors.values())
    sealed.clear()
    assert find_priors(measuring(chain_home, "temperature.vote=2", "committee.draw=best")).values == priors
    assert sealed == []


def test_priors_are_left_out_where_nothing_depends_on_them(chain_home: Path, sealed: list[str]) -> None:
    context = measuring(chain_home, "committee.voter=equal", "label.weights=equal")
    assert find_priors(context) == Priors({})
    assert sealed == []


def test_given_priors_decide_the_vote(chain_home: Path) -> None:
    vote = {"prior.values": {"resnet18": 10.0, "resnet50": 90.0, "shufflenetv2": 80.0}}
    context = tiny_context(chain_home, "committee.draw=best").differing(vote, "")
    weights = [history["weights"] for history in load_history(distil(context, "row").images).values()]
    assert [list(unit) for unit in weights] == [["resnet50", "shufflenetv2"]] * 2
    assert weights[0]["resnet50"] == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), rel=1e-5)


def test_each_seed_can_have_images_of_its_own(made: tuple[Distilled, Result], chain_home: Path) -> None:
    context = tiny_context(chain_home, "protocol.images=per_seed", "protocol.seeds=[0,1]")
    (distilled,), results = compare(context)
    students = results[0].students
    digests = [
        parent["digest"] for student in students for parent in student.manifest["parents"] if parent["kind"] == "images"
    ]
    assert digests[0] == made[0].images.digest
    assert digests[0] != digests[1]
    assert [images.digest for images in distilled.all_images] == digests
    listed = all_artifacts({}, [distilled], results)
    costs = {cost.stage: cost for cost in stage_costs({}, listed, [distilled], results)}
    assert costs["images"].artifacts == costs["labels"].artifacts == 2
    assert costs["images"].bytes == sum(images.bytes for images in distilled.all_images)
    made_of = {"members": 3, "patches": 2, "images": 2, "labels": 2, "students": 2}
    assert dict(Counter(one.kind for one in listed)) == made_of
