"""``hydra/launcher=local``: the points of a sweep one after another, each in a fresh process on this machine.

Hydra finds launchers in this namespace only. Nothing of PyTorch's state, of the environment or of memory survives from
one point to the next.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from cvdd.support.outcome import INTERRUPTED

log = logging.getLogger(__name__)


class PointLost(RuntimeError):
    """The process of a point ended without a result: it was killed, or ended itself for want of a rank."""


class FreshProcessLauncher(Launcher):
    """Runs each point of a sweep in a process of its own, one at a time."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a point is run with."""
        self.config, self.task_function, self.hydra_context = config, task_function, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the points; one that fails does not keep the next from running."""
        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        returned = []
        for index, overrides in enumerate(job_overrides, start=initial_job_idx):
            log.info("#%d : %s", index, " ".join(filter_overrides(overrides)))
            returned.append(self._run(list(overrides), index))
        return returned

    def _run(self, overrides: list[str], index: int) -> JobReturn:
        # A fork is a fresh process here: what launches has imported neither PyTorch nor anything that keeps state.
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_point, args=(self, overrides, index, sender), name=f"point{index}")
        process.start()
        sender.close()
        try:
            result: JobReturn | None = receiver.recv()
        except EOFError:
            result = None
        except BaseException:
            # The signal that ends this process need not have reached the other; it saves and ends, too.
            process.terminate()
            raise
        finally:
            process.join()
        if result is not None:
            return result
        assert process.exitcode is not None
        if process.exitcode == INTERRUPTED:
            # It has said so; then the sweep is interrupted, too.
            sys.exit(INTERRUPTED)
        lost = PointLost(f"point {index} {_ended(process.exitcode)}")
        log.error("%s", lost)
        return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=lost)

    def point(self, overrides: list[str], index: int) -> JobReturn:
        """Compose and run one point in this process."""
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.task_function is not None
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = index
            config.hydra.job.num = index
        result: JobReturn = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return result


def _point(launcher: FreshProcessLauncher, overrides: list[str], index: int, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result = launcher.point(overrides, index)
    try:
        sender.send(result)
    except Exception as error:
        # Not every exception can be sent; what it said can.
        sender.send(JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=RuntimeError(str(error))))


def _ended(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
