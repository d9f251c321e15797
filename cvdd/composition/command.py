"""A command's configuration: composed once more with other overrides, its rows written out, and checked.

Its imports are late where they take time, because whoever asks for help waits for this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cvdd.composition.arguments import key_of, prepare_row, says_what_is_made, unquoted
from cvdd.composition.config_directory import config_directory
from cvdd.composition.given_recipe import register_resolver
from cvdd.composition.launching import register_resolvers
from cvdd.composition.sweep import leaves

if TYPE_CHECKING:
    from cvdd.schema import RunConfig

# A job that a launcher starts composes before it calls anything, but to be unpickled it imports what imports this.
register_resolvers()
register_resolver()


def checked(composed: DictConfig, task: Sequence[str], debug: str | None) -> RunConfig:
    """Return the checked configuration of a command; its arguments are those of :func:`expanded`.

    Raises:
        ValueError: says what to type.
    """
    from cvdd.composition.validation import check

    return check(expanded(composed, task, debug))


def expanded(composed: DictConfig, task: Sequence[str], debug: str | None) -> DictConfig:
    """Return a command's configuration with its rows written out, and no more work for ``debug`` than without it.

    Args:
        composed: by Hydra.
        task: the overrides that it was composed with.
        debug: the file of that group which was chosen, if any.

    Raises:
        ConfigError: a row cannot be composed.
    """
    from cvdd.composition.rows import expand_rows

    once_more = partial(again, composed.verb)
    limits = debug_limits(debug)
    if limits:
        composed = _as_few_as_without(composed, once_more, task, limits)
    return expand_rows(composed, partial(once_more, task), limits, partial(once_more, []))


def _as_few_as_without(
    composed: DictConfig, once_more: Callable[..., DictConfig], task: Sequence[str], limits: Mapping[str, float]
) -> DictConfig:
    """Lower numbers that a file of ``debug`` has raised: a method that optimises nothing is not to begin with it."""
    from cvdd.composition.rows import NOT_COMPOSED

    try:
        plain = once_more([override for override in task if key_of(override) != "debug"], [])
    except NOT_COMPOSED:
        # What is wrong with it is told of the command itself.
        return composed
    typed = {key_of(override) for override in task}
    lowered = composed.copy()
    for key, limit in limits.items():
        number = OmegaConf.select(plain, key)
        if key not in typed and isinstance(number, (int, float)) and number < limit:
            OmegaConf.update(lowered, key, number)
    return lowered


def again(verb: str, task: Sequence[str], row: Sequence[str]) -> DictConfig:
    """Compose a command once more, with the overrides of a row at its end.

    Args:
        verb: of the command.
        task: its overrides, as Hydra was given them: quoted already, and perhaps with a choice of somebody's own.
        row: more, as they are typed.
    """
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


def without_each(config: RunConfig, composed: DictConfig, task: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """Yield overrides that say what is made, and the configuration of the same command without each of them."""
    from cvdd.composition.rows import NOT_COMPOSED, recomposed

    for index, override in enumerate(task):
        if says_what_is_made(override):
            others = [*task[:index], *task[index + 1 :]]
            # Others may need it, and without it there is no command to compare with.
            with contextlib.suppress(ValueError, *NOT_COMPOSED):
                yield unquoted(override), recomposed(config, composed, again(config.verb, others, []))


def debug_limits(choice: str | None) -> Mapping[str, float]:
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
