"""Images and labels that somebody else made, in the place of a stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import MANIFEST
from cvdd.chain.unit_files import PATCHES, load_images, load_targets
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.data import FileSource, check_same_classes
from cvdd.data.given_folder import checksum_of, read_given, scan_given

log = logging.getLogger(__name__)

KIND = "given"
FIELD = "method.given"


def given_start(context: Context) -> Artifact:
    """Return the images of ``method.given`` as an artefact: that of a store itself, files as one of this store.

    Raises:
        ConfigError: there are none, or they are of other classes, of another size, or too few.
        DamagedImage: a file cannot be decoded.
    """
    path = _given(context)
    return _of_store(context, path) if (path / MANIFEST).is_file() else _of_files(context, path)


def is_distilled(start: Artifact) -> bool:
    """Whether initial images are a distilled set of a store."""
    return start.kind == "images"


def kept_as_given(context: Context, start: Artifact | None) -> Artifact | None:
    """Return the initial images if they are a distilled set already, all of which is wanted as it is."""
    method, wanted = context.config.method, context.config.ipc.images_per_class * len(context.data().classes)
    if start is None or not is_distilled(start) or not method.keeps_given or method.jpeg_round_trip:
        return None
    return start if start.metrics["images"] == wanted else None


def first_images(context: Context, start: Artifact) -> Tensor:
    """Return the first images of each class of a distilled set of a store: [classes, ipc, 3, size, size] uint8."""
    pixels, labels = load_images(start)
    ipc = context.config.ipc.images_per_class
    return torch.stack([pixels[labels == label][:ipc] for label in range(len(context.data().classes))])


def check_given(context: Context) -> None:
    """Refuse given images that cannot be used, as far as that is known without reading all of them.

    Raises:
        ConfigError: see :func:`given_start`.
    """
    path, data = _given(context), context.data()
    if (path / MANIFEST).is_file():
        _of_store(context, path)
        return
    source = _files(context, path)
    read_given(source.subset([0]), 1, 1, data.image_size, FIELD)


def _given(context: Context) -> Path:
    given = context.config.method.given
    assert given is not None
    return given.expanduser()


def _of_store(context: Context, path: Path) -> Artifact:
    data = context.data()
    artifact = context.open_elsewhere(path, "images", FIELD)
    identity = artifact.manifest["identity"]
    check_same_classes(list(data.classes), identity["classes"], f"{FIELD}={path}")
    targets, side = load_targets(artifact)
    if side != data.image_size:
        raise ConfigError(
            f"{FIELD}={path} holds images of {side} pixels, and dataset.image_size={data.image_size}; type "
            f"dataset.image_size={side}, or choose others: none are resized"
        )
    _require(context, torch.bincount(targets, minlength=len(data.classes)))
    return artifact


def _of_files(context: Context, path: Path) -> Artifact:
    config, data = context.config, context.data()
    source, ipc = _files(context, path), config.ipc.images_per_class
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "images_per_class": ipc,
        "files": checksum_of(source),
    }

    def build(work: Path) -> dict[str, Any]:
        pixels = read_given(source, len(data.classes), ipc, data.image_size, FIELD)
        save_file({"images": pixels}, work / PATCHES)
        return {"images": ipc * len(data.classes)}

    return context.store.make(KIND, f"{data.name}-{ipc}", identity, [], build)


def _files(context: Context, path: Path) -> FileSource:
    classes = context.data().classes
    source = scan_given(path, classes, FIELD)
    _require(context, torch.bincount(source.labels, minlength=len(classes)))
    return source


def _require(context: Context, counts: Tensor) -> None:
    """Refuse too few images of a class; say where some are left out."""
    given, ipc = context.config.method.given, context.config.ipc.images_per_class
    fewest = int(counts.min())
    if fewest < ipc:
        name = context.data().classes[int(counts.argmin())]
        raise ConfigError(
            f"{FIELD}={given} has {fewest} images of class {name}, and ipc.images_per_class={ipc} needs as many; type "
            f"ipc.images_per_class={fewest}"
        )
    if int(counts.max()) > ipc:
        log.warning(
            "%s=%s has %s images of a class, of which the first %d are taken (ipc.images_per_class)",
            FIELD,
            given,
            fewest if fewest == int(counts.max()) else f"{fewest} to {int(counts.max())}",
            ipc,
        )
