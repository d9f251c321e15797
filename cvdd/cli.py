"""The four commands. Only Hydra is imported here, so that help and completion are quick."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from cvdd.composition.arguments import ArgumentError, prepare, prepare_row, says_what_is_made, typed_overrides, unquoted
from cvdd.composition.composable import require_composable, said_of_yaml
from cvdd.composition.config_directory import config_directory
from cvdd.composition.given_recipe import register_resolver
from cvdd.composition.launching import (
    check_launcher,
    check_multirun,
    launcher_field,
    register_resolvers,
    require_launcher,
    share_of_work,
    speaks_for_all,
)
from cvdd.composition.sweep import GROUP, leaves, only_asks, with_points
from cvdd.support.outcome import USER_ERROR, outcome_kept, reader_may_go, told

if TYPE_CHECKING:
    from cvdd.schema import RunConfig

# A job that a launcher starts composes before it calls anything of this module but imports it to be unpickled.
register_resolvers()
register_resolver()


def _help(part: str, verb: str) -> str:
    from cvdd.composition.help import help_part

    return help_part(part, verb, sys.argv[0])


def _command(verb: str) -> None:
    try:
        require_launcher(sys.argv[1:])
        sys.argv[1:] = with_points(prepare(sys.argv[1:], config_directory()), config_directory())
        require_composable(verb, sys.argv[1:], config_directory())
    except (ArgumentError, YAMLError) as error:
        print(said_of_yaml(error) if isinstance(error, YAMLError) else error, file=sys.stderr)
        sys.exit(USER_ERROR)
    OmegaConf.register_new_resolver("cvdd_help", _help, replace=True)
    with reader_may_go():
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(_run)()


def _again(verb: str, task: Sequence[str], row: Sequence[str]) -> DictConfig:
    from hydra import compose

    # What was typed is quoted already, and may choose a file of somebody's own.
    return compose(verb, [*task, *prepare_row(row, config_directory(), certain=not _more_sources())])


def _more_sources() -> list[Any]:
    """List the places of configuration that somebody added; a job of a launcher has no arguments that would say so."""
    ours = config_directory().resolve()
    if not HydraConfig.initialized():
        # Composed by somebody else, from what is ours.
        return []
    return [
        source
        for source in HydraConfig.get().runtime.config_sources
        if source.provider.startswith(("command-line", "hydra.searchpath"))
        or (source.provider == "main" and Path(source.path).resolve() != ours)
    ]


def _without_each(config: RunConfig, composed: DictConfig, task: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """Yield overrides that say what is made, and the configuration of the same command without each of them."""
    from cvdd.composition.rows import NOT_COMPOSED, recomposed

    for index, override in enumerate(task):
        if says_what_is_made(override):
            others = [*task[:index], *task[index + 1 :]]
            # Others may need it, and without it there is no command to compare with.
            with contextlib.suppress(ValueError, *NOT_COMPOSED):
                yield unquoted(override), recomposed(config, composed, _again(config.verb, others, []))


def debug_limits(choice: str | None) -> dict[str, float]:
    """Return the numbers of a file of ``debug`` by their fields: rows of a comparison have no larger ones."""
    folders = [config_directory(), *(Path(source.path) for source in _more_sources() if source.schema == "file")]
    files = (folder / "debug" / f"{choice}.yaml" for folder in folders)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    tree: Any = OmegaConf.to_container(OmegaConf.load(file))
    limits: dict[str, float] = {}
    for other in tree.pop("defaults", []):
        limits |= debug_limits(other)
    return limits | {key: value for key, value in leaves(tree) if type(value) in (int, float)}


def _run(composed: DictConfig) -> float | None:
    settings = HydraConfig.get()
    task = typed_overrides(settings.overrides.task)
    sweeping = settings.mode is RunMode.MULTIRUN
    kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    # Whoever asks what a sweep costs has not begun it.
    if sweeping and speaks_for_all(os.environ) and not only_asks(composed):
        folder = Path(settings.runtime.output_dir)
        kept = outcome_kept(folder, settings.job.name, task, begins=not share_of_work()[0])
    with kept, told(sweeping):
        from cvdd.composition.rows import expand_rows
        from cvdd.composition.validation import check

        limits = debug_limits(settings.runtime.choices.get("debug"))
        again = partial(_again, composed.verb)
        config = check(expand_rows(composed, partial(again, task), limits, partial(again, [])))
        launcher = settings.runtime.choices["hydra/launcher"]
        check_launcher(config.trainer, launcher, launcher_field("tasks_per_node"), sweeping)
        check_multirun(config.trainer, launcher, sweeping)
        # PyTorch and Lightning are imported only once it is known that there is something to do.
        from cvdd.commands.runtime import Invocation, run

        choices, sweep = settings.runtime.choices, Path(settings.sweep.dir).name if sweeping else None
        point = (str(choices["sweep"]), str(choices[GROUP])) if choices.get(GROUP) else None
        without_each = partial(_without_each, config, composed, task)
        return run(config, Invocation(tuple(task), sweep, without_each, point))


def train() -> None:
    """Train the committee."""
    _command("train")


def distill() -> None:
    """Make synthetic images."""
    _command("distill")


def relabel() -> None:
    """Make soft labels."""
    _command("relabel")


def evaluate() -> None:
    """Train students on the distilled set and measure them beside the baselines."""
    _command("evaluate")
