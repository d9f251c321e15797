"""Pictures of one's own, a folder for each class."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from test_data_readers import make_config, save

from cvdd.artifact import Store
from cvdd.artifact.cleaning import sealed
from cvdd.data import DatasetConfig, image_folder, load_data, to_eval_tensor
from cvdd.support.config_base import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for value, name in ((0, "ant"), (100, "bee"), (200, "cow")):
        for index in range(4):
            save(root / "train" / name / f"{index}.png", value, (40 + index, 30))
        save(root / "val" / name / "x.PNG", value)
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    (root / "train" / "bee" / "._0.png").write_bytes(b"left by a file manager")
    (root / "train" / ".cache").mkdir()
    return root


def folder_config(root: Path, **changes: Any) -> DatasetConfig:
    return make_config("image_folder", root, **{"image_size": 16, "mean": [], "std": [], **changes})


def test_images_that_are_left_out_are_named(folder: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def warned() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    load_data(folder_config(folder), store)
    assert not warned()
    save(folder / "train" / "bee" / "moving.gif", 3)
    save(folder / "train" / "bee" / "deeper" / "MOVING.GIF", 3)
    save(folder / "train" / "ant" / "still.jp2", 3)
    save(folder / "train" / ".hidden" / "0.png", 3)
    assert load_data(folder_config(folder), store).classes == ("ant", "bee", "cow")
    first, second = warned()
    assert "train: 3 files are left out, because .gif, .jp2 is none of .jpg" in first
    assert first.endswith("to have them read: ant/still.jp2, bee/deeper/MOVING.GIF, bee/moving.gif")
    assert "class folder .hidden is left out" in second
    caplog.clear()
    save(folder / "train" / "cow" / "0.gif", 3)
    load_data(folder_config(folder), store)
    assert "train: 4 files are left out" in warned()[0]
    assert warned()[0].endswith("bee/moving.gif, ...")


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tif"])
def test_other_pictures_in_files_of_the_same_size_are_noticed(folder: Path, store: Store, suffix: str) -> None:
    path = folder / "train" / "ant" / f"new.{suffix}"
    save(path, 10, (8, 8))
    before, size = load_data(folder_config(folder), store), path.stat().st_size
    save(path, 20, (8, 8))
    after = load_data(folder_config(folder), store)
    assert path.stat().st_size == size
    assert before.identity["train"] != after.identity["train"]
    assert not torch.equal(before.train.stacked(), after.train.stacked())


def test_image_folder_is_measured_once_and_held_in_memory(folder: Path, store: Store) -> None:
    data = load_data(folder_config(folder), store)
    assert data.classes == ("ant", "bee", "cow")
    assert data.train.stacked().shape == (12, 3, 16, 16)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.mean == pytest.approx([100 / 255] * 3)
    assert data.std == pytest.approx([float(numpy.std([0, 100, 200])) / 255] * 3)
    made = {artifact.path: artifact.digest for artifact in sealed(store.root)}
    again = load_data(folder_config(folder), Store(store.root))
    assert {artifact.path: artifact.digest for artifact in sealed(store.root)} == made
    assert again.identity == data.identity


def test_image_folder_too_large_for_memory_is_lazy(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load_data(folder_config(folder), store)
    monkeypatch.setattr(image_folder, "LARGEST_IN_MEMORY", 5000)
    lazy = load_data(folder_config(folder), store)
    assert not lazy.train.in_memory
    assert lazy.test.in_memory
    assert (lazy.mean, lazy.std) == (in_memory.mean, in_memory.std)
    views = to_eval_tensor(lazy.train, 16, None, range(12))
    assert torch.equal(views, in_memory.train.stacked())


def test_image_folder_classes_in_the_yaml_decide_the_order(folder: Path, store: Store) -> None:
    data = load_data(folder_config(folder, classes=["cow", "ant", "bee"]), store)
    assert data.train.stacked()[:, 0, 0, 0].tolist() == [200] * 4 + [0] * 4 + [100] * 4
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(ConfigError, match="index 2: expected 'dog', found 'cow'"):
        load_data(folder_config(folder, classes=["dog", "ant", "bee"]), store)


def test_image_folder_without_test_images(folder: Path, store: Store) -> None:
    shutil.rmtree(folder / "val")
    with pytest.raises(ConfigError, match=r"test/<class>/\*\.jpg.*dataset.evaluate_on=validation"):
        load_data(folder_config(folder), store)
    data = load_data(folder_config(folder, evaluate_on="validation", validation_fraction=0.25), store)
    assert (len(data.train), len(data.test)) == (9, 3)


def test_image_folder_test_classes_must_be_those_of_train(folder: Path, store: Store) -> None:
    (folder / "val" / "bee").rename(folder / "val" / "bees")
    with pytest.raises(ConfigError, match="index 1: expected 'bee', found 'bees'"):
        load_data(folder_config(folder), store)


def test_class_without_images_is_named(folder: Path, store: Store) -> None:
    for path in (folder / "train" / "bee").glob("*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match="class 'bee' has no image"):
        load_data(folder_config(folder), store)


def test_damaged_image_is_named_while_packing(folder: Path, store: Store) -> None:
    (folder / "train" / "cow" / "2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cow/2.png is truncated, corrupt"):
        load_data(folder_config(folder), store)
    assert sealed(store.root) == []


@pytest.mark.parametrize("target", ["nowhere.png", "3.png"])
def test_a_link_that_leads_nowhere_is_named(target: str, folder: Path, store: Store) -> None:
    (folder / "train" / "cow" / "3.png").unlink(missing_ok=True)
    (folder / "train" / "cow" / "3.png").symlink_to(target)
    with pytest.raises(ConfigError, match=r"cow/3.png cannot be read \(.*\): delete it or replace it"):
        load_data(folder_config(folder), store)


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_damaged_images_of_a_part_are_known_at_once(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """Also those of later chunks, and of images that are measured alone."""
    monkeypatch.setattr("cvdd.data.packing._CHUNK", 5)
    if not in_memory:
        monkeypatch.setattr(image_folder, "LARGEST_IN_MEMORY", 1)
    for path in (folder / "train" / "ant").glob("*.png"):
        path.write_bytes(b"")
    Image.new("I;16", (9, 9)).save(folder / "train" / "cow" / "3.png")
    with pytest.raises(ConfigError) as caught:
        load_data(folder_config(folder), store)
    first, *named = str(caught.value).splitlines()
    assert first == "5 of 12 image files cannot be used:"
    assert [line.split("train/")[1].split()[0] for line in named] == [f"ant/{i}.png" for i in range(4)] + ["cow/3.png"]
    assert named[-1].endswith("replace it by an 8-bit copy")
    for path in (folder / "train").glob("*/?.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(ConfigError) as caught:
        load_data(folder_config(folder), store)
    first, *named = str(caught.value).splitlines()
    assert (first, len(named), named[-1]) == ("12 of 12 image files cannot be used:", 11, "and 2 more")
    assert sealed(store.root) == []


def test_more_classes_per_unit_than_classes(folder: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="dataset.classes_per_unit=4: .* use 1 to 3"):
        load_data(folder_config(folder, classes_per_unit=4), store)


def test_fewer_images_than_asked(folder: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="dataset.train_per_class=5: class 'ant' has only 4"):
        load_data(folder_config(folder, train_per_class=5), store)


def test_a_channel_that_is_the_same_everywhere_is_refused(tmp_path: Path, store: Store) -> None:
    for name in ("ant", "bee"):
        for index in range(3):
            pixels = numpy.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=numpy.uint8)
            pixels[:, :, 1] = 51
            for part in ("train", "test"):
                (tmp_path / "raw" / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "raw" / part / name / f"{index}.png")
    said = r"green is the same in all pixels.*dataset\.mean=\[0\.\d+,0\.2,.*,1,"
    with pytest.raises(ConfigError, match=said) as found:
        load_data(folder_config(tmp_path / "raw"), store)
    given = {
        field: [float(value) for value in str(found.value).split(f"dataset.{field}=[")[1].split("]")[0].split(",")]
        for field in ("mean", "std")
    }
    assert load_data(folder_config(tmp_path / "raw", **given), store).std[1] == 1
