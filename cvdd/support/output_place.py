"""A look at the directory of a command before Hydra makes it, which would answer a refusal with a stack trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import USER_ERROR
from cvdd.support.refusals import require_writable


class OutputPlace(Callback):
    """Ends a command whose directory cannot be made or written with a sentence that says what to type."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the directory of a single run."""
        _require(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the directory of all points."""
        _require(config, "hydra.sweep.dir")


def _require(config: DictConfig, key: str) -> None:
    try:
        place = Path(str(OmegaConf.select(config, key)))
    except OmegaConfBaseException:
        # Hydra knows better what is wrong with it, or what it refers to.
        return
    try:
        require_writable(place, f"another place with {key}=DIR")
    except ConfigError as error:
        print(error, file=sys.stderr)
        # Hydra makes a warning of any error here.
        sys.exit(USER_ERROR)
