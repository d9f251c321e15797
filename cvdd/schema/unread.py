"""Settings that an engine of its own would ignore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel

SHARED = frozenset(
    {
        "name",
        "seed",
        "init",
        "iterations",
        "flip",
        "jitter",
        "classes_per_unit",
        "log_every",
        "grid_every",
        "checkpoint_every",
    }
)
"""Fields of the method that every engine reads, or that a data set's own file sets for all methods."""


def unread_settings(method: BaseModel, section: str, what: str, inits: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the settings around an engine's section: those of the recover loop would be ignored.

    Args:
        method: the whole method's configuration, in which the section is not null.
        section: of the engine, e.g. ``apm``.
        what: the engine does, for messages.
        inits: initial images that it starts from.
    """
    init = getattr(method, "init", None)
    if init not in inits:
        yield f"method.init={init}: {what} starts from {', '.join(inits[:-1])} or {inits[-1]}"
    for name, field in type(method).model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name != section and name not in SHARED and getattr(method, name) != default:
            yield (
                f"method.{name} is of the recover loop, which {what} (method.{section}) replaces; leave it at {default}"
            )
