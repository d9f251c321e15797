"""Images that somebody else made, in the place of a stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import MANIFEST
from cvdd.artifact.tensor_files import write_tensors
from cvdd.chain.context import Context
from cvdd.chain.unit_files import PATCHES, load_images, load_targets
from cvdd.data import Data, FileSource, check_same_classes, is_described
from cvdd.data.folders import class_folders
from cvdd.data.given_folder import check_sizes, checksum_of, read_given, scan_given
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

KIND = "given"
FIELD = "method.given"


def given_start(context: Context) -> Artifact:
    """Return the images of ``method.given`` as an artefact: that of a store itself, files as one of this store.

    Raises:
        ConfigError: there are none, or they are of other classes, of another size, or too few.
        DamagedImage: a file cannot be decoded.
    """
    path = given_path(context)
    return _of_store(context, path) if (path / MANIFEST).is_file() else _of_files(context, path)


def check_given(context: Context) -> None:
    """Refuse given images that cannot be used, without decoding any.

    Raises:
        ConfigError: see :func:`given_start`.
    """
    path = given_path(context)
    if context.config.method.keeps_given and context.config.protocol.images == "per_seed":
        log.warning(
            "protocol.images=per_seed: given images are the same for every seed, so their spread is that of students"
        )
    if (path / MANIFEST).is_file():
        made = _of_store(context, path, warn=True).manifest["identity"].get("method", {})
        if made.get("factor", 1) > context.config.label.factor and context.config.label.given is None:
            log.warning(
                "%s=%s: these images are made of four each, and labels show them whole; type label.factor=2",
                FIELD,
                context.config.method.given,
            )
    else:
        check_sizes(_files(context, path, warn=True), context.data().image_size, FIELD)


def is_distilled(start: Artifact) -> bool:
    """Whether initial images are a distilled set of a store."""
    return start.kind == "images"


def kept_as_given(context: Context, start: Artifact | None) -> Artifact | None:
    """Return the initial images if they are a distilled set already, all of which is wanted as it is."""
    wanted = context.config.ipc.images_per_class * len(context.data().classes)
    if start is None or not is_distilled(start) or not context.config.method.keeps_given:
        return None
    return start if start.metrics["images"] == wanted else None


def first_images(context: Context, start: Artifact) -> Tensor:
    """Return the first images of each class of a distilled set of a store: [classes, ipc, 3, size, size] uint8."""
    pixels, labels = load_images(start)
    ipc = context.config.ipc.images_per_class
    return torch.stack([pixels[labels == label][:ipc] for label in range(len(context.data().classes))])


def given_path(context: Context) -> Path:
    """Return where the given images are."""
    given = context.config.method.given
    assert given is not None
    return given.expanduser()


def _of_store(context: Context, path: Path, warn: bool = False) -> Artifact:
    data = context.data()
    artifact = context.open_elsewhere(path, "images", FIELD)
    classes = artifact.manifest["identity"]["classes"]
    check_same_classes(_names(data, classes), classes, f"{FIELD}={path}")
    targets, side = load_targets(artifact)
    if side != data.image_size:
        raise ConfigError(
            f"{FIELD}={path} holds images of {side} pixels, and dataset.image_size={data.image_size}; type "
            f"dataset.image_size={side}, or choose others: none are resized"
        )
    _require(context, torch.bincount(targets, minlength=len(classes)), warn)
    return artifact


def _of_files(context: Context, path: Path) -> Artifact:
    config, data = context.config, context.data()
    source, ipc = _files(context, path), config.ipc.images_per_class
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "images_per_class": ipc,
        "files": context.once((KIND, path, ipc, tuple(data.classes)), lambda: checksum_of(source)),
    }

    def build(work: Path) -> dict[str, Any]:
        check_sizes(source, data.image_size, FIELD)
        write_tensors(work / PATCHES, {"images": read_given(source, len(data.classes), data.image_size)})
        return {"images": ipc * len(data.classes)}

    return context.store.make(KIND, f"{data.name}-{ipc}", identity, [], build)


def _files(context: Context, path: Path, warn: bool = False) -> FileSource:
    """List as many files of each class as there are images to be."""
    data, ipc = context.data(), context.config.ipc.images_per_class
    classes = _names(data, class_folders(path) if path.is_dir() else ())
    source = scan_given(path, classes, FIELD)
    _require(context, torch.bincount(source.labels, minlength=len(classes)), warn)
    return source.subset(torch.cat([(source.labels == label).nonzero()[:ipc, 0] for label in range(len(classes))]))


def _names(data: Data, found: Sequence[str]) -> Sequence[str]:
    """Names of the classes; those that are found where the data set is not there to say them."""
    return found if is_described(data) and len(found) == len(data.classes) else data.classes


def _require(context: Context, counts: Tensor, warn: bool) -> None:
    """Refuse too few images of a class; say that some are left out, once and not wherever they are read."""
    given, ipc = context.config.method.given, context.config.ipc.images_per_class
    fewest, most = int(counts.min()), int(counts.max())
    if fewest < ipc:
        name = context.data().classes[int(counts.argmin())]
        raise ConfigError(
            f"{FIELD}={given} has {fewest} images of class {name}, and ipc.images_per_class={ipc} needs as many; type "
            f"ipc.images_per_class={fewest}"
        )
    if warn and most > ipc:
        log.warning(
            "%s=%s has %s images of a class, of which the first %d are taken (ipc.images_per_class)",
            FIELD,
            given,
            most if fewest == most else f"{fewest} to {most}",
            ipc,
        )
