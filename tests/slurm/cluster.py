"""A SLURM cluster on this machine for the tests: started in a temporary directory, stopped by process id."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")
LONGEST_STATE = 80
"""Characters of a state directory's path; the path of a socket below it may not be longer than 108."""
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class ClusterError(RuntimeError):
    """SLURM could not be installed or started."""


def require_slurm() -> None:
    """Find SLURM's daemons; install Debian's packages if they are missing and this is root.

    Raises:
        ClusterError: says what to install.
    """
    advice = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if all(shutil.which(daemon, path=PATH) for daemon in DAEMONS):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"SLURM is not installed; as root: {advice}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], [*advice.split(), "--yes"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"SLURM is not installed, and {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _pid(file: Path, name: str) -> int | None:
    """Return the process of a pid file if it still is the daemon of that name."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == name:
            return pid
    return None


class Cluster:
    """Two nodes of two cores, a partition ``main``, and a partition ``urgent`` whose jobs evict those of ``main``.

    Args:
        state: directory of everything that it writes.
    """

    def __init__(self, state: Path) -> None:
        if len(str(state)) > LONGEST_STATE:
            raise ClusterError(f"{state}: a path of more than {LONGEST_STATE} characters is too long for sockets")
        self.state = state

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which SLURM's commands, and those that use them, find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.state / "slurm.conf"), "PATH": f"{HERE / 'bin'}:{PATH}"}

    def start(self) -> None:
        """Start the daemons and wait for the nodes.

        Raises:
            ClusterError: the nodes did not come up; with what the daemons have logged.
        """
        # munged wants its socket where other users could reach it.
        self.state.chmod(0o755)
        for name in ("run", "log", "control"):
            (self.state / name).mkdir(parents=True)
        key = self.state / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        prolog = self.state / "task_prolog"
        prolog.write_text("#!/bin/sh\necho export MASTER_ADDR=127.0.0.1\n")
        prolog.chmod(0o755)
        port = _free_ports(1 + len(NODES))
        text = (HERE / "slurm.conf.in").read_text()
        values = {
            "host": socket.gethostname().partition(".")[0],
            "port": port,
            "first": port + 1,
            "last": port + len(NODES),
            "megabytes": 4096,
            "user": getpass.getuser(),
            "state": self.state,
        }
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", str(value))
        (self.state / "slurm.conf").write_text(text)
        run, log = self.state / "run", self.state / "log"
        munged = [f"--key-file={key}", f"--socket={run / 'munge'}", f"--pid-file={run / 'munged.pid'}"]
        munged += [f"--log-file={log / 'munged.log'}", f"--seed-file={self.state / 'munge.seed'}"]
        self.call("munged", *munged)
        self.call("slurmctld")
        for node in NODES:
            self.call("slurmd", "-N", node)
        deadline = time.monotonic() + 30
        while len(self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()) < len(NODES):
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text()[-2000:] for file in sorted(log.glob("*.log")))
                raise ClusterError(f"the nodes did not come up:\n{logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, by process id."""
        with contextlib.suppress(ClusterError):
            if self.jobs():
                self.call("scancel", "--user", getpass.getuser())
                self.wait_until_empty(20)
        run = self.state / "run"
        for file in sorted(run.glob("slurmd.*.pid")):
            _end(file, "slurmd")
        _end(run / "slurmctld.pid", "slurmctld")
        _end(run / "munged.pid", "munged")

    def call(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it prints.

        Raises:
            ClusterError: it failed.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self, columns: str = "%i %T %P") -> list[list[str]]:
        """List jobs that wait or run: number, state and partition, or other columns of squeue."""
        return [line.split() for line in self.call("squeue", "-h", "-a", "-r", "-o", columns).splitlines()]

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until no job waits or runs."""
        deadline = time.monotonic() + seconds
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.2)


def _free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    for first in range(16817, 32000, 10):
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise ClusterError("no free ports")


def _end(file: Path, name: str) -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 2.0)):
        pid = _pid(file, name)
        if pid is None:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while _pid(file, name) is not None and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def cluster(state: Path) -> Iterator[Cluster]:
    """A cluster that runs while the body does."""
    require_slurm()
    made = Cluster(state)
    try:
        made.start()
        yield made
    finally:
        made.stop()
