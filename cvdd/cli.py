"""The four commands. Only Hydra is imported here, so that help and completion are quick."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from cvdd.composition.arguments import ArgumentError, prepare, typed_overrides
from cvdd.composition.command import checked, without_each
from cvdd.composition.composable import require_composable, said_of_yaml
from cvdd.composition.config_directory import config_directory
from cvdd.composition.launching import (
    check_launcher,
    check_multirun,
    launcher_field,
    require_launcher,
    share_of_work,
    speaks_for_all,
)
from cvdd.composition.sweep import GROUP, only_asks, with_points
from cvdd.support.outcome import USER_ERROR, outcome_kept, reader_may_go, told


def _help(part: str, verb: str) -> str:
    from cvdd.composition.help import help_part

    return help_part(part, verb, sys.argv[0])


def _command(verb: str) -> None:
    try:
        require_launcher(sys.argv[1:])
        sys.argv[1:] = with_points(prepare(sys.argv[1:], config_directory()), config_directory())
        require_composable(verb, sys.argv[1:], config_directory())
    except (ArgumentError, YAMLError) as error:
        print(said_of_yaml(error) if isinstance(error, YAMLError) else error, file=sys.stderr)
        sys.exit(USER_ERROR)
    OmegaConf.register_new_resolver("cvdd_help", _help, replace=True)
    with reader_may_go():
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(_run)()


def _run(composed: DictConfig) -> float | None:
    settings = HydraConfig.get()
    task = typed_overrides(settings.overrides.task)
    sweeping = settings.mode is RunMode.MULTIRUN
    kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    # Whoever asks what a sweep costs has not begun it.
    if sweeping and speaks_for_all(os.environ) and not only_asks(composed):
        folder = Path(settings.runtime.output_dir)
        kept = outcome_kept(folder, settings.job.name, task, begins=not share_of_work()[0])
    with kept, told(sweeping):
        choices, sweep = settings.runtime.choices, Path(settings.sweep.dir).name if sweeping else None
        config = checked(composed, task, choices.get("debug"))
        launcher = choices["hydra/launcher"]
        check_launcher(config.trainer, launcher, launcher_field("tasks_per_node"), sweeping)
        check_multirun(config.trainer, launcher, sweeping)
        # PyTorch and Lightning are imported only once it is known that there is something to do.
        from cvdd.commands.runtime import Invocation, run

        point = (str(choices["sweep"]), str(choices[GROUP])) if choices.get(GROUP) else None
        return run(config, Invocation(tuple(task), sweep, partial(without_each, config, composed, task), point)).metric


def train() -> None:
    """Train the committee."""
    _command("train")


def distill() -> None:
    """Make synthetic images."""
    _command("distill")


def relabel() -> None:
    """Make soft labels."""
    _command("relabel")


def evaluate() -> None:
    """Train students on the distilled set and measure them beside the baselines."""
    _command("evaluate")
