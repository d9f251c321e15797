"""Seeded splits and subsets of a labelled source."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvdd.data.source import ImageSource
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator


def split_validation(
    source: ImageSource, classes: Sequence[str], fraction: float, seed: int
) -> tuple[ImageSource, ImageSource]:
    """Hold out a part of every class, whole groups at a time.

    Args:
        source: images to split; all images of a group have one label.
        classes: class names, for messages.
        fraction: part of each class's groups that is held out, in (0, 1); rounded, at least one group.
        seed: which groups.

    Returns:
        The training part and the validation part; both keep the order of ``source``.

    Raises:
        ConfigError: a class has too few groups to leave some on both sides.
        ValueError: a group holds images of several classes.
    """
    held_out = torch.zeros(len(source), dtype=torch.bool)
    seen = 0
    for label, name in enumerate(classes):
        members = (source.labels == label).nonzero().flatten()
        groups = torch.tensor(sorted(set(source.groups[members].tolist())))
        seen += len(groups)
        count = max(1, round(fraction * len(groups)))
        if count >= len(groups):
            # One is held out of even two.
            smaller = "use a smaller fraction or " if len(groups) > 1 else "add images of it, or use "
            raise ConfigError(
                f"dataset.validation_fraction={fraction}: class {name!r} has {len(groups)} independent image(s), which "
                f"leaves none to train on; {smaller}dataset.evaluate_on=test"
            )
        order = torch.randperm(len(groups), generator=generator(seed, "validation split", label))
        chosen = groups[order[-count:]]
        held_out[members] = torch.isin(source.groups[members], chosen)
    if seen != len(set(source.groups.tolist())):
        raise ValueError("a group of images that must stay together holds several classes")
    return source.subset((~held_out).nonzero()), source.subset(held_out.nonzero())


def keep_per_class(source: ImageSource, classes: Sequence[str], count: int, seed: int, override: str) -> ImageSource:
    """Keep a random subset of the same size for every class.

    A smaller count with the same seed keeps a part of what a larger one keeps.

    Args:
        source: images to choose from.
        classes: class names, for messages.
        count: images to keep per class.
        seed: which images.
        override: the setting that asked for it, e.g. ``"dataset.train_per_class"``; also separates the random draws.

    Raises:
        ConfigError: a class has fewer images than ``count``.
    """
    kept = []
    for label, name in enumerate(classes):
        members = (source.labels == label).nonzero().flatten()
        if len(members) < count:
            raise ConfigError(
                f"{override}={count}: class {name!r} has only {len(members)} images; use at most {len(members)}, "
                "or null for all"
            )
        kept.append(members[torch.randperm(len(members), generator=generator(seed, override, label))[:count]])
    return source.subset(torch.cat(kept).sort().values)
