"""What every stage is given: the configuration, the store, the device and where to log."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from torch.utils.data import DataLoader
from torchvision.io import write_png

from cvdd.artifact import Artifact, Store
from cvdd.data import Data, load_data
from cvdd.distributed import World, ranks_of_trainer
from cvdd.interruption import StopRequest
from cvdd.progress import Advance, progress
from cvdd.schema import RunConfig, with_overrides

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 20.0


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
    """

    config: RunConfig
    store: Store
    device: torch.device
    loggers: Sequence[Logger] = ()
    label: str = ""
    serves: Literal["priors", "students"] | None = None
    world: World = field(default_factory=World)
    _loaded: dict[str, Data] = field(default_factory=dict, repr=False)

    def data(self) -> Data:
        """Load the data set, once per run."""
        key = self.config.dataset.model_dump_json()
        if key not in self._loaded:
            self._loaded[key] = load_data(self.config.dataset, self.store)
        return self._loaded[key]

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
        from cvdd.loggers import log_image

        for logger in self.loggers:
            log_image(logger, self._key(key), images, step)

    def log_artifacts(self, artifacts: Mapping[str, Artifact]) -> None:
        """Tell the loggers that have a summary which artefacts this run's results are; names end in their hashes."""
        from cvdd.loggers import log_summary

        for logger in self.loggers:
            log_summary(logger, {self._key(f"artifact/{key}"): value.path.name for key, value in artifacts.items()})

    def _key(self, key: str) -> str:
        return f"{self.label}/{key}" if self.label else key

    def save_picture(self, name: str, image: torch.Tensor) -> None:
        """Write an image [3, h, w] uint8 into the run's directory, over its predecessor, to be watched meanwhile."""
        folder = self.config.paths.output / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(image, str(folder / f"{self.label + ' ' if self.label else ''}{name}.png"))

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
        """Run Lightning for so many epochs; go on from the checkpoint that an interrupted call left.

        Checkpoints are taken at the ends of epochs, where Lightning resumes exactly; the caller removes the last one
        once the result is saved. A signal to stop is obeyed after the next of them.

        Args:
            module: what is trained.
            loader: its batches; None if the module brings them anew in every epoch.
            epochs: how many.
            checkpoint: the file; its name ends in ``.tmp``, so that no artefact is sealed with it.
            parts: of a batch; all ranks train together if they can share them, and then all of them must call this.

        Raises:
            LostRank: one of them ended.
        """
        shared = self.world.shares(parts)
        # Lightning would take the tasks of a SLURM job for ranks of this training, and requeue the job itself.
        alone: dict[str, Any] = {"devices": devices_of(self.device), "plugins": [LightningEnvironment()]}
        trainer = pl.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            **(ranks_of_trainer(self.world) if shared else alone),
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=checkpoint.parent,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1 if loader is None else 0,
            callbacks=[EpochCheckpoint(checkpoint, SECONDS_BETWEEN_CHECKPOINTS)],
        )
        resume = _usable(checkpoint) if self.world.main or not shared else False
        if shared:
            resume = self.world.say("resume" if resume else None) is not None
            self.world.meet()
        if resume and isinstance(loader, DataLoader) and isinstance(loader.sampler, EpochAware):
            # Lightning makes the first iterator before it tells the sampler the epoch.
            loader.sampler.set_epoch(_finished_epochs(checkpoint))
        with self.world.together() if shared else contextlib.nullcontext():
            trainer.fit(module, loader, ckpt_path=str(checkpoint) if resume else None, weights_only=True)


def devices_of(device: torch.device) -> int | list[int]:
    """What a Lightning trainer is told to train on this device; to it 1 is the first GPU, on other ranks too."""
    if device.type != "cuda":
        return 1
    return [torch.cuda.current_device() if device.index is None else device.index]


@runtime_checkable
class EpochAware(Protocol):
    """A sampler whose order depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        ...


def _finished_epochs(checkpoint: Path) -> int:
    # Taken at the end of an epoch, by EpochCheckpoint, so that epoch is finished.
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["epoch"]) + 1


def _usable(checkpoint: Path) -> bool:
    """Whether there is a checkpoint to go on from; one that a crash of the machine damaged is set aside."""
    if not checkpoint.exists():
        return False
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if archive.testzip() is None:
                return True
    except zipfile.BadZipFile:
        pass
    log.warning("%s is damaged; this part of the work starts again", checkpoint)
    checkpoint.unlink()
    return False


class EpochCheckpoint(Checkpoint):
    """Saves the state of training at the end of an epoch: if the last save is some time ago, or on a signal to stop.

    Args:
        path: of the file; the previous one is replaced atomically.
        seconds: between saves.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__()
        self.path, self.seconds = path, seconds
        self.stop = StopRequest()
        self._saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, after Lightning, which would stop at the next batch and save nothing."""
        self.stop.hold()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Obey a signal that cannot wait for the end of the epoch."""
        if self.stop.overdue:
            log.warning("stopping in the middle of an epoch; it starts again from the last checkpoint")
            self.stop.obey(self.stop.number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; this hook of checkpoints runs after the module's own."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = not last and time.monotonic() - self._saved >= self.seconds
        # Saving is a matter of all ranks, whose clocks and signals differ; no signal that is waited for has number 1.
        own = torch.tensor(self.stop.number or int(due), device=trainer.strategy.root_device)
        wanted = int(trainer.strategy.reduce(own, reduce_op="max"))
        if not wanted:
            return
        temporary = self.path.with_name(self.path.name + ".part.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            temporary.replace(self.path)
        self._saved = time.monotonic()
        if wanted > 1:
            log.warning("%s: saved after epoch %d", signal.Signals(wanted).name, trainer.current_epoch + 1)
            self.stop.obey(wanted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back, and obey one that came after the last epoch."""
        self.stop.release()
        if self.stop.number:
            self.stop.obey(self.stop.number)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.stop.release()
