"""Recording itself: calls that become CUDA graphs, and those that cannot."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cvdd.computing.graphs import WARM_UP_CALLS, Recorded, _abandon

CPU = torch.device("cpu")


@pytest.mark.gpu
def test_every_call_has_its_effects_once() -> None:
    total = torch.zeros(3, device="cuda")

    def add(values: Tensor) -> dict[str, Tensor]:
        total.add_(values.sum())
        return {"double": 2 * values}

    recorded = Recorded(add, torch.device("cuda"), "adding")
    expected = 0.0
    for number in range(WARM_UP_CALLS + 4):
        for count in (2, 3):
            found = recorded(torch.full((count,), float(number), device="cuda"))
            expected += number * count
            assert found["double"].tolist() == [2.0 * number] * count
            assert total.tolist() == [expected] * 3
    assert len(recorded._recordings) == 2


class _Graph:
    """Stands for a CUDA graph: replays what was called while it was recorded; so many recordings fail."""

    failing: ClassVar[int] = 0

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1

    @staticmethod
    @contextlib.contextmanager
    def recording(graph: _Graph, **options: Any) -> Iterator[None]:
        assert not gc.isenabled()
        yield
        if _Graph.failing:
            _Graph.failing -= 1
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("failing", "calls", "warned"),
    [
        (0, [0, 1, 2], False),
        (1, [0, 1, 2, 2, 3], False),
        (2, [0, 1, 2, 2, 3, 3, 4, 5], True),
    ],
)
def test_a_recording_that_is_spoilt_is_tried_once_more(
    failing: int, calls: list[float], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a GPU of paper: calls that fail to be recorded are computed, and so are all after the second of them."""
    stream = SimpleNamespace(device=CPU, wait_stream=lambda other: None)
    paper = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "set_stream": lambda given: None,
        "stream": lambda given: contextlib.nullcontext(),
        "graph_pool_handle": object,
        "CUDAGraph": _Graph,
        "graph": _Graph.recording,
    }
    for name, stand_in in paper.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    pools: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: pools.append("ended"))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: pools.append("released"))
    monkeypatch.setattr(_Graph, "failing", failing)
    made: list[float] = []
    recorded = Recorded(lambda values: made.append(float(values)) or values, CPU, "a step")  # type: ignore[func-returns-value]
    for number in range(6):
        recorded(torch.tensor(float(number)))
    # Two calls come before; a recording calls it too, and what was not recorded is computed.
    assert made == calls
    assert bool([record for record in caplog.records if record.levelno >= logging.WARNING]) is warned
    assert len(recorded._recordings) == (0 if warned else 1)
    assert gc.isenabled()
    assert pools == ["ended", "released"] * failing


def test_memory_of_an_ended_recording_is_left_to_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(index: int, pool: object) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: pytest.fail("released twice"))
    _abandon(torch.device("cuda", 0), (0, 1))


@pytest.mark.gpu
def test_what_waits_for_the_device_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros((), device="cuda")

    def impatient(values: Tensor) -> Tensor:
        torch.zeros(2**26, device="cuda").add_(1)
        total.add_(1)
        return values * float(values.sum().item())

    recorded = Recorded(impatient, torch.device("cuda"), "waiting")
    with caplog.at_level(logging.WARNING):
        for number in range(1, WARM_UP_CALLS + 4):
            assert recorded(torch.ones(2, device="cuda")).tolist() == [2.0, 2.0]
            assert total.item() == number
    (warning,) = caplog.records
    assert "waiting cannot be recorded" in warning.getMessage()
    # And the device is as good as before, all of its memory included.
    assert torch.ones(2, device="cuda").sum().item() == 2
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < 2**27
