"""Where commands print: a terminal has a width, a pipe and a file have none."""

from __future__ import annotations

import os

from rich.console import Console

UNFOLDED = 10**6
"""Columns of what is no terminal; names and paths there are searched for, and copied by programs."""


def new_console() -> Console:
    """Return a console that folds lines for a terminal, or for ``COLUMNS``, alone."""
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Console(width=UNFOLDED)
