"""Ranks of one command: the same bits as one process, one effective batch, and an end when one of them is lost."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Literal

import pytest
import torch
from helpers import TINY, configure, fit, method_config, random_pixels, small_network, tiny_context, training_arguments
from processes import ends, in_process
from torch import Tensor, nn
from torch.utils.data import DataLoader
from vote_reference import voting_loss

import cvdd.commands.ranks
from cvdd.artifact.cleaning import sealed
from cvdd.chain.recover import require_splittable, splits_units
from cvdd.composition.launching import check_multirun
from cvdd.running.distributed import FAILED, World, given_world
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.units import Stack, Unit
from cvdd.synthesis.voting import Voter
from cvdd.training.classifier import Classifier, RunningStatistics, ShuffledBatches
from cvdd.training.member import own_images

ROOT = Path(__file__).parent.parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SMALL = (
    *TINY,
    "~committee.members.shufflenetv2",
    "prior.values={resnet18: 40, resnet50: 30}",
    "recipe.epochs=1",
    "recipe.accumulation=2",
    "ipc.images_per_class=4",
    "method.units_per_stack=1",
    "trainer.threads=1",
)
"""The tiny chain; members with batches in two parts, which two ranks train together, and four stacks to share."""

Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Start relabel.py with a store of the given name."""

    def start(store: str, *overrides: str) -> subprocess.Popen[str]:
        places = [f"paths.store={tmp_path / store}", f"paths.output={tmp_path / store}-output"]
        arguments = [*SMALL, *places, f"paths.data={tmp_path / 'data'}", f"hydra.run.dir={tmp_path / store}-hydra"]
        return subprocess.Popen(
            [sys.executable, "relabel.py", *arguments, *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def files(store: Path) -> dict[str, str]:
    """Checksums of all files of the members, images and labels of a store."""
    made = [one for one in sealed(store) if one.kind in ("encoders", "members", "images", "labels")]
    return {f"{a.path.name}/{name}": entry["sha256"] for a in made for name, entry in a.manifest["files"].items()}


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for commands that are to succeed."""
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said


def child_of(process: subprocess.Popen[str]) -> int:
    """Wait for the rank that a command starts; its process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(600):
        for number in children.read_text().split():
            if "cvdd.commands.rank" in Path(f"/proc/{number}/cmdline").read_text():
                return int(number)
        time.sleep(0.1)
    raise AssertionError("it started no rank")


@pytest.mark.slow
def test_two_ranks_and_two_interrupted_runs_make_the_bits_of_one_process(command: Command, tmp_path: Path) -> None:
    others = command("alone"), command("together", "trainer=ddp", "trainer.accelerator=cpu")
    interrupted = command("interrupted", "trainer=ddp", "trainer.accelerator=cpu")
    # Killed without a warning once there is something of a member, and once more in the images.
    for kind in ("members", "images"):
        while interrupted.poll() is None and not list((tmp_path / "interrupted" / kind).glob("*/manifest.json")):
            time.sleep(0.05)
        os.kill(interrupted.pid, signal.SIGKILL)
        interrupted.communicate()
        interrupted = command("interrupted", "trainer=ddp", "trainer.accelerator=cpu")
    finish(*others, interrupted)
    expected = files(tmp_path / "alone")
    assert len(expected) > 6
    assert files(tmp_path / "together") == expected
    assert files(tmp_path / "interrupted") == expected
    assert "loss" in (tmp_path / "together-output" / "rank1.log").read_text()
    # Only rank 0 logs: each stack and iteration once at most.
    rows = (tmp_path / "together-output" / "csv" / "metrics.csv").read_text().splitlines()
    assert len(rows) == len(set(rows))


@pytest.mark.slow
def test_two_ranks_train_without_labels_as_one_process_does(command: Command, tmp_path: Path) -> None:
    moco = ("recipe=tiny_moco", "recipe.batch_size=50", "recipe.moco={epochs:2,batch_size:20,groups:4,queue:50}")
    finish(command("alone", *moco), command("together", *moco, "trainer=ddp", "trainer.accelerator=cpu"))
    assert sum("weights" in name for name in files(tmp_path / "alone")) == 4
    assert files(tmp_path / "together") == files(tmp_path / "alone")


@pytest.mark.slow
def test_a_lost_rank_ends_a_training_with_its_name(command: Command, tmp_path: Path) -> None:
    process = command("lost", "trainer=ddp", "trainer.accelerator=cpu", "recipe.epochs=10000")
    rank = child_of(process)
    while not list((tmp_path / "lost" / "members" / ".partial").glob("*/*.ckpt.tmp")) and process.poll() is None:
        time.sleep(0.1)
    os.kill(rank, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "rank 1 ended with exit code -9" in said
    assert "the same command goes on" in said


def wait_for_the_lost(output: Path, meeting: int, failed: bool) -> None:
    """What a rank does that is in a meeting while another one fails, or none."""
    cvdd.commands.ranks.SECONDS_TO_NOTICE = 0.2
    world = World(1, 2)
    world.state.store, world.state.meeting = torch.distributed.HashStore(), meeting
    with cvdd.commands.ranks._watched((), world, output):
        if failed:
            world.state.store.set(FAILED, "rank 0 ended: OutOfMemory: too little")
        time.sleep(3)
    sys.exit(0 if bool(world.state.lost) == failed else 3)


@pytest.mark.parametrize(("meeting", "failed", "code"), [(1, True, 1), (0, True, 0), (1, False, 0)])
def test_a_rank_does_not_wait_for_ever_for_one_that_failed(
    meeting: int, failed: bool, code: int, tmp_path: Path
) -> None:
    """A broken connection says so at once, but not all of them break."""
    assert ends(in_process(wait_for_the_lost, tmp_path, meeting, failed)) == code


RESTARTED = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from cvdd.commands.ranks import all_ranks
from cvdd.schema import RunConfig

config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
with all_ranks(config) as world:
    world.meet()
    assert world.say("hello") == "hello"
    total = torch.ones(1)
    dist.all_reduce(total)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and world.rank == 1:
        sys.exit(7)
    world.meet()
    (config.paths.output / f"rank{world.rank}").write_text(str(int(total)))
"""


@pytest.mark.slow
def test_ranks_that_torchrun_starts_once_more_begin_anew(tmp_path: Path) -> None:
    config = configure(tmp_path, *TINY, "trainer=ddp", "trainer.accelerator=cpu", f"paths.output={tmp_path}")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "ranks.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "ranks.py", tmp_path / "config.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2", "2"]


# --- which ranks there are --------------------------------------------------------------------------------------------


def test_ranks_of_torchrun_are_taken_as_they_are() -> None:
    environment = dict(zip(VARIABLES, ("3", "4", "1", "head", "29500"), strict=True)) | {"LOCAL_WORLD_SIZE": "2"}
    world = given_world(2, environment)
    assert world == World(3, 4, 1, 2, "head", 29500)
    with pytest.raises(ConfigError, match="set trainer.devices=2"):
        given_world(4, environment)
    with pytest.raises(ConfigError, match=r"and 3 in all; start trainer\.devices=2 on each machine"):
        given_world(2, environment | {"WORLD_SIZE": "3"})


def test_tasks_of_srun_are_ranks_if_there_is_one_for_each_device() -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "100",
        "SLURM_STEP_ID": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    assert given_world(2, environment) == World(2, 4, 0, 2, "node7", 15703)
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        given_world(3, environment)
    assert given_world(1, environment) is None
    # A batch script has the job's variables, and is alone.
    assert given_world(2, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "100"}) is None


def test_a_process_that_is_a_rank_already_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvdd.commands.ranks.dist, "is_initialized", lambda: True)
    config = configure(tmp_path, *TINY)
    with pytest.raises(ConfigError, match="process of its own"), cvdd.commands.ranks.all_ranks(config):
        pass


def test_a_multirun_in_one_process_is_refused(tmp_path: Path) -> None:
    trainer = configure(tmp_path, *TINY, "trainer=ddp").trainer
    assert trainer.devices == 2
    with pytest.raises(ConfigError, match="hydra/launcher=slurm_ddp .* hydra/launcher=local"):
        check_multirun(trainer, "basic", sweeping=True)
    check_multirun(trainer, "basic", sweeping=False)
    check_multirun(trainer, "local", sweeping=True)


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, *TINY, "trainer.assistants=2", "trainer.progress=lines")
    with cvdd.commands.ranks.in_silence(config) as quiet:
        print("nobody reads this")
        assert quiet.paths.output != config.paths.output
        assert (quiet.trainer.assistants, quiet.trainer.progress, quiet.seed) == (0, "none", config.seed)
    assert not capsys.readouterr().out


# --- batches in parts -------------------------------------------------------------------------------------------------


class InParts(Classifier):
    """The mean of the network's outputs over a batch, forwarded in parts of two images."""

    def __init__(self, images: Tensor, network: nn.Module) -> None:
        super().__init__(**training_arguments(network))
        self.images = images

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        parts = [batch[first : first + 2] for first in range(0, len(batch), 2)]
        return self._note(self.loss_in_parts([partial(self.loss, part, len(parts)) for part in parts], batch_index))

    def loss(self, part: Tensor, parts: int) -> Tensor:
        output: Tensor = self.network(self.images[part]).square().mean()
        return output / parts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), 0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def test_a_step_adds_up_the_gradients_and_statistics_of_its_parts() -> None:
    images = random_pixels(6, 8).float() / 255
    made, reference = network(), network()
    made(images), reference(images)
    reference.load_state_dict(made.state_dict())
    loader = DataLoader(torch.arange(6), sampler=ShuffledBatches(6, 6, 0), batch_size=None)
    module = InParts(images, made)
    fit(module, loader, 1)
    (order,) = list(ShuffledBatches(6, 6, 0))
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for part in order.split(2):
        (reference(images[part]).square().mean() / 3).backward()
    optimizer.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert int(made[1].num_batches_tracked) == 4


def test_running_statistics_follow_the_parts_in_their_order() -> None:
    """With momentum 1/2 and batch means 2 and 6 the running mean goes 0, 1, 3.5."""
    layer = nn.BatchNorm1d(1, momentum=0.5)
    statistics = RunningStatistics(layer)
    measured = []
    for mean in (2.0, 6.0):
        with statistics.of_one_part():
            layer(torch.tensor([[mean - 1], [mean + 1]]))
        measured.append(statistics.measured().clone())
    assert float(layer.running_mean) == 0
    # The unbiased variance of a pair that lies 2 apart is 2.
    assert [part.tolist() for part in measured] == [[2.0, 2.0], [6.0, 2.0]]
    for part in measured:
        statistics.update(part)
    statistics.count(2)
    assert float(layer.running_mean) == 3.5
    assert float(layer.running_var) == 1.75
    assert int(layer.num_batches_tracked) == 2
    assert layer.momentum == 0.5


def test_ranks_divide_a_batch_among_them() -> None:
    """Parts of 2 of 7 images, the last single one with those before it: 0-1, 2-3, 4-6."""
    index = torch.arange(10, 17)
    assert own_images(index, 2, 0, 2).tolist() == [10, 11, 14, 15, 16]
    assert own_images(index, 2, 1, 2).tolist() == [12, 13]
    assert own_images(index[:2], 2, 1, 2).tolist() == []


# --- units that are split over ranks ----------------------------------------------------------------------------------


class Meeting:
    """Two threads that add up what they bring, as ranks do."""

    def __init__(self) -> None:
        self.barrier, self.brought = threading.Barrier(2, timeout=20), dict[int, Tensor]()

    def sum(self, rank: int, own: Tensor) -> Tensor:
        self.brought[rank] = own.detach().clone()
        self.barrier.wait()
        # As much as the other brought counts as a constant here.
        total = own + self.brought[1 - rank]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("statistics_of", ["unit", "stack"])
def test_a_split_unit_has_the_loss_and_the_gradient_of_the_whole(statistics_of: Literal["unit", "stack"]) -> None:
    """Two units of five images, three of which are with one rank and two with the other."""
    images = torch.randn(2, 5, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2, 3, 0], [1, 1, 2, 0, 3]])
    voters = [Voter(f"member{seed}", small_network(seed=seed).double()) for seed in (0, 1)]
    weights = torch.tensor([[0.3, 0.6], [0.7, 0.4]], dtype=torch.float64)
    whole = images.clone().requires_grad_()
    expected = voting_loss(whole, targets, voters, weights, r_bn=0.1, statistics_of=statistics_of)
    expected.loss.backward()
    meeting, found = Meeting(), dict[int, tuple[Tensor, Tensor]]()

    def take_part(rank: int, own: slice) -> None:
        mine = images[:, own].clone().requires_grad_()
        # Hooks on layers of a network are seen by all threads, so each has networks of its own.
        others = [Voter(voter.name, copy.deepcopy(voter.network)) for voter in voters]
        across = partial(meeting.sum, rank)
        terms = voting_loss(
            mine, targets[:, own], others, weights, r_bn=0.1, statistics_of=statistics_of, across=across
        )
        terms.loss.backward()
        assert mine.grad is not None
        found[rank] = (terms.loss.detach(), mine.grad)

    threads = [Thread(target=take_part, args=pair) for pair in ((0, slice(0, 3)), (1, slice(3, 5)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]], dim=1), whole.grad, rtol=1e-9, atol=1e-12)
    for loss, _ in found.values():
        torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-12, atol=0)


def stacks_of(*units: Unit) -> list[Stack]:
    return [Stack(index, (0,), (unit,)) for index, unit in enumerate(units)]


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer=ddp trainer.devices=2"):
        configure(tmp_path, *TINY, "trainer.split_units=true")
    with pytest.raises(ConfigError, match="trainer.assistants=0"):
        configure(tmp_path, *TINY, "trainer=ddp", "trainer.split_units=true", "trainer.assistants=1")
    context = tiny_context(tmp_path, "trainer=ddp", "trainer.split_units=true")
    two = replace(context, world=World(0, 2, 0, 2))
    assert splits_units(two)
    assert not splits_units(context)
    require_splittable(two, stacks_of(Unit(0, 0, 0, 2)))
    with pytest.raises(ConfigError, match="a unit has 1 images, too few for 2 processes"):
        require_splittable(two, stacks_of(Unit(0, 0, 0, 2), Unit(0, 1, 2, 3)))
    dense = replace(two, config=two.config.model_copy(update={"method": method_config(composer="classes", density=1)}))
    with pytest.raises(ConfigError, match="method.density"):
        require_splittable(dense, stacks_of(Unit(0, 0, 0, 2)))
