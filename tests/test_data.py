"""The data contract: configs, splits, subsets, identity, damaged files and the embedded dataset."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets
from omegaconf import OmegaConf
from PIL import Image
from pydantic import ValidationError

from cvdd.artifact import Store
from cvdd.artifact.cleaning import sealed
from cvdd.data import (
    READERS,
    Data,
    DatasetConfig,
    FileSource,
    TensorSource,
    check_same_classes,
    class_hash,
    load_data,
    to_eval_tensor,
)
from cvdd.data.dataset import RawData
from cvdd.data.splits import keep_per_class, split_validation
from cvdd.support.config_base import ConfigError

CONF = Path(__file__).parents[1] / "conf" / "dataset"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


def read_yaml(name: str, /, **changes: Any) -> DatasetConfig:
    content = OmegaConf.create({"paths": {"data": "/nowhere"}, "dataset": OmegaConf.load(CONF / f"{name}.yaml")})
    resolved = OmegaConf.to_container(content, resolve=True)
    assert isinstance(resolved, dict)
    return DatasetConfig.model_validate({**resolved["dataset"], **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def digits(store: Store) -> Data:
    return load_data(read_yaml("digits_photo"), store)


# --- the yaml files ---------------------------------------------------------------------------------------------------


def test_every_reader_has_a_yaml() -> None:
    assert sorted(READERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_yaml_is_valid_complete_and_survives_a_round_trip(name: str) -> None:
    config = read_yaml(name)
    written = set(OmegaConf.load(CONF / f"{name}.yaml").keys())
    assert written | {"digits"} == set(DatasetConfig.model_fields), "every fact stands in the yaml"
    assert config.name == config.source == name
    assert DatasetConfig.model_validate(config.model_dump(mode="json")) == config
    assert all(field.description for field in DatasetConfig.model_fields.values())


def test_yaml_facts_agree_with_torchvision() -> None:
    for name, reader in (("cifar10", torchvision.datasets.CIFAR10), ("cifar100", torchvision.datasets.CIFAR100)):
        assert read_yaml(name).checksum == f"md5:{reader.tgz_md5}"
        assert read_yaml(name).origin == reader.url
    url, md5 = torchvision.datasets.Imagenette._ARCHIVES["full"]
    assert (read_yaml("imagenette").origin, read_yaml("imagenette").checksum) == (url, f"md5:{md5}")
    assert list(read_yaml("imagenette").classes) == sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("digits_photo", (10, 32, 10, 4)),
        ("cifar10", (10, 32, 10, 4)),
        ("cifar100", (100, 32, 100, 4)),
        ("tiny_imagenet", (200, 64, 100, 4)),
        ("imagenette", (10, 224, 10, 32)),
        ("imagewoof", (10, 224, 10, 32)),
        ("imagenet1k", (1000, 224, 100, 32)),
    ],
)
def test_yaml_constants(name: str, sizes: tuple[int, ...]) -> None:
    config = read_yaml(name)
    assert (config.num_classes, config.image_size, config.classes_per_unit, config.jitter) == sizes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cifar10", {"root": None}, "dataset.root=FOLDER"),
        ("cifar10", {"classes": []}, r"dataset.classes=\[\]"),
        ("cifar10", {"classes": ["cat"] * 10}, "'cat' more than once"),
        ("cifar10", {"num_classes": 9}, "dataset.num_classes=9"),
        ("cifar10", {"mean": [], "std": []}, "dataset.mean="),
        ("cifar10", {"mean": [125.3, 123.0, 113.9]}, r"pixels in \[0, 1\]"),
        ("cifar10", {"std": [0.2, 0.2]}, "three numbers"),
        ("cifar10", {"std": [0.2, 0.0, 0.2]}, "dataset.std="),
        ("cifar10", {"classes_per_unit": 11}, "dataset.classes_per_unit=11"),
        ("cifar10", {"jitter": 32}, "dataset.jitter=32"),
        ("cifar10", {"digits": {}}, "dataset.digits is only for"),
        ("cifar10", {"checksum": "c58f"}, "checksum"),
        ("cifar10", {"source": "cifar11"}, "digits_photo"),
        ("cifar10", {"unknown": 1}, "unknown"),
        ("cifar10", {"validation_fraction": 1.0}, "validation_fraction"),
        ("imagenette", {"test_resize": 128}, "dataset.test_resize=128"),
        ("imagenet1k", {"download": True}, "dataset.download=true"),
        ("imagewoof", {"download": True}, "dataset.download=true"),
        ("tiny_imagenet", {"num_classes": None}, "dataset.num_classes=N"),
        ("digits_photo", {"digits": {"size_range": [18, 40]}}, r"set dataset.digits.size_range=\[18,32\], or"),
        (
            "digits_photo",
            {"digits": None, "image_size": 16},
            r"to at least 30, or dataset.digits=.size_range:\[16,16\]",
        ),
        ("digits_photo", {"digits": {"crop_range": [64, 32]}}, "dataset.digits.crop_range"),
        ("digits_photo", {"digits": {"test_digits": 15}}, "dataset.digits.test_digits=15"),
        (
            "digits_photo",
            {"name": "flowers", "root": "mine"},
            r"dataset.root=mine: digits_photo reads no folder; choose dataset=image_folder \(or cifar10, .*root=null",
        ),
        ("digits_photo", {"download": True}, "dataset.download=true: digits_photo needs no download; .*download=false"),
        ("digits_photo", {"name": "cifar10"}, "dataset.name=cifar10 .* choose dataset=cifar10"),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read_yaml(name, **changes)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_class_order_is_refused_with_both_names() -> None:
    check_same_classes(["cat", "dog"], ("cat", "dog"), "teacher")
    with pytest.raises(ConfigError, match="teacher.*index 1: expected 'dog', found 'emu'"):
        check_same_classes(["cat", "dog", "emu"], ["cat", "emu", "dog"], "teacher")
    with pytest.raises(ConfigError, match="index 2: expected 'emu', found no class"):
        check_same_classes(["cat", "dog", "emu"], ["cat", "dog"], "teacher")
    with pytest.raises(ConfigError, match="index 0: expected no class, found 'cat'"):
        check_same_classes([], ["cat"], "teacher")


def test_class_hash_depends_on_order_and_boundaries() -> None:
    assert class_hash(["a", "b"]) == class_hash(("a", "b"))
    assert len({class_hash(names) for names in (["a", "b"], ["b", "a"], ["ab"], ["a,b"])}) == 4
    assert len(class_hash(["a"])) == 16


# --- splits and subsets -----------------------------------------------------------------------------------------------


def make_source(per_class: int = 12, group_size: int = 3, classes: int = 2) -> TensorSource:
    count = per_class * classes
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return TensorSource(images, torch.arange(count) // per_class, torch.arange(count) // group_size)


def test_validation_split_keeps_groups_together_in_every_class() -> None:
    source = make_source(per_class=30)
    train, validation = split_validation(source, ["a", "b"], 0.2, seed=0)
    assert not set(train.groups.tolist()) & set(validation.groups.tolist())
    assert validation.labels.bincount().tolist() == [6, 6]
    assert train.labels.bincount().tolist() == [24, 24]
    again = split_validation(source, ["a", "b"], 0.2, seed=0)[1]
    other = split_validation(source, ["a", "b"], 0.2, seed=1)[1]
    assert torch.equal(validation.stacked(), again.stacked())
    assert not torch.equal(validation.stacked(), other.stacked())


def test_validation_split_that_empties_a_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="dataset.validation_fraction=0.95: class 'a'"):
        split_validation(make_source(), ["a", "b"], 0.95, seed=0)


def test_group_of_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="holds several classes"):
        split_validation(make_source(per_class=12, group_size=5), ["a", "b"], 0.3, seed=0)


def test_subsets_per_class_are_seeded_and_nested() -> None:
    source = make_source()
    small, large = (keep_per_class(source, ["a", "b"], count, 0, "dataset.train_per_class") for count in (3, 7))
    values = [set(part.stacked()[:, 0, 0, 0].tolist()) for part in (small, large)]
    assert values[0] < values[1]
    assert small.labels.bincount().tolist() == [3, 3]


def test_fewer_images_than_asked_per_class() -> None:
    with pytest.raises(ConfigError, match="dataset.test_per_class=13: class 'a' has only 12"):
        keep_per_class(make_source(), ["a", "b"], 13, 0, "dataset.test_per_class")


@pytest.mark.parametrize(
    ("side", "label", "problem"),
    [
        (16, 0, r"training images of 16 pixels, and dataset\.image_size=32"),
        (32, 10, r"training labels from 0 to 10, and 10 classes"),
        (32, -1, r"training labels from -1 to 9, and 10 classes"),
    ],
)
def test_a_reader_is_held_to_what_others_rely_on(
    side: int, label: int, problem: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(10).repeat(2)
    labels[3 if label > 0 else 0] = label
    train = TensorSource(torch.zeros(20, 3, side, side, dtype=torch.uint8), labels)
    raw = RawData(tuple("0123456789"), train, lambda: train, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr("cvdd.data.load.READERS", {"digits_photo": lambda config, store: raw})
    with pytest.raises(ValueError, match=rf"reader of dataset\.source=digits_photo returns {problem}"):
        load_data(read_yaml("digits_photo"), store)


def test_tensor_source_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        TensorSource(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        TensorSource(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


# --- digits_photo -----------------------------------------------------------------------------------------------------


def test_digits_are_complete_balanced_and_disjoint(digits: Data) -> None:
    assert digits.train.stacked().shape == (5188, 3, 32, 32)
    assert digits.train.stacked().dtype == torch.uint8
    assert digits.test.labels.bincount().tolist() == [100] * 10
    assert not set(digits.train.groups.tolist()) & set(digits.test.groups.tolist())
    assert len(set(digits.train.groups.tolist())) == 1297


def test_digits_are_deterministic_and_follow_their_seed(digits: Data, tmp_path: Path) -> None:
    again = load_data(read_yaml("digits_photo"), Store(tmp_path / "again"))
    assert again.identity == digits.identity
    assert torch.equal(again.train.stacked(), digits.train.stacked())
    other = load_data(read_yaml("digits_photo", digits={"seed": 1}), Store(tmp_path / "other"))
    assert other.identity["train"]["content"] != digits.identity["train"]["content"]


def test_digits_normalisation_in_the_yaml_is_the_measured_one(digits: Data) -> None:
    pixels = digits.train.stacked().permute(1, 0, 2, 3).reshape(3, -1).double() / 255
    assert torch.allclose(pixels.mean(1), torch.tensor(digits.mean).double(), atol=1e-3)
    assert torch.allclose(pixels.std(1), torch.tensor(digits.std).double(), atol=1e-3)


def test_digits_refuse_another_class_order(store: Store) -> None:
    classes = ["1", "0", *(str(digit) for digit in range(2, 10))]
    with pytest.raises(ConfigError, match="index 0: expected '1', found '0'"):
        load_data(read_yaml("digits_photo", classes=classes), store)


def test_validation_is_cut_from_training_by_digit(digits: Data, store: Store) -> None:
    config = read_yaml("digits_photo", evaluate_on="validation", test_per_class=20)
    data = load_data(config, store)
    assert not set(data.train.groups.tolist()) & set(data.test.groups.tolist())
    assert set(data.train.groups.tolist()) | set(data.test.groups.tolist()) <= set(digits.train.groups.tolist())
    assert data.test.labels.bincount().tolist() == [20] * 10
    assert math.isclose(len(data.train) / len(digits.train), 0.8, abs_tol=0.01)


def test_validation_never_reads_the_test_set(tmp_path: Path) -> None:
    load_data(read_yaml("digits_photo", evaluate_on="validation"), Store(tmp_path))
    assert [artifact.name for artifact in sealed(tmp_path)] == ["digits_photo-train"]


def test_identity_is_json_and_follows_the_content(digits: Data, store: Store) -> None:
    assert json.loads(json.dumps(digits.identity)) == digits.identity
    assert digits.identity["class_hash"] == digits.class_hash
    bounded = load_data(read_yaml("digits_photo", test_per_class=50), store)
    assert bounded.identity["train"] == digits.identity["train"]
    assert bounded.identity["test"] != digits.identity["test"]
    unused = load_data(read_yaml("digits_photo", validation_fraction=0.5, split_seed=7), store)
    assert unused.identity == digits.identity


# --- files ------------------------------------------------------------------------------------------------------------


def write_image(path: Path, size: tuple[int, int] = (20, 10), mode: str = "RGB", value: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if value is not None else 100).save(path)


def test_file_source_decodes_at_native_size_and_in_rgb(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", (20, 10), "L")
    write_image(tmp_path / "b.png", (9, 12), "RGBA", (10, 20, 30, 0))
    source = FileSource(tmp_path, ["a.jpg", "b.png"], torch.tensor([0, 1]))
    assert source.image(0).shape == (3, 10, 20)
    assert source.image(1)[:, 0, 0].tolist() == [10, 20, 30]
    assert source.subset([1]).image(0).shape == (3, 12, 9)
    assert source.subset([1]).path(0) == tmp_path / "b.png"
    assert not source.in_memory
    with pytest.raises(ValueError, match="to_eval_tensor"):
        source.stacked()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "corrupt.jpg").write_bytes(b"not an image")
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "truncated.jpg")
    content = (tmp_path / "truncated.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    Image.fromarray(noise.numpy()).save(tmp_path / "truncated.png")
    content = (tmp_path / "truncated.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").touch()
    names = ["corrupt.jpg", "truncated.jpg", "truncated.png", "empty.jpg"]
    source = FileSource(tmp_path, names, torch.zeros(4, dtype=torch.int64))
    for index, name in enumerate(names):
        with pytest.raises(ValueError, match=rf"{name} is truncated, corrupt.*delete it or replace it"):
            source.image(index)


def test_deep_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    write_image(tmp_path / "deep.png", (8, 8), "I;16", 40000)
    with pytest.raises(ValueError, match="deep.png has more than 8 bits"):
        FileSource(tmp_path, ["deep.png"], torch.tensor([0])).image(0)


def test_evaluation_view_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 255, 0), (10, 0, 30, 20))
    picture.save(tmp_path / "wide.png")
    source = FileSource(tmp_path, ["wide.png"], torch.tensor([0]))
    whole = to_eval_tensor(source, 10, None, [0, 0])
    assert whole.shape == (2, 3, 10, 10)
    assert whole[0, :, 5, 5].tolist() == [0, 255, 0]
    assert (to_eval_tensor(source, 10, 20, [0])[0, 1] == 255).all(), "a larger resize leaves only the centre"


def test_evaluation_view_of_fixed_size_images_is_the_identity() -> None:
    source = make_source()
    assert torch.equal(to_eval_tensor(source, 8, 16, [3, 1]), source.stacked()[[3, 1]])
    assert to_eval_tensor(source, 4, None, torch.tensor([0])).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_a_larger_test_resize_leaves_the_centre_of_images_in_memory(evaluate_on: str, store: Store) -> None:
    plain = load_data(read_yaml("digits_photo", evaluate_on=evaluate_on), store)
    zoomed = load_data(read_yaml("digits_photo", evaluate_on=evaluate_on, test_resize=40), store)
    one = plain.test.image(3)
    expected = torchvision.transforms.v2.functional.resize(one, [40], antialias=True)[:, 4:36, 4:36]
    assert torch.equal(zoomed.test.image(3), expected)
    assert torch.equal(zoomed.train.stacked(), plain.train.stacked())
    assert torch.equal(zoomed.test.labels, plain.test.labels)
