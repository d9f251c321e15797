"""Labels that somebody else made, of a store or of the published programs, and the images that they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Compose
from given_helpers import HARD, given, labels, one, refused
from helpers import PUBLISHED_IMAGES as IMAGES
from helpers import PUBLISHED_LABELS as RECORDS
from helpers import TINY, configure, tiny_context
from test_label_phases import FEW_LABELS

from cvdd.artifact.cleaning import sealed as sealed_in
from cvdd.chain.compare import Distilled, Result, compare, distil
from cvdd.chain.preflight import check_before_work
from cvdd.chain.training import load_curve
from cvdd.chain.unit_files import load_images
from cvdd.commands.runtime import Invocation, run
from cvdd.composition.given_recipe import recipe_of
from cvdd.labels.published_release import PublishedLabels, read_published_images
from cvdd.support.config_base import ConfigError

pytest_plugins = ["chain_fixtures", "given_fixtures"]


def test_a_set_of_a_store_learns_as_it_did_there(
    made: tuple[Distilled, Result], theirs: Path, tmp_path: Path, sealed: list[str]
) -> None:
    context = tiny_context(tmp_path, *given(one(theirs / "images")), *labels(one(theirs / "labels")))
    check_before_work(context)
    (student,) = compare(context)[1][0].students
    assert [kind for kind in sealed if kind != "data"] == ["students"]
    original = made[1].students[0]
    assert student.manifest["metrics"] == original.manifest["metrics"]
    assert student.manifest["files"] == original.manifest["files"]
    assert student.digest != original.digest


def test_a_command_shows_it_without_what_it_was_made_from(theirs: Path, tmp_path: Path) -> None:
    typed = (*TINY, *given(one(theirs / "images")), *labels(one(theirs / "labels")))
    run(configure(tmp_path, *typed), Invocation(typed))
    summary = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert (summary["members"], summary["votes"], summary["agreement"]) == ({}, [], {})
    (shown,) = summary["results"]
    assert shown["row"] == "given"
    assert shown["labels"] == one(theirs / "labels").name
    assert shown["label_bytes"] == sum(
        path.stat().st_size for path in one(theirs / "labels").iterdir() if path.name != "manifest.json"
    )
    page = (tmp_path / "output" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert "they started from" not in page
    assert {artifact.kind for artifact in sealed_in(tmp_path / "store")} <= {"data", "students"}


def test_the_published_programs_images_and_records(tmp_path: Path, sealed: list[str]) -> None:
    context = tiny_context(tmp_path, *given(IMAGES), *labels(RECORDS))
    check_before_work(context)
    distilled, results = compare(context)
    assert [kind for kind in sealed if kind != "data"] == ["given", "images", "students"]
    pixels, targets = read_published_images(IMAGES)
    found, classes = load_images(distilled[0].images)
    assert torch.equal(found, pixels)
    assert torch.equal(classes, targets)
    opened, expected = distilled[0].labels.open(found), PublishedLabels(RECORDS, 20, 32)
    for epoch in range(3):
        assert torch.equal(opened.epoch(epoch)[1], expected.epoch(epoch)[1])
    summary = results[0].summary()
    assert summary["label_bytes"] == sum(path.stat().st_size for path in RECORDS.glob("epoch_*/*"))
    assert summary["labels"] == RECORDS.name


@pytest.mark.parametrize("epoch", [0, 2])
def test_other_records_are_other_labels(epoch: int, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(RECORDS, tmp_path / "records"))

    def identity() -> dict[str, object]:
        return distil(tiny_context(tmp_path, *given(IMAGES), *labels(copied)), "").labels.identity

    first = identity()
    place = copied / f"epoch_{epoch}"
    shutil.copy(place / "batch_1.tar", place / "batch_0.tar")
    assert identity() != first


def test_a_set_in_a_place_that_is_no_store(theirs: Path, tmp_path: Path) -> None:
    """Nothing is noted around it, and what is wrong with it cannot be made again."""
    downloads = tmp_path / "downloads"
    for kind in ("images", "labels"):
        shutil.copytree(one(theirs / kind), downloads / one(theirs / kind).name)
    images, stored = (downloads / one(theirs / kind).name for kind in ("images", "labels"))
    check_before_work(tiny_context(tmp_path / "run", *given(images), *labels(stored)))
    assert sorted(path.name for path in downloads.iterdir()) == sorted((images.name, stored.name))
    assert not (tmp_path / ".users").exists()
    renamed = stored.rename(downloads / "their labels")
    with pytest.raises(ConfigError, match=r"^label\.given=\S+ labels: .* Copy it again, whole and under its own name"):
        tiny_context(tmp_path / "run", *given(images), "label=given", f"label.given='{renamed}'")
    (images / "manifest.json").write_text("{}")
    said = refused(tmp_path / "run", *given(images), *HARD)
    assert said.startswith("method.given: ")
    assert said.endswith("Copy it again, whole and under its own name.")


def test_labels_of_another_version(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tmp_path, *given(one(theirs / "images")), *labels(one(theirs / "labels")))
    monkeypatch.setattr("cvdd.chain.given_labels.recipe_of", lambda path: {**recipe_of(path), "newer": 1})
    with pytest.raises(ConfigError, match=r"is of another version, .*: it says label\.newer"):
        check_before_work(context)


def test_more_epochs_than_are_labelled(compose: Compose) -> None:
    """What is labelled cannot be changed."""
    typed = ("compare=none", *given(IMAGES), *labels(RECORDS), "protocol.epochs=4")
    with pytest.raises(ConfigError, match=r"and label\.epochs is 3; set protocol\.epochs=3$"):
        compose("evaluate", *typed)


def test_records_are_not_seen_more_than_once(tmp_path: Path) -> None:
    """They are read epoch by epoch, and what is said can be typed."""
    said = refused(tmp_path, *given(IMAGES), *labels(RECORDS), "protocol.repeat_labels=true")
    assert said.endswith("type protocol.repeat_labels=false")


def test_few_labels_of_a_store_teach_as_they_did_there(tmp_path: Path) -> None:
    """With what was left out of them, in the same rounds, with the same epochs of classes."""
    typed = (*FEW_LABELS, "protocol.temperature_factor=0.9", "protocol.temperature_epochs=2")
    original = compare(tiny_context(tmp_path / "one", *typed, "label.top=3", "label.rest=nothing"))
    made = original[0][0].labels.artifact
    assert made is not None
    images, stored = original[0][0].images.path, made.path
    learnt = [override for override in typed if override.startswith("protocol.")]
    again = compare(tiny_context(tmp_path / "other", *given(images), *labels(stored), *learnt))
    assert load_curve(again[1][0].students[0]) == load_curve(original[1][0].students[0])


def test_labels_that_do_not_fit(row: Distilled, files: Path, theirs: Path, tmp_path: Path) -> None:
    stored, images = one(theirs / "labels"), one(theirs / "images")
    said = refused(tmp_path, *given(files), *labels(stored))
    assert f"type method.given=.../images/NAME-{row.images.digest}" in said
    said = refused(tmp_path, *given(images), *labels(stored), "dataset.mean=[0.1,0.2,0.3]")
    assert "the teachers saw images normalised with mean" in said
    said = refused(tmp_path, *given(images), *labels(stored), "label.batch_size=10", "label.mix=none")
    assert "was made with label.mix=cutmix, label.batch_size=8, which nothing can change now" in said
    assert said.endswith("leave label.mix=none, label.batch_size=10 out")
    said = refused(tmp_path, *given(images), *labels(stored), "label.randaugment=true")
    assert "was made with label.randaugment=false, which" in said
    said = refused(tmp_path, *given(images), *labels(stored), "ipc.images_per_class=1")
    assert said.endswith("are of 2 images of each class, and ipc.images_per_class=1; type ipc.images_per_class=2")
    said = refused(tmp_path, *given(IMAGES), *labels(RECORDS), "ipc.images_per_class=1")
    assert "these labels were made for other images" in said


def test_other_artefacts_are_no_labels(row: Distilled) -> None:
    with pytest.raises(ConfigError, match=r"is an artefact of kind images, not labels"):
        recipe_of(row.images.path)


def test_there_is_nothing_to_relabel(tmp_path: Path) -> None:
    config = configure(tmp_path, *TINY, *given(IMAGES), *labels(RECORDS), verb="relabel")
    with pytest.raises(ConfigError, match=r"are labels that are there already, and relabel\.py makes some"):
        run(config, Invocation(()))
