"""A distilled set in somebody's own program."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

import cvdd
from cvdd.artifact import DamagedArtifact
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.unit_files import load_images
from cvdd.distilled import main
from cvdd.labels.replay import replay
from cvdd.schema.unread import without_unread
from cvdd.support.config_base import ConfigError
from cvdd.training.losses import soft_label_loss

pytest_plugins = ["chain_fixtures"]


@pytest.fixture
def row(made: tuple[Distilled, Result]) -> Distilled:
    return made[0]


def test_images_and_what_belongs_to_them(row: Distilled) -> None:
    loaded = cvdd.load(row.images.path)
    images, labels = load_images(row.images)
    assert torch.equal(loaded.images, images)
    assert torch.equal(loaded.labels, labels)
    data = row.context.data()
    assert (loaded.classes, loaded.mean, loaded.std) == (data.classes, data.mean, data.std)
    assert (loaded.soft, loaded.epochs) == (None, 0)
    first = (images[0, :, 0, 0] / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(loaded.normalised()[0, :, 0, 0], first)
    with pytest.raises(ValueError, match="there are soft labels of 0 epochs"):
        next(loaded.batches(0))


def test_batches_are_those_of_a_student(row: Distilled) -> None:
    assert row.labels.artifact is not None
    loaded = cvdd.load(str(row.labels.artifact.path))
    assert loaded.epochs == row.context.config.label.epochs
    pixels, _ = load_images(row.images)
    plan, logits = row.labels.open(pixels).epoch(1)
    samples, said = zip(*loaded.batches(1), strict=True)
    assert [len(batch) for batch in samples] == [8, 8, 4]
    assert torch.equal(torch.cat(said), logits.float())
    # Partners are counted within a batch.
    mean, std = torch.tensor(loaded.mean), torch.tensor(loaded.std)
    assert torch.equal(samples[1], replay(pixels, plan.batch(8, 16), mean, std))
    with pytest.raises(ValueError, match=rf"{loaded.epochs} epochs, counted from 0, and none of epoch"):
        next(loaded.batches(loaded.epochs))


def test_a_network_of_ones_own_learns_from_it(row: Distilled) -> None:
    assert row.labels.artifact is not None
    loaded = cvdd.load(row.labels.artifact.path)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(loaded.classes)))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for epoch in list(range(loaded.epochs)) * 5:
        for samples, logits in loaded.batches(epoch):
            loss = soft_label_loss(network(samples), logits, 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_files_have_the_same_classes(row: Distilled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(row.images.path), str(tmp_path / "files")])
    assert capsys.readouterr().out == f"20 images of 10 classes in {tmp_path / 'files'}\n"
    found = ImageFolder(tmp_path / "files")
    images, labels = load_images(row.images)
    assert found.targets == labels.tolist()
    assert found.classes[3] == f"3_{row.context.data().classes[3]}"
    assert (torch.tensor(list(found[5][0].getdata())).T.reshape(3, 32, 32) == images[5]).all()
    with pytest.raises(ConfigError, match="is not empty"):
        main([str(row.images.path), str(tmp_path / "files")])


@pytest.mark.parametrize("place", ["/proc/x/y", "file", "file/x"])
def test_a_folder_that_cannot_be_made(row: Distilled, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another folder"):
        main([str(row.images.path), str(tmp_path / place)])


def test_a_full_disk_is_told(row: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="no space left for .*; free some, or choose another folder"):
        main([str(row.images.path), str(tmp_path / "files")])
    assert not list(tmp_path.rglob("*.png"))


def test_settings_that_earlier_versions_allowed_are_left_out() -> None:
    earlier = {"bn_mode": "running", "halves": False, "mix": "none", "mix_alpha": 2.0, "epochs": 3}
    assert without_unread("label", earlier) == {"bn_mode": "running", "mix": "none", "epochs": 3}
    today = {"bn_mode": "batch", "halves": False, "mix": "mixup", "mix_alpha": 2.0}
    assert without_unread("label", today) == today


def test_anything_else_is_refused(row: Distilled, made: tuple[Distilled, Result], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no artefact of a store; name a directory such as store/labels"):
        cvdd.load(tmp_path)
    with pytest.raises(ConfigError, match="holds students; name the directory of images or of labels"):
        cvdd.load(made[1].students[0].path)


def test_damage_and_labels_without_their_images(row: Distilled, tmp_path: Path) -> None:
    assert row.labels.artifact is not None
    alone = tmp_path / "labels" / row.labels.artifact.path.name
    shutil.copytree(row.labels.artifact.path, alone)
    with pytest.raises(ConfigError, match=rf"images/\*-{row.images.digest}, are not in the store"):
        cvdd.load(alone)
    with (alone / "logits.bin").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DamagedArtifact):
        cvdd.load(alone)
