"""How a job ends: messages for people, and an exit code that tells the truth."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from hydra.errors import CompactHydraException

from cvdd.config_base import ConfigError

log = logging.getLogger(__name__)

USER_ERROR = 2
INTERRUPTED = 130


class PointFailed(CompactHydraException):
    """One point of a multirun could not run; its message was printed when it failed.

    Hydra prints an error of its own kind without a stack trace and goes on with the next point.
    """


def is_for_users(error: BaseException) -> bool:
    """Whether an error was written by this project for its users, rather than by a defect."""
    return isinstance(error, ConfigError) or type(error).__module__.startswith("cvdd.")


@contextlib.contextmanager
def told(sweeping: bool) -> Iterator[None]:
    """Turn the errors of a job into messages and exit codes.

    Hydra reports the failures of a multirun only at its end, and only the first; so they are told here at once.

    Args:
        sweeping: whether the job is one point of a multirun.
    """
    try:
        yield
    except Exception as error:
        if is_for_users(error):
            # The message says what to type; a stack trace would only hide it.
            log.error("%s", error)
            if sweeping:
                raise PointFailed(str(error)) from None
            sys.exit(USER_ERROR)
        if sweeping:
            log.exception("this point of the sweep failed")
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code in (0, None):
            raise
        log.warning("interrupted; finished units and checkpoints are kept, and the same command goes on from them")
        sys.exit(INTERRUPTED)
