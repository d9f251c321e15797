"""Running out of memory, in words for users: what needs less of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


class OutOfMemory(RuntimeError):
    """The device, or the machine, has too little memory for a step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short.

    PyTorch's own class is known by its words, so that nothing here imports it; on the CPU it has none.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


@contextlib.contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory into an error that says what to type; any other error passes.

    Args:
        what: the step, for people.
        advice: the overrides that need less, with their present values.

    Raises:
        OutOfMemory: the body ran out of memory.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or ["no more memory"])[0]
        raise OutOfMemory(
            f"out of memory: {what} ({first}). {advice}. What is finished and the last checkpoints are kept."
        ) from error
