"""Trajectory matching from real images to a measured student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_files
from mtt_helpers import mtt_context
from safetensors.torch import load_file

import cvdd.training.fit
from cvdd.artifact import Artifact, Store
from cvdd.backbones import build_network
from cvdd.chain.compare import Result
from cvdd.chain.context import Context
from cvdd.chain.initial import initial_images
from cvdd.chain.mtt import load_matched, make_mtt_images, make_mtt_student
from cvdd.chain.space import input_space, whitening_of
from cvdd.chain.training import load_curve
from cvdd.chain.trajectories import make_trajectories, mtt_of
from cvdd.chain.unit_files import load_history, load_images
from cvdd.methods.mtt import FlatNetwork
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed
from cvdd.synthesis.trajectories import Trajectories, TrajectoryWriter
from cvdd.synthesis.trajectory_matching import ExplodingGradients, MatchingModule
from cvdd.training.classifier import NonFiniteTraining
from cvdd.training.sgd_training import SgdModule, SgdRecipe, dsa
from cvdd.verbs.evaluate import evaluate

MTT = "method.mtt"


class PulledPlug(Exception):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtt")


@pytest.fixture(scope="module")
def made(home: Path) -> tuple[Context, Artifact]:
    """Images with ZCA, hard labels and two per class, made once for all tests."""
    context = mtt_context(home)
    return context, make_mtt_images(context)


@pytest.fixture
def differing(made: tuple[Context, Artifact]) -> Callable[..., Context]:
    """The same surroundings with other settings of trajectory matching, or of anything by its whole key."""

    def changed(keys: dict[str, Any] | None = None, **settings: Any) -> Context:
        return made[0].differing({**{f"{MTT}.{name}": value for name, value in settings.items()}, **(keys or {})}, "")

    return changed


@pytest.fixture
def again(made: tuple[Context, Artifact], home: Path, tmp_path: Path) -> Callable[..., Context]:
    """A store of one's own that has everything but the given kinds of artefacts."""

    def without(*kinds: str) -> Context:
        shutil.copytree(home / "store", tmp_path / "store")
        for kind in kinds:
            shutil.rmtree(tmp_path / "store" / kind, ignore_errors=True)
        return replace(made[0], store=Store(tmp_path / "store"))

    return without


def test_images_are_stored_as_every_method_stores_them(made: tuple[Context, Artifact]) -> None:
    context, artifact = made
    pixels, labels = load_images(artifact)
    assert (artifact.kind, pixels.dtype, pixels.shape) == ("images", torch.uint8, (20, 3, 12, 12))
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    histories = load_history(artifact)
    assert sorted(histories) == ["slot0000_block0000", "slot0001_block0000"]
    assert [row["iteration"] for row in histories["slot0000_block0000"]["rows"]] == [2, 4, 6]
    exact = load_matched(artifact)
    space = input_space(context, whitening_of(context))
    assert torch.equal(space.decode(exact.images), pixels)
    assert exact.targets.argmax(dim=1).tolist() == labels.tolist()
    assert exact.step_size == artifact.metrics["step_size"] != 0.05
    start = initial_images(context, None).flatten(0, 1)
    assert (pixels.int() - start.int()).abs().max() > 0
    assert json.loads(json.dumps(dict(artifact.metrics)))["loss"] == histories["slot0001_block0000"]["rows"][-1]["loss"]


def test_the_whitening_lies_with_the_images(made: tuple[Context, Artifact]) -> None:
    context, artifact = made
    whitening = whitening_of(context)
    assert whitening is not None
    ours = load_file(artifact.path / "whitening.safetensors")
    theirs = load_file(whitening.path / "whitening.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_whitening_is_no_image_however_large(made: tuple[Context, Artifact]) -> None:
    _, artifact = made
    measured = dict.fromkeys(("top1", "best_top1", "top5", "loss"), 50.0)
    student = Artifact(artifact.path, {**artifact.manifest, "metrics": measured})
    result = Result("mtt", "convnet", "mtt", (0,), (student,), artifact, None, of_method=True)
    units = sum(path.stat().st_size for path in (artifact.path / "units").iterdir())
    others = (artifact.path / "whitening.safetensors").stat().st_size + units
    assert 0 < result.summary()["image_bytes"] == artifact.bytes - others
    # Whoever sees pixels of 8 bits reads nothing of what the method keeps beside them.
    pixels, _ = load_images(artifact)
    assert replace(result, of_method=False).summary()["image_bytes"] == pixels.numel() < units


def test_snapshots_are_those_of_their_epochs(made: tuple[Context, Artifact]) -> None:
    """The first is the initialisation; each of the others is further away; none is the live network."""
    context, _ = made
    artifact = make_trajectories(context)
    trajectories = Trajectories(artifact.path)
    for expert in range(2):
        seed = derive_seed(derive_seed(context.config.seed, "experts"), expert)
        initial = FlatNetwork(build_network(mtt_of(context).experts.backbone, 10, seed)).vector()
        snapshots = [trajectories.snapshot(expert, epoch) for epoch in range(5)]
        assert torch.equal(snapshots[0], initial)
        ways = [float((snapshot - initial).norm()) for snapshot in snapshots]
        assert ways == sorted(ways)
        assert len(set(ways)) == 5
    assert not torch.equal(trajectories.snapshot(0, 0), trajectories.snapshot(1, 0))
    curve = json.loads((artifact.path / "curves" / "expert00001.json").read_text())
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4]
    assert curve[-1]["train_loss"] < curve[0]["train_loss"]


@pytest.mark.parametrize(("owner", "name", "call"), [(TrajectoryWriter, "write", 8), (MatchingModule, "task", 5)])
def test_an_interrupted_run_ends_with_the_same_bits(
    made: tuple[Context, Artifact],
    again: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
) -> None:
    """Stopped in the second expert's third epoch, and in the fifth iteration, which is of the third epoch."""
    context = again("trajectories", "images")
    original, calls = getattr(owner, name), []
    with monkeypatch.context() as patched:
        patched.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

        def stopping(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise PulledPlug
            return original(*arguments)

        patched.setattr(owner, name, stopping)
        with pytest.raises(PulledPlug):
            make_mtt_images(context)
    if owner is MatchingModule:
        with pytest.raises(ConfigError, match=r"set method\.checkpoint_every=2 to go on with it"):
            make_mtt_images(context.differing({"method.checkpoint_every": 4}, ""))
    resumed: list[int] = []

    def noting(*arguments: Any) -> Any:
        resumed.append(1)
        return original(*arguments)

    monkeypatch.setattr(owner, name, noting)
    images = make_mtt_images(context)
    assert same_files(make_trajectories(context), make_trajectories(made[0]))
    assert same_files(images, made[1])
    # Of ten writes (two experts, five snapshots) and six iterations.
    assert len(resumed) < (10 if owner is TrajectoryWriter else 6)


def test_a_student_learns_at_the_learned_rate(
    made: tuple[Context, Artifact], differing: Callable[..., Context]
) -> None:
    context, images = made
    backbone = mtt_of(context).experts.backbone
    student = make_mtt_student(context, images, "convnet", backbone, 0)
    curve = load_curve(student)
    assert len(curve) == 6
    assert student.kind == "students"
    assert student.metrics["top1"] == curve[-1]["top1"]
    assert student.metrics["best_top1"] >= student.metrics["top1"]
    given = differing({f"{MTT}.student.lr": load_matched(images).step_size})
    assert load_curve(make_mtt_student(given, images, "convnet", backbone, 0)) == curve
    other = differing({f"{MTT}.student.lr": 0.5})
    assert load_curve(make_mtt_student(other, images, "convnet", backbone, 0)) != curve
    with pytest.raises(NonFiniteTraining, match=r"student convnet seed 0.*method\.mtt\.student\.lr"):
        make_mtt_student(differing({f"{MTT}.student.lr": 1e38}), images, "convnet", backbone, 0)


def test_the_rate_falls_where_the_release_lowers_it() -> None:
    """After the 27th of 50 epochs and the 502nd of 1001; what the optimiser remembers is forgotten."""
    recipe = SgdRecipe(50, 0.4, 0.9, 0.0, True)
    assert recipe.drop_epoch == 27
    students = [SgdRecipe(epochs, 0.4, 0.9, 0.0, True, counts_from_zero=True).drop_epoch for epochs in (1001, 300)]
    assert students == [502, 151]
    module = SgdModule(
        recipe,
        torch.randn(6, 3, 4, 4),
        torch.arange(6) % 2,
        lambda pixels: pixels,
        torch.nn.functional.cross_entropy,
        dsa(()),
        forgets_at=recipe.drop_epoch,
        network=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)),
        name="test",
        seed=0,
        measure=lambda network: None,
        measured_at=lambda epoch: False,
        on_epoch=lambda epoch, row: None,
    )
    optimizer = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer: optimizer  # type: ignore[method-assign]
    rates, remembering = [], []
    for epoch in range(30):
        module.__class__.current_epoch = property(lambda self, epoch=epoch: epoch)  # type: ignore[assignment]
        module.on_train_epoch_start()
        rates.append(optimizer.param_groups[0]["lr"])
        remembering.append(bool(optimizer.state))
        optimizer.state[0] = {"momentum_buffer": torch.ones(1)}
    del module.__class__.current_epoch
    assert rates == [0.4] * 27 + [pytest.approx(0.04)] * 3
    assert [epoch for epoch, remembers in enumerate(remembering) if not remembers] == [0, 27]


def test_without_iterations_real_images_are_kept_and_no_expert_is_trained(differing: Callable[..., Context]) -> None:
    context = differing({"method.iterations": 0})
    artifact = make_mtt_images(context)
    assert artifact.metrics["loss"] is None
    assert [parent["kind"] for parent in artifact.manifest["parents"]] == ["whitenings"]
    assert torch.equal(load_images(artifact)[0], initial_images(context, None).flatten(0, 1))
    assert load_matched(artifact).step_size == pytest.approx(0.05)


def test_learned_labels_start_from_an_expert_and_move(differing: Callable[..., Context]) -> None:
    learned = {"labels": "learned", "lr_labels": 5.0}
    moved = load_matched(make_mtt_images(differing(**learned, labels_start="expert"))).targets
    start = load_matched(make_mtt_images(differing({"method.iterations": 0}, **learned, labels_start="expert"))).targets
    for targets in (moved, start):
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(20))
    assert 1e-5 < (moved - start).abs().max() < 0.5
    targets = load_matched(make_mtt_images(differing({"method.iterations": 0}, **learned))).targets
    torch.testing.assert_close(targets[5], torch.full((10,), 0.1 / 9).index_fill(0, torch.tensor(2), 0.9))


def test_textures_are_canvases(differing: Callable[..., Context]) -> None:
    texture = {"canvas": 2, "canvas_samples": 2, "whitening": False, "gradient": "tesla"}
    context = differing({"method.init": "noise"}, **texture)
    artifact = make_mtt_images(context)
    assert load_matched(artifact).images.shape == (20, 3, 24, 24)
    assert load_images(artifact)[0].shape == (20, 3, 12, 12)
    assert not (artifact.path / "whitening.safetensors").exists()
    assert len(load_curve(make_mtt_student(context, artifact, "convnet", mtt_of(context).experts.backbone, 0))) == 6


def test_half_precision_halves_the_store(made: tuple[Context, Artifact], differing: Callable[..., Context]) -> None:
    half = make_trajectories(differing({f"{MTT}.experts.dtype": "float16"}))
    whole = make_trajectories(made[0])
    assert 2 * half.metrics["bytes"] == whole.metrics["bytes"]
    one, other = (Trajectories(artifact.path).snapshot(1, 4) for artifact in (half, whole))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_trajectories_made_elsewhere_are_used(
    made: tuple[Context, Artifact], differing: Callable[..., Context], again: Callable[..., Context]
) -> None:
    context = again("trajectories")
    artifact = make_trajectories(made[0])
    elsewhere = artifact.path
    given = {f"{MTT}.experts.path": elsewhere}

    def elsewhere_with(**changes: Any) -> Context:
        return context.differing({**given, **{name.replace("__", "."): value for name, value in changes.items()}}, "")

    assert make_trajectories(elsewhere_with()).path == elsewhere
    assert not (context.store.root / "trajectories").exists()
    arguments = {"depth": 2, "width": 5, "norm": "instance", "pooled_size": 2}
    for changes, key in [
        ({"dataset__train_per_class": 60}, r"data\.train\.images"),
        ({"method__mtt__experts__lr": 0.01}, r"experts\.lr"),
        ({"method__mtt__experts__backbone__arguments": arguments}, r"experts\.backbone\.arguments\.width"),
        ({"seed": 1}, "seed"),
    ]:
        with pytest.raises(ConfigError, match=rf"does not belong to this configuration: its {key} is"):
            make_trajectories(elsewhere_with(**changes))
    with pytest.raises(ConfigError, match="another whitening"):
        make_trajectories(elsewhere_with(method__mtt__whitening=False))
    with pytest.raises(ConfigError, match="kind images, not trajectories"):
        make_trajectories(elsewhere_with(method__mtt__experts__path=made[1].path))


def test_the_last_good_set_is_kept_in_the_runs_directory(differing: Callable[..., Context]) -> None:
    context = differing(lr_images=1e30, loss_limit=None)
    with pytest.raises(ExplodingGradients, match=r"iteration \d.*last_good\.safetensors"):
        make_mtt_images(context)
    kept = load_file(context.config.paths.output / "last_good.safetensors")
    assert bool(kept["images"].isfinite().all())
    assert kept["step_size"] > 0


def test_networks_with_running_statistics_are_refused(differing: Callable[..., Context]) -> None:
    with pytest.raises(ConfigError, match=r"running_mean.*norm=instance"):
        make_mtt_images(differing({f"{MTT}.experts.backbone.arguments.norm": "batch"}))


def test_too_few_images_for_whitening_are_refused(differing: Callable[..., Context]) -> None:
    """Images of 12 pixels have 432 values."""
    with pytest.raises(ConfigError, match=r"430 training images .* 432 values; at least 433"):
        make_mtt_images(differing({"dataset.train_per_class": 43}))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "segment beyond the epochs": ({"start_epochs": 4}, "snapshots up to epoch 5, and .*experts.epochs=4"),
    "whitened canvas": ({"canvas": 2}, r"canvas=2: .*whitening=false"),
    "samples of no canvas": ({"canvas_samples": 2}, r"canvas_samples.*method\.mtt\.canvas to at least 2"),
    "no rate of labels": ({"labels": "learned"}, r"needs method\.mtt\.lr_labels"),
    "rate of hard labels": ({"lr_labels": 1}, r"set method\.mtt\.labels=learned or lr_labels=null"),
    "start of hard labels": ({"labels_start": "expert"}, "labels_start is of learned labels"),
    "parts of parts": ({"gradient": "tesla", "steps_in_graph": 2}, "gradient=tesla always holds one"),
    "family twice": ({"augmentations": ["crop", "crop"]}, "repeats a family"),
    "eps of nothing": ({"whitening": False, "whitening_eps": 0.2}, "whitening_eps is of method.mtt.whitening"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_answered_with_what_to_type(case: str, differing: Callable[..., Context]) -> None:
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        differing(**settings)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r_bn", 0.5, r"method\.r_bn is of the recover loop.*leave it at 0\.01"),
        ("init", "patches", "method.init=patches: trajectory matching starts from real or noise"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    key: str, value: Any, message: str, differing: Callable[..., Context]
) -> None:
    with pytest.raises(ValueError, match=message):
        differing({f"method.{key}": value})


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ([], "real images they started from"),
        (["method.init=noise", "method.mtt.whitening=false"], None),
        (["method.iterations=0"], None),
    ],
)
def test_the_whole_verb_ends_with_a_page(home: Path, settings: list[str], title: str | None) -> None:
    context = mtt_context(home, "label=hard", "protocol=method", "protocol.seeds=[0]", *settings)
    top1 = evaluate(context, ["evaluate.py"]).metric
    page = (context.config.paths.output / "report.html").read_text()
    assert ("they started from" in page) == (title is not None)
    assert title is None or title in page
    assert json.loads((context.config.paths.output / "metrics.json").read_text())["results"][0]["top1"] == top1
