"""Where measurements go besides the artefacts: csv always, Weights & Biases and TensorBoard by config."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from cvdd.config_base import ConfigError
from cvdd.portable import portable_config
from cvdd.schema import RunConfig


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
    loggers: list[Logger] = [CSVLogger(save_dir=output, name="", version="csv", flush_logs_every_n_steps=200)]
    if config.logger.tensorboard:
        try:
            loggers.append(TensorBoardLogger(save_dir=output, name="", version="tensorboard"))
        except ModuleNotFoundError as error:
            raise ConfigError("logger.tensorboard=true needs: pip install 'cvdd[tensorboard]'") from error
    if config.logger.wandb:
        loggers.append(_wandb(config, run_name, run_id, sweep))
    for logger in loggers:
        # Where files lie on this machine is nobody else's business.
        logger.log_hyperparams(portable_config(config))
    return loggers


def _wandb(config: RunConfig, run_name: str, run_id: str, sweep: str | None) -> WandbLogger:
    group = config.logger.group or sweep
    options: dict[str, Any] = {"group": group, "entity": config.logger.entity, "job_type": config.verb}
    try:
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
        raise ConfigError(
            f"logger.wandb=true: {error}; log in with wandb login, or set logger.wandb_mode=offline"
        ) from error
    return logger


def log_image(logger: Logger, key: str, image: Tensor, step: int) -> None:
    """Send an image [3, h, w] uint8 to a logger that takes images; others ignore it."""
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [image.permute(1, 2, 0).numpy()], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, image, step)


def finish(loggers: list[Logger], failed: bool) -> None:
    """Close loggers; a failed run is marked as failed."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))
