"""What a dataset yaml may say: every fact of a dataset, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field

from cvdd.support.config_base import CheckedConfig

SourceName = Literal[
    "digits_photo", "cifar10", "cifar100", "tiny_imagenet", "imagenette", "imagewoof", "imagenet1k", "image_folder"
]

NOT_DOWNLOADED: tuple[str, ...] = ("image_folder", "imagewoof", "imagenet1k")
"""Sources that are there or not: no reader knows where to find them, and with which checksum."""

MEASURES_CLASSES: tuple[str, ...] = ("image_folder", "tiny_imagenet", "imagenet1k")
"""Sources that may leave ``classes`` empty and take the sorted folder names."""


class DigitsOptions(CheckedConfig):
    """How ``digits_photo`` places handwritten digits on photographs."""

    train_placements: int = Field(default=4, ge=1, description="Images made from each training digit.")
    test_placements: int = Field(default=2, ge=1, description="Images made from each test digit.")
    size_range: tuple[int, int] = Field(
        default=(18, 30), description="Smallest and largest side of a digit, in pixels."
    )
    crop_range: tuple[int, int] = Field(
        default=(32, 128), description="Smallest and largest side of the photograph's square crop, in its own pixels."
    )
    test_digits: int = Field(default=500, ge=10, le=1500, description="Digits kept for the test set, a multiple of 10.")
    seed: int = Field(default=0, ge=0, description="Seed of the split into digits and of every placement.")

    def _problems(self) -> Iterator[str]:
        for name, (low, high), least, most in (
            ("size_range", self.size_range, 8, 512),
            ("crop_range", self.crop_range, 8, 427),  # 427 is the shorter side of scikit-learn's two photographs
        ):
            if not least <= low <= high <= most:
                yield (
                    f"dataset.digits.{name}=[{low},{high}]: give two ordered numbers of pixels from {least} to {most}"
                )
        if self.test_digits % 10:
            yield (
                f"dataset.digits.test_digits={self.test_digits}: must be a multiple of 10, the same number per class"
            )


class DatasetConfig(CheckedConfig):
    """One dataset: where it is, what its classes are, and which part of it a run uses."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="Readable name, part of artefact names.")
    source: SourceName = Field(description="Reader of the raw data.")
    root: str | None = Field(default=None, description="Folder with the raw data; digits_photo needs none.")
    download: bool = Field(default=False, description="Fetch the raw data into root when it is missing.")
    origin: str = Field(description="Where the data comes from: address of the archive, or citation.")
    checksum: str = Field(
        default="",
        pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})?$",
        description="Checksum of the published archive, 'md5:...' or 'sha256:...'; empty if there is no one archive.",
    )
    classes: tuple[str, ...] = Field(
        description="Class names in label order; empty = sorted folder names (image_folder, tiny_imagenet, imagenet1k)."
    )
    num_classes: int | None = Field(
        default=None, ge=2, description="Expected number of classes; null = whatever classes or the folder says."
    )
    image_size: int = Field(ge=8, description="Side of the images that networks see, in pixels.")
    mean: tuple[float, ...] = Field(description="Channel means in [0, 1] (RGB); empty = measured, image_folder only.")
    std: tuple[float, ...] = Field(
        description="Channel standard deviations (RGB); empty = measured, image_folder only."
    )
    test_resize: int | None = Field(
        default=None, ge=8, description="Shorter side before the centre crop of image_size; null = image_size itself."
    )
    classes_per_unit: int = Field(ge=1, description="Classes optimised together in one block of recover.")
    mirror: bool = Field(description="Whether a mirrored image still shows its class; sets every random flip.")
    jitter: int = Field(ge=0, description="Largest random roll along each axis while recovering, in pixels.")
    evaluate_on: Literal["test", "validation"] = Field(
        default="test",
        description="What students are measured on; validation = a part of the training data, test untouched.",
    )
    validation_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Part of the training data that evaluate_on=validation holds out."
    )
    split_seed: int = Field(default=0, ge=0, description="Seed of the validation split and of the per-class subsets.")
    train_per_class: int | None = Field(
        default=None, ge=1, description="Random training images kept per class; null = all."
    )
    test_per_class: int | None = Field(
        default=None, ge=1, description="Random evaluation images kept per class; null = all."
    )
    digits: DigitsOptions | None = Field(default=None, description="Options of digits_photo; null = its defaults.")

    def _problems(self) -> Iterator[str]:
        yield from self._problems_of_classes()
        yield from self._problems_of_normalisation()
        yield from self._problems_of_sizes()
        if self.source == "digits_photo":
            yield from self._problems_of_digits()
            return
        if not self.root:
            yield f"dataset.root=FOLDER is needed: {self.source} reads its images from that folder"
        if self.digits is not None:
            yield f"dataset.digits is only for dataset.source=digits_photo, not {self.source}"
        if self.download and self.source in NOT_DOWNLOADED:
            yield (
                f"dataset.download=true: {self.source} cannot be downloaded; set dataset.download=false and "
                "dataset.root=FOLDER to a folder that holds it"
            )

    def _problems_of_digits(self) -> Iterator[str]:
        """What is typed for other data, and would give the digits that name without a word."""
        others = [name for name in get_args(SourceName) if name != "digits_photo"]
        choice = f"choose dataset=image_folder (or {', '.join(name for name in others if name != 'image_folder')})"
        if self.root:
            yield f"dataset.root={self.root}: digits_photo reads no folder; {choice}, or dataset.root=null"
        if self.download:
            yield f"dataset.download=true: digits_photo needs no download; {choice}, or dataset.download=false"
        if self.name in others:
            yield f"dataset.name={self.name} would be the name of digits_photo; choose dataset={self.name}"

    def _problems_of_classes(self) -> Iterator[str]:
        if not self.classes:
            if self.source not in MEASURES_CLASSES:
                yield (
                    f"dataset.classes=[]: {self.source} needs its class names in order; "
                    f"only {', '.join(MEASURES_CLASSES)} can take them from the folder"
                )
            elif self.source != "image_folder" and self.num_classes is None:
                yield f"dataset.num_classes=N is needed when dataset.classes=[] ({self.source})"
        repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if repeated:
            yield f"dataset.classes names {repeated[0]!r} more than once"
        if self.classes and self.num_classes not in (None, len(self.classes)):
            yield (f"dataset.num_classes={self.num_classes} but dataset.classes has {len(self.classes)} names")

    def _problems_of_normalisation(self) -> Iterator[str]:
        if bool(self.mean) != bool(self.std):
            yield "dataset.mean and dataset.std: give both, or (image_folder only) leave both empty"
        elif not self.mean and self.source != "image_folder":
            yield f"dataset.mean=[R,G,B] is needed: only image_folder measures it, not {self.source}"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != 3:
                yield f"dataset.{name}={list(values)}: give three numbers, one per RGB channel"
        if not all(0 <= value <= 1 for value in self.mean):
            yield f"dataset.mean={list(self.mean)}: values are for pixels in [0, 1], not [0, 255]"
        if not all(0 < value <= 1 for value in self.std):
            yield f"dataset.std={list(self.std)}: values must lie in (0, 1], for pixels in [0, 1]"

    def _problems_of_sizes(self) -> Iterator[str]:
        if self.test_resize is not None and self.test_resize < self.image_size:
            yield (
                f"dataset.test_resize={self.test_resize} is smaller than "
                f"the crop dataset.image_size={self.image_size}; use null or at least image_size"
            )
        if self.jitter >= self.image_size:
            yield f"dataset.jitter={self.jitter}: must be smaller than image_size={self.image_size}"
        known = len(self.classes) or self.num_classes
        if known and self.classes_per_unit > known:
            yield (
                f"dataset.classes_per_unit={self.classes_per_unit}: {self.name} has only {known} classes; "
                f"use 1 to {known}"
            )
        if self.source == "digits_photo":
            low, high = (self.digits or DigitsOptions()).size_range
            side = self.image_size
            smaller = f"[{min(low, side)},{side}]"
            if high > side and self.digits is None:
                yield (
                    f"dataset.digits=null makes digits of up to {high} pixels, and dataset.image_size={side}; set "
                    f"dataset.image_size to at least {high}, or dataset.digits={{size_range:{smaller}}}"
                )
            elif high > side:
                yield (
                    f"dataset.digits.size_range=[{low},{high}]: a digit must fit dataset.image_size={side}; set "
                    f"dataset.digits.size_range={smaller}, or dataset.image_size to at least {high}"
                )
