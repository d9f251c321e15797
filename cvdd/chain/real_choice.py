"""Which real images the initial ones are made of, known by their positions in the training set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import write_tensors
from cvdd.augmentation.augment import normalise
from cvdd.chain.context import Context
from cvdd.chain.members import load_network, make_member
from cvdd.data import resize_and_crop, to_eval_tensor
from cvdd.methods.delt import around_the_middle
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.patches import score_crops, select, stitch
from cvdd.synthesis.units import Unit

POSITIONS = "positions.safetensors"


def make_ranked(context: Context) -> Artifact:
    """Return real images of each class by how well ``patches.observer`` tells them, by their positions.

    Of ``patches.candidates`` random images of the class, as they are tested: with ``method.init=easiest`` those with
    the least cross-entropy (CIM, appendix C), with ``medium`` those in the middle (DELT).

    Raises:
        ConfigError: a class has too few images.
    """
    config, data = context.config, context.data()
    kind = config.method.init
    observer = make_member(context, config.patches.observer)
    count, candidates = config.ipc.images_per_class * config.method.factor**2, config.patches.candidates
    seed = derive_seed(config.method.seed, kind)
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "images_per_class": count,
        "candidates": candidates,
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        backbone = config.committee.members[config.patches.observer].backbone
        network = load_network(context, observer, backbone).to(context.device)
        chosen = []
        with context.progress(kind, len(data.classes)) as advance:
            for label in range(len(data.classes)):
                looked_at = drawn_images(context, label, generator(seed, "candidates", label), candidates)
                losses = score_crops(network, whole_images(context, looked_at), label, data)
                best = around_the_middle(losses, count) if kind == "medium" else select(losses, count, "easy")
                chosen.append(looked_at[best])
                advance(1)
        write_tensors(work / POSITIONS, {"positions": torch.stack(chosen)})
        return {"images": count * len(data.classes)}

    return context.store.make(kind, f"{data.name}-{count}", identity, [observer], build)


def drawn_images(context: Context, label: int, source: torch.Generator, candidates: int | None = None) -> Tensor:
    """Positions of the real images of a class in random order, [n], of which enough are there to begin with.

    Args:
        context: the configuration and its surroundings.
        label: the class.
        source: of the draw.
        candidates: the most that are wanted; None for all.

    Raises:
        ConfigError: there are too few.
    """
    images = shuffled_images(context, label, source)
    ipc, factor = context.config.ipc.images_per_class, context.config.method.factor
    require_real_images(context.data().classes[label], len(images), ipc, candidates, factor=factor)
    return images[:candidates]


def shuffled_images(context: Context, label: int, source: torch.Generator) -> Tensor:
    """Positions of all real images of a class in random order, [n]."""
    images = images_of_class(context, label)
    return images[torch.randperm(len(images), generator=source)]


def images_of_class(context: Context, label: int) -> Tensor:
    """Positions of all real images of a class in their own order, [n]."""
    return (context.data().train.labels == label).nonzero()[:, 0]


def chosen_positions(context: Context, ranked: Artifact | None) -> Tensor:
    """Positions of the real images that each image is made of: [classes, ipc, factor^2], part by part, row by row.

    Random ones of a smaller IPC are the first of a larger. Of ranked ones, image t has number ``q * ipc + t`` as part
    q, so that all images have some from the beginning and some from the end of their order.

    Args:
        context: the configuration and its surroundings.
        ranked: of :func:`make_ranked`; None for random ones.

    Raises:
        ConfigError: a class has too few images.
    """
    config, data = context.config, context.data()
    ipc, each = config.ipc.images_per_class, config.method.factor**2
    if ranked is not None:
        positions = load_file(ranked.path / POSITIONS)["positions"]
        return positions.view(len(data.classes), each, ipc).transpose(1, 2)
    seed = config.method.seed
    drawn = [drawn_images(context, label, generator(seed, "real", label)) for label in range(len(data.classes))]
    return torch.stack([of_class[: ipc * each] for of_class in drawn]).view(-1, ipc, each)


def images_of_real_ones(context: Context, positions: Tensor) -> Tensor:
    """Make each image of its real ones, [classes, ipc, 3, size, size] uint8.

    Args:
        context: the configuration and its surroundings.
        positions: of :func:`chosen_positions`.
    """
    size, factor = context.data().image_size, context.config.method.factor
    if factor == 1:
        return whole_images(context, positions.squeeze(2))
    mosaics = []
    for of_class in positions:
        # Cell by cell, as they are stitched.
        small = resize_and_crop(whole_images(context, of_class.T).flatten(0, 1), size // factor)
        mosaics.append(stitch(small, len(of_class), factor, size))
    return torch.stack(mosaics)


def anchors_of_units(context: Context, positions: Tensor, units: Sequence[Unit]) -> Tensor:
    """The whole real images of each part: [units, images, factor^2, 3, size, size], normalised.

    Args:
        context: the configuration and its surroundings.
        positions: of :func:`chosen_positions`.
        units: of a stack.
    """
    data, chosen = context.data(), torch.stack([unit.of(positions) for unit in units])
    return normalise(whole_images(context, chosen), data.mean, data.std)


def whole_images(context: Context, positions: Tensor) -> Tensor:
    """Real images as they are tested, for positions of any shape: [..., 3, size, size] uint8."""
    data = context.data()
    pixels = to_eval_tensor(data.train, data.image_size, context.config.dataset.test_resize, positions.flatten())
    return pixels.view(*positions.shape, *pixels.shape[1:])


def require_real_images(
    name: str,
    images: int,
    needed: int,
    candidates: int | None = None,
    field: str = "ipc.images_per_class",
    factor: int = 1,
) -> None:
    """Refuse to start more images of a class than it has.

    Args:
        name: of the class.
        images: its real images.
        needed: images to start.
        candidates: of the real images, how many are looked at; None for all.
        field: that says how many are needed.
        factor: of the method; an image is made of as many real ones on a side.

    Raises:
        ConfigError: there are too few.
    """
    each = factor**2
    many = (
        "needs as many" if each == 1 else f"of method.factor={factor}, {each} real images each, needs {needed * each}"
    )
    if images < needed * each:
        raise ConfigError(f"class {name} has {images} images; {field}={needed} {many}")
    if candidates is not None and candidates < needed * each:
        raise ConfigError(
            f"patches.candidates={candidates} images of class {name} are looked at, of {images}; {field}={needed} "
            f"{many}. Raise patches.candidates"
        )
