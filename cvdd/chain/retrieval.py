"""Stage ``candidates``: real images of which each synthetic one gets back what fits it, stage by stage (RETA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.augment import normalise
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_choice import shuffled_images, whole_images
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.features import FEATURES_AT_ONCE, head_features
from cvdd.methods.reta import best_fit, complexity
from cvdd.schema import RetrievalConfig
from cvdd.seeds import derive_seed, generator
from cvdd.units import Unit

FIELD = "method.retrieval"

CANDIDATES = "candidates.safetensors"


def make_candidates(context: Context) -> Artifact:
    """Return real images of each class, by their positions, with what ``patches.observer`` sees of them.

    Of each as it is tested: the input of the observer's last linear layer, and its complexity.

    Raises:
        ConfigError: there are too few for all slots to have their own.
    """
    require_candidates_of_slots(context)
    config, data = context.config, context.data()
    settings = _settings(context)
    observer = make_member(context, config.patches.observer)
    # Nothing is drawn where all are taken.
    seed = None if settings.candidates is None else derive_seed(config.method.seed, "retrieval")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "candidates": settings.candidates,
        "sigma": settings.sigma,
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        network = _observer(context, observer)
        positions, features, complexities = list[Tensor](), list[Tensor](), list[Tensor]()
        with context.progress("candidates", len(data.classes)) as advance:
            for label in range(len(data.classes)):
                chosen = _of_class(context, label, seed, settings.candidates)
                for some in chosen.split(FEATURES_AT_ONCE):
                    images = normalise(whole_images(context, some), data.mean, data.std)
                    features.append(head_features(network, images, FIELD))
                    complexities.append(complexity(images, settings.sigma))
                positions.append(chosen)
                advance(1)
        found = {
            "positions": torch.cat(positions),
            "counts": torch.tensor([len(chosen) for chosen in positions]),
            "features": torch.cat(features),
            "complexities": torch.cat(complexities),
        }
        save_file(found, work / CANDIDATES)
        return {"images": len(found["positions"])}

    return context.store.make("candidates", data.name, identity, [observer], build)


@dataclass(frozen=True)
class Retrieval:
    """Finds for each synthetic image the real one of its class that fits it.

    Attributes:
        context: the configuration and its surroundings.
        network: the observer.
        positions: of each class those of its candidates in the training set.
        features: of each class those of its candidates, [m, k].
        complexities: of each class those of its candidates, [m].
    """

    context: Context
    network: nn.Module
    positions: Sequence[Tensor]
    features: Sequence[Tensor]
    complexities: Sequence[Tensor]

    @staticmethod
    def of(context: Context, candidates: Artifact) -> Retrieval:
        """Return that of some candidates.

        Args:
            context: the configuration and its surroundings.
            candidates: of :func:`make_candidates`.
        """
        found = load_file(candidates.path / CANDIDATES)
        counts = found["counts"].tolist()
        positions, features, complexities = (
            found[name].split(counts) for name in ("positions", "features", "complexities")
        )
        network = _observer(context, make_member(context, context.config.patches.observer))
        return Retrieval(context, network, positions, features, complexities)

    def real_images(self, images: Tensor, units: Sequence[Unit]) -> Tensor:
        """Choose a real image for each synthetic one.

        Args:
            images: [units, images, 3, h, w], normalised.
            units: of a stack.

        Returns:
            [units, images, 3, size, size], normalised, of the size of the data set.
        """
        data, settings = self.context.data(), _settings(self.context)
        shown = head_features(self.network, images.flatten(0, 1), FIELD)
        classes = torch.cat([unit.targets for unit in units])
        slots = torch.cat([unit.slots_of_images for unit in units])
        # Where they are shared, all slots choose as one.
        every = 1 if settings.shared else self.context.config.ipc.images_per_class
        slots = slots % every
        chosen = torch.empty_like(classes)
        for label, slot in torch.stack([classes, slots], dim=1).unique(dim=0).tolist():
            mine, offered = (classes == label) & (slots == slot), slice(slot, None, every)
            features, complexities = self.features[label][offered], self.complexities[label][offered]
            best = best_fit(shown[mine], features, complexities, settings.complexity)
            chosen[mine] = self.positions[label][offered][best]
        return normalise(whole_images(self.context, chosen.view(images.shape[:2])), data.mean, data.std)


def require_candidates_of_slots(context: Context) -> None:
    """Refuse candidates that are too few for each slot to have its own.

    Raises:
        ConfigError: a class has fewer than IPC, or ``method.retrieval.candidates`` are fewer.
    """
    config, data = context.config, context.data()
    settings = _settings(context)
    if settings.shared:
        return
    ipc = config.ipc.images_per_class
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    for name, count in zip(data.classes, counts, strict=True):
        offered = min(count, settings.candidates or count)
        if offered < ipc:
            raise ConfigError(
                f"method.retrieval.shared=false gives each of ipc.images_per_class={ipc} slots candidates of its own, "
                f"and class {name} offers {offered} (it has {count} images, and method.retrieval.candidates="
                f"{settings.candidates}); set method.retrieval.shared=true, or lower ipc.images_per_class"
            )


def _of_class(context: Context, label: int, seed: int | None, candidates: int | None) -> Tensor:
    if seed is None:
        return (context.data().train.labels == label).nonzero()[:, 0]
    return shuffled_images(context, label, generator(seed, "candidates", label))[:candidates]


def _observer(context: Context, member: Artifact) -> nn.Module:
    backbone = context.config.committee.members[context.config.patches.observer].backbone
    return load_network(context, member, backbone).to(context.device)


def _settings(context: Context) -> RetrievalConfig:
    settings = context.config.method.retrieval
    assert settings is not None
    return settings
