"""Lines of progress, where there is no terminal."""

from __future__ import annotations

import pytest

from cvdd.support import progress as module
from cvdd.support.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_what_takes_less_than_a_second_is_told_so(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with progress("lines", "work", 2) as advance:
        clock[0] += 0.2
        advance(1)
        clock[0] += 0.24
        advance(1)
    assert caplog.messages == ["work: 2 of 2 in 0.44 s"]


def test_a_line_now_and_then_says_what_is_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with progress("lines", "work", 100) as advance:
        for _ in range(3):
            clock[0] += 8.0
            advance(10)
    assert caplog.messages == ["work: 20 of 100 in 16 s, about 64 s left"]


def test_what_an_earlier_run_did_says_nothing_of_the_rate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with progress("lines", "work", 100) as advance:
        advance(60)
        clock[0] += 20.0
        advance(20)
    assert caplog.messages == ["work: 80 of 100 in 20 s, about 20 s left"]
