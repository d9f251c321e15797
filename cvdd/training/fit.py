"""Lightning's training that goes on where it was interrupted, alone or with all ranks."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from torch.utils.data import DataLoader

from cvdd.running.distributed import World, ranks_of_trainer
from cvdd.running.interruption import StopRequest
from cvdd.training.pace import Ranges

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 20.0


def fit(
    world: World,
    device: torch.device,
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
        world: the ranks of this command.
        device: of this one.
        module: what is trained.
        loader: its batches; None if the module brings them anew in every epoch.
        epochs: how many.
        checkpoint: the file; its name ends in ``.tmp``, so that no artefact is sealed with it.
        parts: of a batch; all ranks train together if they can share them, and then all of them must call this.

    Raises:
        LostRank: one of them ended.
    """
    shared = world.shares(parts)
    # Lightning would take the tasks of a SLURM job for ranks of this training, and requeue the job itself.
    alone: dict[str, Any] = {"devices": devices_of(device), "plugins": [LightningEnvironment()]}
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        **(ranks_of_trainer(world) if shared else alone),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=checkpoint.parent,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1 if loader is None else 0,
        callbacks=[EpochCheckpoint(checkpoint, SECONDS_BETWEEN_CHECKPOINTS)],
    )
    resume = _usable(checkpoint) if world.main or not shared else False
    if shared:
        resume = world.say("resume" if resume else None) is not None
        world.meet()
    if resume and isinstance(loader, DataLoader) and isinstance(loader.sampler, EpochAware):
        # Lightning makes the first iterator before it tells the sampler the epoch.
        loader.sampler.set_epoch(_finished_epochs(checkpoint))
    with world.together() if shared else contextlib.nullcontext():
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
            log.warning("%s: saved after %s", signal.Signals(wanted).name, _done(trainer))
            self.stop.obey(wanted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back, and obey one that came after the last epoch."""
        self.stop.release()
        if self.stop.number:
            self.stop.obey(self.stop.number)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.stop.release()


def _done(trainer: pl.Trainer) -> str:
    """What is finished at the end of an epoch, in the unit in which it was configured."""
    batches = getattr(trainer.train_dataloader, "dataset", None)
    return f"iteration {batches[-1][1]}" if isinstance(batches, Ranges) else f"epoch {trainer.current_epoch + 1}"
