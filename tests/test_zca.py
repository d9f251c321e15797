"""ZCA whitening and the space in which networks see images."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from helpers import MEAN, STD, random_pixels
from torch import nn

from cvdd.augmentation.augment import normalise
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.zca import InputSpace, Whitening, fit_whitening

PIXELS = random_pixels(400, 4)


def test_whitening_is_that_of_the_definition() -> None:
    """The symmetric inverse root of covariance + eps, here by a matrix square root that shares no code with it."""
    values = PIXELS.flatten(1).double() / 255
    covariance = torch.from_numpy(numpy.cov(values.numpy(), rowvar=False))
    whitening = fit_whitening(PIXELS, 0.1)
    root = whitening.matrix.double()
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        root @ (covariance + 0.1 * torch.eye(48)) @ root, torch.eye(48).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(whitening.mean.double(), values.mean(dim=0), rtol=0, atol=1e-6)


def test_whitened_images_have_the_identity_as_covariance_where_eps_is_small() -> None:
    space = InputSpace(MEAN, STD, fit_whitening(PIXELS, 1e-9))
    white = space.encode(PIXELS).flatten(1)
    torch.testing.assert_close(white.T.cov(), torch.eye(48), rtol=0, atol=1e-3)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(48), rtol=0, atol=1e-4)


@pytest.mark.parametrize("whitened", [True, False])
def test_pixels_come_back_exactly(whitened: bool) -> None:
    space = InputSpace(MEAN, STD, fit_whitening(PIXELS, 0.1) if whitened else None)
    assert torch.equal(space.decode(space.encode(PIXELS)), PIXELS)
    assert (space.encode(PIXELS) - normalise(PIXELS, MEAN, STD)).abs().max() < 1e-6 or whitened


def test_in_front_of_a_network_it_takes_standardised_images() -> None:
    space = InputSpace(MEAN, STD, fit_whitening(PIXELS, 0.1))
    seen = nn.Sequential(space, nn.Identity())(normalise(PIXELS, MEAN, STD))
    torch.testing.assert_close(seen, space.encode(PIXELS), rtol=0, atol=1e-5)
    assert not space.state_dict()


def test_whitening_comes_back_from_its_file(tmp_path: Path) -> None:
    whitening = fit_whitening(PIXELS, 0.1)
    whitening.save(tmp_path / "whitening.safetensors")
    again = Whitening.load(tmp_path / "whitening.safetensors")
    assert torch.equal(again.matrix, whitening.matrix)
    assert torch.equal(again.inverse, whitening.inverse)


def test_a_constant_channel_is_refused() -> None:
    pixels = PIXELS.clone()
    pixels[:, 1] = 7
    with pytest.raises(ConfigError, match=r"green channel of all 400 .* value 7.*method\.mtt\.whitening=false"):
        fit_whitening(pixels, 0.1)


@pytest.mark.parametrize("count", [1, 48])
def test_too_few_images_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"{count} training images .* 48 values; at least 49 .*train_per_class"):
        fit_whitening(PIXELS[:count], 0.1)


def test_a_constant_pixel_is_no_constant_channel() -> None:
    """A black frame is common; eps keeps its whitening finite."""
    pixels = PIXELS.clone()
    pixels[:, :, 0] = 0
    space = InputSpace(MEAN, STD, fit_whitening(pixels, 0.1))
    assert bool(space.encode(pixels).isfinite().all())
    assert torch.equal(space.decode(space.encode(pixels)), pixels)
