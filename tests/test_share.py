"""A distilled set as one folder for other people."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from helpers import tiny_context
from test_label_phases import FEW_LABELS
from torchvision.io import ImageReadMode, decode_image

import cvdd
from cvdd.artifact import DamagedArtifact
from cvdd.chain.compare import Distilled, Result, compare
from cvdd.share import CARD, PREVIEW, main, share, students_of
from cvdd.support.config_base import ConfigError

pytest_plugins = ["chain_fixtures"]


def test_a_folder_has_all_that_others_need(
    made: tuple[Distilled, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, result = made
    labels = row.labels.artifact
    assert labels is not None
    main([str(labels.path), str(tmp_path / "set")])
    assert "20 images and soft labels of 3 epochs in " in capsys.readouterr().out
    # Wherever it is carried.
    folder = tmp_path / "elsewhere"
    shutil.move(tmp_path / "set", folder)
    theirs, ours = cvdd.load(folder / "labels" / labels.path.name), cvdd.load(labels.path)
    assert torch.equal(theirs.images, ours.images)
    for one, other in zip(theirs.batches(1), ours.batches(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    card = (folder / CARD).read_text()
    measured = result.students[0].metrics
    assert measured["parameters"] > 1000
    # As the table calls it, whose backbone has a name that larger ones have too.
    student = f"| tiny_resnet18 | {measured['parameters']:,} | "
    assert student in card
    assert f"| 1 | 0 | {measured['top1']:.1f} | {measured['best_top1']:.1f} | test images |" in card
    for artifact in (row.images, labels):
        assert f"| {artifact.bytes} | `{artifact.manifest['checksum']}` |" in card
    for teacher, artifact in row.labels.teachers.items():
        assert f"| {teacher} | {artifact.metrics['parameters']:,} | {artifact.metrics['test_top1']:.1f} |" in card
    images = f"method.given=images/{row.images.path.name}"
    # There is no preset for two images of each class.
    assert f"{images} ipc.images_per_class=2 label=given label.given=labels/{labels.path.name}" in card
    # The folder alone says as much.
    assert cvdd.load(folder).epochs == theirs.epochs
    assert str(row.images.path.parents[2]) not in card
    preview = decode_image(str(folder / PREVIEW), ImageReadMode.RGB)
    # Ten classes of two images, a pixel between them.
    assert preview.shape == (3, 10 * 33 + 1, 2 * 33 + 1)
    assert torch.equal(preview[:, 1:33, 1:33], ours.images[0])


def test_a_card_says_how_students_go_through_few_labels(tmp_path: Path) -> None:
    distilled, _ = compare(tiny_context(tmp_path, *FEW_LABELS, "label.top=3", "label.rest=nothing"))
    labels = distilled[0].labels.artifact
    assert labels is not None
    main([str(labels.path), str(tmp_path / "set")])
    card = (tmp_path / "set" / CARD).read_text()
    told = "protocol.epochs=8 protocol.accumulation=2 protocol.hard_share=0.5 protocol.repeat_labels=true"
    assert f"compare=none {told} protocol.label_smoothing=0.8\n" in card
    assert "the 3 largest logits are kept" in card
    (_, logits), *_ = cvdd.load(labels.path).batches(0)
    assert logits.isfinite().sum(dim=1).tolist() == [3] * 8


def test_students_of_other_labels_are_not_counted(made: tuple[Distilled, Result]) -> None:
    row, result = made
    labels, store = row.labels.artifact, row.context.store.root
    assert labels is not None
    (ours,) = students_of(store, row.images, labels)
    assert (ours.seeds, ours.top1) == ([0], [result.students[0].metrics["top1"]])
    assert students_of(store, labels, labels) == []
    other = type(labels)(labels.path, {**labels.manifest, "identity": {**labels.manifest["identity"], "seed": 1}})
    assert students_of(store, row.images, other) == []


def test_images_alone(made: tuple[Distilled, Result], tmp_path: Path) -> None:
    images = made[0].images
    main([str(images.path), str(tmp_path)])
    card = (tmp_path / CARD).read_text()
    assert not (tmp_path / "labels").exists()
    assert "soft-labels" not in card
    assert "label.given" not in card
    assert cvdd.load(tmp_path / "images" / images.path.name).epochs == 0
    assert torch.equal(cvdd.load(tmp_path).images, cvdd.load(images.path).images)


def test_whoever_gets_the_folder_may_read_it(made: tuple[Distilled, Result], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        share(made[0].images.path, tmp_path / "set")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_which_of_several_sets_is_meant_is_asked(made: tuple[Distilled, Result], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(made[0].images.path, tmp_path / "images" / f"{name}-0123456789ab")
    with pytest.raises(ConfigError, match=r"is no artefact of a store; name \S+images/a-\w+ or \S+images/b-\w+$"):
        cvdd.load(tmp_path)


def test_what_the_manifest_does_not_list_is_neither_read_nor_given_away(
    made: tuple[Distilled, Result], tmp_path: Path
) -> None:
    ours = cvdd.load(made[0].images.path)
    folder = tmp_path / "store" / "images" / made[0].images.path.name
    shutil.copytree(made[0].images.path, folder)
    first = next((folder / "units").iterdir())
    shutil.copy(first, first.with_name(f"{first.stem} (1).safetensors"))
    first.with_name(f"._{first.name}").write_bytes(b"\0")
    (tmp_path / "secret").write_text("secret")
    (folder / "units" / "more.safetensors").symlink_to(tmp_path / "secret")
    assert torch.equal(cvdd.load(folder).images, ours.images)
    main([str(folder), str(tmp_path / "set")])
    given = {path.name for path in (tmp_path / "set").rglob("*")}
    assert first.name in given
    assert not {f"{first.stem} (1).safetensors", f"._{first.name}", "more.safetensors"} & given


def test_what_cannot_be_shared(made: tuple[Distilled, Result], tmp_path: Path) -> None:
    images = made[0].images
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        main([str(images.path), str(tmp_path)])
    with pytest.raises(ConfigError, match="holds members"):
        main([str(next(iter(made[0].labels.teachers.values())).path), str(tmp_path / "new")])
    copy = tmp_path / "images" / images.path.name
    shutil.copytree(images.path, copy)
    next(copy.glob("units/*.safetensors")).write_bytes(b"changed")
    with pytest.raises(DamagedArtifact):
        main([str(copy), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["/proc/x/y", "file", "file/x"])
def test_a_folder_that_cannot_be_made(made: tuple[Distilled, Result], place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another folder"):
        main([str(made[0].images.path), str(tmp_path / place)])


@pytest.mark.parametrize("method", ["sendfile", "write_bytes"])
def test_a_full_disk_is_told(
    made: tuple[Distilled, Result], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    # The first copies files, the second writes the preview.
    monkeypatch.setattr(Path if method == "write_bytes" else os, method, full)
    with pytest.raises(ConfigError, match="no space left for .*; free some, or choose another folder"):
        main([str(made[0].images.path), str(tmp_path / "set")])
