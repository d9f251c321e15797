"""Steps on a GPU that are recorded once, as CUDA graphs, and then launched as a whole.

A step of small networks is thousands of kernels, each of which takes the processor longer to launch than the GPU to
compute. A recorded step is one launch, with the same kernels and the same bits.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cvdd.support.memory import is_out_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 2
"""To record a step. What else a process does with the GPU at that moment can spoil one."""

WARM_UP_CALLS = 2
"""Calls before a step is recorded: compilers, choices of kernels and lazily made state belong to the first ones."""

MOST_RECORDED = 16
"""Shapes that a step is recorded for; each holds memory."""


@dataclass(frozen=True)
class _Recording:
    """A recorded call: where its arguments are expected, and where its results appear."""

    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    results: Any


class Recorded:
    """A function of tensors that is recorded for each shape of its arguments, and replayed from then on.

    Every call has the function's effects exactly once, be it computed or replayed. The function must do the same on the
    device whatever the values of its arguments, never wait for the device, and change tensors only in place.

    Where recording fails, a warning says so once, and the function is computed as it is.

    Args:
        function: returns tensors, in lists, tuples or dicts. Replayed results are overwritten by the next call.
        device: a GPU.
        what: it is, for the warning.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, what: str) -> None:
        self._function, self._what = function, what
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failures = 0

    def __call__(self, *arguments: Tensor) -> Any:
        """Call the function."""
        key = tuple((argument.shape, argument.dtype) for argument in arguments)
        known = self._recordings.get(key)
        if known is None:
            self._calls[key] += 1
            full = len(self._recordings) >= MOST_RECORDED
            if self._failures == ATTEMPTS or full or self._calls[key] <= WARM_UP_CALLS:
                return self._compute(arguments)
            known = self._record(arguments)
            if known is None:
                return self._compute(arguments)
            self._recordings[key] = known
        for expected, given in zip(known.arguments, arguments, strict=True):
            expected.copy_(given, non_blocking=True)
        known.graph.replay()
        return known.results

    def _compute(self, arguments: Sequence[Tensor]) -> Any:
        # On the stream of the recording, where libraries have the workspaces that it will use.
        with _aside(self._stream):
            return self._function(*arguments)

    def _record(self, arguments: Sequence[Tensor]) -> _Recording | None:
        held = tuple(argument.clone() for argument in arguments)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            with (
                _no_garbage(),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                results = self._function(*held)
        except RuntimeError as error:
            torch.cuda.set_stream(here)
            # What ends a recording that failed may fail too, and hide why.
            _abandon(self._stream.device, self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            if any(is_out_of_memory(cause) for cause in _causes(error)):
                raise MemoryError(f"no more memory on {held[0].device if held else 'the GPU'}") from error
            self._failures += 1
            if self._failures < ATTEMPTS:
                return None
            first = list(_causes(error))[-1]
            log.warning(
                "%s cannot be recorded as a CUDA graph and is launched kernel by kernel, which takes longer (%s)",
                self._what,
                str(first).splitlines()[0] if str(first) else type(first).__name__,
            )
            return None
        return _Recording(graph, held, results)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Free what nobody refers to now, and nothing inside: a graph that is freed spoils one that is being recorded."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _abandon(device: torch.device, pool: Any) -> None:
    """Let go of the memory of a recording that could not be ended: PyTorch does so only for one that was.

    The allocator would otherwise go on as if it were recorded to, and never give these blocks to anything else.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        # It was ended, and its graph lets go.
        return
    torch._C._cuda_releasePool(index, pool)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Use another stream inside, after what was launched before, and before what is launched afterwards."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


def side_by_side(calls: Sequence[Callable[[], Result]], streams: Sequence[torch.cuda.Stream]) -> Iterable[Result]:
    """Make independent calls so that the GPU may compute them at the same time; return their results in order.

    Args:
        calls: that do not depend on each other.
        streams: one for each call; none to make each when its result is asked for, so that memory holds one at a time.
    """
    if len(streams) < len(calls):
        return (call() for call in calls)
    here = torch.cuda.current_stream(streams[0].device)
    results = []
    try:
        for call, stream in zip(calls, streams, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(call())
    finally:
        # Also when a call fails: a recording whose streams are not joined cannot be ended, nor its memory freed.
        for stream in streams[: len(calls)]:
            here.wait_stream(stream)
    return results


def draws_by_itself(network: nn.Module) -> bool:
    """Whether a network in training mode draws random numbers: it has dropout of some kind, or stochastic depth."""
    return any(
        module.p > 0
        if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepth))
        else "Drop" in type(module).__name__
        for module in network.modules()
    )
