"""Networks of the published release: numerical agreement and every way a file can be wrong."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvdd.backbones import BackboneConfig, build_network, load_published
from cvdd.support.config_base import ConfigError

FIXTURES = Path(__file__).parent / "fixtures" / "published"
CHECKPOINT = FIXTURES / "ShuffleNetV2.pth"
SHUFFLENET = "cvdd.backbones.shufflenet.shufflenet_v2"


def network(num_classes: int = 10, target: str = SHUFFLENET, **arguments: object) -> nn.Module:
    return build_network(BackboneConfig(name="net", target=target, arguments=arguments), num_classes, seed=0).eval()


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return dict(torch.load(CHECKPOINT, weights_only=True))


def save(directory: Path, content: object) -> Path:
    path = directory / "ShuffleNetV2.pth"
    torch.save(content, path)
    return path


def assert_agrees(loaded: nn.Module) -> None:
    expected = load_file(FIXTURES / "expected_logits.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(expected["probe_images"]), expected["logits.ShuffleNetV2"], rtol=0, atol=1e-4)


def test_logits_of_the_release() -> None:
    loaded = network()
    report = load_published(CHECKPOINT, loaded)
    assert_agrees(loaded)
    assert (report.mapping, report.tensors, report.num_classes) == ("names", 282, 10)


def test_wrapped_and_nested(stored: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = network()
    nested = {"epoch": 3, "state_dict": {f"module._orig_mod.{name}": value for name, value in stored.items()}}
    assert load_published(save(tmp_path, nested), loaded).mapping == "names"
    assert_agrees(loaded)


def test_other_names_are_paired_by_order(stored: dict[str, Tensor], tmp_path: Path) -> None:
    """A file that calls its layers differently and has no batch counters, as PyTorch wrote them before 0.4.1."""
    renamed = OrderedDict(
        (f"block{position}.{name.rpartition('.')[2]}", value)
        for position, (name, value) in enumerate(stored.items())
        if not name.endswith("num_batches_tracked")
    )
    loaded = network()
    assert load_published(save(tmp_path, renamed), loaded).mapping == "order"
    assert_agrees(loaded)


def test_class_count() -> None:
    with pytest.raises(ConfigError, match=r"ShuffleNetV2\.pth.*10 classes and the dataset has 100"):
        load_published(CHECKPOINT, network(num_classes=100))


def test_other_architecture_is_refused_and_nothing_is_loaded() -> None:
    other = network(target="cvdd.backbones.resnet.resnet", width=24, blocks=[1, 1])
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight \(24, 1, 3, 3\) stands where the network has"):
        load_published(CHECKPOINT, other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("drop", [1, 2])
def test_missing_tensors_are_named(drop: int, stored: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ["linear.bias", "linear.weight"][:drop]:
        del stored[name]
    with pytest.raises(ConfigError, match=r"first without a counterpart is linear\.(bias|weight) of the network"):
        load_published(save(tmp_path, stored), network())


def test_surplus_tensors_are_named(stored: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, {**stored, "extra.weight": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"counterpart is extra\.weight of the file"):
        load_published(path, network())


def test_swapped_roles_are_refused(stored: dict[str, Tensor], tmp_path: Path) -> None:
    """Scale and shift have one shape; only the name's ending tells them apart."""
    names = list(stored)
    names[1], names[2] = names[2], names[1]
    path = save(tmp_path, OrderedDict((f"other.{name}", stored[name]) for name in names))
    with pytest.raises(ConfigError, match=r"other\.bn1\.bias .* stands where the network has bn1\.weight"):
        load_published(path, network())


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (-1.0, "negative variances")])
def test_impossible_values(value: float, message: str, stored: dict[str, Tensor], tmp_path: Path) -> None:
    stored["bn1.running_var"] = torch.full((24,), value)
    with pytest.raises(ConfigError, match=rf"bn1\.running_var holds .*{message}|{message}"):
        load_published(save(tmp_path, stored), network())


@pytest.mark.parametrize("size", [0, 10, 4096, 1_000_000])
def test_truncated_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "ShuffleNetV2.pth"
    path.write_bytes(CHECKPOINT.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"ShuffleNetV2\.pth: damaged"):
        load_published(path, network())


def test_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "ShuffleNetV2.pth"
    content = bytearray(CHECKPOINT.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"ShuffleNetV2\.pth: damaged, the checksum"):
        load_published(path, network())


class Intruder:
    """Anything that is not a tensor."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "not a state dict"),
        ({"conv1.weight": 3}, "entry conv1.weight is a int"),
        (Intruder(), "not a plain state dict"),
    ],
)
def test_other_content(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_published(save(tmp_path, content), network())


def test_weights_of_a_store(stored: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{key}": value for key, value in stored.items()}, path)
    loaded = network()
    load_published(path, loaded)
    assert_agrees(loaded)


def test_damaged_weights_of_a_store(stored: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ConfigError, match="there is no such file"):
        load_published(path, network())
    save_file(stored, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"weights\.safetensors: damaged, truncated"):
        load_published(path, network())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_published(tmp_path / "ResNet18.pth", network())
