"""Every reader on a tiny copy of its data in the published format."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch
import torchvision.datasets
from PIL import Image

from cvdd.artifact import Store
from cvdd.artifact.cleaning import sealed
from cvdd.data import DatasetConfig, load_data, to_eval_tensor
from cvdd.data.config import SourceName
from cvdd.support.config_base import ConfigError

WNIDS = ("n01440764", "n02102040", "n02979186")
SOURCES = [source for source in get_args(SourceName) if source != "digits_photo"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make_config(source: str, root: Path, **changes: Any) -> DatasetConfig:
    content: dict[str, Any] = {
        "name": source,
        "source": source,
        "root": str(root),
        "origin": "the tests",
        "classes": [],
        "image_size": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "classes_per_unit": 2,
        "jitter": 2,
        "mirror": True,
    }
    return DatasetConfig.model_validate({**content, **changes})


def save(path: Path, value: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def write_pickle(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_cifar(monkeypatch: pytest.MonkeyPatch, root: Path, reader: type, key: str, classes: list[str]) -> None:
    """Write every file the reader lists, two images per class and file, and let it expect their checksums."""
    folder = root / reader.base_folder
    random = numpy.random.default_rng(0)
    labels = list(range(len(classes))) * 2
    for attribute in ("train_list", "test_list"):
        listed = []
        for name, _ in getattr(reader, attribute):
            images = random.integers(0, 256, (len(labels), 3072), dtype=numpy.uint8)
            images[:, 0] = labels
            listed.append([name, write_pickle(folder / name, {"data": images, key: labels})])
        monkeypatch.setattr(reader, attribute, listed)
    md5 = write_pickle(folder / reader.meta["filename"], {reader.meta["key"]: classes})
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5})


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_cifar(monkeypatch, tmp_path / "raw", torchvision.datasets.CIFAR10, "labels", ["cat", "dog", "emu"])
    return tmp_path / "raw"


def test_cifar10_batches(cifar10: Path, store: Store) -> None:
    data = load_data(make_config("cifar10", cifar10, classes=["cat", "dog", "emu"]), store)
    assert data.train.stacked().shape == (30, 3, 32, 32)
    assert data.test.stacked().shape == (6, 3, 32, 32)
    assert torch.equal(data.train.stacked()[:, 0, 0, 0].long(), data.train.labels)
    assert data.classes == ("cat", "dog", "emu")


def test_cifar100_uses_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    make_cifar(monkeypatch, tmp_path, torchvision.datasets.CIFAR100, "fine_labels", ["apple", "baby"])
    data = load_data(make_config("cifar100", tmp_path, classes=["apple", "baby"]), store)
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert len(data.test) == 4


def test_cifar_class_order_is_refused(cifar10: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="index 1: expected 'emu', found 'dog'"):
        load_data(make_config("cifar10", cifar10, classes=["cat", "emu", "dog"]), store)


def test_damaged_cifar_batch_is_named_and_never_unpickled(cifar10: Path, store: Store) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (cifar10 / "trap",))

    (cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="data_batch_3 in .* damaged.*dataset.download=true"):
        load_data(make_config("cifar10", cifar10, classes=["cat", "dog", "emu"]), store)
    assert not (cifar10 / "trap").exists()


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", refuse)
    monkeypatch.setattr("cvdd.data.tiny_imagenet.download_and_extract_archive", refuse)
    for source in ("cifar10", "cifar100", "tiny_imagenet", "imagenette"):
        config = make_config(source, tmp_path, classes=WNIDS, num_classes=3, download=True)
        with pytest.raises(ConfigError, match=r"could not download into dataset.root=.*no route.*the tests"):
            load_data(config, store)


def test_cifar10_of_another_size_is_refused(cifar10: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="dataset.image_size=64"):
        load_data(make_config("cifar10", cifar10, classes=["cat", "dog", "emu"], image_size=64), store)


def test_cifar10_folders_are_found_automatically(tmp_path: Path, store: Store) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for value, name in ((50, "cat"), (200, "dog")):
            for index in range(count):
                save(tmp_path / "raw" / part / name / f"{index}.jpg", value + index, (32, 32))
    data = load_data(make_config("cifar10", tmp_path / "raw", classes=["cat", "dog"]), store)
    assert data.train.stacked().shape == (6, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert abs(int(data.test.image(2)[0, 5, 5]) - 200) <= 2


# --- Tiny-ImageNet ----------------------------------------------------------------------------------------------------


def make_tiny(folder: Path) -> None:
    for label, wnid in enumerate(WNIDS):
        for index in range(2):
            save(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 60 * label, (64, 64))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes\t0\t0\t62\t62\n")
    lines = []
    for index, label in enumerate((2, 0, 1, 2)):
        save(folder / "val" / "images" / f"val_{index}.JPEG", 60 * label, (64, 64))
        lines.append(f"val_{index}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    save(folder / "test" / "images" / "test_0.JPEG", 0, (64, 64))


def tiny_config(root: Path, **changes: Any) -> DatasetConfig:
    return make_config("tiny_imagenet", root, **{"num_classes": 3, "image_size": 64, **changes})


def test_tiny_imagenet_from_its_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    make_tiny(tmp_path / "made" / "tiny-imagenet-200")
    archive = shutil.make_archive(str(tmp_path / "tiny"), "zip", tmp_path / "made")

    def fetch(url: str, root: str, md5: str | None) -> None:
        assert md5 == hashlib.md5(Path(archive).read_bytes()).hexdigest()
        with zipfile.ZipFile(archive) as content:
            content.extractall(root)

    monkeypatch.setattr("cvdd.data.tiny_imagenet.download_and_extract_archive", fetch)
    checksum = f"md5:{hashlib.md5(Path(archive).read_bytes()).hexdigest()}"
    data = load_data(tiny_config(tmp_path / "raw", download=True, checksum=checksum), store)
    assert data.classes == WNIDS
    assert data.train.stacked().shape == (6, 3, 64, 64)
    assert data.test.labels.tolist() == [0, 1, 2, 2]
    assert [round(int(data.test.image(index)[0, 0, 0]) / 60) for index in range(4)] == [0, 1, 2, 2]
    load_data(tiny_config(tmp_path / "raw" / "tiny-imagenet-200"), store)
    assert len(sealed(store.root)) == 2, "decoded once, whichever of the two folders root names"


@pytest.mark.parametrize("name", ["tiny_imagenet", "cifar10"])
def test_a_larger_test_resize_leaves_the_centre(name: str, tmp_path: Path, store: Store) -> None:
    if name == "cifar10":
        side, folder, config = 32, tmp_path / "test" / "cat", make_config("cifar10", tmp_path, classes=["cat", "dog"])
        for part in ("train", "test"):
            for label in ("cat", "dog"):
                save(tmp_path / part / label / "0.jpg", 50, (32, 32))
    else:
        make_tiny(tmp_path)
        side, folder, config = 64, tmp_path / "val" / "images", tiny_config(tmp_path)
    # A white frame around a black picture, which the crop cuts off.
    for path in folder.iterdir():
        framed = Image.new("RGB", (side, side), "white")
        framed.paste("black", (4, 4, side - 4, side - 4))
        framed.save(path, quality=95)
    whole = load_data(config, store)
    centre = load_data(config.model_copy(update={"test_resize": side + 16}), store)
    assert int(whole.test.image(0)[0, 0, 0]) > 200
    assert int(centre.test.image(0)[:, 1:-1, 1:-1].max()) < 60
    assert centre.test.image(0).shape == (3, side, side)
    assert torch.equal(centre.train.stacked(), whole.train.stacked())


@pytest.mark.parametrize(
    "line", ["../../secret.JPEG\tn01440764", "/etc/x.JPEG\tn01440764", "..\tn01440764", "val_0.JPEG"]
)
def test_tiny_imagenet_annotations_cannot_leave_their_folder(tmp_path: Path, store: Store, line: str) -> None:
    make_tiny(tmp_path)
    with (tmp_path / "val" / "val_annotations.txt").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ConfigError, match="line 5: expected a plain file name.*unpack the archive again"):
        load_data(tiny_config(tmp_path), store)


def test_tiny_imagenet_annotations_that_are_no_text(tmp_path: Path, store: Store) -> None:
    make_tiny(tmp_path)
    with (tmp_path / "val" / "val_annotations.txt").open("ab") as stream:
        stream.write(b"val_\xff\xfe.JPEG\t" + WNIDS[0].encode() + b"\n")
    with pytest.raises(ConfigError, match="line 5: expected a plain file name.*unpack the archive again"):
        load_data(tiny_config(tmp_path), store)


def test_tiny_imagenet_problems_are_named(tmp_path: Path, store: Store) -> None:
    make_tiny(tmp_path)
    with pytest.raises(ConfigError, match="3 class folders, expected 200"):
        load_data(tiny_config(tmp_path, num_classes=200), store)
    with pytest.raises(ConfigError, match="index 0: expected 'n02102040', found 'n01440764'"):
        load_data(tiny_config(tmp_path, classes=[WNIDS[1], WNIDS[0], WNIDS[2]]), store)
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(ConfigError, match="val_2.JPEG is missing"):
        load_data(tiny_config(tmp_path), store)


# --- ImageNette and ImageNet-1K ---------------------------------------------------------------------------------------


def make_wnid_folders(root: Path, names: tuple[str, ...] = WNIDS) -> None:
    for part, count in (("train", 2), ("val", 1)):
        for label, wnid in enumerate(names):
            for index in range(count):
                save(root / part / wnid / f"{wnid}_{index}.JPEG", 60 * label, (50 + index, 40))


@pytest.mark.parametrize("source", ["imagenette", "imagewoof", "imagenet1k"])
def test_full_size_images_are_lazy(tmp_path: Path, store: Store, source: str) -> None:
    make_wnid_folders(tmp_path / ("" if source == "imagenet1k" else f"{source}2"))
    data = load_data(make_config(source, tmp_path, classes=WNIDS, num_classes=3, test_resize=36), store)
    assert not data.train.in_memory
    assert data.train.image(1).shape == (3, 40, 51)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert to_eval_tensor(data.test, 32, 36, [0, 2]).shape == (2, 3, 32, 32)
    assert sealed(store.root) == []


@pytest.mark.parametrize("source", ["imagenette", "imagenet1k"])
def test_wnid_order_is_refused(tmp_path: Path, store: Store, source: str) -> None:
    make_wnid_folders(tmp_path)
    with pytest.raises(ConfigError, match="index 1: expected 'n02979186', found 'n02102040'"):
        load_data(make_config(source, tmp_path, classes=[WNIDS[0], WNIDS[2], WNIDS[1]]), store)


def test_imagenet1k_wants_exactly_the_published_classes(tmp_path: Path, store: Store) -> None:
    make_wnid_folders(tmp_path)
    with pytest.raises(ConfigError, match="3 class folders, expected 1000"):
        load_data(make_config("imagenet1k", tmp_path, num_classes=1000), store)
    with pytest.raises(ConfigError, match="index 1: expected 'n01443537', found 'n02102040'"):
        load_data(make_config("imagenet1k", tmp_path, num_classes=3), store)


@pytest.mark.parametrize("source", SOURCES)
def test_missing_data_says_what_to_type(tmp_path: Path, store: Store, source: str) -> None:
    config = make_config(source, tmp_path / "absent", classes=WNIDS, num_classes=3)
    with pytest.raises(ConfigError, match="type dataset.root=FOLDER.*Expected in that folder: ") as caught:
        load_data(config, store)
    downloadable = source not in ("imagewoof", "imagenet1k", "image_folder")
    assert ("dataset.download=true" in str(caught.value)) == downloadable
