"""What a sweep does at the beginning and at the end of each of its points."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cvdd.composition.arguments import typed_overrides
from cvdd.composition.launching import share_of_work, speaks_for_all
from cvdd.composition.sweep import GROUP, STATE, SweepConfig, is_of_command, only_asks
from cvdd.support.outcome import forget_results

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Notes how far each point is, and writes the sweep's report after each.

    After each, because Hydra calls nothing at the end of a multirun with a failed point. A launcher may run points in
    other processes, each with a copy of this callback; of several that are ranks of one point only the first writes.

    Args:
        sweep: the fields of :class:`SweepConfig`.
    """

    def __init__(self, **sweep: Any) -> None:
        plain = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in sweep.items()
        }
        self.sweep = SweepConfig.model_validate(plain)
        self._verb = ""
        self._overrides: list[str] = []
        self._started = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep what was typed: Hydra gives a point its overrides rewritten, and once each."""
        self._verb = str(config.hydra.job.name)
        self._overrides = typed_overrides(config.hydra.overrides.task)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note that a point is being made, and remove what an earlier command measured there."""
        if not speaks_for_all(os.environ) or only_asks(config):
            return
        self._started = time.monotonic()
        if share_of_work()[0]:
            # Others work for this point already, and may have ended it.
            return
        self._note(config, "running")
        # Only after the note: until then the point is done for whoever reads the directory.
        forget_results(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note how a point ended, and write the report."""
        if not speaks_for_all(os.environ) or only_asks(config):
            # Its seconds are the first one's too, and that one may still be writing the results.
            return
        seconds = time.monotonic() - self._started
        if job_return.status is JobStatus.COMPLETED:
            self._note(config, "done", seconds=seconds)
        else:
            error = job_return._return_value
            self._note(config, "failed", str(error) or type(error).__name__, seconds)
        if config.hydra.mode.name == "MULTIRUN":
            from cvdd.report.sweeps import write_report

            page = write_report(Path(config.hydra.runtime.output_dir).parent)
            log.info("sweep: %s", page)

    def _note(self, config: DictConfig, status: str, error: str = "", seconds: float = 0.0) -> None:
        name = str(config.hydra.runtime.choices[GROUP])
        folder = Path(config.hydra.runtime.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "point": name,
            "status": status,
            "error": error,
            "node": self.sweep.node(name),
            "verb": self._verb,
            "overrides": self._overrides,
        }
        # Of all jobs that worked for this point, as the sweep's next command only finds what the last one has made.
        state["seconds"] = round(_seconds_of(folder / STATE, state) + seconds, 3)
        # Only here, as whoever asks for help waits for what this module imports.
        from cvdd.artifact.files import write_atomically

        write_atomically(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())


def _seconds_of(path: Path, state: Mapping[str, Any]) -> float:
    """Seconds that earlier jobs worked for the same point of the same command."""
    try:
        earlier = json.loads(path.read_text())
        same = earlier["node"] == state["node"] and is_of_command(earlier, state["verb"], state["overrides"])
        return float(earlier["seconds"]) if same else 0.0
    except (OSError, ValueError, KeyError):
        return 0.0
