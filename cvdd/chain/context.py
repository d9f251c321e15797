"""What every stage is given: the configuration, the store, the device and where to log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact, DamagedArtifact, Store
from cvdd.artifact.manifest import COPY, read_whole
from cvdd.data import Data, load_data
from cvdd.running.distributed import World
from cvdd.schema import RunConfig, with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.support.pictures import write_png
from cvdd.support.progress import Advance, progress
from cvdd.training.fit import fit

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Surroundings of a stage.

    Attributes:
        config: the checked configuration.
        store: where artefacts are found and made.
        device: where tensors live.
        loggers: Lightning loggers; a row goes to all of them.
        label: which row of the comparison this is; empty for the main one.
        serves: what its artefacts are for, if it is not what their kind says: measuring a prior, or a student.
        world: the ranks of this command.
        shown: the row of the comparison that the command is about; empty if it is the configuration's own.
    """

    config: RunConfig
    store: Store
    device: torch.device
    loggers: Sequence[Logger] = ()
    label: str = ""
    serves: Literal["priors", "students"] | None = None
    world: World = field(default_factory=World)
    shown: str = ""
    _loaded: dict[str, Data] = field(default_factory=dict, repr=False)
    _others: dict[Path, Store] = field(default_factory=dict, repr=False)
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def open_elsewhere(self, path: Path, kind: str, where: str) -> Artifact:
        """Open an artefact of another store, which is in use there until this run ends.

        Args:
            path: its directory.
            kind: that it must be of.
            where: the field that names it, for messages.

        Raises:
            ConfigError: it is of another kind.
            DamagedArtifact: it is none, or damaged.
        """
        whole = path.expanduser().absolute()
        try:
            artifact = self._open_elsewhere(whole, kind)
        except DamagedArtifact as error:
            raise DamagedArtifact(f"{where}: {error}") from error
        if artifact.kind != kind:
            raise ConfigError(f"{where}: {path} is an artefact of kind {artifact.kind}, not {kind}")
        return artifact

    def _open_elsewhere(self, path: Path, kind: str) -> Artifact:
        root = path.parent.parent
        if path.parent.name != kind:
            # Copied to a place that is no store, in which nothing is to be noted.
            return self.once(path, lambda: read_whole(path, COPY))
        if root not in self._others:
            self._others[root] = Store(root)
        return self._others[root].open(path, COPY)

    def data(self) -> Data:
        """Load the data set, once per run."""
        key = self.config.dataset.model_dump_json()
        if key not in self._loaded:
            self._loaded[key] = load_data(self.config.dataset, self.store)
        return self._loaded[key]

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return what ``find`` finds, which is asked once in a run, whatever rows there are.

        Args:
            key: of what is found.
            find: takes long.
        """
        if key not in self._known:
            self._known[key] = find()
        found: T = self._known[key]
        return found

    def tell(self, message: str, level: int = logging.INFO) -> None:
        """Say something that is true of the whole run, once and by one rank."""
        if self.world.main:
            self.once(("told", message), lambda: log.log(level, "%s", message))

    def differing(
        self, overrides: Mapping[str, Any], label: str, serves: Literal["priors", "students"] | None = None
    ) -> Context:
        """Return a context whose configuration differs in some dotted keys.

        Args:
            overrides: by dotted key.
            label: see the attributes.
            serves: likewise.
        """
        return replace(self, config=with_overrides(self.config, dict(overrides)), label=label, serves=serves)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send a row to all loggers."""
        for logger in self.loggers:
            logger.log_metrics({self._key(key): value for key, value in values.items()}, step=step)

    def log_images(self, key: str, images: torch.Tensor, step: int) -> None:
        """Send an image [3, h, w] uint8 to the loggers that take images."""
        from cvdd.running.loggers import log_image

        for logger in self.loggers:
            log_image(logger, self._key(key), images, step)

    def log_artifacts(self, artifacts: Mapping[str, Artifact]) -> None:
        """Tell the loggers that have a summary which artefacts this run's results are; names end in their hashes."""
        from cvdd.running.loggers import log_summary

        for logger in self.loggers:
            log_summary(logger, {self._key(f"artifact/{key}"): value.path.name for key, value in artifacts.items()})

    def _key(self, key: str) -> str:
        return f"{self.label}/{key}" if self.label else key

    def save_picture(self, name: str, image: torch.Tensor) -> None:
        """Write an image [3, h, w] uint8 into the run's directory, over its predecessor, to be watched meanwhile."""
        folder = self.config.paths.output / "pictures"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_png(image, folder / f"{self.label + ' ' if self.label else ''}{name}.png")
        except OSError as error:
            # Losing a picture of what is half made must not lose work.
            log.warning("a picture of the work so far is left out: %s", error)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Show progress in the way that ``trainer.progress`` asks for."""
        shown = f"{what} ({self.label})" if self.label else what
        with progress(self.config.trainer.progress, shown, total) as advance:
            yield advance

    def make_network(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        build: Callable[[Path], Mapping[str, Any]],
        train: Callable[[Path], object],
        parts: int,
    ) -> Artifact:
        """Return an artefact that needs a network trained, by one rank or, where its batches can be shared, by all.

        Rank 0 holds the artefact and builds it; the others join its training and write nothing.

        Args:
            kind: see :meth:`cvdd.artifact.Store.make`, like all up to ``build``.
            name: likewise.
            identity: likewise.
            parents: likewise.
            build: likewise; it calls ``train``.
            train: the part of it that ranks share, up to and including :meth:`fit`.
            parts: of a batch.
        """
        world, store = self.world, self.store
        if not world.shares(parts):
            return store.make(kind, name, identity, parents, build)
        if world.main:

            def leading(work: Path) -> Mapping[str, Any]:
                world.say(str(work.relative_to(store.root)))
                return build(work)

            artifact = store.make(kind, name, identity, parents, leading)
            world.say(None)
        else:
            while (work := world.say("")) is not None:
                train(store.root / work)
            artifact = store.make(kind, name, identity, parents, build)
        return artifact

    def fit(
        self,
        module: pl.LightningModule,
        loader: DataLoader[Any] | None,
        epochs: int,
        checkpoint: Path,
        parts: int = 1,
    ) -> None:
        """Train with Lightning on this rank's device; see :func:`cvdd.training.fit.fit`."""
        fit(self.world, self.device, module, loader, epochs, checkpoint, parts)
