"""What is global to a process: its device, its threads, and what libraries say in it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping

import torch

from cvdd.composition.launching import tasks_of_srun
from cvdd.schema import RunConfig
from cvdd.support.allocator import keep_freed_memory
from cvdd.support.config_base import ConfigError


def prepare_process(config: RunConfig, local_rank: int = 0) -> torch.device:
    """Set what is global to a process, and return the device.

    Args:
        config: the checked configuration.
        local_rank: which of the processes on this machine this one is.

    Raises:
        ConfigError: the device that is asked for is not there.
    """
    _quiet_libraries()
    hide_absent_gpus()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    device = find_device(config, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def find_device(config: RunConfig, local_rank: int = 0) -> torch.device:
    """Return the device that the configuration asks for: of several GPUs, one for each process on the machine.

    Raises:
        ConfigError: it asks for a GPU and there is none, or for more than there are.
    """
    accelerator, devices = config.trainer.accelerator, config.trainer.devices
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU was found; choose trainer=cpu or trainer=auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if devices == 1:
        chosen = _task_on_machine(os.environ) % found
        torch.cuda.set_device(chosen)
        return torch.device("cuda", chosen)
    if devices > found:
        bound = ", or let each task see all of them (srun --gpu-bind=none)" if "SLURM_LOCALID" in os.environ else ""
        raise ConfigError(
            f"trainer.devices={devices}, and this process sees {found} GPUs; set trainer.devices={found}, or "
            f"trainer.accelerator=cpu{bound}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _task_on_machine(environment: Mapping[str, str]) -> int:
    """Which of the tasks that srun started on a machine this is, where each works by itself; 0 elsewhere."""
    several = "RANK" not in environment and tasks_of_srun(environment) > 1
    return int(environment.get("SLURM_LOCALID", 0)) if several else 0


def hide_absent_gpus() -> None:
    """Spare PyTorch's optimisers the look for a GPU at every step, for which they open a library each time."""
    if not torch.cuda.is_available():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


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
        ".*module\\(s\\) in eval mode.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
