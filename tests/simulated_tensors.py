"""Tensors on a simulated GPU (``simulated_gpu.py``), and the device that they lie on."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

PLACE = torch.device("cuda", 0)
CPU = torch.device("cpu")

MIXED = {
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations that take tensors of both devices."""

WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operations whose results the processor waits for."""

Call = tuple[Callable[..., Any], Any, Any, Any]


class Graph:
    """A CUDA graph."""

    def __init__(self, gpu: Device) -> None:
        self.calls: list[Call] = []
        self._gpu = gpu

    def replay(self) -> None:
        """Compute again what was recorded, into the memory that it was computed into."""
        self._gpu.replayed += 1
        for function, arguments, options, recorded in self.calls:
            out = function(*arguments, **options)
            for known, values in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                # What was written to, or is looked at otherwise, is there already.
                if isinstance(known, Tensor) and known.data_ptr() != values.data_ptr():
                    known.copy_(values)


@dataclass
class Device:
    """What a simulated GPU has done.

    Attributes:
        launches: operations that were computed on it, replays apart.
        waits: how often the processor waited for it, by what for; copies from the CPU, which it may wait for, included.
        recorded: graphs.
        replayed: graphs, each time.
        largest: bytes of the largest tensor that it has held.
        room: bytes of the largest tensor that it has room for; none for any.
    """

    launches: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    recorded: int = 0
    replayed: int = 0
    largest: int = 0
    room: int | None = None
    _recording: list[Call] | None = field(default=None, repr=False)
    _undo: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def wait(self, what: object) -> None:
        """Let the processor wait for the device."""
        if self._recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        self.waits[str(what)] += 1

    def compute(self, function: Any, arguments: Any, options: dict[str, Any]) -> Any:
        """Compute an operation of PyTorch some of whose tensors, or whose results, lie on the device."""
        given = tree_leaves((arguments, options))
        if options.get("device") == CPU and any(isinstance(values, OnGpu) for values in given):
            # Asked by PyTorch's own code, for which these lie on the CPU; Python code asks by OnGpu.to.
            options = {**options, "device": PLACE}
        asked = None if options.get("device") is None else torch.device(options["device"])
        self._check(function, given, asked)
        held_arguments, held_options = tree_map_only(OnGpu, lambda values: values.held, (arguments, options))
        if asked is not None and asked.type == "cuda":
            held_options = held_options | {"device": CPU}
        if self._recording is not None:
            self._undo += [(values, values.clone()) for values in _written(function, held_arguments, held_options)]
        out = function(*held_arguments, **held_options)
        self.launches += 1
        if asked is not None and asked.type != "cuda":
            return out
        made = [values for values in tree_leaves(out) if isinstance(values, Tensor)]
        needed = max((values.untyped_storage().nbytes() for values in made), default=0)
        if self.room is not None and needed > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {needed} bytes")
        self.largest = max(self.largest, needed)
        if self._recording is not None:
            self._recording.append((function, held_arguments, held_options, out))
        if torch.Tag.inplace_view in function.tags:
            # What lies on the GPU only says its shape, and says the new one.
            with no_dispatch():
                function(*arguments, **options)
        # What an operation writes to is returned as it came.
        known = {
            id(values.held if isinstance(values, OnGpu) else values): values
            for values in given
            if isinstance(values, Tensor)
        }
        assert all(known[id(values)].shape == values.shape for values in made if id(values) in known), function
        return tree_map_only(
            Tensor, lambda values: known[id(values)] if id(values) in known else OnGpu(values, self), out
        )

    def _check(self, function: Any, given: Sequence[Any], asked: torch.device | None) -> None:
        tensors = [values for values in given if isinstance(values, Tensor)]
        here = [values for values in tensors if not isinstance(values, OnGpu)]
        apart = len(here) < len(tensors) and any(values.dim() > 0 for values in here)
        if apart and function not in MIXED:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(in {function})"
            )
        by_mask = function is aten.index.Tensor and any(values.dtype == torch.bool for values in tensors[1:])
        between = function is aten.copy_.default and bool(here)
        arrives = function is aten._to_copy.default and bool(here)
        leaves = asked is not None and asked.type != "cuda"
        if function in WAITING or by_mask or between or arrives or leaves:
            self.wait(function)

    @contextlib.contextmanager
    def record(self, graph: Graph) -> Iterator[None]:
        """Record what is called inside, which has no effects."""
        assert not self.recording, "a graph in a graph"
        graph.calls = self._recording = []
        draws = torch.default_generator.get_state()
        try:
            yield
        finally:
            self._recording = None
            while self._undo:
                values, before = self._undo.pop()
                values.copy_(before)
            torch.default_generator.set_state(draws)
        self.recorded += 1

    @property
    def recording(self) -> bool:
        """Whether a graph is recorded."""
        return self._recording is not None


def _written(function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    """List the tensors that an operation writes to."""
    expected = function._schema.arguments
    given = [*zip(expected, arguments, strict=False), *((one, options.get(one.name)) for one in expected)]
    written = [values for one, values in given if one.alias_info is not None and one.alias_info.is_write]
    if function is aten.native_batch_norm.default:
        # Its schema does not say that it moves the running statistics.
        written += arguments[3:5]
    return [values for values in tree_leaves(written) if isinstance(values, Tensor)]


class OnGpu(Tensor):
    """A tensor on a simulated GPU."""

    held: Tensor
    gpu: Device

    # Operations are caught where they are dispatched; methods below are what Python code asks a tensor itself.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, gpu: Device) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            # PyTorch's engine for gradients would ask the driver about any other.
            device=CPU,
        )
        made.held, made.gpu = held, gpu
        return made

    def __init__(self, held: Tensor, gpu: Device) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = tree_leaves((arguments, options))
        device: Device = next(values.gpu for values in given if isinstance(values, OnGpu))
        return device.compute(function, arguments, options or {})

    device = property(lambda self: PLACE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def cpu(self, *arguments: Any, **options: Any) -> Tensor:
        return self.to(CPU, *arguments, **options)

    def cuda(self, *arguments: Any, **options: Any) -> Tensor:
        return self

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        if arguments and isinstance(arguments[0], Tensor):
            arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
        copy = options.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*arguments, **options)
        dtype, layout = dtype or self.dtype, layout or torch.preserve_format
        if device is not None and device.type == "meta":
            return torch.empty_strided(self.shape, self.stride(), dtype=dtype, device=device)
        if device is not None and device.type == "cpu":
            return _Leave.apply(self, dtype, layout)
        lies_so = layout == torch.preserve_format or self.is_contiguous(memory_format=layout)
        if dtype == self.dtype and lies_so and not copy:
            return self
        return aten._to_copy.default(self, dtype=dtype, memory_format=layout)

    def tolist(self) -> Any:
        self.gpu.wait("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        made: OnGpu = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As what a file holds that is loaded on a CPU.
        self.gpu.wait("saving")
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnGpu({self.held!r})"

    # With these a module that moves keeps its parameters, as it does on a real one.
    def __tensor_flatten__(self) -> tuple[list[str], Device]:
        return ["held"], self.gpu

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], gpu: Device, shape: Any, stride: Any) -> OnGpu:
        return OnGpu(inner["held"], gpu)


class _Leave(torch.autograd.Function):
    """A copy in the CPU's memory."""

    @staticmethod
    def forward(ctx: Any, values: OnGpu, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        values.gpu.wait("a copy to the CPU")
        ctx.dtype, ctx.gpu = values.dtype, values.gpu
        return values.held.to(dtype, memory_format=layout, copy=True).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return OnGpu(gradient.to(ctx.dtype), ctx.gpu), None, None


class Dispatch(TorchDispatchMode):
    """Catches what is made on the device."""

    def __init__(self, gpu: Device) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        given, asked = tree_leaves((arguments, options)), options.get("device")
        if asked == CPU and not any(isinstance(values, Tensor) for values in given) and _differentiates():
            asked = PLACE
            options = {**options, "device": asked}
        there = asked is not None and torch.device(asked).type == "cuda"
        if there or any(isinstance(values, OnGpu) for values in given):
            return self.gpu.compute(function, arguments, options)
        return function(*arguments, **options)


def _differentiates() -> bool:
    """Whether what is made is PyTorch's zeros for a gradient that is none, of a graph on the GPU."""
    frame = sys._getframe(2)
    # Those of what PyTorch puts around every mode.
    while frame.f_back is not None and frame.f_code.co_name in ("inner", "_fn"):
        frame = frame.f_back
    engine = frame.f_code.co_name == "_engine_run_backward"
    return engine and any(isinstance(values, OnGpu) for values in frame.f_locals["t_outputs"])
