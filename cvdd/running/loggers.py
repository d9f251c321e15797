"""Where measurements go besides the artefacts: csv always, Weights & Biases and TensorBoard by config."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from cvdd.composition.portable import portable_config
from cvdd.running.interruption import SIGNALS
from cvdd.schema import RunConfig
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

ERROR = "error"
"""In a run's summary: the kind of error that ended it, empty if none did. What it said is in the job's own log."""


def make_loggers(config: RunConfig, run_name: str, run_id: str, sweep: str | None = None) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        config: the checked configuration.
        run_name: readable name for dashboards.
        run_id: stable identity, so that a repeated command goes on in the same wandb run.
        sweep: name of the multirun that the run belongs to, if any.

    Raises:
        ConfigError: an optional package is not installed, or Weights & Biases refuses the run.
    """
    output = config.paths.output
    _keep_rows(output / "csv" / "metrics.csv")
    loggers: list[Logger] = [CSVLogger(save_dir=output, name="", version="csv", flush_logs_every_n_steps=200)]
    if config.logger.tensorboard:
        try:
            loggers.append(TensorBoardLogger(save_dir=output, name="", version="tensorboard", default_hp_metric=False))
        except ModuleNotFoundError as error:
            raise ConfigError("logger.tensorboard=true needs: pip install 'cvdd[tensorboard]'") from error
    if config.logger.wandb:
        loggers.append(_wandb(config, run_name, run_id, sweep))
    for logger in loggers:
        # Where files lie on this machine is nobody else's business.
        logger.log_hyperparams(portable_config(config))
    return loggers


def _keep_rows(file: Path) -> None:
    """Set aside what an interrupted job logged in the same directory; Lightning would begin the file anew."""
    if file.exists():
        earlier = len(list(file.parent.glob("metrics-*.csv")))
        file.rename(file.with_name(f"metrics-{earlier + 1}.csv"))


def _wandb(config: RunConfig, run_name: str, run_id: str, sweep: str | None) -> WandbLogger:
    group = config.logger.group or sweep
    options: dict[str, Any] = {"group": group, "entity": config.logger.entity, "job_type": config.verb}
    try:
        options["settings"] = _settings_without_machine()
        logger = WandbLogger(
            name=run_name,
            id=run_id,
            save_dir=config.paths.output,
            project=config.logger.project,
            offline=config.logger.wandb_mode == "offline",
            resume="allow",
            **options,
        )
    except ModuleNotFoundError as error:
        raise ConfigError("logger.wandb=true needs: pip install 'cvdd[wandb]'") from error
    from wandb.errors import Error as WandbError

    try:
        # The run begins when it is first looked at; what keeps it from beginning is said now, not in mid-work.
        _ = logger.experiment
    except WandbError as error:
        # A repeated command goes on in the run of the first one, and what was deleted there can never go on.
        deleted = "deleted" in str(error)
        another = f"choose another project, logger.project=NAME instead of {config.logger.project}"
        advice = another if deleted else "log in with wandb login, or set logger.wandb_mode=offline"
        raise ConfigError(f"logger.wandb=true: {error}; {advice}") from error
    return logger


def _settings_without_machine() -> Any:
    """Settings with which wandb sends neither the machine's name nor its paths, which the console's text is full of."""
    from wandb import Settings

    return Settings(host="", x_disable_meta=True, console="off")


def log_image(logger: Logger, key: str, image: Tensor, step: int) -> None:
    """Send an image [3, h, w] uint8 to a logger that takes images; others ignore it."""
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [image.permute(1, 2, 0).numpy()], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, image, step)


def log_summary(logger: Logger, values: Mapping[str, str]) -> None:
    """Tell a logger what is true of the whole run, if it has a place for that; others ignore it."""
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(dict(values))


@contextlib.contextmanager
def reporting_to(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close loggers when the body ends, however it ends, and tell them how.

    An error marks the run as failed. A signal that announces the end of the job marks it as preempted, so that a
    dashboard does not count it among the failures: the job goes on under the same identity. SIGTERM, SIGUSR1 and
    SIGUSR2, which would end the process without a last word, end the body with SystemExit unless somebody else asked
    for them.
    """
    with _orderly_end():
        try:
            yield
        except BaseException as error:
            _finish(loggers, error)
            raise
        _finish(loggers, None)


def _finish(loggers: Sequence[Logger], error: BaseException | None) -> None:
    for logger in loggers:
        try:
            _close(logger, error)
        except Exception as second:
            if error is None:
                raise
            # What ended the body counts: a sweep goes on after an error, and ends with a signal.
            log.warning("%s could not be closed (%s)", type(logger).__name__, second)


def _close(logger: Logger, error: BaseException | None) -> None:
    log_summary(logger, {ERROR: type(error).__name__ if error else ""})
    logger.finalize("failed" if error else "success")
    if isinstance(logger, WandbLogger):
        if isinstance(error, SystemExit):
            logger.experiment.mark_preempting()
        logger.experiment.finish(exit_code=int(error is not None))


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
