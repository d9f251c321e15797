"""Images that somebody else made: files, and sets of a store."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Compose
from given_helpers import HARD, cvdd_images, given, labels, one, refused
from helpers import PUBLISHED_IMAGES as IMAGES
from helpers import PUBLISHED_LABELS as RECORDS
from helpers import TINY, configure, tiny_context
from PIL import Image
from safetensors.torch import load_file

from cvdd.chain.compare import Distilled, compare, distil
from cvdd.chain.preflight import check_before_work
from cvdd.chain.unit_files import PATCHES, load_images
from cvdd.cost import plan_pieces, planning
from cvdd.data.given_folder import class_folder, scan_given
from cvdd.report.gallery import data_uri, make_gallery
from cvdd.support.config_base import ConfigError

pytest_plugins = ["chain_fixtures", "given_fixtures"]

ON_IMAGENET = ("committee=imagenet", "recipe=imagenette", "students=imagenet", "compare=none")


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


def test_all_damaged_files_are_named(files: Path, tmp_path: Path) -> None:
    for broken in (files / "2_2" / "0001.png", files / "7_7" / "0000.png"):
        broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="2 of 20 image files cannot be used") as found:
        distil(tiny_context(tmp_path, *given(files), *HARD), "")
    assert [name in str(found.value) for name in ("2_2/0001.png", "7_7/0000.png")] == [True, True]


def test_folders_as_they_are_written_are_read_whatever_classes_are_called(tmp_path: Path) -> None:
    classes = [
        "  lead",
        "-ant",
        "?",
        "_",
        "3",
        "7 up",
        "a?b",
        "\N{LATIN SMALL LETTER E WITH ACUTE}t\N{BULLET}e",
        "zoo ",
    ]
    folders = [class_folder(index, name, len(classes)) for index, name in enumerate(classes)]
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    source = scan_given(tmp_path, classes, "method.given")
    assert [source.path(index).parent.name for index in range(len(source))] == folders
    with pytest.raises(ConfigError, match=r"folder 0_  lead should be of class 0 of dataset\.classes, which is -ant"):
        scan_given(tmp_path, ["-ant", "  lead", *classes[2:]], "method.given")


def test_seeds_change_nothing(files: Path, tmp_path: Path) -> None:

    digests = {
        distil(tiny_context(tmp_path, *given(files), *HARD, f"method.seed={seed}"), "").images.digest for seed in (0, 7)
    }
    assert len(digests) == 1


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
            r"^label\.given=\S+ brings labels, and label\.teachers=\S+ with label\.store=logits would make",
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


def test_priors_are_measured_as_ever(compose: Compose) -> None:
    """The measurement has images and labels of its own, whatever is given."""
    measured = ("prior=measured", "label.teachers=committee", "label.weights=prior")
    assert compose("evaluate", *given(IMAGES), *measured).prior.source == "measured"
