"""A GPU that is simulated on the CPU, for what can be told of programs for one without having one.

Tensors that lie on it say ``cuda:0``; what they hold lies in the CPU's memory, where everything is computed. It refuses
what a real one refuses: operations between tensors here and there, and waiting for the device while a CUDA graph is
recorded. A graph is the list of operations that were called meanwhile; to replay it is to compute them again, from the
same memory into the same memory.

It says nothing of kernels, compilers, speed, or of streams that do not wait for each other: all streams are one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from simulated_tensors import PLACE, Device, Dispatch, Graph
from torch import Tensor


class Stream:
    """A stream: there is one, whose work is done in order."""

    device = PLACE
    cuda_stream = 0

    def __init__(self, gpu: Device) -> None:
        self._gpu = gpu

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None:
        self._gpu.wait("synchronize")

    def is_capturing(self) -> bool:
        return self._gpu.recording


def _functions(gpu: Device, memory: int) -> dict[str, Any]:
    """What ``torch.cuda`` says and does."""
    here, draws = Stream(gpu), torch.default_generator
    properties = SimpleNamespace(name="simulated GPU", major=9, minor=0, total_memory=memory, multi_processor_count=1)
    return {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "Stream": lambda device=None: Stream(gpu),
        "current_stream": lambda device=None: here,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "CUDAGraph": lambda: Graph(gpu),
        "graph": lambda graph, **options: gpu.record(graph),
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: gpu.recording,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "mem_get_info": lambda device=None: (memory, memory),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed": draws.manual_seed,
        "manual_seed_all": draws.manual_seed,
        "get_rng_state": lambda device=None: draws.get_state(),
        "set_rng_state": lambda state, device=None: draws.set_state(state),
        "get_rng_state_all": lambda: [draws.get_state()],
        "set_rng_state_all": lambda states: None,
    }


@contextlib.contextmanager
def simulated_gpu(memory: int = 8 << 30) -> Iterator[Device]:
    """Let PyTorch find a GPU inside, if there is none.

    Args:
        memory: that is free, in bytes.
    """
    # Else PyTorch's own code asks the driver which device is current.
    torch._C._ensureCUDADeviceGuardSet()
    gpu, plain_tensor, plain_autocast = Device(), torch.tensor, torch.autocast
    plain_groups = torch._C._group_tensors_by_device_and_dtype

    def tensor(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
        made = plain_tensor(*arguments, **options)
        return made if device is None else made.to(device)

    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else plain_tensor(data, dtype=dtype)
        return made.to(device or made.device, dtype or made.dtype)

    def groups(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
        found = plain_groups(lists, with_indices)
        return {
            (next(values for values in chain(*group) if values is not None).device, dtype): (group, indices)
            for (_, dtype), (group, indices) in found.items()
        }

    def one_hot(labels: Tensor, classes: int = -1) -> Tensor:
        count = int(labels.max()) + 1 if classes == -1 else classes
        return (labels[..., None] == torch.arange(count, device=labels.device)).long()

    with contextlib.ExitStack() as stack:
        for name, function in _functions(gpu, memory).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for owner, name, function in (
            (torch, "tensor", tensor),
            (torch, "as_tensor", as_tensor),
            # The simulated tensors are the CPU's to it.
            (torch, "autocast", lambda kind, *arguments, **options: plain_autocast("cpu", *arguments, **options)),
            (torch._C, "_group_tensors_by_device_and_dtype", groups),
            # PyTorch's own makes a tensor on the device of its labels, which is the CPU to it.
            (torch.nn.functional, "one_hot", one_hot),
            (torch.accelerator, "current_stream", lambda device=None: Stream(gpu)),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(Dispatch(gpu))
        yield gpu
