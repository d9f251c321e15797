"""ZCA whitening, and the space in which networks see images: standardised by channel, or whitened.

The whitening is our own and not kornia's: that one accepts channels and sets of images that cannot be whitened, keeps
no eigenvectors, and would be the only user of a compiled dependency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdd.artifact.tensor_files import save_tensors
from cvdd.augmentation.augment import denormalise, normalise
from cvdd.support.config_base import ConfigError

CHUNK = 4096
"""Images whose double-precision copy is held at once while the covariance is summed."""


@dataclass(frozen=True)
class Whitening:
    """``x' = (x - mean) U (S + eps)^(-1/2) U^T`` with the covariance ``U S U^T`` (specification of MTT, section 2.2).

    Attributes:
        mean: [d] float32, d values of an image in [0, 1].
        vectors: [d, d] float32, the eigenvectors U in columns.
        values: [d] float32, the eigenvalues S, not below 0.
        eps: added to the eigenvalues.
    """

    mean: Tensor
    vectors: Tensor
    values: Tensor
    eps: float

    @cached_property
    def matrix(self) -> Tensor:
        """What a centred image is multiplied with to whiten it: [d, d]."""
        return (self.vectors * (self.values + self.eps).rsqrt()) @ self.vectors.T

    @cached_property
    def inverse(self) -> Tensor:
        """What a whitened image is multiplied with to undo it: [d, d]."""
        return (self.vectors * (self.values + self.eps).sqrt()) @ self.vectors.T

    def save(self, path: Path) -> None:
        """Write it to a file."""
        tensors = {"mean": self.mean, "vectors": self.vectors, "values": self.values}
        tensors["eps"] = torch.tensor(self.eps)
        save_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})

    @staticmethod
    def load(path: Path) -> Whitening:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        return Whitening(tensors["mean"], tensors["vectors"], tensors["values"], float(tensors["eps"]))


def fit_whitening(images: Tensor, eps: float, section: str = "method.mtt") -> Whitening:
    """Measure the whitening of a set of images.

    Args:
        images: [n, channels, size, size] uint8.
        eps: added to the eigenvalues of the covariance, which is that of values in [0, 1].
        section: of the configuration that asks for it, for messages.

    Raises:
        ConfigError: a channel is constant, or the images are not more than their dimensions, so that their covariance
            is singular.
    """
    count, dimensions = len(images), images[0].numel()
    if count <= dimensions:
        raise ConfigError(
            f"{section}.whitening=true: {count} training images do not determine the covariance of {dimensions} "
            f"values; at least {dimensions + 1} images are needed. Use more (dataset.train_per_class), smaller ones "
            f"(dataset.image_size), or {section}.whitening=false"
        )
    for channel, name in enumerate(("red", "green", "blue")):
        if int(images[:, channel].min()) == int(images[:, channel].max()):
            raise ConfigError(
                f"{section}.whitening=true: the {name} channel of all {count} training images has the one value "
                f"{int(images[0, channel, 0, 0])}, which cannot be whitened; correct the data, or set "
                f"{section}.whitening=false"
            )
    total = torch.zeros(dimensions, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        total += chunk.flatten(1).double().sum(dim=0)
    mean = total / count
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for chunk in images.split(CHUNK):
        centred = chunk.flatten(1).double() - mean
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / ((count - 1) * 255**2))
    return Whitening((mean / 255).float(), vectors.float(), values.clamp(min=0).float(), eps)


class InputSpace(nn.Module):
    """Maps pixels to what networks see, and back.

    As a module it takes images that are standardised by channel, so that it can stand in front of a network wherever
    the project measures networks on standardised images.

    Args:
        mean: channel means of pixels in [0, 1].
        std: channel standard deviations of pixels in [0, 1].
        whitening: None for images that are only standardised.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], whitening: Whitening | None) -> None:
        super().__init__()
        self._mean, self._std = tuple(mean), tuple(std)
        self.whitened = whitening is not None
        tensors: Mapping[str, Tensor | None] = {"centre": None, "matrix": None, "inverse": None}
        if whitening is not None:
            tensors = {"centre": whitening.mean, "matrix": whitening.matrix, "inverse": whitening.inverse}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 3, size, size] that are standardised by channel."""
        if not self.whitened:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self._mean, self._std))
        return self._whiten(images * std + mean)

    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels [n, 3, size, size] uint8 to float32 images in this space."""
        return self._whiten(pixels.float() / 255) if self.whitened else normalise(pixels, self._mean, self._std)

    def decode(self, images: Tensor) -> Tensor:
        """Map images of this space [n, 3, size, size] to the nearest uint8 pixels."""
        if not self.whitened:
            return denormalise(images, self._mean, self._std)
        assert isinstance(self.inverse, Tensor)
        assert isinstance(self.centre, Tensor)
        values = (images.flatten(1) @ self.inverse + self.centre).view_as(images)
        return (values.clamp(0, 1) * 255).round().to(torch.uint8)

    def _whiten(self, values: Tensor) -> Tensor:
        assert isinstance(self.matrix, Tensor)
        assert isinstance(self.centre, Tensor)
        return ((values.flatten(1) - self.centre) @ self.matrix).view_as(values)
