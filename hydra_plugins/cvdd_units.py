"""``hydra/launcher=slurm_units``: each point of a sweep is spread over an array of SLURM jobs.

Hydra finds launchers in this namespace only. Every job of the array runs the same command; the store sees to it that
they share its parts, so that a job that starts late or is lost delays nothing but the part that it held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

# Without the extra cvdd[slurm] there is nothing to be found here; the command says so when the launcher is asked for.
with contextlib.suppress(ImportError):
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    from cvdd.composition.launching import SHARE

    class UnitsLauncher(SlurmLauncher):  # type: ignore[misc]
        """Runs a point ``array_parallelism`` times at once, in jobs that share its work through the store.

        The first job writes the point's directory, as without sharing; the others write below it, into ``workers``,
        and end with it. With several tasks in a job each of them takes part.
        """

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit one array for all points and wait for the first job of each."""
            assert self.config is not None
            jobs = int(self.params["array_parallelism"])
            folder = Path(str(self.config.hydra.sweep.dir))
            folder.mkdir(parents=True, exist_ok=True)
            calls = [
                (list(overrides), "hydra.sweep.dir", point, str(job), Singleton.get_state())
                for point, overrides in enumerate(job_overrides, start=initial_job_idx)
                for job in range(jobs)
            ]
            submitted = self._executor().map_array(self, *zip(*calls, strict=True))
            returned = []
            for first in range(0, len(submitted), jobs):
                returned.append(submitted[first].results()[0])
                for other in submitted[first + 1 : first + jobs]:
                    other.cancel(check=False)
            return returned

        def _executor(self) -> Any:
            import submitit

            shared = set(OmegaConf.structured(BaseQueueConf).keys())
            fields = {
                name if name in shared else f"slurm_{name}": value
                for name, value in self.params.items()
                if name not in ("submitit_folder", "max_num_timeout")
            }
            executor = submitit.AutoExecutor(
                self.params["submitit_folder"], cluster="slurm", slurm_max_num_timeout=self.params["max_num_timeout"]
            )
            executor.update_parameters(**fields)
            return executor

        def __call__(
            self, sweep_overrides: list[str], job_dir_key: str, job_num: int, job_id: str, singleton_state: Any
        ) -> JobReturn:
            """Run a point in one task of one job; ``job_id`` is which of the point's jobs it is."""
            assert self.config is not None
            tasks, rank = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_PROCID", 0))
            index = int(job_id) * tasks + rank
            os.environ[SHARE] = f"{index}/{int(self.params['array_parallelism']) * tasks}"
            if index:
                # As it was written: of the point that is not composed yet, not of the sweep.
                subdir = OmegaConf.to_container(self.config.hydra.sweep)["subdir"]  # type: ignore[call-overload,index]
                sweep_overrides = [
                    *sweep_overrides,
                    f"hydra.sweep.subdir='{subdir}/workers/{index}'",
                    "logger.wandb=false",
                    "logger.tensorboard=false",
                ]
                # The state of the point and the report of the sweep are the first job's.
                self.hydra_context.callbacks = Callbacks()
            result: JobReturn = super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)
            return result
