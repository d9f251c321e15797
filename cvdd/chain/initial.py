"""Stage ``patches``: initial images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import write_tensors
from cvdd.augmentation.augment import normalise
from cvdd.chain.context import Context
from cvdd.chain.difficulty import graded_images, make_difficulty
from cvdd.chain.given import first_images, given_start, is_distilled
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_choice import chosen_positions, drawn_images, images_of_real_ones, make_ranked
from cvdd.chain.unit_files import PATCHES
from cvdd.data import to_eval_tensor
from cvdd.methods.selection import herd, member_features
from cvdd.schema.anchors import BEGINNINGS, RANKED
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.patches import make_patches


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
        write_tensors(work / PATCHES, {"images": torch.stack(images), "losses": torch.stack(losses)})
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
            for label in range(len(data.classes)):
                looked_at = drawn_images(context, label, generator(seed, "candidates", label), candidates)
                pixels = to_eval_tensor(data.train, data.image_size, config.dataset.test_resize, looked_at)
                features = member_features(networks, normalise(pixels, data.mean, data.std))
                chosen.append(pixels[herd(features, ipc)])
                advance(1)
        write_tensors(work / PATCHES, {"images": torch.stack(chosen)})
        return {"images": ipc * len(data.classes)}

    return context.store.make("herds", f"{data.name}-{ipc}", identity, members, build)


def make_start(context: Context) -> Artifact | None:
    """Return the artefact that holds the initial images, if the method's ``init`` needs one."""
    makers = {
        "patches": make_initial_patches,
        "herding": make_herd,
        **dict.fromkeys(RANKED, make_ranked),
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
    image, with ``easiest`` from one that the observer tells well, and with ``medium`` from one that it tells neither
    well nor badly; of these three with ``method.factor`` from several.

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
    if patches is not None and config.method.init not in BEGINNINGS:
        return load_file(patches.path / PATCHES)["images"][:, :ipc]
    return images_of_real_ones(context, chosen_positions(context, patches))
