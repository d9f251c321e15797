"""Where images come from: a tensor in memory or files that are decoded one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy
import torch
from PIL import Image
from torch import Tensor

from cvdd.support.config_base import ConfigError

# Past this many files the sizes are left out of the digest: on a network file system one `stat` per file of
# ImageNet-1K takes minutes, and its names are those of a published, fixed collection.
_MOST_FILES_MEASURED = 200_000
_UNCOMPRESSED = (b".bmp", b".pgm", b".ppm", b".tif", b".tiff")
"""Formats whose files are of one size if their pictures are, so that the size says nothing of what they show."""


_NAMED = 10
"""Damaged files that an error names; it counts the others."""


class DamagedImage(ConfigError):
    """An image file cannot be used; the message names it and says what to do."""

    @classmethod
    def of_all(cls, found: Sequence[str], images: int) -> DamagedImage:
        """Make one of several: whoever mends one file wants to know of the others.

        Args:
            found: what is said of each; at least one.
            images: that were looked at.
        """
        if len(found) == 1:
            return cls(found[0])
        lines = [f"{len(found)} of {images} image files cannot be used:", *found[:_NAMED]]
        if len(found) > _NAMED:
            lines.append(f"and {len(found) - _NAMED} more")
        return cls("\n".join(lines))


@runtime_checkable
class ImageSource(Protocol):
    """Labelled RGB images, addressed by position.

    Attributes:
        labels: int64 ``[n]``, index into the dataset's classes.
        groups: int64 ``[n]``; samples of one group show the same thing and never lie on both sides of a split.
        in_memory: whether all images have one size and are held decoded.
    """

    labels: Tensor
    groups: Tensor

    @property
    def in_memory(self) -> bool:
        """Whether :meth:`stacked` works."""

    def __len__(self) -> int:
        """Number of images."""

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 ``[3, height, width]``, at its native size."""

    def stacked(self) -> Tensor:
        """Return all images, uint8 ``[n, 3, S, S]``; raises ValueError unless ``in_memory``."""

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSource:
        """Return the source that holds only these positions, in this order."""

    def digest(self) -> str:
        """Return a hash of the content: pixels in memory; names, sizes and labels of files."""


def _as_index(indices: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(indices, dtype=torch.int64).reshape(-1)


class TensorSource:
    """Images of one size held in memory."""

    def __init__(self, images: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Hold ``images`` without a copy.

        Args:
            images: uint8 ``[n, 3, S, S]``.
            labels: int64 ``[n]``.
            groups: int64 ``[n]``; by default every image is a group of its own.

        Raises:
            ValueError: a shape or type is not as above.
        """
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] != images.shape[3]
        ):
            raise ValueError(f"images must be uint8 [n, 3, S, S], not {images.dtype} {list(images.shape)}")
        groups = torch.arange(len(images)) if groups is None else groups
        for name, values in (("labels", labels), ("groups", groups)):
            if values.dtype != torch.int64 or values.shape != (len(images),):
                raise ValueError(f"{name} must be int64 [{len(images)}], not {values.dtype} {list(values.shape)}")
        self._images = images
        self.labels = labels
        self.groups = groups

    @property
    def in_memory(self) -> bool:
        """Always true."""
        return True

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return self._images.shape[-1]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 ``[3, S, S]``, a view of the whole."""
        return self._images[index]

    def stacked(self) -> Tensor:
        """Return all images, uint8 ``[n, 3, S, S]``: the tensor itself, not to be written to."""
        return self._images

    def subset(self, indices: Sequence[int] | Tensor) -> TensorSource:
        """Return a copy of these positions, in this order."""
        chosen = _as_index(indices)
        return TensorSource(self._images[chosen], self.labels[chosen], self.groups[chosen])

    def digest(self) -> str:
        """Return a hash of pixels and labels."""
        content = hashlib.blake2b(repr(tuple(self._images.shape)).encode(), digest_size=8)
        content.update(self._images.contiguous().numpy().data)
        content.update(self.labels.contiguous().numpy().data)
        return content.hexdigest()


class FileSource:
    """Images decoded from files when asked for; safe to hand to data loader workers."""

    def __init__(self, root: Path, names: Sequence[str], labels: Tensor, groups: Tensor | None = None) -> None:
        """Remember the files without opening any.

        Args:
            root: folder that all names are relative to.
            names: n paths relative to ``root``, with forward slashes.
            labels: int64 ``[n]``.
            groups: int64 ``[n]``; by default every file is a group of its own.

        Raises:
            ValueError: names, labels and groups differ in length.
        """
        # One fixed-width array instead of a list: reading a Python string writes its reference count, which would
        # copy a million-file list into every forked loader worker.
        self._hold(root, numpy.array([os.fsencode(name) for name in names], dtype=numpy.bytes_), labels, groups)

    def _hold(self, root: Path, names: numpy.ndarray, labels: Tensor, groups: Tensor | None) -> None:
        groups = torch.arange(len(names)) if groups is None else groups
        if labels.shape != (len(names),) or groups.shape != (len(names),):
            raise ValueError(f"{len(names)} files, but {len(labels)} labels and {len(groups)} groups")
        self._root = root
        self._names = names
        self.labels = labels
        self.groups = groups

    @property
    def in_memory(self) -> bool:
        """Always false."""
        return False

    def __len__(self) -> int:
        """Number of files."""
        return len(self._names)

    def path(self, index: int) -> Path:
        """Return the file of one image."""
        return self._root / os.fsdecode(bytes(self._names[index]))

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 ``[3, height, width]``; raises ValueError for a damaged file (see decode)."""
        return decode(self.path(index))

    def stacked(self) -> Tensor:
        """Refuse: files may differ in size and need not fit into memory.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the images under {self._root} are not held in memory; use to_eval_tensor on some of them")

    def subset(self, indices: Sequence[int] | Tensor) -> FileSource:
        """Return the source of these files, in this order."""
        chosen = _as_index(indices)
        picked = FileSource.__new__(FileSource)
        picked._hold(self._root, self._names[chosen.numpy()], self.labels[chosen], self.groups[chosen])
        return picked

    def digest(self) -> str:
        """Return a hash of names, labels and (up to 200,000 files) sizes, and of uncompressed files."""
        content = hashlib.blake2b(digest_size=8)
        measured = len(self) <= _MOST_FILES_MEASURED
        for index, label in enumerate(self.labels.tolist()):
            name = bytes(self._names[index])
            try:
                size = self.path(index).stat().st_size if measured else 0
                content.update(b"%s\x1f%d\x1f%d\n" % (name, label, size))
                if measured and name.lower().endswith(_UNCOMPRESSED):
                    content.update(hashlib.blake2b(self.path(index).read_bytes(), digest_size=8).digest())
            except OSError as error:
                # A link whose file has gone is in its folder like any other.
                raise DamagedImage(
                    f"image file {self.path(index)} cannot be read ({error.strerror}): delete it or replace it by an "
                    "intact copy"
                ) from error
        return content.hexdigest()


def decode(path: Path) -> Tensor:
    """Decode an image file to uint8 RGB ``[3, height, width]``.

    Grey and palette images become RGB, transparency is dropped, and a rotation noted in the file is not applied, as in
    torchvision's own folder reader.

    Raises:
        ValueError: the file is damaged, is no image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            pixels = numpy.array(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DamagedImage(
            f"image file {path} is truncated, corrupt or unreadable ({error}): "
            "delete it or replace it by an intact copy"
        ) from error
    if mode == "F" or mode.startswith("I"):
        raise DamagedImage(
            f"image file {path} has more than 8 bits per channel (mode {mode}), which would be clipped: "
            "delete it or replace it by an 8-bit copy"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
