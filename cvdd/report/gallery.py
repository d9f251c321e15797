"""Distilled images class by class, beside what they started from, as pictures inside the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.chain.compare import Distilled
from cvdd.chain.context import Context
from cvdd.chain.given import kept_as_given
from cvdd.chain.initial import initial_images, make_start
from cvdd.chain.unit_files import PATCHES, UNITS
from cvdd.schema.anchors import BEGINNINGS

CLASSES, SLOTS = 20, 10
"""Most rows and columns that are shown."""
LOSSLESS_SIDE, SIDE = 48, 96
"""Images up to the first side are kept pixel by pixel; larger ones are shown as JPEG, reduced to the second."""
STARTS: Mapping[str, str] = MappingProxyType(
    {"patches": "patches", "herds": "herded real images", "given": "given images"}
)
"""Artefacts that hold initial images, and what these are called."""

REAL_IMAGES = 5000
"""Real images are read once more to be shown; a set with more of them is not."""


@dataclass(frozen=True)
class GalleryRow:
    """One class.

    Attributes:
        name: of the class.
        distilled: its images as ``data:`` URIs, slot by slot.
        start: what they started from, likewise; empty if nothing is shown.
    """

    name: str
    distilled: tuple[str, ...]
    start: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """The images of a distilled set that a page shows.

    Attributes:
        rows: by class.
        start_title: what the images started from; None if that is not shown.
        note: what is left out; empty if nothing is.
        pixelated: whether the pixels are to be seen as squares.
    """

    rows: tuple[GalleryRow, ...]
    start_title: str | None
    note: str
    pixelated: bool


def make_gallery(distilled: Distilled) -> Gallery:
    """Read the images of a distilled set that fit a page, and what they started from."""
    context, images = distilled.context, distilled.images
    names: Sequence[str] = images.manifest["identity"]["classes"]
    choice = choose_images(images)
    shown = read_images(images, choice.labels, choice.slots)
    start, title = _start(context, images, choice.labels, choice.slots)
    rows = tuple(
        GalleryRow(
            names[label],
            tuple(data_uri(image) for image in shown[index]),
            () if start is None else tuple(data_uri(image) for image in start[index]),
        )
        for index, label in enumerate(choice.labels)
    )
    note = f"Shown: {choice.left_out}." if choice.left_out else ""
    return Gallery(rows, title, note, shown.shape[-1] <= SIDE)


@dataclass(frozen=True)
class Choice:
    """Which images of a distilled set are shown.

    Attributes:
        labels: classes.
        slots: of each.
        left_out: what is not shown, in words; empty if nothing is.
    """

    labels: tuple[int, ...]
    slots: int
    left_out: str


def choose_images(images: Artifact, whole: int = 0) -> Choice:
    """Choose what can be shown: at most 20 classes and 10 slots.

    Args:
        images: a distilled set.
        whole: a set of no more images is shown as it is.
    """
    classes, ipc = len(images.manifest["identity"]["classes"]), images_per_class(images)
    most = (classes, ipc) if classes * ipc <= whole else (CLASSES, SLOTS)
    labels, slots = _spread(classes, most[0]), min(ipc, most[1])
    left_out = [
        f"{count} of {total} {what}"
        for count, total, what in ((len(labels), classes, "classes, evenly spread"), (slots, ipc, "slots"))
        if count < total
    ]
    return Choice(tuple(labels), slots, "; ".join(left_out))


def images_per_class(images: Artifact) -> int:
    """How many images each class of a distilled set has, at least: ``method=full`` has as many as there are."""
    identity = images.manifest["identity"]
    if "ipc" in identity:
        return int(identity["ipc"])
    counts: list[int] = []
    for path in (images.path / UNITS).glob("*.safetensors"):
        # A unit of all images of a class.
        with safe_open(path, "pt") as file:
            counts.append(file.get_slice("labels").get_shape()[0])
    return min(counts, default=0)


def read_images(images: Artifact, labels: Sequence[int], slots: int) -> Tensor:
    """Read some images of a distilled set without those around them: [labels, slots, 3, h, w] uint8."""
    found: dict[int, list[Tensor]] = {label: [] for label in labels}
    for path in sorted((images.path / UNITS).glob("*.safetensors")):
        first = re.match(r"slot(\d+)", path.stem)
        if first is None or int(first[1]) >= slots:
            continue
        with safe_open(path, "pt") as file:
            pixels = file.get_slice("images")
            # A unit has one image of a class, or several: the i-th of a class is that of slot i, as for students.
            for index, label in enumerate(file.get_tensor("labels").tolist()):
                if label in found and len(found[label]) < slots:
                    found[label].append(pixels[index : index + 1][0])
    return torch.stack([torch.stack(found[label]) for label in labels])


def data_uri(image: Tensor) -> str:
    """Write an image [3, h, w] uint8 as a ``data:`` URI: PNG if it is small, a reduced JPEG otherwise."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    kind = "PNG" if max(picture.size) <= LOSSLESS_SIDE else "JPEG"
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, kind, optimize=True, quality=85, subsampling=0)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _spread(count: int, most: int) -> list[int]:
    """Choose at most so many of ``range(count)``, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def _start(context: Context, images: Artifact, labels: Sequence[int], slots: int) -> tuple[Tensor | None, str | None]:
    identity = images.manifest["identity"]
    # Trajectory matching says of the whole set what other methods say under "method".
    method = identity.get("method", identity)
    if method.get("iterations", 0) == 0 or method["init"] == "noise":
        return None, None
    if kept_as_given(context, images) is not None:
        # What they started from may be in another store, or nowhere.
        return None, None
    few = images.metrics["images"] <= REAL_IMAGES
    for parent in images.manifest["parents"]:
        if parent["kind"] in STARTS:
            patches = context.store.open(context.store.root / parent["kind"] / f"{parent['name']}-{parent['digest']}")
            # Sliced, because all patches of a large data set do not fit memory.
            with safe_open(patches.path / PATCHES, "pt") as file:
                stored = file.get_slice("images")
                chosen = [stored[label : label + 1, :slots][0] for label in labels]
            return torch.stack(chosen), f"{STARTS[parent['kind']]} they started from"
    if not few or method["init"] not in (*BEGINNINGS, "difficulty", "from_given"):
        return None, None
    # Of a set of a store, whose images are no initial images by themselves.
    start = initial_images(context, make_start(context))
    what = "given" if method["init"] == "from_given" else "real"
    return start[list(labels), :slots], f"{what} images they started from"
