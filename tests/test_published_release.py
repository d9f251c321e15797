"""Images and label records of the published programs: their numbers come out again, and nothing else comes in."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import FIXTURES, MEAN, STD, label_config, protocol_config
from helpers import PUBLISHED_IMAGES as IMAGES
from helpers import PUBLISHED_LABELS as LABELS
from PIL import Image
from torch.utils.data import DataLoader

from cvdd.backbones import BackboneConfig, build_network, load_published
from cvdd.labels.batches import EpochSampler, SoftLabelDataset
from cvdd.labels.published_release import PublishedLabels, published_order, read_published_images, read_record
from cvdd.labels.replay import replay
from cvdd.labels.teachers import Teachers
from cvdd.support.config_base import ConfigError
from cvdd.training.measure import Accuracy
from cvdd.training.student import StudentModule

RECORD = Path("epoch_0") / "batch_0.tar"


def shufflenet() -> torch.nn.Module:
    arguments = {"widths": [48, 96, 192], "blocks": [3, 7, 3], "stem_width": 24, "head_width": 1024}
    config = BackboneConfig(name="shufflenetv2", target="cvdd.backbones.shufflenet.shufflenet_v2", arguments=arguments)
    return build_network(config, 10, 0)


@pytest.fixture(scope="module")
def teachers() -> Teachers:
    network = shufflenet()
    load_published(FIXTURES / "published" / "ShuffleNetV2.pth", network)
    return Teachers([network], [1.0], label_config(bn_mode="batch", halves=True))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LABELS, tmp_path / "labels"))


def rewrite(records: Path, **changes: object) -> Path:
    """Change entries of the first record."""
    names = ("boxes", "flips", "permutation", "share", "region", "logits")
    path = records / RECORD
    content = dict(zip(names, torch.load(path, weights_only=False), strict=True)) | changes
    torch.save(list(content.values()), path)
    return path


def scored(teachers: Teachers, labels: PublishedLabels, epoch: int, rounding: bool = True) -> tuple:
    images, _ = read_published_images(IMAGES)
    plan, logits = labels.epoch(epoch)
    mine = []
    for start, stop in SoftLabelDataset(labels).bounds:
        samples = replay(images, plan.batch(start, stop), MEAN, STD, rounding=rounding)
        mine.append(teachers.score(samples, stop - start))
    return torch.cat(mine), logits.float()


def test_images_are_class_major() -> None:
    images, labels = read_published_images(IMAGES)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    fifth = np.asarray(Image.open(IMAGES / "new002" / "class002_id001.jpg"))
    assert np.array_equal(images[5].permute(1, 2, 0).numpy(), fifth)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_records_give_the_stored_logits(epoch: int, teachers: Teachers) -> None:
    labels = PublishedLabels(LABELS, 20, 32)
    assert (labels.batch_size, labels.count, labels.epochs) == (8, 20, 3)
    mine, stored = scored(teachers, labels, epoch)
    torch.testing.assert_close(mine, stored, rtol=0, atol=1e-3)


def test_neither_other_rounding_nor_another_order_gives_them(teachers: Teachers) -> None:
    """The agreement above would not survive crops that are not rounded to 8 bits, or samples in another order."""
    unrounded, stored = scored(teachers, PublishedLabels(LABELS, 20, 32), 1, rounding=False)
    elsewhere, _ = scored(teachers, PublishedLabels(LABELS, 20, 32, seed=43), 1)
    assert (unrounded - stored).abs().max() > 0.01
    assert (elsewhere - stored).abs().max() > 0.1


def test_order_is_that_of_pytorchs_sampler() -> None:
    sampler = torch.utils.data.RandomSampler(range(7), generator=torch.Generator().manual_seed(5))
    assert [order.tolist() for order in published_order(7, 4, seed=5)] == [list(sampler) for _ in range(4)]


def test_a_student_trains_on_them() -> None:
    images, _ = read_published_images(IMAGES)
    dataset = SoftLabelDataset(PublishedLabels(LABELS, 20, 32))
    student = StudentModule(
        protocol_config(epochs=3),
        images,
        torch.zeros(len(images), dtype=torch.long),
        8,
        MEAN,
        STD,
        network=shufflenet(),
        name="student",
        seed=0,
        measure=lambda network: Accuracy(0.0, 0.0, 0.0),
        measured_at=lambda epoch: False,
        on_epoch=lambda epoch, row: None,
    )
    before = student.network.linear.weight.clone()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loader = DataLoader(dataset, sampler=EpochSampler(len(dataset.bounds)), batch_size=None)
    trainer.fit(student, loader)
    assert trainer.global_step == 9
    assert len(student.curve) == 3
    assert not torch.equal(before, student.network.linear.weight)


class Intruder:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_record_is_not_run(records: Path, tmp_path: Path) -> None:
    path = rewrite(records, share=Intruder(tmp_path / "intruded"))
    with pytest.raises(ConfigError, match=r"batch_0\.tar: .*other things than numbers"):
        read_record(path, 32)
    assert not (tmp_path / "intruded").exists()


def test_records_of_numpy_1(records: Path) -> None:
    """NumPy 1 called the module of its scalars numpy.core."""
    path = records / RECORD
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = members["batch_0/data.pkl"]
    assert b"numpy._core.multiarray" in pickled
    members["batch_0/data.pkl"] = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert read_record(path, 32)[1].box == (13, 19, 21, 27)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": None}, "no CutMix region"),
        ({"logits": torch.full((8, 10), torch.nan)}, "logits are not finite"),
        ({"logits": torch.zeros(7, 10)}, r"do not belong together: \[8, 4\], \[8\], \[8\], \[7, 10\]"),
        ({"flips": [True] * 8}, "not a label record"),
        ({"permutation": torch.zeros(8, dtype=torch.long)}, "permutation is not one of 8"),
        ({"boxes": torch.full((8, 4), 0.7)}, "not whole pixels of images of 32x32"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.75, 0.5]] * 8)}, "not whole pixels of images of 32x32"),
    ],
)
def test_impossible_records(changes: dict, message: str, records: Path) -> None:
    with pytest.raises(ConfigError, match=rf"batch_0\.tar: .*{message}"):
        read_record(rewrite(records, **changes), 32)


def test_records_of_images_of_another_size() -> None:
    with pytest.raises(ConfigError, match="not whole pixels of images of 33x33"):
        PublishedLabels(LABELS, 20, 33)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_record_is_named(damage: str, records: Path) -> None:
    path = records / "epoch_1" / "batch_2.tar"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:1500])
    else:
        with zipfile.ZipFile(path) as archive:
            logits = archive.read("batch_2/data/3")
        content[content.index(logits)] ^= 1
        path.write_bytes(content)
    labels = PublishedLabels(records, 20, 32)
    labels.epoch(0)
    with pytest.raises(ConfigError, match=r"epoch_1/batch_2\.tar: damaged"):
        labels.epoch(1)


def test_a_missing_epoch_is_named_before_any_training(records: Path) -> None:
    epochs = sorted(records.glob("epoch_*"))
    assert len(epochs) > 1
    epochs[0].rename(records / f"epoch_{len(epochs)}")
    with pytest.raises(ConfigError, match=rf"epoch_0 of {len(epochs)} epochs is missing"):
        PublishedLabels(records, 20, 32)


def test_a_missing_record_is_named_before_any_training(records: Path) -> None:
    (records / "epoch_2" / "batch_1.tar").unlink()
    with pytest.raises(ConfigError, match=r"epoch_2 has 2 batches of 8, and 20 images make 3; .* not copied whole"):
        PublishedLabels(records, 20, 32)


def test_labels_of_another_number_of_classes(records: Path) -> None:
    with pytest.raises(ConfigError, match="labels of 10 classes, and the images are of 7"):
        PublishedLabels(records, 20, 32, classes=7)
    rewrite(records, logits=torch.zeros(8, 7))
    shutil.copy(LABELS / RECORD, records / "epoch_1" / "batch_0.tar")
    labels = PublishedLabels(records, 20, 32, classes=7)
    with pytest.raises(ConfigError, match=r"epoch_1/batch_0\.tar: 8 samples of 10 classes instead of 8 of 7"):
        labels.epoch(1)


def test_labels_of_another_number_of_images() -> None:
    with pytest.raises(ConfigError, match="epoch_0 has 3 batches of 8, and 30 images make 4"):
        PublishedLabels(LABELS, 30, 32)
    with pytest.raises(ConfigError, match=r"batch_2\.tar: 4 samples of 10 classes instead of 5 of 10"):
        PublishedLabels(LABELS, 21, 32).epoch(0)


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no label records"):
        PublishedLabels(tmp_path, 20, 32)
    with pytest.raises(ConfigError, match="no images found"):
        read_published_images(tmp_path)


def test_images_of_two_sizes(tmp_path: Path) -> None:
    for name, side in (("new000", 32), ("new001", 16)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side)).save(tmp_path / name / "a.jpg")
    with pytest.raises(ConfigError, match=r"new001/a\.jpg: \[16, 16\] pixels"):
        read_published_images(tmp_path)
