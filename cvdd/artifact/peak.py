"""The most memory that this process held since somebody began to look."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

from cvdd.support.allocator import give_back_memory

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET = "5"
"""What Linux takes as the wish to begin anew with the highest resident size (proc(5))."""
_HIGHEST = "VmHWM:"


def forget_peak() -> None:
    """Begin anew; where the system cannot, the peak remains that of the whole process."""
    if (torch := _used_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()
        return
    # What was freed and kept would count again.
    give_back_memory()
    with contextlib.suppress(OSError):
        _RESET.write_text(_FORGET)


def peak_memory() -> int:
    """Return the most bytes that this process held since then: on the GPU if it used one, else of the machine."""
    if (torch := _used_gpu()) is not None:
        return int(torch.cuda.max_memory_allocated())
    return highest_resident()


def highest_resident() -> int:
    """Return the most bytes of the machine's memory that this process held since :func:`forget_peak`.

    Where the system cannot forget, it is since the process began.
    """
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(_HIGHEST):
                return int(line.split()[1]) * 1024
    # In bytes on macOS, in kibibytes elsewhere (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _used_gpu() -> Any:
    # A process that has not loaded PyTorch has used no GPU, and would wait seconds for nothing.
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
