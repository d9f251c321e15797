"""What commands print into a pipe is not folded."""

from __future__ import annotations

import pytest
from rich.table import Table

from cvdd.support.console import new_console, new_table, print_table

NAME = "store/images/" + "digits_photo-" * 12 + "0123456789ab"


def table_with(name: str) -> Table:
    table = new_table("a title")
    table.add_column("path", overflow="fold")
    table.add_row(name)
    return table


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_pipe_gets_names_and_sentences_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(table_with(NAME))
    new_console().print("word " * 50)
    lines = lines_of(capsys)
    assert NAME in lines
    assert lines[-1] == ("word " * 50).strip()


@pytest.mark.parametrize("variable", ["COLUMNS", "FORCE_COLOR"])
def test_a_terminal_and_who_asks_for_a_width_get_folded_lines(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv(variable, "80")
    print_table(table_with(NAME))
    lines = lines_of(capsys)
    assert NAME not in lines
    assert NAME in "".join(lines)
