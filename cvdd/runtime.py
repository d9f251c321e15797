"""What surrounds a job: threads, device, loggers and results."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cvdd.allocator import keep_freed_memory
from cvdd.arguments import is_of_surroundings, unquoted
from cvdd.artifact import Artifact, Store, digest_of
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.distributed import World
from cvdd.hardware import machine_name
from cvdd.jobs import sign_in
from cvdd.launching import share_of_work, tasks_of_srun
from cvdd.loggers import make_loggers, reporting_to
from cvdd.outcome import forget_results
from cvdd.portable import portable_override, what_is_made
from cvdd.preflight import check_before_work
from cvdd.provenance import made_by_other_code
from cvdd.ranks import all_ranks, in_silence
from cvdd.refusals import require_writable
from cvdd.schema import RunConfig, with_overrides
from cvdd.unread_overrides import Alternative, warn_of_unread
from cvdd.verbs import VERBS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Invocation:
    """How a command was started.

    Attributes:
        overrides: what the user typed.
        sweep: name of the multirun that this job is a point of, if any.
        without_each: makes the configurations of the same command without one of the overrides.
        point: the named sweep and its point, if the job is one of those.
    """

    overrides: tuple[str, ...]
    sweep: str | None = None
    without_each: Callable[[], Iterable[Alternative]] = tuple
    point: tuple[str, str] | None = None

    def row(self, config: RunConfig) -> str:
        """Name of the row of a comparison that the job is about; empty if it is the configuration's own."""
        name = self.point[1] if self.point else ""
        return name if name in config.compare else ""


def run(config: RunConfig, invocation: Invocation) -> float | None:
    """Do what a checked configuration says.

    Returns:
        the verb's main metric, or None if it has none.
    """
    with _process_as_found():
        if config.cost:
            from cvdd.cost import show_cost

            show_cost(config, prepare_process(config))
            return None
        with all_ranks(config) as world:
            return work_as(world, config, invocation)


@contextlib.contextmanager
def _process_as_found() -> Iterator[None]:
    """Leave nothing of a point of a multirun to the next one, which may run in the same process."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def work_as(world: World, config: RunConfig, invocation: Invocation) -> float | None:
    """Do what a checked configuration says as one of the ranks of a command.

    Returns:
        the verb's main metric, or None if it has none.
    """
    if world.main:
        return _work(world, config, invocation)
    with in_silence(config) as quiet:
        return _work(world, quiet, invocation)


def _work(world: World, config: RunConfig, invocation: Invocation) -> float | None:
    device = prepare_process(config, world.local_rank)
    output = config.paths.output
    require_writable(output, "another place with paths.output=DIR")
    context = Context(config, Store(config.paths.store, machine_name(device)), device, world=world)
    check_before_work(context)
    if not world.main:
        # Rank 0 reports for all.
        return VERBS[config.verb](context, [])
    if not share_of_work()[0]:
        # Of several jobs that share a point one looks.
        warn_of_unread(context, invocation.without_each())
    if config.verb == "evaluate" and invocation.sweep is None:
        # Points of a multirun have forgotten theirs when they began.
        forget_results(output)
    sign_in(output, context.store)
    row = invocation.row(config)
    # A dashboard asks what was measured there, and that is the row.
    told = with_overrides(config, {**config.compare[row], "compare": {}}) if row else config
    loggers = make_loggers(told, run_name(config, invocation), run_id(config, invocation), invocation.sweep)
    context = replace(context, loggers=loggers, shown=row)
    with reporting_to(loggers):
        metric = VERBS[config.verb](context, invocation_lines(config, invocation))
    _warn_of_other_code(context.store.opened)
    return metric


def _warn_of_other_code(used: Sequence[Artifact]) -> None:
    old = [artifact for artifact in used if made_by_other_code(artifact.manifest["code"])]
    if old:
        log.warning(
            "%d of the %d artefacts of this run were made by other code than this (%s, for instance): their identity "
            "is what is configured, not the code. If the difference matters, make them anew: paths.store=DIR",
            len(old),
            len(used),
            f"{old[0].kind}/{old[0].path.name}",
        )


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


def run_name(config: RunConfig, invocation: Invocation) -> str:
    """Name of a run on a dashboard: the verb and what was typed, without where things are and run."""
    typed = (override for override in invocation.overrides if not is_of_surroundings(override))
    chosen = [portable_override(override, config) for override in typed]
    return " ".join([config.verb, *chosen])


def run_id(config: RunConfig, invocation: Invocation) -> str:
    """Identity of a run on a dashboard: the same for a repeated command, on whatever machine.

    Points of named sweeps have their own, because two sweeps may have a point in common.
    """
    point = {"point": invocation.point} if invocation.point else {}
    return digest_of("run", what_is_made(config) | point, [])


def invocation_lines(config: RunConfig, invocation: Invocation) -> list[str]:
    """The command that repeats this run, with names for the directories of this machine."""
    typed = [portable_override(unquoted(override), config) for override in invocation.overrides]
    return [f"python {config.verb}.py {shlex.join(typed)}".rstrip()]


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
