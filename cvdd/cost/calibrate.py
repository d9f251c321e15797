"""How long each kind of step takes on this machine, from about ten seconds of real ones."""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.artifact import Store, write_atomically
from cvdd.chain.context import Context
from cvdd.computing.footprint import Profile, free_memory, profile
from cvdd.cost.fakes import Run, Scale, run_of, scale_of
from cvdd.cost.recovering import COMPILE_SECONDS, COMPILED_SHARE
from cvdd.cost.steps import (
    MeasureStep,
    MoveStep,
    Network,
    Overhead,
    PatchStep,
    ReplayStep,
    ScoreStep,
    Step,
    VoteStep,
)
from cvdd.running.distributed import World
from cvdd.synthesis.patches import SCORED_AT_ONCE

log = logging.getLogger(__name__)

Clock = Callable[[], float]

SECONDS = 10.0
"""Time for all distinct steps together."""

LEAST_SECONDS, MOST_SECONDS = 0.1, 1.0
"""Time for one of them."""

_REPEATS = 15
_SLOW = 0.2
"""Share of the machine's matrix rate that a slow network reaches."""


class Profiles:
    """FLOPs and bytes of networks, each counted once; and the networks themselves, each built once."""

    def __init__(self) -> None:
        self._profiles: dict[tuple[Network, str], Profile] = {}
        self._networks: dict[str, nn.Module] = {}

    def __call__(self, network: Network, mode: str) -> Profile:
        """Return what one image costs."""
        key = (network, mode)
        if key not in self._profiles:
            self._profiles[key] = profile(self._built(network), network.classes, network.size, mode)  # type: ignore[arg-type]
        return self._profiles[key]

    def build(self, network: Network) -> nn.Module:
        """Return a copy of a network."""
        return copy.deepcopy(self._built(network))

    def _built(self, network: Network) -> nn.Module:
        # The same network serves all sizes of images.
        key = f"{network.backbone} {network.classes}"
        if key not in self._networks:
            self._networks[key] = network.build()
        return self._networks[key]


def time_steps(
    steps: Iterable[Step],
    profiles: Profiles,
    context: Context,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
) -> dict[Step, float]:
    """Time steps; those that would take too long, or too much memory, in a smaller batch.

    Args:
        steps: which; repeated ones are timed once.
        profiles: of their networks.
        context: on its device; nothing is written but into a temporary folder.
        seconds: for all together, roughly.
        clock: what is read before and after; that of the process does not see what else the machine does.

    Returns:
        seconds of each.
    """
    wanted = list(dict.fromkeys(steps))
    times: dict[Step, float] = {}
    real = [step for step in wanted if not isinstance(step, Overhead)]
    if len(real) < len(wanted):
        around = _overheads(context, clock)
        times = {step: around[step.of] for step in wanted if isinstance(step, Overhead)}
    limit = min(max(seconds / max(len(real), 1), LEAST_SECONDS), MOST_SECONDS)
    rate = _matrix_rate(context.device, clock) if real else 0.0
    free = free_memory(context.device)
    with torch.random.fork_rng(devices=[]), context.progress("calibrate", len(real)) as advance:
        for step in real:
            times[step] = _time_step(step, scale_of(step, profiles), profiles, context.device, limit, rate, free, clock)
            advance(1)
    return times


def _time_step(
    step: Step,
    scale: Scale,
    profiles: Profiles,
    device: torch.device,
    limit: float,
    rate: float,
    free: float,
    clock: Clock,
) -> float:
    whole = _whole(step, scale)
    # A third: a warm-up comes before it, and a network may be slower than thought.
    calls = step.settings.iterations if isinstance(step, MoveStep) else 1
    affordable = limit / 3 * rate * _SLOW * scale.size / max(calls * scale.flops, 1.0)
    if scale.bytes > free / 4:
        affordable = min(affordable, whole * free / 4 / scale.bytes)
    images = whole if affordable >= whole else max(int(affordable), scale.least)
    images = min(images, whole)
    run = run_of(step, images, profiles.build, device)
    taken = _median(run, device, limit, clock)
    if isinstance(step, VoteStep) and step.engine.compile:
        taken *= COMPILED_SHARE
    log.debug("%s: %d of %d images in %.4f s", type(step).__name__, images, whole, taken)
    return taken / calls * scale.size / images


def _whole(step: Step, scale: Scale) -> int:
    """Images in one call, for steps that are counted image by image."""
    if isinstance(step, ScoreStep):
        # A few batches show how they fare together.
        return step.settings.batch_size * min(step.settings.stack, 10)
    if isinstance(step, ReplayStep):
        return step.settings.batch_size * min(step.settings.stack, 10)
    if isinstance(step, MeasureStep):
        return step.batch
    if isinstance(step, PatchStep):
        # As many as are scored in one forward pass.
        return max(SCORED_AT_ONCE // step.settings.crops, step.settings.factor**2)
    return scale.size


def _median(run: Run, device: torch.device, limit: float, clock: Clock) -> float:
    """Median time of a call after one that warms up; a single one if that is all the time there is."""
    begin = clock()
    run()
    _wait(device)
    if clock() - begin > 4 * limit:
        # Slower than thought: what was measured is better than as long again.
        return clock() - begin
    taken: list[float] = []
    while len(taken) < _REPEATS and (not taken or sum(taken) < limit):
        begin = clock()
        run()
        _wait(device)
        taken.append(clock() - begin)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix_rate(device: torch.device, clock: Clock) -> float:
    """FLOPs per second of a product of matrices."""
    side = 4096 if device.type == "cuda" else 512
    one = torch.randn(side, side, device=device)
    return 2 * side**3 / _median(lambda: one @ one, device, 0.05, clock)


class _Trivial(pl.LightningModule):
    """Training that costs nothing but what Lightning adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _overheads(context: Context, clock: Clock) -> dict[str, float]:
    """Seconds of what happens around steps."""
    context = replace(context, world=World())
    with _no_news(), tempfile.TemporaryDirectory(prefix="cvdd-cost-") as folder:
        place = Path(folder)

        def fit(epochs: int, batches: int) -> Callable[[], None]:
            loader: DataLoader[Tensor] = DataLoader(list(torch.ones(batches, 1, 1)), batch_size=None)  # type: ignore[arg-type]
            return lambda: context.fit(_Trivial(), loader, epochs, place / "cost.ckpt.tmp")

        one = _once(fit(1, 1), clock, warm=True)
        many = _once(fit(31, 1), clock)
        long = _once(fit(1, 201), clock)
        epoch, batch = max(many - one, 0.0) / 30, max(long - one, 0.0) / 200
        store, numbers = Store(place / "store"), iter(range(100))

        def seal() -> None:
            store.make("cost", "small", {"number": next(numbers)}, [], _write_little)

        artifact = _once(seal, clock, warm=True)
        part = _once(lambda: write_atomically(place / "part", b"0" * 100_000), clock, warm=True)
        megabytes = 16
        large = _once(lambda: store.make("cost", "large", {}, [], lambda work: _write(work, megabytes)), clock)
        return {
            # Its one epoch has one batch.
            "fit": max(one - epoch, 0.0),
            "epoch": max(epoch - batch, 0.0),
            "batch": batch,
            "artifact": artifact,
            "part": part,
            "compile": COMPILE_SECONDS,
            "megabyte": max(large - artifact, 0.0) / megabytes,
        }


@contextlib.contextmanager
def _no_news() -> Iterator[None]:
    """Keep a store that is thrown away from saying what it makes."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _once(run: Callable[[], object], clock: Clock, *, warm: bool = False) -> float:
    if warm:
        run()
    begin = clock()
    run()
    return clock() - begin


def _write_little(work: Path) -> dict[str, int]:
    write_atomically(work / "file", b"0" * 10_000)
    return {}


def _write(work: Path, megabytes: int) -> dict[str, int]:
    write_atomically(work / "file", b"0" * (megabytes * 1_000_000))
    return {}
