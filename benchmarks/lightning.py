"""What share of training Lightning takes for itself: ``python -m benchmarks.lightning --help``.

Measured are the calls that do the work: the steps, backward passes and updates. What is left of the time from the
first to the last of them is Lightning's. On a GPU, which computes meanwhile, it need not make anything take longer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks import engine
from benchmarks.cases import Case, make_program
from benchmarks.limits import usable_device

CASES = {
    "images of digits": Case(
        "recover", "digits", ("resnet18", "mobilenetv2"), 10, 200, units=10, overrides=("engine.compile=false",)
    ),
    "students of digits": Case("student", "digits", ("mobilenetv2",), 100, 20),
    "members of digits": Case("committee", "digits", ("resnet18",), 1280, 4),
    "students of CIFAR-10": Case("student", "cifar", ("resnet18",), 100, 2),
}


class Share:
    """Watches one fit of Lightning.

    Attributes:
        working: seconds of the calls that do the work.
        whole: seconds from the start of the first to the end of the last.
    """

    def __init__(self) -> None:
        self.working, self.whole, self._began, self._inside = 0.0, 0.0, 0.0, False

    def watch(self, module: pl.LightningModule) -> None:
        """Measure what a module does."""
        for name in ("training_step", "backward"):
            setattr(module, name, self._timed(getattr(module, name)))
        configure = module.configure_optimizers

        def configured() -> Any:
            made = configure()
            optimizer: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
            optimizer.register_step_post_hook(lambda *arguments: self._note(time.perf_counter()))
            return made

        module.configure_optimizers = configured  # type: ignore[method-assign]

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            if not self._began:
                self._began = started
            self._inside = True
            result = work(*arguments, **options)
            self._inside = False
            self._ended = time.perf_counter()
            self.working += self._ended - started
            self.whole = self._ended - self._began
            return result

        return timed

    def _note(self, now: float) -> None:
        """An update that was not part of a step ended: what came since the last backward pass is work too."""
        if not self._inside and self._began:
            self.working += now - self._ended
            self.whole = now - self._began


def shares(case: Case, device: torch.device) -> Share:
    """Train once, watched."""
    share, fit = Share(), engine.fit

    def watched(config: Any, module: pl.LightningModule, *arguments: Any, **options: Any) -> float:
        share.watch(module)
        return fit(config, module, *arguments, **options)

    with tempfile.TemporaryDirectory() as folder:
        program = make_program(case, "engine", device, Path(folder))
        program()
        engine.fit = watched
        try:
            program()
        finally:
            engine.fit = fit
    return share


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="of which the median is shown")
    wanted = parser.parse_args()
    device = usable_device()
    for name, case in CASES.items():
        taken = [shares(case, device) for _ in range(wanted.repetitions)]
        parts = sorted(1 - share.working / share.whole for share in taken)
        print(f"{name}: {100 * parts[len(parts) // 2]:.2f} % of {taken[0].whole:.1f} s ({device.type})", flush=True)


if __name__ == "__main__":
    main()
