"""Stage ``candidates``: real images of which each synthetic one gets back what fits it, stage by stage (RETA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdd.artifact import Artifact, Maker, Parts
from cvdd.artifact.tensor_files import is_whole, save_tensors
from cvdd.augmentation.augment import normalise
from cvdd.chain.context import Context
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_choice import images_of_class, shuffled_images, whole_images
from cvdd.methods.fadrm import resized
from cvdd.methods.reta import best_fit, complexity
from cvdd.schema import RetrievalConfig
from cvdd.statistics.features import head_features
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.units import Unit

FIELD = "method.retrieval"

SHOWN_AT_ONCE = 100
"""Images in a forward pass, and decoded at once: fewer than voters judge, beside whom the observer looks."""


def make_candidates(context: Context) -> Artifact:
    """Return real images of each class, by their positions, with what ``patches.observer`` sees of them.

    Of each as it is tested: the input of the observer's last linear layer, and its complexity.

    Each class is a part, which any process can make.

    Raises:
        ConfigError: there are too few for all slots to have their own.
    """
    require_candidates_of_slots(context)
    config, data = context.config, context.data()
    settings = _settings(context)
    observer = make_member(context, config.patches.observer)
    most = _most_of_a_class(context)
    # As many as there are is all of them, of which nothing is drawn.
    candidates = settings.candidates if settings.candidates and settings.candidates < most else None
    seed = None if candidates is None else derive_seed(config.method.seed, "retrieval")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "candidates": candidates,
        "sigma": settings.sigma,
        "seed": seed,
    }

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        network = _observer(context, observer)
        with context.progress("candidates", len(data.classes)) as advance:

            def make(label: int) -> None:
                chosen = _of_class(context, label, seed, candidates)
                features, complexities = list[Tensor](), list[Tensor]()
                for some in chosen.split(SHOWN_AT_ONCE):
                    images = normalise(whole_images(context, some), data.mean, data.std).to(context.device)
                    features.append(head_features(network, images, FIELD))
                    complexities.append(complexity(images, settings.sigma).cpu())
                found = {
                    "positions": chosen,
                    "features": torch.cat(features),
                    "complexities": torch.cat(complexities),
                }
                save_tensors(work / _file_of(label), found)
                advance(1)

            yield Maker(make, lambda made: advance(len(made)))

    labels = range(len(data.classes))
    parts = Parts(
        [f"class{label:05d}" for label in labels], lambda work, label: is_whole(work / _file_of(label)), maker
    )
    metrics = {"classes": len(data.classes)}
    return context.store.make_parts("candidates", data.name, identity, [observer], parts, lambda work: metrics)


@dataclass(frozen=True)
class Retrieval:
    """Finds for each synthetic image the real one of its class that fits it.

    Attributes:
        context: the configuration and its surroundings.
        network: the observer.
        candidates: of :func:`make_candidates`, read class by class.
    """

    context: Context
    network: nn.Module
    candidates: Artifact

    @staticmethod
    def of(context: Context, candidates: Artifact) -> Retrieval:
        """Return that of some candidates.

        Args:
            context: the configuration and its surroundings.
            candidates: of :func:`make_candidates`.
        """
        network = _observer(context, make_member(context, context.config.patches.observer))
        return Retrieval(context, network, candidates)

    def of_class(self, label: int) -> dict[str, Tensor]:
        """Candidates of a class: ``positions`` [m] in the training set, ``features`` [m, k], ``complexities`` [m]."""
        return load_file(self.candidates.path / _file_of(label))

    def real_images(self, images: Tensor, units: Sequence[Unit]) -> Tensor:
        """Choose a real image for each synthetic one.

        Args:
            images: [units, images, 3, h, w], normalised.
            units: of a stack.

        Returns:
            [units, images, 3, size, size], normalised, of the size of the data set.
        """
        data, settings = self.context.data(), _settings(self.context)
        # Of one size, as the candidates were seen.
        seen = resized(images, data.image_size).flatten(0, 1)
        shown = head_features(self.network, seen, FIELD, SHOWN_AT_ONCE)
        classes = torch.cat([unit.targets for unit in units])
        # Where they are shared, all slots choose as one.
        every = 1 if settings.shared else self.context.config.ipc.images_per_class
        slots = torch.cat([unit.slots_of_images for unit in units]) % every
        chosen = torch.empty_like(classes)
        for label in classes.unique().tolist():
            found = self.of_class(label)
            for slot in slots[classes == label].unique().tolist():
                mine, offered = (classes == label) & (slots == slot), slice(slot, None, every)
                features, complexities = found["features"][offered], found["complexities"][offered]
                best = best_fit(shown[mine], features, complexities, settings.complexity)
                chosen[mine] = found["positions"][offered][best]
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


def _most_of_a_class(context: Context) -> int:
    return int(torch.bincount(context.data().train.labels).max())


def _file_of(label: int) -> str:
    return f"class{label:05d}.safetensors"


def _of_class(context: Context, label: int, seed: int | None, candidates: int | None) -> Tensor:
    if seed is None:
        return images_of_class(context, label)
    return shuffled_images(context, label, generator(seed, "candidates", label))[:candidates]


def _observer(context: Context, member: Artifact) -> nn.Module:
    backbone = context.config.committee.members[context.config.patches.observer].backbone
    return load_network(context, member, backbone).to(context.device)


def _settings(context: Context) -> RetrievalConfig:
    settings = context.config.method.retrieval
    assert settings is not None
    return settings
