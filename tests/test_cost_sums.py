"""How a predicted cost is added up, and how long a step takes on a clock that the test turns: no real time is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Compose
from test_cost import CPU, stages, total, works

from cvdd.chain.context import Context
from cvdd.computing.footprint import Profile
from cvdd.cost import calibrate, planning
from cvdd.cost.calibrate import Profiles, time_steps
from cvdd.cost.fakes import scale_of
from cvdd.cost.prediction import StageCost, predict
from cvdd.cost.recovering import COMPILED_SHARE
from cvdd.cost.steps import (
    DecodeStep,
    MeasureStep,
    MocoStep,
    MoveStep,
    Network,
    Overhead,
    PatchStep,
    ScoreStep,
    Step,
    StudentStep,
    TrainStep,
    VoteStep,
)
from cvdd.cost.table import cost_table, what
from cvdd.cost.work import Work
from cvdd.schema import RunConfig
from cvdd.schema.moco import MocoConfig
from cvdd.synthesis.engine import Engine

ONE_IMAGE = Profile(flops=7.0, activations=5.0, weights=2)
"""What an image costs in every network of these tests."""


def network_of(config: RunConfig) -> Network:
    return Network.of(config.committee.members["resnet18"].backbone, 10, 8)


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_stage_costs_what_its_steps_do_as_often_as_they_happen(compose: Compose) -> None:
    piece = works(compose("train"))[0][0]
    network = network_of(piece.config)
    measure, score = MeasureStep(network, 4), ScoreStep.of(network, piece.config.label, 3)
    work, other = Work(), Work()
    work.use(measure, 10)
    work.use(score, 20)
    work.around(fit=2)
    work.held, other.held = 1000, 500
    other.use(measure, 30)
    times: dict[Step, float] = {measure: 3.0, score: 0.1, Overhead("fit"): 0.5}
    (cost,) = predict([(piece, work), (piece, other)], times, lambda network, mode: ONE_IMAGE, 100)
    assert cost.seconds == pytest.approx(40 * 3.0 + 20 * 0.1 + 2 * 0.5)
    assert cost.flops == 60 * 7
    # The largest step of the first has four images; the process holds 100 bytes anyway.
    assert cost.peak_memory == 100 + 1000 + 4 * 5 + 2


def test_steps_side_by_side_hold_their_memory_together(compose: Compose) -> None:
    piece = works(compose("train"))[0][0]
    network = network_of(piece.config)
    steps = MeasureStep(network, 4), MeasureStep(network, 6)
    work = Work()
    for step in steps:
        work.use(step, 1)
    work.together.add(steps)
    (cost,) = predict([(piece, work)], dict.fromkeys(steps, 1.0), lambda network, mode: ONE_IMAGE, 0)
    assert cost.peak_memory == (4 * 5 + 2) + (6 * 5 + 2)


def test_a_step_holds_its_images_and_its_weights(compose: Compose) -> None:
    config = compose("evaluate")
    network = network_of(config)

    def held(step: Step) -> float:
        return scale_of(step, lambda network, mode: ONE_IMAGE).bytes

    recipe = config.recipe.model_copy(update={"batch_size": 60, "accumulation": 3})
    protocol = config.protocol.model_copy(update={"accumulation": 2})
    label = config.label.model_copy(update={"batch_size": 8})
    # Weights with their gradients and two averages, and the part of a batch that is held at once.
    assert held(TrainStep.of(network, recipe, True)) == 20 * 5 + 4 * 2
    assert held(StudentStep.of(network, protocol, label)) == 4 * 5 + 4 * 2
    # A group of a batch, and the queue.
    moco = MocoConfig(epochs=1, batch_size=60, groups=3, lr=0.1, dimension=7, queue=100)
    without_labels = config.recipe.model_copy(update={"moco": moco})
    assert held(MocoStep.of(network, without_labels, True)) == 20 * 5 + 4 * 2 + 4 * 7 * 100
    assert held(ScoreStep.of(network, label, 30)) == 30 * 5 + 2
    assert held(MeasureStep(network, 12)) == 12 * 5 + 2
    assert held(VoteStep(network, 2, 3, True, Engine())) == 6 * 5 + 2
    assert held(VoteStep(network, 2, 3, True, Engine(precision="bf16"))) == (6 * 5 + 2) / 2


def test_the_sum_is_at_least_that_of_what_is_known() -> None:
    def cost(stage: str, seconds: float | None) -> StageCost:
        return StageCost(stage, 1, [], {}, 0, 0.0, seconds, 0.0, 0, 0, 0)

    def sum_of_times(*costs: StageCost) -> str:
        return list(cost_table(costs, "costs").columns[4].cells)[-1]

    assert sum_of_times(cost("members", 20.0), cost("images", 30.0)) == "50 s"
    assert sum_of_times(cost("members", 20.0), cost("images", None)) == "at least 20 s"
    assert sum_of_times(cost("members", 0.0), cost("images", None)) == "unknown"
    assert sum_of_times() == "< 0.01 s"


@pytest.mark.parametrize(
    ("name", "one"),
    [("trajectories", "1 trajectory"), ("sets of images", "1 set of images"), ("members", "1 member")],
)
def test_one_of_a_kind_is_named_so(name: str, one: str) -> None:
    stage = StageCost("images", 1, [], {name: 1}, 0, 0.0, None, 0.0, 0, 0, 0)
    assert what(stage) == one


# --- counts -----------------------------------------------------------------------------------------------------------


def test_measurements_are_counted_image_by_image(compose: Compose) -> None:
    config = compose("evaluate", "compare=none", "protocol.epochs=200", "protocol.eval_every=70")
    tested = len(planning(config, CPU).data().test)
    counted = works(config)
    # After each of ten epochs and at the end on test images, and once on the 5,188 training images.
    assert total(counted, "members", MeasureStep) == 5 * (11 * tested + 5188)
    # Three seeds, after the epochs 70, 140 and 200.
    assert total(counted, "students", MeasureStep) == 3 * 3 * tested


def test_patches_are_counted_by_their_candidates(compose: Compose) -> None:
    counted = works(compose("distill", "patches.candidates=30", "patches.crops=3", "patches.factor=2"))
    assert total(counted, "patches", PatchStep) == 10 * 30
    (work,) = (work for piece, work in counted if piece.stage == "patches")
    images = stages(counted)["images"].image_bytes
    assert work.other_bytes == images == 100 * 3 * 32 * 32
    # The crops of a class, a quarter of an image each, as bytes and as numbers of four bytes.
    assert work.held == 30 * 3 * 3 * 16 * 16 * (1 + 4)
    # There are no more candidates than images of a class.
    assert total(works(compose("distill", "patches.candidates=1000")), "patches", PatchStep) == 10 * 518


def test_files_are_decoded_by_workers_side_by_side(compose: Compose) -> None:
    config = compose("distill", "dataset=imagenette", "trainer.workers=4", "recipe.epochs=20", "patches.candidates=30")
    counted = works(config)
    (members,) = {work.parts["epochs"] for piece, work in counted if piece.stage == "members"}
    assert members == 20
    trained = [piece for piece, _ in counted if piece.stage == "members"]
    # Twenty epochs of 9,469 images, and eleven measurements of 3,925.
    assert total(counted, "members", DecodeStep) == len(trained) * (20 * 9469 + 11 * 3925) / 4
    # Candidates are read by the process itself.
    assert total(counted, "patches", DecodeStep) == 10 * 30


def test_images_that_are_held_out_are_none_of_the_training_images(compose: Compose) -> None:
    config = compose("train", "dataset=cifar10", "dataset.evaluate_on=validation", "dataset.validation_fraction=0.1")
    data = planning(config, CPU).data()
    assert (len(data.train), len(data.test)) == (45_000, 5_000)


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that goes on by eight in every call of a step."""
    seconds = [0.0]

    def run_of(step: Step, images: int, build: Any, device: torch.device) -> Callable[[], None]:
        def run() -> None:
            seconds[0] += 8.0

        return run

    monkeypatch.setattr(calibrate, "run_of", run_of)
    return seconds


def timed(steps: list[Step], config: RunConfig, now: list[float]) -> dict[Step, float]:
    return time_steps(steps, Profiles(), planning(config, CPU), clock=lambda: now[0])


def test_the_time_of_a_call_is_that_of_its_steps(
    compose: Compose, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_matrix_rate", lambda *arguments: 1e18)
    config = compose("distill")
    network = network_of(config)
    move, measure = MoveStep.of(2, 3, 8, config.method), MeasureStep(network, 4)
    plain, compiled = (VoteStep(network, 2, 3, True, Engine(compile=choice)) for choice in (False, True))
    times = timed([move, measure, plain, compiled], config, now)
    # One call makes sixteen iterations, or measures four images.
    assert times[move] == 8 / 16
    assert times[measure] == 8 / 4
    assert times[plain] == 8
    assert times[compiled] == pytest.approx(8 * COMPILED_SHARE)
    assert COMPILED_SHARE < 1


def test_a_part_of_a_step_stands_for_all_of_it(
    compose: Compose, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_matrix_rate", lambda *arguments: 1.0)
    config = compose("distill")
    vote = VoteStep(network_of(config), 2, 3, True, Engine())
    # Slow as the machine seems, it is given a single image.
    assert timed([vote], config, now)[vote] == 8 * 6


def test_what_happens_around_steps_is_told_apart(
    compose: Compose, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit takes 5 s, an epoch 2 s and a batch half a second more; a file takes 3 s a megabyte."""

    def fit(context: Context, module: Any, loader: Any, epochs: int, *rest: Any) -> None:
        now[0] += 5 + epochs * (2 + 0.5 * len(loader))

    def write(path: Path, content: bytes) -> None:
        path.write_bytes(b"")
        now[0] += 3 * len(content) / 1e6

    monkeypatch.setattr(Context, "fit", fit)
    monkeypatch.setattr(calibrate, "write_atomically", write)
    names = ("fit", "epoch", "batch", "artifact", "part", "megabyte")
    found = timed([Overhead(name) for name in names], compose("distill"), now)
    expected = SimpleNamespace(fit=5.0, epoch=2.0, batch=0.5, artifact=0.03, part=0.3, megabyte=3 - 0.03 / 16)
    for name in names:
        assert found[Overhead(name)] == pytest.approx(getattr(expected, name)), name
