"""What surrounds a job: threads, device, loggers and results."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass, replace

import torch

from cvdd.artifact import Store, digest_of
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.loggers import finish, make_loggers
from cvdd.portable import portable_config
from cvdd.preflight import check_before_work
from cvdd.schema import RunConfig
from cvdd.verbs import VERBS

_SURROUNDINGS = re.compile(r"[+~]*(paths|trainer|logger|hydra)[./=@]")


@dataclass(frozen=True)
class Invocation:
    """How a command was started.

    Attributes:
        overrides: what the user typed.
        sweep: name of the multirun that this job is a point of, if any.
    """

    overrides: tuple[str, ...]
    sweep: str | None = None


def run(config: RunConfig, invocation: Invocation) -> float | None:
    """Do what a checked configuration says.

    Returns:
        the verb's main metric, or None if it has none.
    """
    device = prepare_process(config)
    output = config.paths.output
    output.mkdir(parents=True, exist_ok=True)
    context = Context(config, Store(config.paths.store), device)
    check_before_work(context)
    loggers = make_loggers(config, run_name(config, invocation), run_id(config), invocation.sweep)
    context = replace(context, loggers=loggers)
    failed = True
    try:
        metric = VERBS[config.verb](context, invocation_lines(config, invocation))
        failed = False
        return metric
    finally:
        finish(loggers, failed)


def prepare_process(config: RunConfig) -> torch.device:
    """Set what is global to a process, and return the device.

    Raises:
        ConfigError: the device that is asked for is not there.
    """
    _quiet_libraries()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    return find_device(config)


def run_name(config: RunConfig, invocation: Invocation) -> str:
    """Name of a run on a dashboard: the verb and what was typed, without where things are and run."""
    chosen = [override for override in invocation.overrides if not _SURROUNDINGS.match(override)]
    return " ".join([config.verb, *chosen])


def run_id(config: RunConfig) -> str:
    """Identity of a run on a dashboard: the same for a repeated command, on whatever machine."""
    tree = portable_config(config)
    return digest_of("run", {key: value for key, value in tree.items() if key not in ("trainer", "logger")}, [])


def invocation_lines(config: RunConfig, invocation: Invocation) -> list[str]:
    """The command that repeats this run."""
    return [f"python {config.verb}.py {' '.join(_quoted(override) for override in invocation.overrides)}".strip()]


def _quoted(override: str) -> str:
    return f"'{override}'" if any(character in override for character in ' {}[]()$*?<>|&;"') else override


def find_device(config: RunConfig) -> torch.device:
    """Return the device that the configuration asks for.

    Raises:
        ConfigError: it asks for a GPU and there is none, or for more devices than are supported.
    """
    accelerator = config.trainer.accelerator
    if config.trainer.devices != 1:
        raise ConfigError(f"trainer.devices={config.trainer.devices}: one process is supported; use trainer.devices=1")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU was found; choose trainer=cpu or trainer=auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _quiet_libraries() -> None:
    # One Trainer per unit would announce the hardware hundreds of times.
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*`srun` command is available.*",
        ".*Experiment logs directory.*",
        ".*Checkpoint directory.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
