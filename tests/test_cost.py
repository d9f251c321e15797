"""What a command would cost: counts against numbers that were worked out by hand. No test looks at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from helpers import tiny_context
from torch import nn

from cvdd.chain.compare import Distilled, Result, compare
from cvdd.chain.context import Context
from cvdd.computing.footprint import profile
from cvdd.cost import StageCost, _notes, load_prediction, plan_pieces, planning, predict_run, show_cost
from cvdd.cost.plan import Piece
from cvdd.cost.prediction import FOLDER, measured_seconds, predict, prediction_path
from cvdd.cost.steps import MoveStep, Network, Overhead, ReplayStep, ScoreStep, StudentStep, TrainStep, VoteStep
from cvdd.cost.work import Work, work_of
from cvdd.report.predicted import predicted_costs
from cvdd.schema import RunConfig, with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.engine import Engine

pytest_plugins = ["chain_fixtures"]

CPU = torch.device("cpu")


def works(config: RunConfig) -> list[tuple[Piece, Work]]:
    return [(piece, work_of(piece)) for piece in plan_pieces(planning(config, CPU))]


def stages(counted: list[tuple[Piece, Work]]) -> dict[str, StageCost]:
    """Costs of all stages where every step takes a second."""

    class Second(dict[Any, float]):
        def __missing__(self, step: Any) -> float:
            return 1.0

    costs = predict(counted, Second(), lambda network, mode: profile_of_nothing(), 0)
    return {cost.stage: cost for cost in costs}


def profile_of_nothing() -> Any:
    return profile(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), 2, 8, "forward")


def in_store(context: Context) -> RunConfig:
    """Configuration of a context whose store is not the configured one."""
    config = context.config
    return config.model_copy(update={"paths": config.paths.model_copy(update={"store": context.store.root})})


def total(counted: list[tuple[Piece, Work]], stage: str, kind: type) -> float:
    """How often steps of a kind happen in a stage."""
    return sum(
        count
        for piece, work in counted
        if piece.stage == stage
        for step, count in work.uses.items()
        if isinstance(step, kind)
    )


def test_digits_at_ipc_10(compose: Compose) -> None:
    counted = works(compose("evaluate", "compare=none"))
    costs = stages(counted)
    # Five members, 10 epochs of 5,188 images in batches of 64: 81 full ones, and one of 4.
    assert costs["members"].steps == 5 * 10 * 82
    assert total(counted, "members", TrainStep) == pytest.approx(5 * 10 * 5188 / 64)
    # Ten slots of one block; ten slots have ten different pairs of five members, so nothing is stacked.
    assert costs["images"].parts == {"sets of images": 1, "units": 10, "stacks": 10}
    assert costs["images"].steps == 10 * 200
    # Both members of a pair judge 200 iterations.
    assert total(counted, "images", VoteStep) == 10 * 2 * 200
    assert costs["images"].image_bytes == 100 * 3 * 32 * 32
    # 200 epochs of 100 images, five teachers, float16.
    assert total(counted, "labels", ScoreStep) == 5 * 200 * 100
    logits = 200 * 100 * 10 * 2
    records = next(work.label_bytes for piece, work in counted if piece.stage == "labels") - logits
    assert records == 200 * 100 * 29
    assert costs["labels"].label_bytes == 980_000
    # Three seeds, 200 epochs of ten batches.
    assert costs["students"].steps == 3 * 200 * 10
    # A measurement of one member: ten slots share its draw, and so one forward pass.
    assert costs["priors"].parts["stacks"] == 5
    assert total(counted, "priors", StudentStep) == 5 * 60 * 10
    assert list(costs) == ["members", "patches", "priors", "images", "labels", "students"]


def test_imagenet_at_ipc_50_without_its_images(compose: Compose) -> None:
    config = compose("evaluate", "experiment=cvdd_table1_imagenet1k_ipc50_r18")
    counted = works(config)
    costs = stages(counted)
    # Weights are fetched, not trained.
    assert costs["members"].parts == {"members": 5}
    assert costs["members"].steps == 0
    # Fifty slots of ten blocks of 100 classes; a stack takes ten units of equal draw, here always those of a slot.
    assert costs["images"].parts["units"] == 500
    assert costs["images"].parts["stacks"] == 50
    assert costs["images"].steps == 50 * 4000
    assert total(counted, "images", MoveStep) == 50 * 4000
    assert costs["images"].image_bytes == 50_000 * 3 * 224 * 224
    label, samples = config.label, config.label.epochs * 50_000
    assert label.epochs == 300
    assert costs["labels"].label_bytes == samples * 1000 * 2 + samples * 29
    assert total(counted, "labels", ScoreStep) == 5 * samples
    assert costs["students"].steps == len(config.protocol.seeds) * 300 * 50_000 // 16
    assert "priors" not in costs


def test_rows_share_what_is_identical(compose: Compose) -> None:
    alone = stages(works(compose("evaluate", "compare=none")))
    both = stages(works(compose("evaluate", "compare=random_real")))
    for shared in ("members", "patches", "priors"):
        assert both[shared] == alone[shared]
    for own in ("images", "labels", "students"):
        assert both[own].artifacts == 2 * alone[own].artifacts
    # A row that is the configuration itself under another name adds nothing.
    same = with_overrides(compose("evaluate", "compare=none"), {"compare": {"again": {}}})
    assert stages(works(same)) == alone


def test_a_row_with_other_members_measures_their_priors(compose: Compose) -> None:
    """Rows of the same members share the command's, whatever else they differ in."""

    def measured(*overrides: str) -> set[str]:
        counted = works(compose("evaluate", "compare=none", *overrides))
        made = (piece.artifact for piece, _ in counted if piece.stage == "priors")
        return {artifact.name for artifact in made if artifact.kind == "images"}

    alone = measured()
    assert len(alone) == 5
    assert measured("+compare.row=['method=random_real','method.iterations=0']") == alone
    others = measured("+compare.row=['committee=tiny_mixed']")
    assert alone < others
    assert any("vit" in name for name in others - alone)


def test_a_verb_counts_no_later_stage(compose: Compose) -> None:
    assert list(stages(works(compose("train")))) == ["members"]
    assert "labels" not in stages(works(compose("distill")))
    assert "students" not in stages(works(compose("relabel")))


def test_a_verb_measures_only_the_priors_that_it_needs(compose: Compose) -> None:
    """Labels are weighted by priors too, and so are the votes of rows that one is compared with."""
    one = ("method.voters=[resnet18]", "+compare.votes={method.voters:drawn}")
    assert "priors" not in stages(works(compose("distill", *one)))
    for verb in ("relabel", "evaluate"):
        assert stages(works(compose(verb, "method.voters=[resnet18]")))["priors"].artifacts == 10
    assert stages(works(compose("distill")))["priors"].artifacts == 10
    alone = ("method.voters=[resnet18]", "label.weights=equal")
    assert "priors" not in stages(works(compose("evaluate", *alone)))
    assert "priors" in stages(works(compose("evaluate", *alone, "+compare.votes={method.voters:drawn}")))


def test_what_is_recorded_is_held_together(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(kind: str) -> int:
        counted = works(compose("evaluate", "method.voters=all", "compare=none"))
        groups = [group for piece, work in counted if piece.stage == kind for group in work.together]
        return max(sum(isinstance(step, VoteStep | ScoreStep) for step in group) for group in groups)

    assert (largest("images"), largest("labels")) == (1, 1)
    monkeypatch.setattr("cvdd.cost.plan.records", lambda wanted, device: True)
    assert (largest("images"), largest("labels")) == (5, 5)


def test_no_more_samples_are_held_than_there_are(compose: Compose) -> None:
    """Sixteen batches of 1024 fit a pass; three epochs of a hundred images share one, and are all there is."""
    counted = works(
        compose("relabel", "label.batch_size=1024", "label.stack=16", "label.epochs=3", "protocol.epochs=3")
    )
    steps = [step for piece, work in counted if piece.stage == "labels" for step in work.uses]
    assert {step.together for step in steps if isinstance(step, ScoreStep | ReplayStep)} == {300}


@pytest.mark.parametrize(("compared", "rows"), [("false", 0), ("true", 10)])
def test_turns_let_one_member_judge(compared: str, rows: int, compose: Compose) -> None:
    counted = works(compose("distill", "method.turns=in_turn", f"method.log_agreement={compared}"))
    # To be compared, both members of a pair judge once more at each log row.
    assert total(counted, "images", VoteStep) == 10 * (200 + 2 * rows)


def test_a_large_stack_is_judged_in_parts(compose: Compose) -> None:
    counted = works(compose("distill", "prior.iterations=10", "engine.units_per_pass=4", "engine.compile=false"))
    # The ten slots of a measurement share a stack: two passes of four units, and one of two.
    assert total(counted, "priors", VoteStep) == 5 * 10 * 3
    assert total(counted, "images", VoteStep) == 10 * 2 * 200


def test_compiling_takes_time_of_its_own(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvdd.computing.automatic.has_compiler", lambda device: True)
    plain = works(compose("distill", "engine.compile=false"))
    compiled = works(compose("distill", "engine.compile=true", "engine.units_per_pass=1"))
    assert total(plain, "images", VoteStep) == total(compiled, "images", VoteStep)
    images = next(work for piece, work in compiled if piece.stage == "images")
    # Once for each member.
    assert images.uses[Overhead("compile")] == 5
    assert Overhead("compile") not in next(work for piece, work in plain if piece.stage == "images").uses


def test_each_seed_has_images_of_its_own(compose: Compose) -> None:
    costs = stages(works(compose("evaluate", "protocol.images=per_seed", "compare=none")))
    assert [costs[stage].artifacts for stage in ("patches", "images", "labels", "students")] == [3, 3, 3, 3]


def test_methods_with_engines_of_their_own_are_not_guessed(compose: Compose) -> None:
    costs = stages(works(compose("evaluate", "experiment=apm_digits_photo")))
    assert costs["images"].seconds is None
    assert costs["students"].seconds is None


@pytest.mark.parametrize(("mode", "passes"), [("forward", 1), ("vote", 2), ("train", 2)])
def test_flops_of_a_known_layer(mode: Any, passes: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten())
    forward = 2 * 3 * 4 * 3 * 3 * 6 * 6
    # Backwards either the image or the weights have a gradient, at the price of a forward pass.
    assert profile(network, 4 * 6 * 6, 8, mode).flops == passes * forward
    assert next(network.parameters()).device.type == "cpu"


def test_bytes_that_are_held_for_the_way_back() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    held = profile(network, 4, 8, "train")
    assert held.weights == 3 * 4 * 4
    # The image, what comes out of the ReLU, and four numbers or so for the loss.
    least = 3 * 64 * 4 + 4 * 64 * 4
    assert least <= held.activations <= least + 200


def test_nothing_is_made(compose: Compose, tmp_path: Path) -> None:
    config = compose("evaluate", "compare=none")
    plan_pieces(planning(config, CPU))
    assert not config.paths.store.exists()


def test_what_is_made_costs_nothing(made: tuple[Distilled, Result], again: Callable[..., Context]) -> None:
    everything = stages(works(in_store(again())))
    assert all(cost.all_made for cost in everything.values())
    assert all(cost.seconds == 0 for cost in everything.values())
    assert everything["images"].image_bytes == 20 * 3 * 32 * 32


def test_what_is_missing_is_counted(made: tuple[Distilled, Result], again: Callable[..., Context]) -> None:
    costs = stages(works(in_store(again("students"))))
    assert costs["images"].all_made
    assert not costs["students"].made
    # Batches of 8 of 20 images, three epochs.
    assert costs["students"].steps == 3 * 3


def test_the_whole_way_on_a_tiny_run(chain_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = tiny_context(chain_home, "cost=true", store=tmp_path / "fresh")
    config = in_store(context)
    show_cost(config, CPU)
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in ("members", "patches", "images", "labels", "students"))
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == [FOLDER]

    run = config.model_copy(update={"cost": False})
    found = load_prediction(run)
    assert found is not None
    assert all(cost.seconds is not None and cost.seconds > 0 for cost in found[1])
    assert all(cost.flops > 0 and cost.peak_memory > 0 for cost in found[1])
    finished = Context(run, context.store, CPU)
    compare(finished)
    shown = predicted_costs(finished)
    assert shown is not None
    assert [cost.stage for cost in shown[1]] == [cost.stage for cost in found[1]]
    assert all(cost.measured > 0 for cost in shown[1])


def test_a_prediction_is_that_of_an_equal_configuration(compose: Compose) -> None:
    assert load_prediction(compose("evaluate")) is None
    asked = compose("train", "cost=true", "recipe.epochs=1", "dataset.train_per_class=40")
    show_cost(asked, CPU)
    same = compose("train", "recipe.epochs=1", "dataset.train_per_class=40", "trainer.progress=none")
    assert load_prediction(same) is not None
    assert load_prediction(compose("train", "recipe.epochs=2", "dataset.train_per_class=40")) is None


def test_a_prediction_of_another_version_is_left_alone(compose: Compose) -> None:
    config = compose("train")
    folder = config.paths.store / FOLDER
    folder.mkdir(parents=True)
    prediction_path(config).write_text(json.dumps({"machine": "x", "stages": [{"other": 1}]}))
    assert load_prediction(config) is None


def test_only_what_was_missing_is_measured(made: tuple[Distilled, Result], again: Callable[..., Context]) -> None:
    pieces = plan_pieces(planning(in_store(again()), CPU))
    students = [piece for piece in pieces if piece.stage == "students"]
    cost = stages([(piece, work_of(piece)) for piece in students])["students"]
    assert measured_seconds(pieces, cost) == 0
    unmade = StageCost(**{**cost.__dict__, "made": []})
    seconds = students[0].artifact.manifest["cost"]["process_seconds"]
    assert measured_seconds(pieces, unmade) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("times", "seconds"), [({"wall_seconds": 100.0, "process_seconds": 180.0}, 180.0), ({"wall_seconds": 180.0}, 180.0)]
)
def test_what_processes_measured_together_stands_beside_a_prediction_for_one(
    times: dict[str, float], seconds: float, made: tuple[Distilled, Result], again: Callable[..., Context]
) -> None:
    """Artefacts of earlier versions have one time, which was that."""
    pieces = plan_pieces(planning(in_store(again()), CPU))
    piece = next(piece for piece in pieces if piece.stage == "students")
    cost = stages([(piece, work_of(piece))])["students"]
    manifest = {**piece.artifact.manifest, "cost": times}
    piece = replace(piece, artifact=replace(piece.artifact, manifest=manifest))
    assert measured_seconds([piece], replace(cost, made=[])) == seconds


FOLDER_OF_MINE = ("dataset=image_folder", "dataset.name=mine", "dataset.root=/nowhere", "dataset.image_size=32")


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ((), "number of classes"),
        (("dataset.num_classes=10",), "number of training images"),
        (("dataset.num_classes=10", "dataset.train_per_class=5"), "number of images to measure on"),
    ],
)
def test_an_unknown_size_is_an_error_that_names_the_override(
    compose: Compose, known: tuple[str, ...], unknown: str
) -> None:
    config = compose("train", *FOLDER_OF_MINE, *known)
    with pytest.raises(ConfigError, match=unknown) as caught:
        works(config)
    for override in ("dataset.root=", "dataset.num_classes=", "dataset.train_per_class=", "dataset.test_per_class="):
        assert override in str(caught.value)


def test_images_of_a_folder_that_were_never_decoded_are_counted(compose: Compose, tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 3)):
        for name in ("one", "two", "three"):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for index in range(count):
                (tmp_path / "mine" / part / name / f"{index}.jpg").touch()
    config = compose("train", *FOLDER_OF_MINE, f"dataset.root={tmp_path / 'mine'}")
    context = planning(config, CPU)
    data = context.data()
    assert (len(data.classes), len(data.train), len(data.test)) == (3, 36, 9)
    assert context.notes == {"mine is not decoded yet; sizes are those of its configuration, or counted": None}


def test_a_folder_of_known_size(compose: Compose) -> None:
    sizes = ("dataset.num_classes=10", "dataset.train_per_class=64", "dataset.test_per_class=5")
    counted = works(compose("train", *FOLDER_OF_MINE, *sizes))
    assert stages(counted)["members"].steps == 5 * 10 * 10


def test_the_reason_is_said(compose: Compose) -> None:
    context = planning(compose("train", "dataset=cifar10"), CPU)
    plan_pieces(context)
    assert any("published" in note for note in context.notes)


def test_too_large_steps_are_timed_in_part(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    import cvdd.cost.calibrate as module

    sizes: list[int] = []
    real = module.run_of

    def noting(step: Any, images: int, *rest: Any) -> Any:
        sizes.append(images)
        return real(step, images, *rest)

    monkeypatch.setattr(module, "run_of", noting)
    monkeypatch.setattr(module, "_matrix_rate", lambda *arguments: 1.0)
    config = compose("train", "~committee.members.densenet121")
    step = VoteStep(Network.of(config.committee.members["resnet18"].backbone, 10, 32), 2, 10, True, Engine())
    times = module.time_steps([step, Overhead("fit")], module.Profiles(), planning(config, CPU), 0.1)
    assert sizes == [1]
    assert times[step] > 0
    monkeypatch.setattr(module, "_matrix_rate", lambda *arguments: 1e18)
    module.time_steps([step], module.Profiles(), planning(config, CPU), 0.1)
    assert sizes == [1, 20]


def test_predict_run_of_a_committee(compose: Compose) -> None:
    config = compose("train", "dataset.train_per_class=20", "recipe.epochs=1")
    costs, notes = predict_run(config, CPU, 0.5)
    assert [cost.stage for cost in costs] == ["members"]
    assert costs[0].seconds is not None
    assert costs[0].other_bytes > 0
    assert any("not decoded" in note for note in notes)
    recorded = "recorded as CUDA graphs"
    assert not any(recorded in note for note in notes)
    assert any(recorded in note for note in _notes(config, [], True))
