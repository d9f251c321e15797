"""Commands as processes of their own, which are watched and stopped at moments that are counted in work.

They are forked from one process that has imported everything, which is most of what a small command does. Nothing else
is different: each reads its own command line, writes to its own log and ends with its own exit code.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from helpers import TINY

from cvdd.artifact.__main__ import verify_artifacts
from cvdd.artifact.cleaning import unfinished

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["commands", "cvdd.cli", "cvdd.commands.runtime", "cvdd.verbs", "cvdd.report.page"])

VERBS = {
    "train": ("data", "members"),
    "distill": ("patches", "images"),
    "relabel": ("labels",),
    "evaluate": ("students",),
}
"""The verbs in their order, and the kinds of artefacts that each adds to those before it."""

PATIENCE = 600
"""Seconds that a command may take on a busy machine; on an idle one it takes a few."""

SECONDS_BETWEEN_LOOKS = 0.003


def _run(verb: str, arguments: list[str], folder: Path) -> None:
    journal = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(journal, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # A shell's background jobs, and what they start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ["WANDB_MODE"] = "offline"
    sys.argv = [f"{verb}.py", *arguments]
    import cvdd.cli

    save_often()
    note_work(folder.parent / "work.txt")
    getattr(cvdd.cli, verb)()


def save_often() -> None:
    """Take every checkpoint that can be taken."""
    import cvdd.labels.store
    import cvdd.training.fit

    cvdd.training.fit.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    cvdd.labels.store.SECONDS_BETWEEN_SAVES = -1.0


def note_work(notes: Path) -> None:
    """Write down what this process seals, and which units of images it saves."""
    import cvdd.artifact.store
    import cvdd.chain.recover

    seal, write_unit = cvdd.artifact.store.seal, cvdd.chain.recover.write_unit

    def note(what: str) -> None:
        descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{what}\n".encode())
        os.close(descriptor)

    def noting_seal(work: Path, path: Path, manifest: dict[str, Any]) -> None:
        seal(work, path, manifest)
        note(f"{path.parent.name}/{path.name}")

    def noting_unit(folder: Path, unit: Any, *rest: Any) -> None:
        write_unit(folder, unit, *rest)
        note(f"{folder.parent.name}/{unit.name}")

    cvdd.artifact.store.seal, cvdd.chain.recover.write_unit = noting_seal, noting_unit


class Command:
    """A command that runs.

    Args:
        verb: which one.
        home: of its store.
        overrides: beside those that make it tiny.
    """

    def __init__(self, verb: str, home: Path, *overrides: str) -> None:
        number = 1 + len(list(home.glob("run*")))
        self.folder = home / f"run{number}"
        self.folder.mkdir(parents=True)
        places = [f"paths.store={home / 'store'}", f"paths.data={home / 'data'}", f"paths.output={self.folder / 'out'}"]
        arguments = [*TINY, *places, f"hydra.run.dir={self.folder / 'hydra'}", "trainer.threads=1", *overrides]
        self._process = FORKED.Process(target=_run, args=(verb, arguments, self.folder))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has said so far."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.exitcode is None

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; its exit code."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
        assert code is not None, f"it did not end:\n{self.log}"
        return code

    def finish(self) -> None:
        """Wait for its end, which is that of a command that did all it should."""
        code = self.end()
        assert code == 0, self.log

    def work_for(self, seconds: float) -> float:
        """Let it work on artefacts for some seconds of CPU time, whatever else the machine does; return how many.

        It has ended by itself if it needed fewer.
        """
        deadline = time.monotonic() + PATIENCE
        while self.alive and " making " not in self.log:
            assert time.monotonic() < deadline, self.log
            time.sleep(SECONDS_BETWEEN_LOOKS)
        begun = now = _cpu_seconds(self.pid) or 0.0
        while now - begun < seconds and self.alive:
            assert time.monotonic() < deadline, self.log
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = max(now, _cpu_seconds(self.pid) or now)
        return now - begun

    def send_after(self, seconds: float, number: int) -> bool:
        """Send a signal once it has worked for so long; return whether it was still there to get it."""
        self.work_for(seconds)
        if self.alive:
            os.kill(self.pid, number)
            return self.end() != 0
        return False

    def children(self) -> list[int]:
        """Processes that it has started."""
        return [int(child) for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


def _cpu_seconds(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Reference:
    """A store that was made by the four verbs, one after the other, without any interruption.

    Args:
        home: its place.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seconds = {}
        for verb in VERBS:
            command = Command(verb, home)
            self.seconds[verb] = command.work_for(float("inf"))
            command.finish()
        self.made = contents(home)

    def copy(self, home: Path, *without: str) -> Path:
        """Make a store of one's own which lacks some kinds of artefacts; return its place."""
        home.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns(".locks", ".users", ".partial")
        shutil.copytree(self.home / "store", home / "store", ignore=ignore, dirs_exist_ok=True)
        for kind in without:
            shutil.rmtree(home / "store" / kind)
        return home

    def without_verb(self, home: Path, verb: str) -> Path:
        """Make a store of one's own which has what the verbs before this one made."""
        verbs = list(VERBS)
        return self.copy(home, *(kind for later in verbs[verbs.index(verb) :] for kind in VERBS[later]))

    def require_same(self, home: Path, kinds: tuple[str, ...] = ()) -> None:
        """Demand the same bits of everything in a store, of such kinds if they are given, and that all is whole."""
        expected = {name: files for name, files in self.made.items() if not kinds or name.split("/")[0] in kinds}
        found = contents(home)
        assert expected
        different = {name: (found.get(name), made) for name, made in expected.items() if found.get(name) != made}
        assert not different, different
        assert verify_artifacts(home / "store") == 0
        assert unfinished(home / "store") == []


def contents(home: Path) -> dict[str, Any]:
    """Files with their checksums, and metrics, of all artefacts of a store."""
    made = {}
    for file in sorted((home / "store").glob("*/*/manifest.json")):
        manifest = json.loads(file.read_text())
        made[f"{file.parent.parent.name}/{file.parent.name}"] = (manifest["files"], manifest["metrics"])
    return made
