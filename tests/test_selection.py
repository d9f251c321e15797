"""Herding: real images whose mean is that of their class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import PRIORS, small_network, tiny_context
from safetensors.torch import load_file
from torch import nn

import cvdd.chain.initial
from cvdd.augmentation.augment import denormalise
from cvdd.chain.images import make_images
from cvdd.chain.initial import PATCHES, make_herd
from cvdd.chain.unit_files import load_images
from cvdd.methods.selection import herd, member_features
from cvdd.support.config_base import ConfigError

pytest_plugins = ["chain_fixtures"]


def test_herding_by_hand() -> None:
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [7.0]])
    # The mean is 2.6. First 3; then 2, for (3 + 2) / 2 = 2.5; of 0, 1 and 7 then 1, for 6 / 3 = 2; then 7, for
    # 13 / 4 = 3.25.
    assert herd(features, 5).tolist() == [3, 2, 1, 4, 0]
    assert herd(features, 2).tolist() == [3, 2]


def test_herding_is_closer_to_the_mean_than_chance() -> None:
    source = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=source)
    mean = features.mean(dim=0)
    chosen = herd(features, 10)
    assert len(set(chosen.tolist())) == 10
    by_chance = [(features[torch.randperm(200, generator=source)[:10]].mean(dim=0) - mean).norm() for _ in range(200)]
    assert (features[chosen].mean(dim=0) - mean).norm() < 0.5 * min(by_chance)


class WithHead(nn.Module):
    """A classifier on the mean colours, scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.head = scale, nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale * x.mean(dim=(2, 3)))


def test_features_do_not_depend_on_a_networks_scale_or_on_the_batch() -> None:
    images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    one, other = member_features([WithHead(1.0)], images), member_features([WithHead(50.0)], images, batch=5)
    torch.testing.assert_close(one, other)
    colours = images.mean(dim=(2, 3))
    expected = (colours - colours.mean(dim=0)) / colours.std(dim=0, correction=0) / 3**0.5
    torch.testing.assert_close(one, expected)
    assert member_features([WithHead(1.0), WithHead(2.0)], images).shape == (12, 6)


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    network = nn.Sequential(*[module for module in small_network() if not isinstance(module, nn.Linear)])
    with pytest.raises(ConfigError, match=r"method\.init=herding needs what goes into a network's"):
        member_features([network], torch.zeros(2, 3, 12, 12))


def test_herded_images_are_real_ones_of_their_class(chain_home: Path) -> None:
    context = tiny_context(chain_home, "method=random_real", "method.iterations=0", "method.init=herding")
    images, labels = load_images(make_images(context, PRIORS))
    train = context.data().train
    for image, label in zip(images, labels, strict=True):
        same = (train.stacked() == image).flatten(1).all(dim=1)
        assert bool(same.any())
        assert int(train.labels[same.nonzero()[0, 0]]) == int(label)
    other = context.differing({"method.seed": 1}, "")
    assert make_herd(other).digest != make_herd(context).digest


def test_the_herd_is_chosen_by_what_networks_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised images; of each class those are kept, in their order, that were chosen: here the last and the first.

    The artefact holds them as pixels.
    """
    seen: list[torch.Tensor] = []

    def features(networks: list[nn.Module], images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)

    monkeypatch.setattr(
        cvdd.chain.initial,
        "make_member",
        lambda context, name: context.store.make("members", name, {}, [], lambda work: {}),
    )
    monkeypatch.setattr(cvdd.chain.initial, "load_network", lambda *arguments: small_network())
    monkeypatch.setattr(cvdd.chain.initial, "member_features", features)
    monkeypatch.setattr(cvdd.chain.initial, "herd", lambda features, count: torch.tensor([len(features) - 1, 0]))
    context = tiny_context(tmp_path, "method=random_real", "method.iterations=0", "method.init=herding")
    chosen = load_file(make_herd(context).path / PATCHES)["images"]
    assert len(chosen) == len(seen) == 10
    for kept, images in zip(chosen, seen, strict=True):
        assert torch.equal(kept, denormalise(images, context.data().mean, context.data().std)[[-1, 0]])
