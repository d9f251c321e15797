"""How long an artefact took: each process by itself, and all of them on one clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
        noted = {"began": 1050.0, "seconds": 80.0, "peak": 2**60, "machine": "NVIDIA H200"}
        (work / FOLDER / "two.json").write_text(json.dumps(noted))
        return {}

    cost = Store(tmp_path, "a processor").make("things", "thing", {}, [], build).manifest["cost"]
    # And the moment that it really took.
    assert cost["wall_seconds"] == pytest.approx(130, abs=10)
    assert cost["process_seconds"] == pytest.approx(180, abs=10)
    assert cost["sessions"] == 3
    # Of the process that needed most, and on what each ran, where that was noted.
    assert cost["peak_memory_bytes"] == 2**60
    assert cost["machines"] == {"NVIDIA H200": 80.0, "a processor": pytest.approx(0, abs=10)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others cannot begin anew with the highest size")
def test_the_peak_of_an_artefact_is_its_own(tmp_path: Path) -> None:
    """In a process of its own, which has held nothing yet."""
    code = f"""
from pathlib import Path
from cvdd.artifact import Store
store = Store(Path({str(tmp_path)!r}))
peaks = []
for name, size in (("large", 300_000_000), ("small", 1)):
    made = store.make("things", name, {{"name": name}}, [], lambda work: {{"sum": sum(bytearray(size)[::4096])}})
    peaks.append(made.manifest["cost"]["peak_memory_bytes"])
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    large, small = map(int, done.stdout.split())
    assert large - small > 250_000_000


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
