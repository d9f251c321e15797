"""Several processes as the ranks of one command.

All ranks walk through the same work: what has
parts is shared through the store's claims without any traffic between them, a network whose batches come in parts is
trained by all of them together, and everything else is made by one while the others wait for it.

Nothing depends on how many ranks there are. Only rank 0 writes to the terminal, to loggers and to the run's directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import (  # type: ignore[attr-defined]
    LightningEnvironment,
    SLURMEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from cvdd.composition.launching import tasks_of_srun
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
SECONDS_BETWEEN_LOOKS = 0.5
FAILED = "failed"
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
        state: of the conversation.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    per_node: int = 1
    address: str = LOOPBACK
    port: int = 0
    state: State = field(default_factory=lambda: State(), repr=False, compare=False)

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
        state = self.state
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
        state = self.state
        state.met += 1
        key = f"met/{state.met}"
        with self.together():
            state.store.add(key, 1)
            self._wait(lambda: state.store.add(key, 0) >= self.size)

    def _wait(self, ready: Callable[[], bool]) -> None:
        state, pause = self.state, 0.01
        while not ready():
            state.lost = state.lost or state.last_words()
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
        state = self.state
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
            raise LostRank(state.lost or lost("another rank has ended; its log says why")) from error
        finally:
            state.meeting -= 1


@dataclass
class State:
    """What a rank knows of the others, and what it has said.

    Attributes:
        store: through which ranks speak.
        said: number of messages so far.
        met: number of meetings so far.
        lost: what is known of a rank that has ended; empty while all are alive.
        meeting: how many calls it is in just now that need the others.
    """

    store: Any = None
    said: int = 0
    met: int = 0
    lost: str = ""
    meeting: int = 0

    def last_words(self) -> str:
        """Say what to do about a rank that said that it failed; empty while none has."""
        known = self.store is not None and self.store.check([FAILED])
        return lost(self.store.get(FAILED).decode()) if known else ""


def _of_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "connection" in text or "gloo" in text or "nccl" in text


def lost(what: str) -> str:
    """Say what to do after the loss of a rank."""
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
        if here == devices and size % devices:
            raise ConfigError(
                f"{here} processes were started on this machine, and {size} in all; start trainer.devices={devices} on "
                "each machine"
            )
        if here != devices:
            raise ConfigError(
                f"trainer.devices={devices}, and {here} processes were started on this machine, {size} in all; set "
                f"trainer.devices={here}"
            )
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return World(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]), devices, address, port)
    size = tasks_of_srun(environment)
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


class RanksStrategy(DDPStrategy):
    """Lightning's DDP over ranks that exist, without its wrapper around the module.

    :class:`cvdd.training.classifier.Classifier` exchanges the gradients of its parts itself, in an order that does not
    depend on the number of ranks; DDP's own sum does.
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


class _SumOverRanks(torch.autograd.Function):
    """A sum whose gradient stays on its rank: what follows it is computed on every rank alike, but counts once."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def sum_over_ranks(own: Tensor) -> Tensor:
    """Add up a tensor over all ranks; the gradient of each rank's term is the gradient of the sum.

    A loss made of such sums is the same on all ranks, and its gradient is right for what a rank alone has.
    """
    total: Tensor = _SumOverRanks.apply(own)
    return total
