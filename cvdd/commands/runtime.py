"""What surrounds a job: threads, device, loggers and results."""

from __future__ import annotations

import contextlib
import gc
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cvdd.artifact import Artifact, Store, digest_of
from cvdd.chain.context import Context
from cvdd.chain.preflight import check_before_work
from cvdd.commands.ranks import all_ranks, in_silence
from cvdd.commands.unread_overrides import Alternative, warn_of_unread
from cvdd.composition.arguments import is_of_surroundings, unquoted
from cvdd.composition.launching import share_of_work
from cvdd.composition.portable import portable_override, what_is_made
from cvdd.running.distributed import World
from cvdd.running.jobs import sign_in
from cvdd.running.loggers import make_loggers, reporting_to
from cvdd.running.process import prepare_process
from cvdd.schema import RunConfig, with_overrides
from cvdd.support.hardware import machine_name
from cvdd.support.outcome import forget_results
from cvdd.support.provenance import made_by_other_code
from cvdd.support.refusals import require_writable
from cvdd.verbs import VERBS
from cvdd.verbs.made import Made

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


def run(config: RunConfig, invocation: Invocation) -> Made:
    """Do what a checked configuration says; what it would cost, if that is asked, makes nothing."""
    with _process_as_found():
        if config.cost:
            from cvdd.cost import show_cost

            show_cost(config, prepare_process(config))
            return Made()
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


def work_as(world: World, config: RunConfig, invocation: Invocation) -> Made:
    """Do what a checked configuration says as one of the ranks of a command."""
    if world.main:
        return _work(world, config, invocation)
    with in_silence(config) as quiet:
        return _work(world, quiet, invocation)


def _work(world: World, config: RunConfig, invocation: Invocation) -> Made:
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
        made = VERBS[config.verb](context, invocation_lines(config, invocation))
    _warn_of_other_code(context.store.opened)
    return made


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
