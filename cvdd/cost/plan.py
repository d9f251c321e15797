"""What a configuration would make: the chain is walked with a store that makes nothing."""

from __future__ import annotations

import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cvdd.artifact import Artifact, Parts, Store, digest_of
from cvdd.artifact.manifest import COPY, DELETE, read_manifest, sealed_as
from cvdd.chain.compare import compare, distil
from cvdd.chain.context import Context
from cvdd.chain.members import make_member
from cvdd.chain.own_engines import make_distilled, own_engine
from cvdd.chain.priors import find_priors
from cvdd.chain.stages import stage_of
from cvdd.computing.automatic import records
from cvdd.cost.sizes import NotMade, sized_data
from cvdd.data import Data
from cvdd.schema import RunConfig, members_used


def equal_metrics(name: str) -> float:
    """Return what stands for an accuracy that is not measured yet, in percent: equal priors give equal votes."""
    return 50.0


def other_metrics(name: str) -> float:
    """Return such a number that is another for each name, so that it is seen what depends on the priors."""
    return 40.0 + zlib.crc32(name.encode()) % 2000 / 100


@dataclass(frozen=True)
class Piece:
    """An artefact that a run needs.

    Attributes:
        stage: to which its cost belongs.
        artifact: the sealed one, or one of which only kind, name, digest, identity and parents are known.
        made: whether the store holds it.
        parents: artefacts that it is made from.
        config: of the row of the comparison that asked first.
        data: its data set.
        recorded: whether steps would be recorded as CUDA graphs, networks side by side.
    """

    stage: str
    artifact: Artifact
    made: bool
    parents: tuple[Artifact, ...] = field(repr=False)
    config: RunConfig = field(repr=False)
    data: Data = field(repr=False)
    recorded: bool = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """What determines it, besides its parents."""
        identity: Mapping[str, Any] = self.artifact.manifest["identity"]
        return identity

    @property
    def name(self) -> str:
        """Its kind and directory."""
        return f"{self.artifact.kind}/{self.artifact.path.name}"


class PlanStore(Store):
    """A store that finds what is there, and notes what is missing instead of making it; it writes nothing.

    Args:
        root: of the real store.
        pieces: all that was asked for so far, each once.
        context: who asks.
    """

    def __init__(self, root: Path, pieces: dict[str, Piece], context: Planning | None = None) -> None:
        super().__init__(root)
        self.pieces, self.context = pieces, context

    def make(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        build: Callable[[Path], Mapping[str, Any]],
    ) -> Artifact:
        """Note an artefact."""
        return self._note(kind, name, identity, parents)

    def make_parts(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        parts: Parts,
        finish: Callable[[Path], Mapping[str, Any]],
    ) -> Artifact:
        """Note an artefact."""
        return self._note(kind, name, identity, parents)

    def open(self, path: Path, remedy: str = DELETE) -> Artifact:
        """Read a manifest; the real store would also write down who uses the artefact."""
        return read_manifest(path, remedy)

    def _note(self, kind: str, name: str, identity: Mapping[str, Any], parents: Sequence[Artifact]) -> Artifact:
        digest = digest_of(kind, identity, parents)
        # Under the name that it is asked for first, as it will be made.
        known = (piece.artifact for piece in self.pieces.values())
        asked = (artifact.path for artifact in known if (artifact.kind, artifact.digest) == (kind, digest))
        path = next(asked, self.root / kind / f"{name}-{digest}")
        made = sealed_as(path)
        if made is not None:
            artifact = read_manifest(made)
        elif kind == "data":
            raise NotMade(name)
        else:
            manifest = {
                "kind": kind,
                "name": name,
                "digest": digest,
                "identity": json.loads(json.dumps(dict(identity))),
                "parents": [{"kind": p.kind, "name": p.name, "digest": p.digest} for p in parents],
                "files": {},
                "metrics": self._metrics(kind, name),
            }
            artifact = Artifact(path, manifest)
        context = self.context
        if context is not None and kind != "data":
            stage = _stage(kind, context)
            recorded = records(context.config.engine.cuda_graphs, context.device)
            piece = Piece(stage, artifact, made is not None, tuple(parents), context.config, context.data(), recorded)
            self.pieces.setdefault(piece.name, piece)
        return artifact

    def _metrics(self, kind: str, name: str) -> Mapping[str, Any]:
        assert self.context is not None
        config, data, unmeasured = self.context.config, self.context.data(), self.context.unmeasured
        count = config.ipc.images_per_class * len(data.classes)
        if kind == "images" and config.method.init == "all":
            count = len(data.train)
        return defaultdict(lambda: unmeasured(name), {"images": count})


@dataclass(frozen=True)
class Planning(Context):
    """Surroundings of a walk through the chain that makes nothing.

    Attributes:
        notes: why sizes are not those of real images, each once.
        unmeasured: stands for every accuracy of an artefact that is not made yet, by its name.
    """

    notes: dict[str, None] = field(default_factory=dict, repr=False)
    unmeasured: Callable[[str], float] = equal_metrics

    def data(self) -> Data:
        """Load the data set, or describe it, once per run."""
        key = self.config.dataset.model_dump_json()
        if key not in self._loaded:
            self._loaded[key], why = sized_data(self.config.dataset, PlanStore(self.store.root, {}))
            if why is not None:
                self.notes[why] = None
        return self._loaded[key]

    def tell(self, message: str, level: int = logging.INFO) -> None:
        """Say warnings alone: a walk is made for many configurations."""
        if level > logging.INFO:
            super().tell(message, level)

    def _open_elsewhere(self, path: Path, kind: str) -> Artifact:
        # What is not computed with needs no checksums.
        return read_manifest(path, COPY)

    def differing(
        self, overrides: Mapping[str, Any], label: str, serves: Literal["priors", "students"] | None = None
    ) -> Planning:
        """Return a context whose configuration differs, and whose pieces are noted with it."""
        changed = super().differing(overrides, label, serves)
        assert isinstance(changed, Planning)
        return _bound(changed)


def planning(
    config: RunConfig,
    device: torch.device,
    loaded: Mapping[str, Data] | None = None,
    unmeasured: Callable[[str], float] = equal_metrics,
) -> Planning:
    """Return the surroundings of a walk.

    Args:
        config: of the run.
        device: where it would run.
        loaded: data sets that are loaded already, as a context keeps them.
        unmeasured: see :class:`Planning`.
    """
    store = PlanStore(config.paths.store, {})
    return _bound(Planning(config, store, device, _loaded=dict(loaded or {}), unmeasured=unmeasured))


def planning_beside(
    context: Context, config: RunConfig, unmeasured: Callable[[str], float] = equal_metrics
) -> Planning:
    """Return the surroundings of a walk for which nothing is read again that a run has read.

    Args:
        context: of the run, whose data set is loaded if need be.
        config: for the walk.
        unmeasured: see :class:`Planning`.
    """
    context.data()
    beside = planning(config, context.device, context._loaded, unmeasured)
    return _bound(replace(beside, _known=context._known))


def _bound(context: Planning) -> Planning:
    assert isinstance(context.store, PlanStore)
    store = PlanStore(context.store.root, context.store.pieces)
    bound = replace(context, store=store)
    store.context = bound
    return bound


def plan_pieces(context: Planning) -> list[Piece]:
    """List the artefacts that a verb needs, each once: what rows of a comparison share has one identity.

    Raises:
        ConfigError: the configuration cannot run, as far as that is known before work.
    """
    _WALKS[context.config.verb](context)
    assert isinstance(context.store, PlanStore)
    return list(context.store.pieces.values())


def _train(context: Planning) -> None:
    own = own_engine(context.config.method)
    if own is not None:
        own.networks(context, None)
    else:
        _members(context, context.config.committee.members)


def _distill(context: Planning) -> None:
    make_distilled(context, find_priors(context).values)


def _relabel(context: Planning) -> None:
    distil(context, context.config.method.name)


def _evaluate(context: Planning) -> None:
    compare(context)
    _members(context, members_used(context.config))


def _members(context: Planning, names: Mapping[str, Any] | Sequence[str]) -> None:
    for name in names:
        make_member(context, name)


_WALKS: Mapping[str, Callable[[Planning], None]] = {
    "train": _train,
    "distill": _distill,
    "relabel": _relabel,
    "evaluate": _evaluate,
}


def _stage(kind: str, context: Context) -> str:
    if context.serves == "priors" and kind in ("images", "students"):
        return "priors"
    if context.serves == "students" and kind == "members":
        # Students of all real data are trained like members.
        return "students"
    return stage_of(kind)
