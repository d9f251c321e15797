"""What was made on another kind of machine, where ``engine=auto`` came to something else, is used as it is.

Images distilled on a GPU, in half precision, are not distilled again because the students are trained without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cvdd.artifact import Artifact
from cvdd.chain.context import Context


def as_it_was_made(
    context: Context,
    kind: str,
    identity: Mapping[str, Any],
    parents: Sequence[Artifact],
    here: Mapping[str, Any],
    elsewhere: Sequence[Mapping[str, Any]],
    typed: str,
) -> dict[str, Any]:
    """Return how an artefact was computed, if it is there; otherwise how this machine computes it.

    Args:
        context: whose store is looked into.
        kind: of the artefact.
        identity: all of it but how it is computed.
        parents: it is made from.
        here: what this machine adds to the identity.
        elsewhere: what others may add with the same configuration.
        typed: overrides that leave nothing to the machine, for the message.
    """
    for way in (here, *elsewhere):
        sealed = context.store.sealed(kind, {**identity, **way}, parents)
        if sealed is None:
            continue
        if way != here:
            context.tell(
                f"{kind}/{sealed.name} was made on another kind of machine; to make it as this one does: {typed}"
            )
        return dict(way)
    return dict(here)
