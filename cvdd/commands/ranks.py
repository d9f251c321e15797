"""Starting the ranks of a command, and ending all of them together.

Rank 0 is the command itself. It starts the others on its machine with the configuration that it has checked, so nothing
is composed twice; under ``torchrun`` or ``srun`` they are there already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cvdd.running.children import started
from cvdd.running.distributed import FAILED, LOOPBACK, SECONDS_BETWEEN_LOOKS, World, given_world, lost
from cvdd.schema import SILENT, RunConfig, with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.support.refusals import require_writable

log = logging.getLogger(__name__)

SECONDS_TO_NOTICE = 60.0
"""How long a rank that waits for a dead one has to say so by itself."""
SECONDS_TO_FINISH = 60.0
TIME_TO_COME = timedelta(minutes=15)


@contextlib.contextmanager
def all_ranks(config: RunConfig) -> Iterator[World]:
    """Join the ranks of this command, and start those that are missing; they end with the body.

    Args:
        config: the checked configuration.

    Raises:
        ConfigError: other processes were started than the configuration asks for.
        LostRank: a rank ended while others needed it.
    """
    if dist.is_initialized():
        raise ConfigError(
            "this process is a rank of something else already; start each command in a process of its own"
        )
    devices = config.trainer.devices
    given = given_world(devices, os.environ)
    if given is not None:
        with joined(given, None, config):
            yield given
    elif devices == 1:
        yield World()
    else:
        store = TCPStore(LOOPBACK, 0, devices, True, TIME_TO_COME, wait_for_workers=False)
        world = World(0, devices, 0, devices, LOOPBACK, store.port)
        with _others(config, world), joined(world, store, config):
            yield world


@contextlib.contextmanager
def joined(world: World, store: TCPStore | None, config: RunConfig) -> Iterator[None]:
    """Belong to the ranks of a command while the body runs.

    Args:
        world: of this rank.
        store: where they meet, if this process keeps it; it has started the others then, and watches them.
        config: the checked configuration.
    """
    if world.address == LOOPBACK and ("lo" in [name for _, name in socket.if_nameindex()]):
        # The name of a machine need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    watched = _watched((), world, config.paths.output) if store is None else contextlib.nullcontext()
    if store is None:
        store = TCPStore(world.address, world.port, world.size, world.main, TIME_TO_COME, wait_for_workers=False)
    gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    # The store of torchrun outlives ranks that it starts once more, and what they said.
    world.state.store = PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    world.meet()
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=world.state.store, rank=world.rank, world_size=world.size)
    # Whoever started the others watches already.
    with watched:
        try:
            yield
        except BaseException as error:
            # Those who wait for this rank are told why they wait in vain; nothing that fails now may hide it.
            with contextlib.suppress(RuntimeError):
                world.state.store.set(FAILED, f"rank {world.rank} ended: {type(error).__name__}: {error}")
            with contextlib.suppress(RuntimeError):
                if gpu and dist.group.WORLD is not None:
                    # The orderly end of NCCL is a meeting of its own, to which ranks that wait in another never come.
                    dist.group.WORLD.abort()
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextlib.contextmanager
def _others(config: RunConfig, world: World) -> Iterator[None]:
    """Run the other ranks while the body runs."""
    output = config.paths.output
    require_writable(output, "another place with paths.output=DIR")
    with contextlib.ExitStack() as running:
        processes = []
        for rank in range(1, world.size):
            # A session of their own: Ctrl-C is for rank 0, which ends them.
            place = (rank, world.size, world.port)
            rank_process = started(
                "cvdd.commands.rank", config, *place, journal=output / f"rank{rank}.log", own_session=True
            )
            processes.append(running.enter_context(rank_process))
        with _watched(processes, world, output):
            yield
        deadline = time.monotonic() + SECONDS_TO_FINISH
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.1))


@contextlib.contextmanager
def _watched(processes: Sequence[subprocess.Popen[bytes]], world: World, output: Path) -> Iterator[None]:
    """While the body runs, notice that a rank is lost, and end this one if it goes on waiting for it.

    Args:
        processes: ranks that this one started; they end with it.
        world: of this rank.
        output: where their logs are.
    """
    done = threading.Event()
    threading.Thread(target=_watch, args=(processes, world, output, done), daemon=True, name="ranks").start()
    try:
        yield
    finally:
        done.set()


def _watch(processes: Sequence[subprocess.Popen[bytes]], world: World, output: Path, done: threading.Event) -> None:
    state = world.state
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        if not state.lost:
            state.lost = _ended(processes, world, output)
        # Most connections break at once, and the meeting with them; not those of NCCL.
        if state.lost and state.meeting and not done.wait(SECONDS_TO_NOTICE) and state.meeting:
            log.error("%s", state.lost)
            for process in processes:
                process.kill()
            os._exit(1)


def _ended(processes: Sequence[subprocess.Popen[bytes]], world: World, output: Path) -> str:
    """Say which rank has ended, as its process or its last words tell; empty while none has."""
    for rank, process in enumerate(processes, 1):
        # One that ended without an error was done; whoever still needs it waits in vain all the same.
        if process.poll() or (process.poll() == 0 and world.state.meeting):
            found = lost(f"rank {rank} ended with exit code {process.returncode}; see {output}/rank{rank}.log")
            log.warning("%s. What the others do alone goes on", found)
            return found
    try:
        return world.state.last_words()
    except RuntimeError:
        # The store is rank 0's.
        return lost("rank 0 has ended")


@contextlib.contextmanager
def in_silence(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the configuration of a rank other than 0: nothing that it prints or draws is kept."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield with_overrides(config, {**SILENT, "paths.output": Path(folder)})
