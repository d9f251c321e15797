"""How long an artefact took: each process by itself, and all of them on one clock."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cvdd.artifact import Store
from cvdd.artifact.sessions import FOLDER, Session, Span, process_seconds, read_sessions, wall_seconds


@pytest.mark.parametrize(
    ("spans", "wall"),
    [
        ([], 0),
        ([Span(100, 50)], 50),
        # Interrupted for 50 s.
        ([Span(200, 30), Span(100, 50)], 80),
        # Side by side for 20 s.
        ([Span(100, 50), Span(130, 40)], 70),
        # The second and the third lie within the first.
        ([Span(100, 50), Span(110, 20), Span(120, 20), Span(140, 20)], 60),
        ([Span(100, 50), Span(100, 50)], 50),
        ([Span(100, 50), Span(150, 50)], 100),
    ],
)
def test_time_is_counted_once_on_the_clock(spans: list[Span], wall: float) -> None:
    assert wall_seconds(spans) == wall
    assert process_seconds(spans) == sum(span.seconds for span in spans)


def test_a_manifest_has_both(tmp_path: Path) -> None:
    def build(work: Path) -> Mapping[str, Any]:
        (work / FOLDER).mkdir()
        (work / FOLDER / "one.txt").write_text("100.000 1000.000")
        (work / FOLDER / "two.txt").write_text("80.000 1050.000")
        return {}

    cost = Store(tmp_path).make("things", "thing", {}, [], build).manifest["cost"]
    # And the moment that it really took.
    assert cost["wall_seconds"] == pytest.approx(130, abs=10)
    assert cost["process_seconds"] == pytest.approx(180, abs=10)
    assert cost["sessions"] == 3


def test_a_session_says_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.25)
    session = Session(tmp_path)
    session.started -= 12
    session.note(last=True)
    (span,) = read_sessions(tmp_path)
    assert (span.began, span.seconds) == (1_700_000_000.25, pytest.approx(12, abs=5))


def test_sessions_of_earlier_versions_end_where_they_were_noted(tmp_path: Path) -> None:
    """Their files have only the seconds; what was cut short while it was written counts nothing."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "old.txt").write_text("60.000")
    os.utime(tmp_path / FOLDER / "old.txt", (1000, 1000))
    (tmp_path / FOLDER / "new.txt").write_text("20.000 990.000")
    (tmp_path / FOLDER / "cut.txt").write_text("")
    (tmp_path / FOLDER / "garbled.txt").write_text("\0\0\0")
    spans = read_sessions(tmp_path)
    assert sorted(spans, key=lambda span: span.began) == [Span(940, 60), Span(990, 20)]
    assert wall_seconds(spans) == 70
