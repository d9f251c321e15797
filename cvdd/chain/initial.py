"""Stage ``patches``: initial images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.augment import normalise
from cvdd.chain.difficulty import graded_images, make_difficulty
from cvdd.chain.given import first_images, given_start, is_distilled
from cvdd.chain.members import load_network, make_member
from cvdd.chain.unit_files import PATCHES
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.data import resize_and_crop, to_eval_tensor
from cvdd.patches import make_patches, stitch
from cvdd.seeds import derive_seed, generator
from cvdd.selection import herd, member_features


def make_initial_patches(context: Context) -> Artifact:
    """Return the patches of all classes, cut from the training images and scored by the observer."""
    config, data = context.config, context.data()
    observer = make_member(context, config.patches.observer)
    seed = derive_seed(config.method.seed, "patches")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        # The observer is known by its artefact, a parent; its name in this committee changes nothing.
        "patches": config.patches.model_dump(mode="json", exclude={"observer"}),
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        backbone = config.committee.members[config.patches.observer].backbone
        network = load_network(context, observer, backbone).to(context.device)
        images, losses = [], []
        with context.progress("patches", len(data.classes)) as advance:
            for label in range(len(data.classes)):
                made, loss = make_patches(data, network, config.patches, label, seed)
                images.append(made)
                losses.append(loss)
                advance(1)
        save_file({"images": torch.stack(images), "losses": torch.stack(losses)}, work / PATCHES)
        return {"mean_loss": float(torch.stack(losses).mean())}

    name = f"{data.name}-{config.patches.difficulty}-{config.patches.images_per_class}"
    return context.store.make("patches", name, identity, [observer], build)


def make_herd(context: Context) -> Artifact:
    """Return the real images of each class whose mean, in the features of all members, is that of the class."""
    config, data = context.config, context.data()
    names = list(config.committee.members)
    members = [make_member(context, name) for name in names]
    ipc, candidates = config.ipc.images_per_class, config.patches.candidates
    seed = derive_seed(config.method.seed, "herd")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "images_per_class": ipc,
        "candidates": candidates,
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        networks = [
            load_network(context, member, config.committee.members[name].backbone).to(context.device)
            for name, member in zip(names, members, strict=True)
        ]
        chosen = []
        with context.progress("herding", len(data.classes)) as advance:
            for label, name in enumerate(data.classes):
                images = (data.train.labels == label).nonzero()[:, 0]
                require_real_images(name, len(images), ipc, candidates)
                source = generator(seed, "candidates", label)
                looked_at = images[torch.randperm(len(images), generator=source)[:candidates]]
                pixels = to_eval_tensor(data.train, data.image_size, config.dataset.test_resize, looked_at)
                features = member_features(networks, normalise(pixels, data.mean, data.std))
                chosen.append(pixels[herd(features, ipc)])
                advance(1)
        save_file({"images": torch.stack(chosen)}, work / PATCHES)
        return {"images": ipc * len(data.classes)}

    return context.store.make("herds", f"{data.name}-{ipc}", identity, members, build)


def make_start(context: Context) -> Artifact | None:
    """Return the artefact that holds the initial images, if the method's ``init`` needs one."""
    makers = {
        "patches": make_initial_patches,
        "herding": make_herd,
        "difficulty": make_difficulty,
        "given": given_start,
        "from_given": given_start,
    }
    make = makers.get(context.config.method.init)
    return None if make is None else make(context)


def initial_images(context: Context, patches: Artifact | None) -> Tensor:
    """Initial images of all slots: [classes, ipc, 3, size, size] uint8.

    With ``method.init=patches`` slot k starts from patch k, with ``herding`` from the image that was chosen k-th, with
    ``given`` from the k-th of its class, with ``difficulty`` from one of group k; with ``real`` from a random training
    image, or with ``method.factor`` from several, so that the images of a smaller IPC are the first ones of a larger.

    Args:
        context: the configuration and its surroundings.
        patches: of :func:`make_start`.

    Raises:
        ConfigError: a class has fewer images than IPC.
    """
    config = context.config
    ipc = config.ipc.images_per_class
    if patches is not None and is_distilled(patches):
        return first_images(context, patches)
    if patches is not None and config.method.init == "difficulty":
        return graded_images(context, patches)
    if patches is not None:
        return load_file(patches.path / PATCHES)["images"][:, :ipc]
    data, factor = context.data(), config.method.factor
    chosen = []
    for label, name in enumerate(data.classes):
        members = (data.train.labels == label).nonzero()[:, 0]
        require_real_images(name, len(members), ipc, factor=factor)
        order = torch.randperm(len(members), generator=generator(config.method.seed, "real", label))
        chosen.append(members[order[: ipc * factor**2]])
    if factor > 1:
        return torch.stack([_mosaics(context, indices) for indices in chosen])
    indices = torch.cat(chosen)
    pixels: Tensor = to_eval_tensor(data.train, data.image_size, config.dataset.test_resize, indices)
    return pixels.view(len(data.classes), ipc, *pixels.shape[1:])


def _mosaics(context: Context, indices: Tensor) -> Tensor:
    """Images of several real ones each, cell by cell: [n, 3, size, size] uint8."""
    data, factor = context.data(), context.config.method.factor
    whole = to_eval_tensor(data.train, data.image_size, context.config.dataset.test_resize, indices)
    small = resize_and_crop(whole, data.image_size // factor)
    count = len(indices) // factor**2
    # Cell by cell, as they are stitched; an image has neighbours of the order, whatever IPC is.
    by_cell = small.unflatten(0, (count, factor**2)).transpose(0, 1).flatten(0, 1)
    return stitch(by_cell, count, factor, data.image_size)


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
    if images < needed * each:
        many = (
            "needs as many"
            if each == 1
            else (f"of method.factor={factor}, {each} real images each, needs {needed * each}")
        )
        raise ConfigError(f"class {name} has {images} images; {field}={needed} {many}")
    if candidates is not None and candidates < needed:
        raise ConfigError(
            f"patches.candidates={candidates} images of class {name} are looked at, of {images}; {field}={needed} "
            "needs as many. Raise patches.candidates"
        )
