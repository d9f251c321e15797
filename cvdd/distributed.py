"""Several processes as the ranks of one command.

Rank 0 is the command itself. It starts the others on its machine with the configuration that it has checked, so nothing
is composed twice; under ``torchrun`` or ``srun`` they are there already. All ranks walk through the same work: what has
parts is shared through the store's claims without any traffic between them, a network whose batches come in parts is
trained by all of them together, and everything else is made by one while the others wait for it.

Nothing depends on how many ranks there are. Only rank 0 writes to the terminal, to loggers and to the run's directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cvdd.config_base import ConfigError
from cvdd.schema import RunConfig, with_overrides

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_NOTICE = 60.0
"""How long a rank that waits for a dead one has to say so by itself."""
SECONDS_TO_FINISH = 60.0
SECONDS_TO_STOP = 10.0
TIME_TO_COME = timedelta(minutes=15)
_FAILED = "failed"
_FIRST_PORT, _PORTS = 15000, 15000


class LostRank(RuntimeError):
    """A rank ended while others needed it."""


@dataclass(frozen=True)
class World:
    """The ranks of a command, seen from one of them.

    Attributes:
        rank: of this process.
        size: number of ranks.
        local_rank: its number on this machine.
        per_node: ranks on each machine.
        address: where rank 0 listens.
        port: likewise.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    per_node: int = 1
    address: str = LOOPBACK
    port: int = 0
    _state: _State = field(default_factory=lambda: _State(), repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def shares(self, parts: int) -> bool:
        """Whether all ranks together train a network whose batches come in so many parts."""
        return self.size > 1 and parts % self.size == 0

    def say(self, message: str | None) -> str | None:
        """Send a message from rank 0 to all ranks, and return it on each.

        Raises:
            LostRank: rank 0 has ended.
        """
        if self.size == 1:
            return message
        state = self._state
        state.said += 1
        key = f"said/{state.said}"
        with self.together():
            if self.main:
                state.store.set(key, json.dumps(message))
            else:
                self._wait(lambda: state.store.check([key]))
            said: str | None = json.loads(state.store.get(key))
        return said

    def meet(self) -> None:
        """Wait until all ranks are here; unlike a collective it can be interrupted and sees that a rank is dead.

        Raises:
            LostRank: one of them has ended.
        """
        if self.size == 1:
            return
        state = self._state
        state.met += 1
        key = f"met/{state.met}"
        with self.together():
            state.store.add(key, 1)
            self._wait(lambda: state.store.add(key, 0) >= self.size)

    def _wait(self, ready: Callable[[], bool]) -> None:
        state, pause = self._state, 0.01
        while not ready():
            if state.store.check([_FAILED]):
                state.lost = state.lost or _lost(state.store.get(_FAILED).decode())
            if state.lost:
                raise LostRank(state.lost)
            time.sleep(pause)
            pause = min(2 * pause, SECONDS_BETWEEN_LOOKS)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do something that needs all ranks.

        Raises:
            LostRank: one of them has ended.
        """
        state = self._state
        if state.lost:
            raise LostRank(state.lost)
        state.meeting += 1
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _of_connection(error):
                raise
            # Whoever watches the processes knows more than a broken connection tells.
            deadline = time.monotonic() + 4 * SECONDS_BETWEEN_LOOKS
            while not state.lost and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_LOOKS / 4)
            raise LostRank(state.lost or _lost("another rank has ended; its log says why")) from error
        finally:
            state.meeting -= 1


@dataclass
class _State:
    store: Any = None
    said: int = 0
    met: int = 0
    lost: str = ""
    meeting: int = 0


def _of_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "connection" in text or "gloo" in text or "nccl" in text


def _lost(what: str) -> str:
    return f"{what}. What is finished and the last checkpoints are kept; the same command goes on from them"


def given_world(devices: int, environment: Mapping[str, str]) -> World | None:
    """Return the place of this process among those that torchrun or srun started; None if they started no others.

    Args:
        devices: processes on each machine that the configuration asks for.
        environment: of this process.

    Raises:
        ConfigError: others were started than the configuration asks for.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        size = int(environment["WORLD_SIZE"])
        here = int(environment.get("LOCAL_WORLD_SIZE", devices))
        if here != devices or size % devices:
            raise ConfigError(
                f"trainer.devices={devices}, and {here} processes were started on this machine, {size} in all; set "
                f"trainer.devices={here}"
            )
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return World(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]), devices, address, port)
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    # Tasks that are no ranks share units through the store, each for itself.
    if size == 1 or devices == 1:
        return None
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if size != nodes * devices:
        raise ConfigError(
            f"trainer.devices={devices}, and srun started {size} tasks on {nodes} machines; start trainer.devices "
            "tasks on each machine (--ntasks-per-node)"
        )
    address = LOOPBACK
    if nodes > 1:
        address = SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"])
    chosen = int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", 0))
    port = int(environment.get("MASTER_PORT", _FIRST_PORT + chosen % _PORTS))
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return World(rank, size, local_rank, devices, environment.get("MASTER_ADDR", address), port)


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
        with _joined(given, None, config):
            yield given
    elif devices == 1:
        yield World()
    else:
        store = TCPStore(LOOPBACK, 0, devices, True, TIME_TO_COME, wait_for_workers=False)
        world = World(0, devices, 0, devices, LOOPBACK, store.port)
        with _others(config, world), _joined(world, store, config):
            yield world


@contextlib.contextmanager
def _joined(world: World, store: TCPStore | None, config: RunConfig) -> Iterator[None]:
    if world.address == LOOPBACK and ("lo" in [name for _, name in socket.if_nameindex()]):
        # The name of a machine need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if store is None:
        store = TCPStore(world.address, world.port, world.size, world.main, TIME_TO_COME, wait_for_workers=False)
    gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    world._state.store = store
    world.meet()
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield
    except BaseException as error:
        # Those who wait for this rank are told why they wait in vain.
        with contextlib.suppress(RuntimeError):
            store.set(_FAILED, f"rank {world.rank} ended: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _others(config: RunConfig, world: World) -> Iterator[None]:
    """Run the other ranks while the body runs."""
    output = config.paths.output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        written = Path(folder) / "config.json"
        written.write_text(config.model_dump_json())
        processes = []
        for rank in range(1, world.size):
            journal = running.enter_context((output / f"rank{rank}.log").open("w"))
            command = [
                sys.executable,
                "-m",
                "cvdd.distributed",
                str(written),
                *map(str, (rank, world.size, world.port)),
            ]
            # A session of their own: Ctrl-C is for rank 0, which ends them.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=journal, stderr=subprocess.STDOUT, start_new_session=True
            )
            running.callback(_stop, process)
            processes.append(process)
        done = threading.Event()
        running.callback(done.set)
        watch = threading.Thread(target=_watch, args=(processes, world, output, done), daemon=True, name="ranks")
        watch.start()
        yield
        done.set()
        deadline = time.monotonic() + SECONDS_TO_FINISH
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.1))


def _watch(processes: Sequence[subprocess.Popen[bytes]], world: World, output: Path, done: threading.Event) -> None:
    state = world._state
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        for rank, process in enumerate(processes, 1):
            if not state.lost and process.poll():
                state.lost = _lost(
                    f"rank {rank} ended with exit code {process.returncode}; see {output}/rank{rank}.log"
                )
                log.warning("%s. What the others do alone goes on", state.lost)
        # Most connections break at once, and the meeting with them; not those of NCCL.
        if state.lost and state.meeting and not done.wait(SECONDS_TO_NOTICE) and state.meeting:
            log.error("%s", state.lost)
            for process in processes:
                process.kill()
            os._exit(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def in_silence(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the configuration of a rank other than 0: nothing that it prints or draws is kept."""
    quiet: dict[str, Any] = {
        "trainer.assistants": 0,
        "trainer.progress": "none",
        "logger.wandb": False,
        "logger.tensorboard": False,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield with_overrides(config, {**quiet, "paths.output": Path(folder)})


class RanksStrategy(DDPStrategy):
    """Lightning's DDP over ranks that exist, without its wrapper around the module.

    :class:`cvdd.classifier.Classifier` exchanges the gradients of its parts itself, in an order that does not depend
    on the number of ranks; DDP's own sum does.
    """

    def __init__(self, world: World) -> None:
        super().__init__(cluster_environment=_Ranks(world))

    def _configure_launcher(self) -> None:
        # There is nothing to launch, and the launcher would change the number of threads.
        self._launcher = None

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


def ranks_of_trainer(world: World) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for a training by all ranks."""
    return {
        "devices": world.per_node,
        "num_nodes": world.size // world.per_node,
        "strategy": RanksStrategy(world),
        "use_distributed_sampler": False,
    }


class _Ranks(LightningEnvironment):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.rank // self.world.per_node

    def teardown(self) -> None:
        pass


def gather_parts(own: Sequence[Tensor], count: int) -> list[Tensor]:
    """Bring together what each rank made of its parts; part p is that of rank p modulo their number.

    Args:
        own: of this rank's parts, in order; all [k].
        count: parts on all ranks.

    Returns:
        ``count`` tensors [k], in the order of the parts, the same on all ranks.
    """
    size = dist.get_world_size()
    rows = -(-count // size)
    mine = torch.zeros(rows, own[0].shape[0], dtype=own[0].dtype, device=own[0].device)
    for row, tensor in zip(mine, own, strict=False):
        row.copy_(tensor)
    everyone = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everyone, mine)
    return [everyone[part % size][part // size] for part in range(count)]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _main(arguments: Sequence[str]) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from cvdd.outcome import told
    from cvdd.runtime import Invocation, work_as

    written, rank, size, port = Path(arguments[0]), *(int(argument) for argument in arguments[1:])
    config = RunConfig.model_validate_json(written.read_text())
    world = World(rank, size, rank, size, LOOPBACK, port)
    with told(sweeping=False), _joined(world, None, config):
        work_as(world, config, Invocation(()))


if __name__ == "__main__":
    # Under its own name, so that its classes are those that others import.
    from cvdd.distributed import _main as main

    main(sys.argv[1:])
