"""Small images decoded once, kept in the store as one tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvdd.artifact.tensor_files import write_tensors
from cvdd.data.resize import resize_and_crop
from cvdd.data.source import DamagedImage, ImageSource, TensorSource

if TYPE_CHECKING:
    from cvdd.artifact import Artifact, Store

ARTIFACT_KIND = "data"
_FILE = "images.safetensors"
_CHUNK = 512


def channel_statistics(total: Tensor, squares: Tensor, pixels: int) -> tuple[list[float], list[float]]:
    """Turn sums of 8-bit values into the mean and standard deviation of pixels in [0, 1].

    Args:
        total: int64 ``[3]``, sum of the values of each channel.
        squares: int64 ``[3]``, sum of their squares.
        pixels: number of values per channel.
    """
    mean = total.double() / pixels
    variance = squares.double() / pixels - mean**2
    return (mean / 255).tolist(), (variance.clamp_min(0).sqrt() / 255).tolist()


def channel_sums(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact sums of values and of squares per channel, int64 ``[3]`` each, of uint8 ``[n, 3, h, w]``."""
    values = images.movedim(1, 0).reshape(3, -1)
    levels = torch.arange(256)
    counts = torch.stack([torch.bincount(channel.int(), minlength=256) for channel in values])
    return (counts * levels).sum(1), (counts * levels**2).sum(1)


def write_images(directory: Path, images: Tensor, labels: Tensor, groups: Tensor) -> dict[str, Any]:
    """Write a part of a dataset into an artefact under construction and return its metrics.

    Args:
        directory: the artefact's work directory.
        images: uint8 ``[n, 3, S, S]``.
        labels: int64 ``[n]``.
        groups: int64 ``[n]``.

    Returns:
        ``images``, ``mean`` and ``std`` as JSON values.
    """
    write_tensors(directory / _FILE, {"images": images, "labels": labels, "groups": groups})
    total, squares = channel_sums(images)
    mean, std = channel_statistics(total, squares, images[:, 0].numel())
    return {"images": len(images), "mean": mean, "std": std}


def read_images(artifact: Artifact) -> TensorSource:
    """Load what :func:`write_images` wrote."""
    content = load_file(artifact.path / _FILE)
    return TensorSource(content["images"], content["labels"], content["groups"])


def pack(
    store: Store,
    name: str,
    identity: Mapping[str, Any],
    source: ImageSource,
    image_size: int,
    shorter_side: int | None = None,
    keep: bool = True,
) -> Artifact:
    """Decode, resize and crop every image once, and store the tensor and its channel statistics.

    Args:
        store: where the artefact lives.
        name: readable name, e.g. ``"tiny_imagenet-train"``.
        identity: what changes the result besides the arguments below.
        source: images to decode.
        image_size: side of the stored images, in pixels.
        shorter_side: shorter side before the centre crop, in pixels; by default ``image_size``.
        keep: store the pixels; otherwise only measure (metrics ``mean`` and ``std``).

    Raises:
        DamagedImage: files are damaged (the first of them are named), which is known once all were looked at.
    """
    full_identity = {
        **identity,
        "content": source.digest(),
        "image_size": image_size,
        "shorter_side": shorter_side,
        "keep": keep,
    }

    def build(directory: Path) -> Mapping[str, Any]:
        kept = torch.empty((len(source) if keep else 0, 3, image_size, image_size), dtype=torch.uint8)
        total, squares = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        damaged: list[str] = []

        def view(index: int) -> Tensor | str:
            try:
                return resize_and_crop(source.image(index), image_size, shorter_side)
            except DamagedImage as error:
                return str(error)  # the error itself would keep the image that was decoded

        # Threads help because the decoder works outside the interpreter lock; one chunk at a time bounds memory.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(source), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(source)))
                views = list(pool.map(view, indices))
                # The rest is looked at all the same, to tell of all that are damaged.
                damaged += [found for found in views if isinstance(found, str)]
                if damaged:
                    continue
                chunk = torch.stack([found for found in views if isinstance(found, Tensor)])
                if keep:
                    kept[start : start + len(chunk)] = chunk
                else:
                    chunk_total, chunk_squares = channel_sums(chunk)
                    total, squares = total + chunk_total, squares + chunk_squares
        if damaged:
            raise DamagedImage.of_all(damaged, len(source))
        if keep:
            return write_images(directory, kept, source.labels, source.groups)
        mean, std = channel_statistics(total, squares, len(source) * image_size**2)
        return {"images": len(source), "mean": mean, "std": std}

    return store.make(ARTIFACT_KIND, name, full_identity, [], build)
