"""Labels that somebody else made, of a store or of the published programs, in the place of ``relabel``."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import MANIFEST, file_checksum
from cvdd.chain.context import Context
from cvdd.chain.given import given_path, given_start, kept_as_given
from cvdd.chain.labels import Labels, open_labels
from cvdd.composition.given_recipe import is_published, recipe_of
from cvdd.data import is_described
from cvdd.labels.published_release import PublishedLabels
from cvdd.labels.sources import SoftLabels
from cvdd.schema.unread import as_typed
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

FIELD = "label.given"


@dataclass(frozen=True)
class GivenLabels(Labels):
    """Labels whose teachers are not at hand.

    Attributes:
        folder: where they lie.
        size: bytes on disk.
    """

    folder: Path
    size: int

    @property
    def place(self) -> str:
        """Name of the directory in which they are stored."""
        return self.folder.name

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.size

    def open(self, pixels: Tensor, in_rounds: bool = False) -> SoftLabels:
        """Return the labels for reading; see :meth:`Labels.open`."""
        if self.artifact is not None:
            return open_labels(self.context, self.artifact, self.images, pixels, in_rounds)
        return _published(self.context, self.folder, len(pixels))


def given_labels(context: Context, images: Artifact) -> GivenLabels:
    """Return the labels that ``label.given`` names.

    Args:
        context: the configuration and its surroundings.
        images: that they are of.

    Raises:
        ConfigError: they are of other images or classes, or of another recipe than the configuration says.
    """
    folder = _given(context)
    _check_recipe(context)
    if is_published(folder):
        content, size = context.once((FIELD, folder), lambda: _read_once(folder))
        return GivenLabels({"published": content}, [images], None, context, images, [], {}, folder, size)
    artifact = context.open_elsewhere(folder, "labels", FIELD)
    _check_images(context, artifact, images)
    made = artifact.manifest["identity"]
    identity = {key: value for key, value in made.items() if key not in ("images", "classes", "parameters")}
    identity["teachers"] = [one["digest"] for one in artifact.manifest["parents"] if one["kind"] != "images"]
    return GivenLabels(identity, [images, artifact], artifact, context, images, [], {}, folder, artifact.bytes)


def check_given_labels(context: Context) -> None:
    """Refuse given labels that cannot be used, as far as that is known before the images are made.

    Raises:
        ConfigError: see :func:`given_labels`.
    """
    config, folder = context.config, _given(context)
    _check_recipe(context)
    if is_published(folder):
        _published(context, folder, config.ipc.images_per_class * len(context.data().classes))
        return
    artifact = context.open_elsewhere(folder, "labels", FIELD)
    digest = artifact.manifest["identity"]["images"]
    if not (given_path(context) / MANIFEST).is_file():
        raise ConfigError(
            f"{FIELD}={folder} are labels of a store, which are of images of a store: type "
            f"method.given=.../images/NAME-{digest}"
        )
    images = given_start(context)
    _check_images(context, artifact, images)
    if kept_as_given(context, images) is None:
        count = int(images.metrics["images"]) // len(context.data().classes)
        raise ConfigError(
            f"{FIELD}={folder} are of {count} images of each class, and ipc.images_per_class="
            f"{config.ipc.images_per_class}; type ipc.images_per_class={count}"
        )


def _given(context: Context) -> Path:
    given = context.config.label.given
    assert given is not None
    return given.expanduser().absolute()


def _published(context: Context, folder: Path, count: int) -> PublishedLabels:
    data = context.data()
    return PublishedLabels(folder, count, data.image_size, classes=len(data.classes))


def _check_images(context: Context, labels: Artifact, images: Artifact) -> None:
    made, data = labels.manifest["identity"], context.data()
    if made["images"] != images.digest:
        raise ConfigError(
            f"{FIELD}={context.config.label.given} are of the images {made['images']}, and {images.path.name} is "
            f"given; type method.given=.../images/NAME-{made['images']}"
        )
    theirs = images.manifest["identity"]["data"]
    for name, own in (("mean", data.mean), ("std", data.std)):
        if list(theirs[name]) != list(own) and not is_described(data):
            raise ConfigError(
                f"{FIELD}={context.config.label.given}: the teachers saw images normalised with {name} {theirs[name]}, "
                f"and students would with {list(own)}; type 'dataset.{name}={theirs[name]}'"
            )


def _check_recipe(context: Context) -> None:
    label = context.config.label
    said, read = label.model_dump(mode="json"), recipe_of(label.given)
    if context.config.protocol.repeat_labels and is_published(_given(context)):
        raise ConfigError(
            f"{FIELD}={label.given} are records of the published programs, which are read epoch by epoch; type "
            "protocol.repeat_labels=false"
        )
    if unknown := sorted(read.keys() - said.keys()):
        raise ConfigError(
            f"{FIELD}={label.given} is of another version, which this one cannot read: it says label.{unknown[0]}"
        )
    known = [(name, value) for name, value in read.items() if name not in ("given", "store")]
    other = [(name, value) for name, value in known if said[name] != value]
    if other:
        made = ", ".join(f"label.{name}={as_typed(value)}" for name, value in other)
        typed = ", ".join(f"label.{name}={as_typed(said[name])}" for name, _ in other)
        raise ConfigError(
            f"{FIELD}={label.given} was made with {made}, which nothing can change now; choose label=given, and leave "
            f"{typed} out"
        )


def _read_once(folder: Path) -> tuple[str, int]:
    """Hash all records with their names; return that, and their bytes."""
    log.info("reading the records in %s once, to know them again", folder)
    content, size = hashlib.sha256(), 0
    for path in sorted(folder.glob("epoch_*/batch_*.tar")):
        content.update(f"{path.relative_to(folder).as_posix()} {file_checksum(path)}\n".encode())
        size += path.stat().st_size
    return content.hexdigest(), size
