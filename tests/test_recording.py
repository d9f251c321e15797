"""Statistics of the real data: against loops over images and batches, and as an artefact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Compose
from helpers import as_files, small_network, tiny_context, with_source
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.chain.members import load_network, make_member
from cvdd.chain.statistics import load_statistics, make_statistics
from cvdd.schema import StatisticsConfig
from cvdd.statistics.layer_statistics import channel_moments, patch_moments
from cvdd.statistics.recording import RealStatistics, pool, record_statistics
from cvdd.support.config_base import ConfigError

pytest_plugins = ["chain_fixtures"]

CLASSES = 4
LABELS = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2, 2, 1])
SPLIT = (4, 4, 2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = noise(10, 3, 6, 6) * torch.linspace(0.5, 2, 10, dtype=torch.float64)[:, None, None, None]


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(IMAGES.split(SPLIT), LABELS.split(SPLIT), strict=True))


def record(**options: object) -> RealStatistics:
    of_convolutions = {} if options.get("layers") == "bn" else {"patch": 3}
    config = StatisticsConfig.model_validate({"layers": "bn_and_conv", **of_convolutions, **options})
    return record_statistics(small_network().double(), batches(), config, CLASSES)


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "patch"), [(4, 6, 2), (5, 7, 3), (2, 2, 4), (1, 1, 3)])
def test_patches_by_a_loop(height: int, width: int, patch: int) -> None:
    """Maps whose sides are multiples of the patch's, maps whose are not, and maps that are smaller."""
    inputs = noise(6, 5, height, width)
    rows, columns = -(-height // patch), -(-width // patch)
    resized = nn.functional.interpolate(
        inputs, size=(rows * patch, columns * patch), mode="bilinear", align_corners=False
    )
    found = patch_moments(inputs, 2, patch)
    assert found.mean.shape == (2, rows * columns)
    for group in range(2):
        for row in range(rows):
            for column in range(columns):
                part = resized[3 * group : 3 * group + 3, :, row * patch :, column * patch :][..., :patch, :patch]
                values, index = part.flatten(), row * columns + column
                mean = values.sum() / len(values)
                variance = ((values - mean) ** 2).sum() / len(values)
                assert found.mean[group, index].item() == pytest.approx(mean.item(), abs=1e-12)
                assert found.variance[group, index].item() == pytest.approx(variance.item(), rel=1e-9)


def test_moments_of_a_group_follow_from_those_of_its_images() -> None:
    inputs = noise(7, 4, 5, 5) + noise(7, 4, 1, 1, seed=1)
    group = torch.tensor([2, 0, 2, 2, 0, 2, 0])
    pooled = pool(channel_moments(inputs, 7), group, 4)
    for index in (0, 2):
        together = channel_moments(inputs[group == index], 1)
        torch.testing.assert_close(pooled.mean[index], together.mean[0])
        torch.testing.assert_close(pooled.variance[index], together.variance[0])
    assert not pooled.mean[[1, 3]].any()


# --- what is recorded -------------------------------------------------------------------------------------------------


def moments_of(images: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """Of all images together, at the first layer, by library calls."""
    if part == "channels":
        return images.mean(dim=(0, 2, 3)), images.var(dim=(0, 2, 3), correction=0)
    tiles = [images[:, :, row : row + 3, column : column + 3] for row in (0, 3) for column in (0, 3)]
    return torch.stack([tile.mean() for tile in tiles]), torch.stack([tile.var(correction=0) for tile in tiles])


@pytest.mark.parametrize("part", ["channels", "patches"])
def test_of_all_images_the_weighted_mean_of_the_batches(part: str) -> None:
    found = record().layers["0"][part]
    shares = torch.tensor(SPLIT, dtype=torch.float64) / 10
    each = [moments_of(images, part) for images, _ in batches()]
    expected = [sum(share * one[index] for share, one in zip(shares, each, strict=True)) for index in range(2)]
    torch.testing.assert_close(found.mean.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert (found.variance - moments_of(IMAGES, part)[1]).abs().max() > 1e-3


def expected_of_class(kind: str, label: int, part: str) -> tuple[Tensor, Tensor]:
    own = IMAGES[label == LABELS]
    if kind == "total":
        return moments_of(own, part)
    if kind == "images":
        each = [moments_of(image[None], part) for image in own]
        return torch.stack([mean for mean, _ in each]).mean(dim=0), torch.stack([var for _, var in each]).mean(dim=0)
    entries = 3 if part == "channels" else 4
    mean, variance = torch.zeros(entries, dtype=torch.float64), torch.ones(entries, dtype=torch.float64)
    for images, labels in batches():
        if (labels == label).any():
            new_mean, new_variance = moments_of(images[labels == label], part)
            mean, variance = 0.9 * mean + 0.1 * new_mean, 0.9 * variance + 0.1 * new_variance
    return mean, variance


@pytest.mark.parametrize("part", ["channels", "patches"])
@pytest.mark.parametrize("kind", ["images", "total", "moving"])
def test_of_a_class(kind: str, part: str) -> None:
    """Mean under mean and variance under variance, also of patches, which the release swaps."""
    found = record(class_share=0.5, class_statistics=kind).classes["0"][part]
    for label in range(3):
        mean, variance = expected_of_class(kind, label, part)
        torch.testing.assert_close(found.mean[label].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance[label].double(), variance, rtol=1e-5, atol=1e-6)
    assert found.mean.shape[0] == CLASSES
    assert not found.mean[3].any()
    assert set(found.variance[3].tolist()) == ({1.0} if kind == "moving" else {0.0})


def test_only_what_is_asked_for() -> None:
    everything = record(class_share=0.5)
    assert list(everything.layers) == ["0", "3"]
    assert list(everything.classes) == ["0", "1", "3", "4"]
    assert list(everything.classes["1"]) == ["channels"]
    assert record().classes == {}
    batchnorm = record(layers="bn", class_share=1.0)
    assert batchnorm.layers == {}
    assert list(batchnorm.classes) == ["1", "4"]


def test_later_layers_see_what_the_network_makes_of_the_images() -> None:
    network = small_network().double()
    inputs = network[:4](IMAGES)
    found = record(class_share=1.0, class_statistics="total").classes["4"]["channels"]
    torch.testing.assert_close(found.mean[1].double(), inputs[LABELS == 1].mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_the_network_is_left_as_it_was() -> None:
    network = small_network().double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    record_statistics(network, batches(), StatisticsConfig(layers="bn_and_conv"), CLASSES)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(not module._forward_pre_hooks for module in network.modules())


# --- the artefact -----------------------------------------------------------------------------------------------------

SMALL = (
    "dataset.train_per_class=8",
    "recipe.epochs=1",
    "committee.members.resnet18.backbone.arguments.width=8",
    "method.statistics.layers=bn_and_conv",
    "method.statistics.class_share=0.5",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def made(home: Path) -> Artifact:
    return make_statistics(tiny_context(home, *SMALL), "resnet18")


def test_read_as_they_were_made(made: Artifact, home: Path) -> None:
    context = tiny_context(home, *SMALL)
    recorded = load_statistics(made)
    network = load_network(
        context, make_member(context, "resnet18"), context.config.committee.members["resnet18"].backbone
    )
    convolutions = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    batchnorm = {name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert set(recorded.layers) == convolutions
    assert set(recorded.classes) == convolutions | batchnorm
    assert made.metrics == {"images": 80, "layers": len(convolutions | batchnorm)}
    first = next(iter(recorded.layers.values()))
    assert first["patches"].mean.shape == (64,)
    # The padding of the crops is black, and black is below the mean.
    data = context.data()
    pixels = data.train.stacked().float().mean(dim=(0, 2, 3)) / 255
    shown = first["channels"].mean * torch.tensor(data.std) + torch.tensor(data.mean)
    assert bool((shown < pixels).all())
    assert bool((shown > 0.7 * pixels).all())


def test_the_same_again(made: Artifact, tmp_path: Path) -> None:
    other = make_statistics(tiny_context(tmp_path, *SMALL), "resnet18")
    assert other.path.name == made.path.name
    assert other.manifest["files"] == made.manifest["files"]


def digest(home: Path, *changes: str) -> str:
    return make_statistics(tiny_context(home, *SMALL, *changes), "resnet18").digest


def test_they_belong_to_the_members_weights(made: Artifact, home: Path) -> None:
    assert [parent["kind"] for parent in made.manifest["parents"]] == ["members"]
    assert digest(home, "seed=1", "method.seed=0") != made.digest


def test_images_in_files(made: Artifact, tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *SMALL, "trainer.workers=0")
    make_member(context, "resnet18")
    found = make_statistics(as_files(tmp_path, context), "resnet18")
    assert found.path.name == made.path.name
    assert found.manifest["files"] == made.manifest["files"]


def test_resized_crops_of_files_have_the_side_of_the_data(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *SMALL, "trainer.workers=0", "recipe.crop=resized")
    make_member(context, "resnet18")
    recorded = load_statistics(make_statistics(as_files(tmp_path, context), "resnet18"))
    assert next(iter(recorded.layers.values()))["patches"].mean.shape == (64,)


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *SMALL)
    make_member(context, "resnet18")
    source = context.data().train
    without = with_source(context, source.subset((source.labels != 3).nonzero()))
    with pytest.raises(ConfigError, match=r"class 3 has no training images.*method\.statistics\.class_share=0"):
        make_statistics(without, "resnet18")


@pytest.mark.parametrize("change", ["method.statistics.patch=8", "method.statistics.class_statistics=moving"])
def test_what_is_recorded_is_part_of_the_identity(change: str, made: Artifact, home: Path) -> None:
    assert digest(home, change) != made.digest


@pytest.mark.parametrize(
    "change", ["method.statistics.class_share=0.7", "method.statistics.momentum=0.5", "method.seed=5", "method.lr=1"]
)
def test_what_changes_nothing_is_not(change: str, made: Artifact, home: Path) -> None:
    assert digest(home, change) == made.digest


def test_the_batch_of_recorded_statistics_is_chosen_and_belongs_to_them(chain_home: Path) -> None:
    def recorded(batch: int) -> Artifact:
        overrides = ("method=lpld", f"method.statistics.batch={batch}", "ipc.images_per_class=1")
        return make_statistics(tiny_context(chain_home, *overrides), "resnet18")

    assert recorded(64).digest != recorded(256).digest
    assert recorded(256).manifest["identity"]["batch"] == 256


def test_a_batch_of_nothing_that_is_recorded_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"method\.statistics\.batch=256 is of statistics that are recorded"):
        compose("evaluate", "method=cvdd", "method.statistics.batch=256")
