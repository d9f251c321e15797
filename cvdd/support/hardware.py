"""What a machine is called: its processor or GPU, never its name in a network."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

_INFORMATION = Path("/proc/cpuinfo")


@functools.cache
def processor_name() -> str:
    """Name the processor as the system does."""
    if _INFORMATION.exists():
        for line in _INFORMATION.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name(device: torch.device) -> str:
    """Name what computes: the GPU, or the processor with the threads that it uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
