"""Which process works in a run's directory, so that whoever watches a sweep finds out what it is at."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from cvdd.artifact import Store, write_atomically

JOB = "job.json"
"""In a run's directory: the process that works, or worked last, for it."""


@dataclass(frozen=True)
class Job:
    """A process that works for a run.

    Attributes:
        host: its machine.
        process: its number there.
        cluster: its job and task in SLURM's words; None outside.
        store: where it finds and makes artefacts.
        user: the name under which the store knows it.
    """

    host: str
    process: int
    cluster: str | None
    store: str
    user: str

    @property
    def name(self) -> str:
        """For people who want to look after it."""
        place = f"{self.host} process {self.process}"
        return f"SLURM {self.cluster}, {place}" if self.cluster else place


def sign_in(output: Path, store: Store) -> None:
    """Say in a run's directory that this process works for it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    cluster = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
    job = Job(socket.gethostname(), os.getpid(), cluster, str(store.root.absolute()), store.user)
    write_atomically(output / JOB, (json.dumps(asdict(job)) + "\n").encode())


def read_job(folder: Path) -> Job | None:
    """Return the process that works, or worked last, in a directory; None if that is not known."""
    try:
        return Job(**json.loads((folder / JOB).read_text()))
    except (OSError, ValueError, TypeError):
        return None
