"""A distilled set for programs of one's own: ``cvdd.load`` reads it, ``python -m cvdd.distilled`` writes PNG files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import COPY, MANIFEST, read_whole
from cvdd.artifact.places import digest_in
from cvdd.augmentation.augment import normalise
from cvdd.chain.unit_files import load_images
from cvdd.data.given_folder import class_folder
from cvdd.labels.replay import batch_bounds, replay
from cvdd.labels.store import LabelLayout, StoredLabels
from cvdd.schema import LabelConfig
from cvdd.schema.unread import without_unread
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import told
from cvdd.support.pictures import write_png
from cvdd.support.refusals import place_errors


@dataclass(frozen=True)
class DistilledSet:
    """Images, and soft labels where these are stored.

    Attributes:
        images: [n, 3, h, w] uint8, class by class.
        labels: [n] class indices.
        classes: names, by index.
        mean: of the normalisation that the committee was trained with, in units of 1.
        std: likewise.
        soft: the stored soft labels, or None.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    soft: StoredLabels | None

    @property
    def epochs(self) -> int:
        """Epochs of soft labels; 0 without any."""
        return 0 if self.soft is None else self.soft.epochs

    def normalised(self) -> Tensor:
        """Return the images as networks take them: [n, 3, h, w] float32."""
        return normalise(self.images.float(), torch.tensor(self.mean), torch.tensor(self.std))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch of soft labels: what the teachers saw, and what they said.

        Args:
            epoch: from 0 to ``epochs - 1``; crops, flips and mixes differ from one to the next.

        Yields:
            Samples, [b, 3, h, w] float32, normalised, and logits, [b, classes] float32; minus infinity for classes that
            ``label.rest=nothing`` left out.

        Raises:
            ValueError: there is no such epoch, or there are no soft labels.
        """
        if self.soft is None or epoch not in range(self.epochs):
            raise ValueError(
                f"there are soft labels of {self.epochs} epochs, counted from 0, and none of epoch {epoch}"
            )
        plan, logits = self.soft.epoch(epoch)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        for start, stop in batch_bounds(len(plan), self.soft.batch_size):
            yield replay(self.images, plan.batch(start, stop), mean, std), logits[start:stop].float()

    def save_images(self, folder: str | Path) -> None:
        """Write the images as PNG files, a folder for each class in the order of their indices.

        Folders are named ``0_airplane`` and so on, so that ``torchvision.datasets.ImageFolder`` gives the same indices.

        Args:
            folder: is made.

        Raises:
            ConfigError: there is something in it already, or it cannot be written.
        """
        target = Path(folder).expanduser()
        if target.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty; name a folder that is not there yet")
        with place_errors(target, "another folder"):
            for index, name in enumerate(self.classes):
                place = target / class_folder(index, name, len(self.classes))
                place.mkdir(parents=True)
                for number, image in enumerate(self.images[self.labels == index]):
                    write_png(image, place / f"{number:04d}.png")


def load(path: str | Path) -> DistilledSet:
    """Read a distilled set from a store.

    Args:
        path: directory of its labels, ``STORE/labels/NAME-HASH``, beside whose store its images are found; or of its
            images alone, ``STORE/images/NAME-HASH``. ``distill`` and ``relabel`` print them, and a page lists both. Or
            a folder that :mod:`cvdd.share` has written.

    Raises:
        ConfigError: the directory holds no images or labels, or its images are not in the store.
        DamagedArtifact: a file is missing or was changed.
    """
    images, stored = open_set(Path(path).expanduser())
    identity = images.manifest["identity"]
    pixels, labels = load_images(images)
    data, classes = identity["data"], tuple(identity["classes"])
    soft = None if stored is None else _stored(stored, len(pixels), len(classes), pixels.shape[-1])
    return DistilledSet(pixels, labels, classes, tuple(data["mean"]), tuple(data["std"]), soft)


def open_set(path: Path) -> tuple[Artifact, Artifact | None]:
    """Open a distilled set; see :func:`load`.

    Returns:
        its images, and its labels if the path is that of labels.
    """
    artifact = _whole(_only_set_in(path))
    if artifact.kind not in ("images", "labels"):
        raise ConfigError(f"{path} holds {artifact.kind}; name the directory of images or of labels")
    return (artifact, None) if artifact.kind == "images" else (_images_of(artifact), artifact)


def _sets_in(folder: Path, kind: str) -> list[Path]:
    return sorted(place.parent for place in folder.glob(f"{kind}/*/{MANIFEST}"))


def _only_set_in(path: Path) -> Path:
    """Return the set of a folder that holds one, as ``cvdd.share`` writes it; any other path as it is."""
    found = _sets_in(path, "labels") or _sets_in(path, "images")
    return found[0] if len(found) == 1 else path


def _whole(path: Path) -> Artifact:
    if not (path / MANIFEST).is_file():
        inside = [*_sets_in(path, "labels"), *_sets_in(path, "images")]
        named = " or ".join(str(place) for place in inside[:3]) or "a directory such as store/labels/NAME-HASH"
        raise ConfigError(f"{path} is no artefact of a store; name {named}")
    return read_whole(path, COPY)


def _images_of(labels: Artifact) -> Artifact:
    digest, folder = labels.manifest["identity"]["images"], labels.path.resolve().parent.parent / "images"
    # Looked for among what is there: no path is made of what a file says.
    found = [path for path in sorted(folder.glob("*")) if digest_in(path) == digest and (path / MANIFEST).is_file()]
    if not found:
        raise ConfigError(f"{labels.path}: the images of these labels, images/*-{digest}, are not in the store")
    return _whole(found[0])


def _stored(labels: Artifact, count: int, classes: int, size: int) -> StoredLabels:
    identity = labels.manifest["identity"]
    # Who labelled, and with what weight, is of the past.
    given = {"name": labels.name, "teachers": "committee", "weights": "equal", "parameters": identity["parameters"]}
    try:
        label = LabelConfig.model_validate({**without_unread("label", identity["label"]), **given})
    except ValidationError as error:
        raise ConfigError(f"{labels.path} is of another version, which this one cannot read ({error})") from error
    return StoredLabels(labels.path, LabelLayout.of(label, count, classes), label, size, identity["seed"])


def main(arguments: Sequence[str]) -> None:
    """Write the images of a distilled set as PNG files."""
    parser = argparse.ArgumentParser(prog="python -m cvdd.distilled", description=main.__doc__)
    parser.add_argument("path", metavar="STORE/images/NAME-HASH", help="the distilled set")
    parser.add_argument("folder", metavar="FOLDER", help="where the files go, a folder for each class; it is made")
    given = parser.parse_args(arguments)
    made = load(given.path)
    made.save_images(given.folder)
    print(f"{len(made.images)} images of {len(made.classes)} classes in {given.folder}")


if __name__ == "__main__":
    with told(sweeping=False):
        main(sys.argv[1:])
