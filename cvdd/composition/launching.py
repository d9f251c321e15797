"""What a job knows of the launcher that started it: its share of the work, and fields that follow from the launcher.

The launchers themselves are in ``hydra_plugins``, where Hydra looks for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cvdd.composition.arguments import ArgumentError
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.schema.surroundings import TrainerConfig

RESOLVER = "cvdd_launcher"
COMMAND = "cvdd_command"
SHARE = "CVDD_SHARE"
"""Environment variable of a job that shares a point with others, INDEX/TOTAL."""

BASIC = "basic"
_GROUP = "hydra/launcher="
_SUBMITIT = ("slurm", "slurm_units", "slurm_ddp")


def register_resolvers() -> None:
    """Make ``${cvdd_launcher:FIELD,OTHERWISE}`` and ``${cvdd_command:}`` known to OmegaConf."""
    OmegaConf.register_new_resolver(RESOLVER, _of_launcher, replace=True)
    # Like Hydra's time of day, and handed on to the points of a multirun with it: the same wherever it is asked for.
    OmegaConf.register_new_resolver(COMMAND, lambda: command_number(os.environ), use_cache=True, replace=True)


def _of_launcher(field: str, otherwise: Any = None) -> Any:
    """Read a field of the launcher; what is given ``otherwise`` if it has none, or outside of Hydra's commands."""
    value = launcher_field(field) if HydraConfig.initialized() else None
    return otherwise if value is None else value


def launcher_field(name: str) -> Any:
    """Return a field of this command's launcher, None if it has no such field.

    ``tasks_per_node`` is that of one training: the tasks of a launcher that shares units train each for itself.
    """
    launcher = HydraConfig.get().launcher
    if name == "tasks_per_node" and launcher["_target_"].endswith(".UnitsLauncher"):
        return 1
    return launcher.get(name)


def command_number(environment: Mapping[str, str]) -> str:
    """Return what tells this command from another of the same second; its ranks, which compose alike, agree on it.

    Args:
        environment: of this process.
    """
    if "RANK" in environment:
        return environment.get("MASTER_PORT", "0")
    if tasks_of_srun(environment) > 1:
        return f"{environment['SLURM_JOB_ID']}-{environment.get('SLURM_STEP_ID', 0)}"
    # Process ids are small and alike in containers.
    return f"{datetime.now():%f}"


def require_launcher(arguments: Sequence[str]) -> None:
    """Refuse a launcher whose package is not installed.

    Raises:
        ArgumentError: says what to install.
    """
    chosen = [argument.removeprefix(_GROUP) for argument in arguments if argument.startswith(_GROUP)]
    if any(name in _SUBMITIT for name in chosen) and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise ArgumentError(f"{_GROUP}{chosen[-1]} needs: pip install 'cvdd[slurm]'")


def check_launcher(trainer: TrainerConfig, launcher: str, tasks: int | None, sweeping: bool) -> None:
    """Refuse a launcher that Hydra would ignore, or that starts other processes than the trainer expects.

    Args:
        trainer: what is expected.
        launcher: the name of its file.
        tasks: processes that it starts on each node for one training; None if it leaves that to the trainer.
        sweeping: whether the command is a multirun.

    Raises:
        ConfigError: says what to type.
    """
    if launcher != BASIC and not sweeping:
        raise ConfigError(f"{_GROUP}{launcher} starts the jobs of a multirun only; add --multirun (-m)")
    # One task may start the processes of the trainer itself; of several, each is one of them.
    if tasks is not None and tasks != trainer.devices and (tasks > 1 or launcher == "slurm_ddp"):
        raise ConfigError(
            f"trainer.devices={trainer.devices} and hydra.launcher.tasks_per_node={tasks}: leave out trainer.devices, "
            "which follows from the launcher, or use hydra/launcher=slurm_units for tasks that share units"
        )


def check_multirun(trainer: TrainerConfig, launcher: str, sweeping: bool) -> None:
    """Refuse several processes for each point of a multirun that runs in one process.

    Raises:
        ConfigError: names the launchers that work.
    """
    if sweeping and launcher == BASIC and trainer.devices > 1:
        raise ConfigError(
            f"trainer.devices={trainer.devices} in a multirun: one point would leave its processes to the next. Choose "
            f"{_GROUP}slurm_ddp (one task for each device), or {_GROUP}local (a fresh process for each point), or "
            "trainer.devices=1"
        )


def share_of_work() -> tuple[int, int]:
    """Return which of how many jobs this one is that share a point: (0, 1) if nobody shares it."""
    index, _, total = os.environ.get(SHARE, "0/1").partition("/")
    return int(index), int(total)


def tasks_of_srun(environment: Mapping[str, str]) -> int:
    """Tasks that srun started together with this process, itself included; 1 where there was no srun."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def speaks_for_all(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of those that torchrun or srun started for a command, or the only one.

    Args:
        environment: of this process. Under torchrun its rank counts: all ranks of a machine are of one task of srun.
    """
    return int(environment.get("RANK", environment.get("SLURM_PROCID", 0))) == 0
