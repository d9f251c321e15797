"""Named seeds: every random draw of the project comes from one of these generators."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on ``seed`` and on the draw's name, and on nothing else.

    The names say what the draw is for, e.g. ``derive_seed(0, "recover", slot, block)``. Distinct names give
    independent streams; the same names give the same stream in every process and on every machine.
    """
    text = "\x1f".join([str(int(seed)), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextlib.contextmanager
def own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Let what networks draw by themselves inside depend on a seed alone, and nobody else's draws on it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_networks(seed, device)
        yield


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed what networks on a device draw by themselves (dropout)."""
    # torch.manual_seed remembers each seed, with the stack, for every kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
