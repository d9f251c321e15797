"""Labels that somebody else made, of a store or of the published programs, in the place of ``relabel``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import file_checksum
from cvdd.chain.labels import Labels, open_labels
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.given_recipe import is_published, recipe_of
from cvdd.labels import SoftLabels
from cvdd.published_release import PublishedLabels

FIELD = "label.given"


@dataclass(frozen=True)
class GivenLabels(Labels):
    """Labels whose teachers are not at hand.

    Attributes:
        folder: where they lie.
    """

    folder: Path

    @property
    def bytes(self) -> int:
        """Size on disk."""
        if self.artifact is not None:
            return self.artifact.bytes
        return sum(path.stat().st_size for path in _records(self.folder))

    def open(self, pixels: Tensor) -> SoftLabels:
        """Return the labels for reading; see :meth:`Labels.open`."""
        if self.artifact is not None:
            return open_labels(self.context, self.artifact, self.images, pixels)
        return PublishedLabels(self.folder, len(pixels), pixels.shape[-1])


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
        return GivenLabels({"published": _checksum(folder)}, [images], None, context, images, [], {}, folder)
    artifact = context.open_elsewhere(folder, "labels", FIELD)
    _check_images(context, artifact, images)
    made = artifact.manifest["identity"]
    identity = {key: value for key, value in made.items() if key not in ("images", "classes", "parameters")}
    identity["teachers"] = [one["digest"] for one in artifact.manifest["parents"] if one["kind"] != "images"]
    return GivenLabels(identity, [images, artifact], artifact, context, images, [], {}, folder)


def check_given_labels(context: Context) -> None:
    """Refuse given labels that cannot be used, as far as that is known before the images are made.

    Raises:
        ConfigError: see :func:`given_labels`.
    """
    config, folder = context.config, _given(context)
    _check_recipe(context)
    data = context.data()
    if is_published(folder):
        PublishedLabels(folder, config.ipc.images_per_class * len(data.classes), data.image_size)
        return
    artifact = context.open_elsewhere(folder, "labels", FIELD)
    given = config.method.given
    assert given is not None
    if not (given.expanduser() / "manifest.json").is_file():
        raise ConfigError(
            f"{FIELD}={folder} are labels of a store, which are of images of a store: type "
            f"method.given=.../images/NAME-{artifact.manifest['identity']['images']}"
        )
    _check_images(context, artifact, context.open_elsewhere(given.expanduser(), "images", "method.given"))


def _given(context: Context) -> Path:
    given = context.config.label.given
    assert given is not None
    return given.expanduser()


def _check_images(context: Context, labels: Artifact, images: Artifact) -> None:
    made, data = labels.manifest["identity"], context.data()
    if made["images"] != images.digest:
        raise ConfigError(
            f"{FIELD}={context.config.label.given} are of the images {made['images']}, and {images.path.name} is "
            f"given; type method.given=.../images/NAME-{made['images']}, and ipc.images_per_class as they have it"
        )
    theirs = images.manifest["identity"]["data"]
    for name, own in (("mean", data.mean), ("std", data.std)):
        if list(theirs[name]) != list(own):
            raise ConfigError(
                f"{FIELD}={context.config.label.given}: the teachers saw images normalised with {name} {theirs[name]}, "
                f"and students would with {list(own)}; type 'dataset.{name}={theirs[name]}'"
            )


def _check_recipe(context: Context) -> None:
    label = context.config.label
    said, read = label.model_dump(mode="json"), recipe_of(label.given)
    other = [
        f"label.{name}={_typed(said[name])} is {_typed(value)}" for name, value in _known(read) if said[name] != value
    ]
    if other:
        raise ConfigError(
            f"{FIELD}={label.given} has a recipe of its own, in which {', '.join(other)}; choose label=given, and "
            "leave out what it does not say"
        )


def _known(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in recipe.items() if name not in ("given", "store")]


def _typed(value: Any) -> str:
    return str(value).replace(" ", "")


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch_*/batch_*.tar"))


def _checksum(folder: Path) -> str:
    """Hash names and sizes of all records, and what those of the first epoch hold: there are up to millions."""
    content = hashlib.sha256()
    for path in _records(folder):
        first = file_checksum(path) if path.parent.name == "epoch_0" else ""
        content.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} {first}\n".encode())
    return content.hexdigest()
