"""The compiler inside a process: for how many networks it compiles, and what the next process finds again."""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Iterator

import torch
import torch._functorch.config

SPECIALISATIONS = 256
"""PyTorch gives up after 8 shapes and networks, and a committee has more."""


@contextlib.contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Let PyTorch compile for every network and shape inside."""
    if not compiled:
        yield
        return
    limits = {"recompile_limit": SPECIALISATIONS, "accumulated_recompile_limit": 8 * SPECIALISATIONS}
    # What was compiled is found again by the next process, fused layers and all: seconds instead of minutes.
    kept = {"autograd_cache_allow_custom_autograd_functions": True}
    with torch._dynamo.config.patch(limits), torch._functorch.config.patch(kept), _keys_of_any_program():
        yield


@contextlib.contextmanager
def _keys_of_any_program() -> Iterator[None]:
    """Pickle memory formats by their names inside.

    PyTorch lets pickle find them in whichever of the modules that have ``torch`` was imported first. Keys of what is
    compiled hold that module, so that a program that imports in another order would not find it.
    """
    known = copyreg.dispatch_table
    if torch.memory_format in known:
        yield
        return
    known[torch.memory_format] = lambda layout: (memory_format_of, (str(layout),))
    try:
        yield
    finally:
        del known[torch.memory_format]


def memory_format_of(name: str) -> torch.memory_format:
    """Return the memory format called ``torch.NAME``."""
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.memory_format)
    return found
