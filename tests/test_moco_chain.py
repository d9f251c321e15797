"""Members that are trained without labels, in the chain: artefacts, interruptions, costs, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, as_files, configure, same_files, tiny_context
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from test_interruption import PulledPlug, stop_at
from test_moco import SETTINGS

from cvdd.artifact import Artifact
from cvdd.backbones import build_network
from cvdd.backbones.heads import require_head
from cvdd.chain.context import Context
from cvdd.chain.encoders import make_encoder, with_encoder
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.training import WEIGHTS, load_curve
from cvdd.cost.calibrate import Profiles
from cvdd.cost.fakes import run_of, scale_of
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import DecodeStep, MocoStep, TrainStep
from cvdd.cost.work import work_of
from cvdd.report.tables import print_members
from cvdd.schema import with_overrides
from cvdd.support.config_base import ConfigError
from cvdd.support.readable import readable_seconds
from cvdd.support.seeds import derive_seed
from cvdd.training.classifier import Classifier

TYPED = "{" + ",".join(f"{key}:{value}" for key, value in SETTINGS.items()) + "}"
TINY_MOCO = ("recipe=tiny_moco", "recipe.epochs=2", "recipe.batch_size=50", f"recipe.moco={TYPED}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moco")


@pytest.fixture(scope="module")
def member(home: Path) -> Any:
    return make_member(tiny_context(home, *TINY_MOCO), "resnet18")


def encoder_of(context: Context) -> Any:
    backbone = context.config.committee.members["resnet18"].backbone
    return make_encoder(context, "resnet18", backbone, derive_seed(context.config.seed, "member", "resnet18"))


def test_a_member_is_its_encoder_with_another_last_layer(member: Any, home: Path) -> None:
    context = tiny_context(home, *TINY_MOCO)
    encoder = encoder_of(context)
    assert member.manifest["parents"] == [{"kind": "encoders", "name": encoder.name, "digest": encoder.digest}]
    learnt, whole = load_file(encoder.path / WEIGHTS), load_file(member.path / WEIGHTS)
    network = load_network(context, member, context.config.committee.members["resnet18"].backbone)
    head, _ = require_head(network, "it")
    assert whole.keys() - learnt.keys() == {f"{head}.weight", f"{head}.bias"}
    # Statistics of BatchNorm too, and how often they were updated: without labels, two groups a step.
    assert all(torch.equal(values, whole[key]) for key, values in learnt.items())
    counts = {int(values) for key, values in learnt.items() if key.endswith("num_batches_tracked")}
    steps = 2 * (len(context.data().train) // 12)
    assert counts == {2 * steps}
    assert len(load_curve(encoder)) == 2
    assert encoder.metrics["train_loss"] == load_curve(encoder)[-1]["train_loss"]


def test_a_probe_begins_small(member: Any, home: Path) -> None:
    context = tiny_context(home, *TINY_MOCO)
    backbone = context.config.committee.members["resnet18"].backbone
    networks = [with_encoder(build_network(backbone, 10, 0), encoder_of(context), seed) for seed in (1, 1, 2)]
    one, again, other = (require_head(network, "it")[1] for network in networks)
    assert float(one.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert not one.bias.any()
    assert torch.equal(one.weight, again.weight)
    assert not torch.equal(one.weight, other.weight)


def test_the_time_of_a_member_is_with_that_of_its_encoder(
    member: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = tiny_context(home, *TINY_MOCO)
    shown = Artifact(member.path, {**member.manifest, "cost": {"wall_seconds": 7200.0}})
    seconds = encoder_of(context).manifest["cost"]["wall_seconds"]
    assert 0 < seconds < 60
    print_members(context.config, {"resnet18": shown})
    assert readable_seconds(7200 + seconds) in capsys.readouterr().out


def test_a_training_without_labels_learns_something(home: Path) -> None:
    # Views that are easily told from those of others.
    longer = TYPED.replace("epochs:2", "epochs:8,changed:0,grey:0,blurred:0,crop_scale:[0.8,1.0]")
    encoder = encoder_of(tiny_context(home, *TINY_MOCO, f"recipe.moco={longer}"))
    losses = [row["train_loss"] for row in load_curve(encoder)]
    # In the first epoch the queue is noise, from which a view is easily told.
    assert losses[-1] < losses[1] - 0.3


def test_it_goes_on_where_it_was_interrupted(member: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tmp_path, *TINY_MOCO)
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 2, PulledPlug)
        with pytest.raises(PulledPlug):
            make_member(context, "resnet18")
    again = make_member(context, "resnet18")
    assert same_files(again, member)
    assert encoder_of(context).manifest["cost"]["sessions"] == 2


def test_images_may_be_files(home: Path, tmp_path: Path) -> None:
    """They are cropped from a somewhat larger side, so weights differ from those of images in memory."""
    context = as_files(tmp_path, tiny_context(tmp_path, *TINY_MOCO, "trainer.workers=0"))
    assert encoder_of(context).metrics["train_loss"] > 0


def test_a_gpu_computes_the_same(home: Path, tmp_path: Path) -> None:
    # Three steps: what is rounded otherwise grows from step to step.
    typed = TYPED.replace("epochs:2", "epochs:1").replace("12", "100").replace("30", "100")
    short = (*TINY_MOCO, f"recipe.moco={typed}")
    with simulated_gpu():
        context = tiny_context(tmp_path, *short, "trainer.accelerator=auto", "engine.precision=fp32")
        found = encoder_of(replace(context, device=torch.device("cuda", 0)))
    expected = encoder_of(tiny_context(home, *short))
    ours, theirs = load_file(found.path / WEIGHTS), load_file(expected.path / WEIGHTS)
    # Layers lie otherwise in memory there, and a gradient through BatchNorm of noise is rounded accordingly.
    assert found.metrics["train_loss"] == pytest.approx(expected.metrics["train_loss"], rel=1e-4)
    for key, values in ours.items():
        torch.testing.assert_close(values, theirs[key], atol=3e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        "epochs:3",
        "batch_size:10",
        "groups:3",
        "lr:0.01",
        "momentum:0.5",
        "weight_decay:0.01",
        "dimension:6",
        "queue:31",
        "key_momentum:0.8",
        "temperature:0.3",
        "crop_scale:[0.3,1.0]",
        "changes:[0.1,0.4,0.4,0.1]",
        "changed:0.7",
        "grey:0.1",
        "blurred:0.1",
    ],
)
def test_every_setting_makes_another_member(change: str, member: Any, home: Path) -> None:
    name = change.partition(":")[0]
    settings = ",".join([change, *(f"{key}:{value}" for key, value in SETTINGS.items() if key != name)])
    config = configure(home, *tiny(f"recipe.moco={{{settings}}}"))
    kinds = {piece.artifact.kind: piece for piece in pieces_of(config)}
    assert kinds["encoders"].artifact.digest != encoder_of(tiny_context(home, *TINY_MOCO)).digest
    assert kinds["members"].artifact.digest != member.digest


def tiny(*overrides: str) -> Sequence[str]:
    return (*TINY, *TINY_MOCO, "committee.size=1", "method.voters=[resnet18]", "label.teachers=[resnet18]", *overrides)


def pieces_of(config: Any) -> list[Any]:
    return plan_pieces(planning(config, torch.device("cpu")))


def test_its_cost_is_counted(home: Path) -> None:
    config = configure(home, *tiny())
    works = {piece.artifact.kind: work_of(piece) for piece in pieces_of(config) if piece.stage == "members"}
    assert set(works) == {"members", "encoders"}
    # 300 images in batches of twelve, two epochs; a last layer is trained as long as any member.
    assert works["encoders"].steps == 2 * 25
    assert works["encoders"].parts == {"epochs without labels": 2}
    assert works["encoders"].held == 300 * 3 * 32 * 32
    assert works["members"].steps == 2 * 6
    (probe,) = (step for step in works["members"].uses if isinstance(step, TrainStep))
    (step,) = (step for step in works["encoders"].uses if isinstance(step, MocoStep))
    assert probe.probe
    assert step.network.classes == SETTINGS["dimension"]
    # Only a forward pass is needed for a last layer.
    profiles = Profiles()
    sizes = {one: scale_of(one, profiles) for one in (probe, step, replace(probe, probe=False))}
    assert sizes[probe].flops < sizes[replace(probe, probe=False)].flops / 2
    for one in (probe, step):
        run_of(one, sizes[one].least, profiles.build, torch.device("cpu"))()


def test_files_are_decoded_for_every_view_of_a_batch(home: Path) -> None:
    words = "dataset=imagenette committee=imagenet recipe=imagenet1k_moco recipe.moco.epochs=3 trainer.workers=4"
    config = configure(home, *words.split(), "patches=stitched", "students=imagenet", verb="train")
    counted = [work_of(piece) for piece in pieces_of(config) if piece.artifact.kind == "encoders"]
    assert len(counted) == 5
    for work in counted:
        assert work.held == 0
        assert sum(count for step, count in work.uses.items() if isinstance(step, DecodeStep)) == work.steps * 256 / 4


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("groups:5", r"recipe\.moco\.groups=5 does not cut recipe\.moco\.batch_size=12 .* to one of 1, 2, 3, 4, 6"),
        ("groups:12", r"recipe\.moco\.groups=12 .* two images or more"),
        ("queue:11", r"recipe\.moco\.queue=11 .* at least recipe\.moco\.batch_size=12"),
        ("changes:[0.4,0.4,0.4,0.6]", r"recipe\.moco\.changes"),
        ("changed:0,changes:[0.1,0.4,0.4,0.1]", r"recipe\.moco\.changed=0 .* nothing reads recipe\.moco\.changes"),
        ("changes:[0,0,0,0]", r"recipe\.moco\.changes=\[0,0,0,0\] changes nothing"),
    ],
)
def test_settings_that_cannot_be(change: str, said: str, tmp_path: Path) -> None:
    name = change.partition(":")[0]
    settings = ",".join([change, *(f"{key}:{value}" for key, value in SETTINGS.items() if key != name)])
    with pytest.raises(ConfigError, match=said):
        tiny_context(tmp_path, "recipe=tiny_moco", f"recipe.moco={{{settings}}}")


def test_students_of_all_data_are_trained_with_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.full_data=true .* recipe\.moco"):
        tiny_context(tmp_path, *TINY_MOCO, "protocol.full_data=true")


def refused(context: Context, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_before_work(context)


def with_member(context: Context, backbone: dict[str, Any], **member: Any) -> Context:
    changes = {f"committee.members.resnet18.{key}": value for key, value in member.items()}
    config = with_overrides(context.config, {"committee.members.resnet18.backbone": backbone, **changes})
    return replace(context, config=config)


def test_a_batch_larger_than_the_data_is_told_before_work(tmp_path: Path) -> None:
    large = TYPED.replace("batch_size:12", "batch_size:400").replace("queue:30", "queue:400")
    context = tiny_context(tmp_path, *TINY_MOCO, f"recipe.moco={large}", verb="train")
    refused(context, r"recipe\.moco\.batch_size=400 is more than the 300 training images")


def test_networks_that_cannot_be_trained_without_labels_are_told_before_work(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *TINY_MOCO, verb="train")
    squeezenet = {"name": "other", "target": "torchvision.models.squeezenet1_1", "min_size": 17}
    refused(with_member(context, squeezenet), r"members\.resnet18: recipe\.moco needs what goes into")
    pretrained = {"name": "other", "target": "torchvision.models.resnet18", "pretrained": True}
    refused(with_member(context, pretrained), r"members\.resnet18\.backbone\.pretrained=true begins with weights")
    # Nothing is trained of a network that is given.
    given = with_member(context, squeezenet, checkpoint=str(tmp_path / "weights.safetensors"))
    check_before_work(given)
