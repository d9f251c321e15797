"""Adversarial prediction matching: the chain from teachers to students, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_files, tiny_context
from safetensors.torch import load_file

import cvdd.chain.apm
import cvdd.training.fit
from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig
from cvdd.chain.apm import IMAGES, load_labelled, make_apm_images
from cvdd.chain.apm_student import apm_labels, make_apm_student
from cvdd.chain.apm_teachers import load_teachers, make_apm_teachers
from cvdd.chain.context import Context
from cvdd.chain.unit_files import load_history, load_images
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator
from cvdd.training.classifier import NonFiniteTraining
from cvdd.verbs.evaluate import evaluate

BACKBONE = {"name": "convnet3", "target": "cvdd.backbones.convnet.convnet"}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SMALL = (
    "method=apm_tiny",
    "method.iterations=5",
    "method.checkpoint_every=2",
    "method.log_every=1",
    "method.grid_every=2",
    "method.apm.teachers.count=2",
    "method.apm.teachers.epochs=2",
    "method.apm.teachers.milestone=1",
    "method.apm.teachers.backbone.arguments.width=8",
    "method.apm.surrogate.epochs=4",
    "method.apm.surrogate.snapshots=2",
    "method.apm.student.epochs=3",
    "method.apm.parts=2",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("apm")


def small_context(home: Path, *overrides: str, store: Path | None = None) -> Context:
    return tiny_context(home, *SMALL, *overrides, store=store)


@pytest.fixture(scope="module")
def images(home: Path) -> Artifact:
    return make_apm_images(small_context(home))


def test_the_artefact_holds_pixels_for_people_and_floats_for_students(home: Path, images: Artifact) -> None:
    context = small_context(home)
    known = load_labelled(images)
    pixels, labels = load_images(images)
    assert pixels.dtype == torch.uint8
    assert known.images.shape == pixels.shape == (20, 3, 32, 32)
    assert labels.tolist() == known.targets.tolist() == [label for label in range(10) for _ in range(2)]
    data = context.data()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    shown = ((known.images * std + mean) * 255).clamp(0, 255)
    assert float((shown - pixels).abs().max()) <= 0.501
    assert list(load_history(images)) == ["slot0000_block0000", "slot0001_block0000"]
    assert [row["iteration"] for row in load_history(images)["slot0001_block0000"]["rows"]] == [1, 2, 3, 4, 5]


def test_labels_are_the_logits_of_one_teacher_on_clean_images(home: Path, images: Artifact) -> None:
    context = small_context(home)
    known = load_labelled(images)
    teachers = make_apm_teachers(context)
    answers = [teacher(known.images) for teacher in load_teachers(context, teachers)]
    distances = [float((answer - known.logits).abs().max()) for answer in answers]
    assert min(distances) < 1e-5
    assert max(distances) > 1e-2
    labels = apm_labels(context, images)
    assert list(labels.teachers.values()) == [teachers[distances.index(min(distances))]]
    assert apm_labels(small_context(home, "method.iterations=0"), images).identity == labels.identity
    right = (known.logits.argmax(dim=1) == known.targets).sum()
    assert images.metrics["teacher_top1"] == pytest.approx(100 * int(right) / 20)


def test_without_iterations_the_images_are_the_fair_baseline(home: Path, images: Artifact) -> None:
    baseline = make_apm_images(small_context(home, "method.iterations=0"))
    teachers = [[parent["name"] for parent in made.manifest["parents"]][-1] for made in (baseline, images)]
    assert teachers[0] == teachers[1]
    known = load_labelled(baseline)
    moved = (load_labelled(images).images - known.images).abs().flatten(1).max(dim=1).values
    assert bool((moved > 1e-3).all())
    pixels, _ = load_images(baseline)
    real = {image.numpy().tobytes() for image in small_context(home).data().train.stacked()}
    assert all(image.numpy().tobytes() in real for image in pixels)


def test_parts_depend_on_nothing_outside(home: Path, images: Artifact) -> None:
    """The first of two parts is the whole of a set of half the size, whoever begins with which part."""
    parts = [parent["digest"] for parent in images.manifest["parents"] if parent["kind"] == "image_parts"]
    half = make_apm_images(small_context(home, "ipc.images_per_class=1", "method.apm.parts=1"))
    assert [parent["digest"] for parent in half.manifest["parents"] if parent["kind"] == "image_parts"] == parts[:1]
    assert make_apm_images(small_context(home, "method.apm.first_part=1")).digest == images.digest
    whole = make_apm_images(small_context(home, "method.apm.parts=1"))
    assert not torch.equal(load_labelled(whole).images, load_labelled(images).images)


def test_an_interrupted_part_goes_on_to_the_same_bits(
    home: Path, images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints after iterations 2 and 4 lie between two refreshes, so students and teacher are restored as well."""
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    context = small_context(home, store=tmp_path / "store")
    log_row, rows = cvdd.chain.apm._log_row, []

    def noting(context: Context, part: Any, row: Any, *rest: Any) -> None:
        rows.append((part.index, row.iteration))
        if rows == [(0, 1), (0, 2), (0, 3)]:
            raise RuntimeError("pulled plug")
        log_row(context, part, row, *rest)

    monkeypatch.setattr(cvdd.chain.apm, "_log_row", noting)
    with pytest.raises(RuntimeError, match="pulled plug"):
        make_apm_images(context)
    with pytest.raises(ConfigError, match=r"set method\.checkpoint_every=2 to go on with it"):
        make_apm_images(context.differing({"method.checkpoint_every": 4}, ""))
    made = make_apm_images(context)
    assert rows[3:6] == [(0, 3), (0, 4), (0, 5)]
    assert same_files(made, images)


def test_students_of_any_architecture_are_measured(home: Path, images: Artifact) -> None:
    context = small_context(home)
    for name, backbone in {**context.config.students, "own": context.config.method.apm.teachers.backbone}.items():
        student = make_apm_student(context, images, name, backbone, 0)
        assert set(student.metrics) == {"top1", "top5", "loss", "best_top1", "best_epoch"}
        assert 0 <= student.metrics["top1"] <= student.metrics["best_top1"] <= 100
        assert student.kind == "students"


def test_what_diverges_names_the_field_of_its_own_rate(home: Path, images: Artifact) -> None:
    context = small_context(home, "method.apm.student.lr=1e30")
    with pytest.raises(NonFiniteTraining, match=r"student convnet3 seed 0 .*rate \(method\.apm\.student\.lr\)"):
        make_apm_student(context, images, "convnet3", BackboneConfig.model_validate(BACKBONE), 0)
    with pytest.raises(NonFiniteTraining, match=r"teacher 0 .*rate \(method\.apm\.teachers\.lr\)"):
        make_apm_teachers(small_context(home, "method.apm.teachers.lr=1e30"))


def test_noise_is_a_start_too(home: Path) -> None:
    context = small_context(home, "method.init=noise", "method.iterations=1", "ipc.images_per_class=1")
    made = make_apm_images(context.differing({"method.apm.parts": 1}, ""))
    start = torch.randn((10, 3, 32, 32), generator=generator(0, "noise", 0))
    assert float((load_labelled(made).images - start).abs().max()) < 1.0


def test_whitened_images_are_shown_as_pixels_and_judged_by_whitened_teachers(home: Path) -> None:
    """A quarter of the pixels, so that the 1,297 images determine their covariance."""
    changes = (
        "dataset.image_size=16",
        "dataset.digits.size_range=[8,16]",
        "dataset.train_per_class=null",
        "method.iterations=0",
        "method.apm.teachers.count=1",
    )
    context = small_context(home, "method.apm.whitening=true", *changes)
    made = make_apm_images(context)
    pixels, _ = load_images(made)
    real = {image.numpy().tobytes() for image in context.data().train.stacked()}
    assert all(image.numpy().tobytes() in real for image in pixels)
    # Whitening without epsilon would make it 1.
    assert 0.1 < float(load_labelled(made).images.std()) < 0.9
    (teacher,) = make_apm_teachers(context)
    chosen = f"method.apm.teachers.paths=[{teacher.path}]"
    with pytest.raises(ConfigError, match=r"the space of .* set method\.apm\.whitening and method\.apm\.whitening_eps"):
        make_apm_teachers(small_context(home, chosen, *changes))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.apm.parts=3",), r"method\.apm\.parts=3 must divide ipc\.images_per_class=2; choose 1, 2"),
        (("method.apm.batch_size=11",), r"method\.apm\.batch_size=11 is more than the 10 images of a part"),
        (("method.apm.whitening=true",), r"method\.apm\.whitening=true: 300 training images do not determine"),
        (
            ("method.apm.surrogate.batch_size=3", "method.apm.teachers.backbone.arguments.norm=batch"),
            r"surrogate\.batch_size=3 leaves a last batch of one of 10 images",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(home: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_apm_images(small_context(home, *overrides))


def test_teachers_made_elsewhere_must_belong_to_the_configuration(home: Path, images: Artifact) -> None:
    context = small_context(home)
    own = [str(artifact.path) for artifact in make_apm_teachers(context)]
    chosen = f"method.apm.teachers.paths=[{','.join(own)}]"
    assert make_apm_images(small_context(home, chosen)).digest == images.digest
    for changes, message in [
        (("method.apm.teachers.backbone.arguments.width=4",), "the backbone of .* share one architecture"),
        (("dataset.mean=[0.5,0.5,0.5]",), "the data of .* choose the dataset"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_apm_teachers(small_context(home, chosen, *changes))
    elsewhere = Path(own[0]).parents[2] / "another store" / "teachers"
    for path in own:
        shutil.copytree(path, elsewhere / Path(path).name)
    moved = ",".join(f"'{elsewhere / Path(path).name}'" for path in own)
    assert make_apm_images(small_context(home, f"method.apm.teachers.paths=[{moved}]")).digest == images.digest
    other = f"method.apm.teachers.paths=[{images.path},{images.path.parent}]"
    with pytest.raises(ConfigError, match="is an artefact of kind images, not teachers"):
        make_apm_teachers(small_context(home, other))


def test_a_part_is_stored_slot_by_slot(home: Path, images: Artifact) -> None:
    paths = sorted((images.path.parents[1] / "image_parts").glob("*apm_tiny-slots1to2-*"))
    parents = {parent["digest"] for parent in images.manifest["parents"]}
    (path,) = [path for path in paths if path.name.rpartition("-")[2] in parents]
    stored = load_file(path / IMAGES)["images"]
    assert stored.shape == (1, 10, 3, 32, 32)
    assert torch.equal(stored[0], load_labelled(images).images[1::2])


@pytest.mark.parametrize("init", ["real", "noise"])
def test_the_whole_verb_ends_with_a_page(home: Path, init: str) -> None:
    context = small_context(home, "label=hard", "protocol=method", "protocol.seeds=[0]", f"method.init={init}")
    top1 = evaluate(context, ["evaluate.py"]).metric
    page = (context.config.paths.output / "report.html").read_text()
    assert ("they started from" in page) == (init == "real")
    assert json.loads((context.config.paths.output / "metrics.json").read_text())["results"][0]["top1"] == top1
