"""Where commands print: a terminal has a width, a pipe and a file have none."""

from __future__ import annotations

import os

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNFOLDED = 10**6
"""Columns of what is no terminal; names and paths there are searched for, and copied by programs."""


def new_console() -> Console:
    """Return a console that folds lines for a terminal, or for ``COLUMNS``, alone."""
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Console(width=UNFOLDED)


def new_table(title: str) -> Table:
    """Return an empty table in the style of all that is printed."""
    return Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")


def print_table(table: Table) -> None:
    """Print a table, as narrow as it must be."""
    console = new_console()
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        # Narrow gaps are easier to read than names in two lines.
        table.padding = 0
        table.show_edge = False
    console.print(table)
