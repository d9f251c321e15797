"""Members that are trained without labels: MoCo's step, the probe on top, and what comes of them in the chain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MEAN, STD, TINY, as_files, configure, random_pixels, same_files, small_network, tiny_context
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from test_interruption import PulledPlug, stop_at
from torch import Tensor, nn

from cvdd.augment import normalise
from cvdd.backbones.heads import require_head
from cvdd.chain.encoders import make_encoder
from cvdd.chain.members import load_network, make_member
from cvdd.chain.training import WEIGHTS, load_curve
from cvdd.classifier import Classifier
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.cost.calibrate import Profiles
from cvdd.cost.fakes import run_of, scale_of
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import MocoStep, TrainStep
from cvdd.cost.work import work_of
from cvdd.measure import Accuracy
from cvdd.moco import MocoModule, apply_view, draw_view, follow, only_probed, with_projection
from cvdd.preflight import check_before_work
from cvdd.schema import with_overrides
from cvdd.schema.moco import MocoConfig
from cvdd.seeds import derive_seed, generator

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 12,
    "groups": 2,
    "lr": 0.05,
    "dimension": 5,
    "queue": 30,
    "key_momentum": 0.9,
}
TYPED = "{" + ",".join(f"{key}:{value}" for key, value in SETTINGS.items()) + "}"
TINY_MOCO = ("recipe=tiny_moco", "recipe.epochs=2", "recipe.batch_size=50", f"recipe.moco={TYPED}")


def module_of(count: int = 24, **changes: Any) -> MocoModule:
    config = MocoConfig(**{**SETTINGS, **changes})
    network = small_network(classes=config.dimension).train().requires_grad_(True)
    with_projection(network, 3)
    return MocoModule(
        config,
        True,
        random_pixels(count),
        MEAN,
        STD,
        16,
        network=network,
        name="it",
        seed=7,
        measure=lambda network: Accuracy(0.0, 0.0, 0.0),
        measured_at=lambda epoch: False,
        on_epoch=lambda epoch, row: None,
    )


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def plain_step(module: MocoModule, indices: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and keys as the release writes them, a group after the other, of the module's own draws."""
    config, network, behind = module.config, copy.deepcopy(module.network), copy.deepcopy(module.key_network)
    assert module._pixels is not None
    pixels = module._pixels[indices]
    source = generator(7, "views", 0, 0)
    seen, held = (draw_view(config, True, len(pixels), 16, 16, source) for _ in range(2))
    order = torch.randperm(len(pixels), generator=source)
    for mine, theirs in zip(behind.parameters(), network.parameters(), strict=True):
        mine.data = mine.data * config.key_momentum + theirs.data * (1 - config.key_momentum)
    keys = torch.zeros(len(pixels), config.dimension)
    with torch.no_grad():
        for group in order.chunk(config.groups):
            shown = normalise(apply_view(pixels, 16, held)[group], MEAN, STD)
            keys[group] = unit(behind(shown))
    losses = []
    for group in torch.arange(len(pixels)).chunk(config.groups):
        found = unit(network(normalise(apply_view(pixels, 16, seen)[group], MEAN, STD)))
        logits = torch.cat([(found * keys[group]).sum(1)[:, None], found @ module.queue], dim=1) / config.temperature
        losses.append(-logits.log_softmax(dim=1)[:, 0])
    loss = torch.cat(losses).mean()
    return loss, list(torch.autograd.grad(loss, list(network.parameters()))), keys


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_step_is_the_releases(groups: int) -> None:
    module, indices = module_of(groups=groups), torch.arange(12) * 2
    for parameter in module.network.parameters():
        # Away from the second network, as later in a training.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    waiting = module.queue.clone()
    expected, gradients, keys = plain_step(module, indices)
    loss = module.training_step(indices, 0)
    torch.testing.assert_close(loss, expected)
    module.backward(loss)
    for parameter, gradient in zip(module.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(module.queue[:, :12], keys.T)
    assert torch.equal(module.queue[:, 12:], waiting[:, 12:])
    assert int(module.place) == 12
    assert all(parameter.grad is None for parameter in module.key_network.parameters())


def test_keys_are_normalised_in_other_groups_than_views() -> None:
    """With statistics of one group, the order in which keys are computed would be seen in none of them."""
    module, indices = module_of(groups=2), torch.arange(12)
    seen: list[Tensor] = []
    module.key_network.register_forward_pre_hook(lambda network, given: seen.append(given[0].clone()))
    module.training_step(indices, 0)
    assert [len(shown) for shown in seen] == [6, 6]
    held = torch.cat(seen)
    module._pixels = module._pixels[torch.arange(24)] if module._pixels is not None else None
    source = generator(7, "views", 0, 0)
    draw_view(module.config, True, 12, 16, 16, source)
    drawn = draw_view(module.config, True, 12, 16, 16, source)
    order = torch.randperm(12, generator=source)
    assert not torch.equal(order.sort().values[:6], order[:6].sort().values)
    assert module._pixels is not None
    torch.testing.assert_close(held, normalise(apply_view(module._pixels[indices], 16, drawn), MEAN, STD)[order])


def test_the_queue_goes_round() -> None:
    module = module_of()
    keys = unit(torch.randn(12, 5, generator=torch.Generator().manual_seed(2)))
    for _ in range(3):
        module._enqueue(keys)
    # 36 keys in 30 places: the last twelve begin at place 24 and go on at the beginning.
    torch.testing.assert_close(module.queue[:, 24:], keys[:6].T)
    torch.testing.assert_close(module.queue[:, :6], keys[6:].T)
    assert int(module.place) == 6


def test_the_second_network_follows_the_first() -> None:
    ahead, behind = small_network(seed=1), small_network(seed=2)
    before = [parameter.clone() for parameter in behind.parameters()]
    follow(behind, ahead, 0.75)
    for old, new, target in zip(before, behind.parameters(), ahead.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * target)


def test_a_projection_is_two_layers_in_the_place_of_the_last() -> None:
    network, again = small_network(classes=5), small_network(classes=5)
    name = with_projection(network, 3)
    hidden, rectifier, last = network.get_submodule(name).children()
    assert isinstance(hidden, nn.Linear)
    assert isinstance(rectifier, nn.ReLU)
    assert isinstance(last, nn.Linear)
    assert (hidden.in_features, hidden.out_features, last.in_features, last.out_features) == (12, 12, 12, 5)
    with_projection(again, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_a_probe_trains_the_last_layer_alone() -> None:
    network = small_network(dropout=0.5).train()
    head = only_probed(network)
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == [
        "9.weight",
        "9.bias",
    ]
    assert head is network[9]
    assert not any(module.training for module in network.modules())


# --- in the chain -----------------------------------------------------------------------------------------------------


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
    for key, values in ours.items():
        torch.testing.assert_close(values, theirs[key], atol=1e-5, rtol=1e-4)


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


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("groups:5", r"recipe\.moco\.groups=5 does not cut recipe\.moco\.batch_size=12 .* to one of 1, 2, 3, 4, 6"),
        ("groups:12", r"recipe\.moco\.groups=12 .* two images or more"),
        ("queue:11", r"recipe\.moco\.queue=11 .* at least recipe\.moco\.batch_size=12"),
        ("changes:[0.4,0.4,0.4,0.6]", r"recipe\.moco\.changes"),
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


def test_a_batch_larger_than_the_data_is_told_before_it_is_trained(tmp_path: Path) -> None:
    large = TYPED.replace("batch_size:12", "batch_size:400").replace("queue:30", "queue:400")
    context = tiny_context(tmp_path, *TINY_MOCO, f"recipe.moco={large}")
    with pytest.raises(ConfigError, match=r"recipe\.moco\.batch_size=400 is more than the 300 training images"):
        make_member(context, "resnet18")


def test_a_network_without_a_linear_layer_is_told_before_it_is_trained(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *TINY_MOCO, verb="train")
    other = {"name": "other", "target": "torchvision.models.squeezenet1_1", "min_size": 17}
    config = with_overrides(context.config, {"committee.members.resnet18.backbone": other})
    context = replace(context, config=config)
    with pytest.raises(ConfigError, match=r"recipe\.moco needs what goes into a network's linear classifier"):
        check_before_work(context)
