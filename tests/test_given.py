"""Images and labels that somebody else made: files, sets of a store, and those of the published programs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Compose
from helpers import PUBLISHED_IMAGES as IMAGES
from helpers import PUBLISHED_LABELS as RECORDS
from helpers import TINY, configure, tiny_context
from PIL import Image
from safetensors.torch import load_file

import cvdd
from cvdd.artifact import Artifact
from cvdd.artifact.cleaning import sealed as sealed_in
from cvdd.artifact.manifest import read_manifest
from cvdd.chain.compare import Distilled, Result, compare, distil
from cvdd.chain.unit_files import PATCHES, load_images
from cvdd.config_base import ConfigError
from cvdd.cost import plan_pieces, planning
from cvdd.given_recipe import recipe_of
from cvdd.preflight import check_before_work
from cvdd.published_release import PublishedLabels, read_published_images
from cvdd.report.gallery import data_uri, make_gallery
from cvdd.runtime import Invocation, run

pytest_plugins = ["chain_fixtures"]

HARD = ("label=hard", "protocol=hard_tiny", "protocol.epochs=3", "protocol.eval_every=1")


def given(folder: Path) -> tuple[str, ...]:
    # The tiny configuration types as many iterations as it needs.
    return ("method=given", f"method.given={folder}", "method.iterations=0")


def labels(folder: Path) -> tuple[str, ...]:
    # What the tiny configuration types of labels is what these are.
    return ("label=given", f"label.given={folder}")


@pytest.fixture
def row(made: tuple[Distilled, Result]) -> Distilled:
    return made[0]


@pytest.fixture
def files(row: Distilled, tmp_path: Path) -> Path:
    """Its images as files."""
    cvdd.load(row.images.path).save_images(tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture
def theirs(row: Distilled, tmp_path: Path) -> Path:
    """Somebody else's store, which has images and their labels, and nothing of what these were made from."""
    assert row.labels.artifact is not None
    for artifact in (row.images, row.labels.artifact):
        shutil.copytree(artifact.path, tmp_path / "theirs" / artifact.kind / artifact.path.name)
    return tmp_path / "theirs"


ON_IMAGENET = ("committee=imagenet", "recipe=imagenette", "students=imagenet", "compare=none")


def cvdd_images(theirs: Path) -> Artifact:
    return read_manifest(one(theirs / "images"))


def one(folder: Path) -> Path:
    (found,) = folder.glob("[!.]*")
    return found


def refused(tmp_path: Path, *overrides: str) -> str:
    """What a command says before it does anything."""
    with pytest.raises(ConfigError) as error:
        check_before_work(tiny_context(tmp_path, *overrides))
    assert not (tmp_path / "store" / "members").exists()
    return str(error.value)


def test_files_are_taken_as_they_are(row: Distilled, files: Path, tmp_path: Path, sealed: list[str]) -> None:
    context = tiny_context(tmp_path, *given(files), *HARD)
    check_before_work(context)
    results = compare(context)[1]
    assert [kind for kind in sealed if kind != "data"] == ["given", "images", "students"]
    assert results[0].images is not None
    assert all(map(torch.equal, load_images(results[0].images), load_images(row.images)))


def test_what_files_hold_decides_and_not_their_names(files: Path, tmp_path: Path) -> None:
    def images() -> str:
        return distil(tiny_context(tmp_path, *given(files), *HARD), "").images.digest

    first = images()
    shutil.move(files / "3_3" / "0001.png", files / "3_3" / "the second one.png")
    assert images() == first
    shutil.move(files, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", files)
    for folder in sorted(files.iterdir()):
        folder.rename(files / f"new{int(folder.name[0]):03d}")
    assert images() == first
    picture = Image.open(files / "new003" / "0000.png")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(files / "new003" / "0000.png")
    assert images() != first


def test_seeds_change_nothing(files: Path, tmp_path: Path) -> None:

    digests = {
        distil(tiny_context(tmp_path, *given(files), *HARD, f"method.seed={seed}"), "").images.digest for seed in (0, 7)
    }
    assert len(digests) == 1


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
    assert summary["labels"] is None


def test_other_records_are_other_labels(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(RECORDS, tmp_path / "records"))

    def identity() -> dict[str, object]:
        return distil(tiny_context(tmp_path, *given(IMAGES), *labels(copied)), "").labels.identity

    first = identity()
    shutil.copy(copied / "epoch_0" / "batch_1.tar", copied / "epoch_0" / "batch_0.tar")
    assert identity() != first


def test_images_begin_with_given_ones(row: Distilled, files: Path, theirs: Path, tmp_path: Path) -> None:
    """Whether they are files or a set of a store; one image of each class is taken of two."""
    results = []
    for number, place in enumerate((files, one(theirs / "images"))):
        for start in (("method.init=from_given",), ("method=given", "method.iterations=0")):
            options = ("ipc.images_per_class=1", *start, f"method.given={place}")
            context = tiny_context(tmp_path / str(number), *options, *HARD)
            results.append((context, distil(context, "").images))
    (_, first), (_, kept), (_, second), (_, also_kept) = results
    assert torch.equal(load_images(first)[0], load_images(second)[0])
    assert torch.equal(load_images(kept)[0], load_images(also_kept)[0])
    assert not torch.equal(load_images(first)[0], load_images(kept)[0])
    assert torch.equal(load_images(kept)[0], load_images(row.images)[0][::2])
    (parent,) = [one for one in first.manifest["parents"] if one["kind"] == "given"]
    place = tmp_path / "0" / "store" / "given" / f"{parent['name']}-{parent['digest']}"
    assert torch.equal(load_file(place / PATCHES)["images"][:, 0], load_images(row.images)[0][::2])


def test_rows_of_a_comparison(theirs: Path, files: Path, again, chain_home: Path) -> None:  # type: ignore[no-untyped-def]
    stored = ",".join(map(repr, (*given(one(theirs / "images")), *labels(one(theirs / "labels")))))
    rows = (f"+compare.theirs=[{stored}]", f"+compare.files=[{','.join(map(repr, given(files)))}]")
    context = tiny_context(chain_home, *rows, store=again().store.root)
    results = {result.row: result for result in compare(context)[1]}
    assert list(results) == ["cvdd", "theirs", "files"]
    own, given_labels, labelled = (result.students[0] for result in results.values())
    assert own.manifest["files"] == given_labels.manifest["files"] == labelled.manifest["files"]


def test_what_it_would_cost(files: Path, theirs: Path, tmp_path: Path) -> None:

    asked = [
        [*given(files), *HARD],
        [*given(one(theirs / "images")), *labels(one(theirs / "labels"))],
    ]
    kinds = []
    for options in asked:
        config = configure(tmp_path, *TINY, *options)
        kinds.append([piece.artifact.kind for piece in plan_pieces(planning(config, torch.device("cpu")))])
    assert kinds == [["given", "images", "students"], ["students"]]


def test_it_costs_as_much_where_the_data_are_not_there(files: Path, tmp_path: Path) -> None:
    for folder in sorted(files.iterdir()):
        folder.rename(files / f"n0{folder.name[0]}")
    there = ("dataset=imagenet1k", "dataset.root=nowhere", "dataset.num_classes=10", "dataset.classes_per_unit=10")
    config = configure(
        tmp_path, *there, *ON_IMAGENET, "ipc.images_per_class=2", "method=given", f"method.given={files}"
    )
    assert "given" in [piece.artifact.kind for piece in plan_pieces(planning(config, torch.device("cpu")))]


def test_other_records_of_later_epochs_are_other_labels(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(RECORDS, tmp_path / "records"))

    def identity() -> dict[str, object]:
        return distil(tiny_context(tmp_path, *given(IMAGES), *labels(copied)), "").labels.identity

    first = identity()
    shutil.copy(copied / "epoch_2" / "batch_1.tar", copied / "epoch_2" / "batch_0.tar")
    assert identity() != first


def test_images_beyond_those_asked_for_do_not_count(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def images() -> str:
        context = tiny_context(tmp_path, *given(files), *HARD, "ipc.images_per_class=1")
        check_before_work(context)
        return distil(context, "").images.digest

    first = images()
    assert caplog.text.count("has 2 images of a class, of which the first 1 are taken") == 1
    (files / "2_2" / "0001.png").unlink()
    assert images() == first
    assert "has 1 to 2 images of a class" in caplog.text


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


@pytest.mark.parametrize("kind", ["files", "store"])
def test_the_page_shows_what_images_began_with(kind: str, files: Path, theirs: Path, tmp_path: Path) -> None:
    place = files if kind == "files" else one(theirs / "images")
    options = ("method.init=from_given", f"method.given={place}", "ipc.images_per_class=1")
    made = distil(tiny_context(tmp_path, *options, *HARD), "")
    gallery = make_gallery(made)
    assert gallery.start_title == "given images they started from"
    expected = load_images(cvdd_images(theirs))[0][::2]
    assert [row.start[0] for row in gallery.rows] == [data_uri(image) for image in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: shutil.rmtree(files / "3_3"), r"holds 9 class folders \(0_0, 1_1, 2_2, \.\.\.\); needed are 10"),
        (lambda files: shutil.rmtree(files), r"there is no such directory"),
        (lambda files: (files / "3_3" / "0001.png").unlink(), r"has 1 images of class 3, and ipc\.images_per_class=2"),
        (
            lambda files: [(files / "3_3" / f"000{k}.png").unlink() for k in (0, 1)],
            r"class '3_3' has no image in .*correct method\.given",
        ),
        (
            lambda files: (
                [(files / "3_3").rename(files / "x"), (files / "4_4").rename(files / "3_4")]
                and (files / "x").rename(files / "4_3")
            ),
            r"folder 3_4 should be of class 3 of dataset\.classes, which is 3; is the set of other classes, or",
        ),
        (
            lambda files: [folder.rename(files / f"{folder.name[0]}_bird") for folder in files.iterdir()],
            r"folder 0_bird should be of class 0 of dataset\.classes, which is 0; is the set of other classes",
        ),
        (lambda files: (files / "5_5" / "0000.png").write_bytes(b"x"), r"5_5/0000\.png cannot be read as an image"),
        (
            lambda files: Image.new("RGB", (16, 32)).save(files / "7_7" / "0001.png"),
            r"7_7/0001\.png has 16x32 pixels, and dataset\.image_size=32",
        ),
    ],
)
def test_files_that_do_not_fit(change, message: str, files: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    change(files)
    assert re.search(message, refused(tmp_path, *given(files)))


def test_labels_that_do_not_fit(row: Distilled, files: Path, theirs: Path, tmp_path: Path) -> None:
    stored, images = one(theirs / "labels"), one(theirs / "images")
    said = refused(tmp_path, *given(files), *labels(stored))
    assert f"type method.given=.../images/NAME-{row.images.digest}" in said
    said = refused(tmp_path, *given(images), *labels(stored), "dataset.mean=[0.1,0.2,0.3]")
    assert "the teachers saw images normalised with mean" in said
    said = refused(tmp_path, *given(images), *labels(stored), "label.batch_size=10", "label.mix=none")
    assert "in which label.mix=none is cutmix, label.batch_size=10 is 8; choose label=given" in said
    said = refused(tmp_path, *given(images), *labels(stored), "ipc.images_per_class=1")
    assert said.endswith("are of 2 images of each class, and ipc.images_per_class=1; type ipc.images_per_class=2")
    said = refused(tmp_path, *given(IMAGES), *labels(RECORDS), "ipc.images_per_class=1")
    assert "these labels were made for other images" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("label=given",), r"^label\.given=null: label=given reads labels that are there; type label\.given=store/"),
        (
            ("+compare.theirs=['label=given']",),
            r"^compare\.theirs=\[label=given\]: label\.given=null: label=given reads",
        ),
        (("label=given", "label.given=nowhere"), r"^label\.given=nowhere holds neither labels of a store"),
        (labels(RECORDS), r"^label\.given=\S+ is of images that are there too; add method=given"),
        (
            (f"label.given={RECORDS}", *given(IMAGES)),
            r"^label\.given=\S+ has nobody label anything; choose label=given",
        ),
        (("method=given",), r"^method\.init=given takes images that are there; type method\.given=FOLDER"),
        (
            (f"method.given={IMAGES}",),
            r"^method\.given=\S+ is of method=given, or of method\.init=from_given, and method\.init=patches",
        ),
        (
            ("method=given", f"method.given={IMAGES}", "method.iterations=5"),
            r"^method\.init=given keeps images as they are, and method\.iterations=5",
        ),
        (
            ("method.init=from_given", f"method.given={IMAGES}", "method.iterations=0"),
            r"^method\.init=from_given begins with images, and method\.iterations=0 keeps them",
        ),
        (
            (*given(IMAGES), "method.jpeg_round_trip=true"),
            r"^method\.init=given keeps images as they are, and method\.jpeg_round_trip=true would compress them",
        ),
        (
            ("method=mtt_tiny", "method.init=given", f"method.given={IMAGES}", "label=hard", "protocol=method"),
            r"method\.init=given: trajectory matching starts from real or noise",
        ),
    ],
)
def test_what_is_refused_before_anything(overrides: tuple[str, ...], message: str, compose: Compose) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("evaluate", *overrides)


def test_other_artefacts_are_no_labels(row: Distilled) -> None:
    with pytest.raises(ConfigError, match=r"is an artefact of kind images, not labels"):
        recipe_of(row.images.path)


def test_there_is_nothing_to_relabel(tmp_path: Path) -> None:
    config = configure(tmp_path, *TINY, *given(IMAGES), *labels(RECORDS), verb="relabel")
    with pytest.raises(ConfigError, match=r"are labels that are there already, and relabel\.py makes some"):
        run(config, Invocation(()))


def test_priors_are_measured_as_ever(compose: Compose) -> None:
    """The measurement has images and labels of its own, whatever is given."""
    measured = ("prior=measured", "label.teachers=committee", "label.weights=prior")
    assert compose("evaluate", *given(IMAGES), *measured).prior.source == "measured"
