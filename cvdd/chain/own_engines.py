"""Methods that do not vote on images: what each puts in the place of the stages. A new one is a row of ``OWN``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig
from cvdd.chain.apm import check_apm, make_apm_images
from cvdd.chain.apm_student import apm_labels, make_apm_student
from cvdd.chain.apm_teachers import apm_of, make_apm_teachers
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.labels import Labels
from cvdd.chain.mtt import make_mtt_images, make_mtt_student
from cvdd.chain.trajectories import make_trajectories, mtt_of
from cvdd.schema import MethodConfig


@dataclass(frozen=True)
class OwnEngine:
    """The stages of one such method.

    Attributes:
        networks: makes the networks that images begin with, which ``train`` makes instead of members; in the order of
            these indices, or from the first to the last.
        called: what people call these networks.
        count: of them.
        apart: whether each is an artefact, which several processes can share out; otherwise all are one.
        images: makes the images.
        student: trains a student on them where ``protocol.student=method``.
        labels: says what it learns there; None where labels are made as for any other method.
        learns_labels: whether what it learns there was distilled too, and lies beside the images.
        check: refuses before any work what its stages would refuse.
    """

    networks: Callable[[Context, Sequence[int] | None], list[Artifact]]
    called: str
    count: Callable[[Context], int]
    apart: bool
    images: Callable[[Context], Artifact]
    student: Callable[[Context, Artifact, str, BackboneConfig, int], Artifact]
    learns_labels: Callable[[Context], bool]
    labels: Callable[[Context, Artifact], Labels] | None = None
    check: Callable[[Context], None] | None = None


OWN: Mapping[str, OwnEngine] = MappingProxyType(
    {
        "apm": OwnEngine(
            networks=make_apm_teachers,
            called="teachers",
            count=lambda context: apm_of(context).teachers.count,
            apart=True,
            images=make_apm_images,
            student=make_apm_student,
            learns_labels=lambda context: True,
            labels=apm_labels,
            check=check_apm,
        ),
        "mtt": OwnEngine(
            networks=lambda context, order: [make_trajectories(context)],
            called="experts",
            count=lambda context: mtt_of(context).experts.count,
            apart=False,
            images=make_mtt_images,
            student=make_mtt_student,
            learns_labels=lambda context: mtt_of(context).labels == "learned",
        ),
    }
)
"""By the section of ``method`` that holds its settings."""


def own_engine(method: MethodConfig) -> OwnEngine | None:
    """Return the engine of a method's own; None for one whose images members vote on, or that keeps real ones."""
    own = method.own
    return None if own is None else OWN[own[0]]


def make_distilled(context: Context, priors: Mapping[str, float]) -> Artifact:
    """Return the distilled images of a configuration, by whichever engine.

    Args:
        context: the configuration and its surroundings.
        priors: see :func:`cvdd.chain.images.make_images`.
    """
    own = own_engine(context.config.method)
    return make_images(context, priors) if own is None else own.images(context)
