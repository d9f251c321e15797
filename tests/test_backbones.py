"""Networks: sizes, shapes, seeds, config errors and every backbone yaml."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
import yaml
from omegaconf import OmegaConf
from torch import nn

from cvdd.backbones import (
    BackboneConfig,
    batchnorm_layers,
    build,
    build_network,
    has_batchnorm,
    weights_chosen_by_timm,
)
from cvdd.backbones.config import packages_of_others
from cvdd.support.config_base import ConfigError

CONFIGS = Path(__file__).parents[1] / "conf" / "backbone"
SMALL = ("resnet18", "resnet50", "shufflenetv2", "mobilenetv2", "densenet121")
TINY = tuple(f"tiny_{name}" for name in (*SMALL, "convnet3"))


def load(name: str, **changes: Any) -> BackboneConfig:
    """Read a backbone yaml without Hydra."""
    return BackboneConfig(**{**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), **changes})


def config(target: str, **arguments: Any) -> BackboneConfig:
    return BackboneConfig(name="net", target=target, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "millions", "layers"),
    [
        ("resnet18", 11.22, 20),
        ("resnet50", 23.71, 53),
        ("mobilenetv2", 2.41, 57),
        ("shufflenetv2", 0.44, 56),
        ("densenet121", 7.05, 120),
        ("imagenet_resnet18", None, 20),
        ("imagenet_resnet50", None, 53),
        ("imagenet_mobilenetv2", None, 52),
        ("imagenet_shufflenetv2", None, 56),
        ("imagenet_densenet121", None, 121),
    ],
)
def test_published_counts(name: str, millions: float | None, layers: int) -> None:
    network = build_network(load(name), num_classes=100, seed=0)
    assert len(batchnorm_layers(network)) == layers
    if millions is not None:
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == millions


WITHOUT_BATCHNORM = ("tiny_vit", "tiny_convnext", "alexnet", "imagenet_alexnet")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_yaml_builds(name: str) -> None:
    changes = {"arguments": {"model_name": "resnet10t"}} if name == "timm" else {}
    with torch.device("meta"):  # an enclosing device must not leak into the network
        network = build_network(load(name, **changes), num_classes=7, seed=0)
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].out_features == 7
    assert network.training
    assert has_batchnorm(network) == (name not in WITHOUT_BATCHNORM)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [*SMALL, *TINY, "convnet4", "alexnet", "vgg11"])
def test_forward_at_both_sizes(name: str, size: int) -> None:
    network = build_network(load(name), num_classes=10, seed=0).eval()
    with torch.inference_mode():
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", TINY)
def test_tiny_networks_learn(name: str) -> None:
    network = build_network(load(name), num_classes=10, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(20, 3, 32, 32, generator=random), torch.arange(20) % 10
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert name == "tiny_convnet3" or len(batchnorm_layers(network)) >= 8


def test_public_parameter_names() -> None:
    """Checkpoints of the release rely on these names and their order."""
    names = list(build_network(load("resnet18"), 10, 0).state_dict())
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert {"layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_var"} <= set(names)
    assert names[-2:] == ["linear.weight", "linear.bias"]
    assert "layers.3.conv2.weight" in build_network(load("mobilenetv2"), 10, 0).state_dict()
    names = list(build_network(load("densenet121"), 10, 0).state_dict())
    assert {"dense1.0.bn1.weight", "trans3.conv.weight", "bn.running_mean"} <= set(names)


@pytest.mark.parametrize(("norm", "layers"), [("batch", 3), ("instance", 0), ("none", 0)])
def test_convnet_norms(norm: str, layers: int) -> None:
    network = build_network(config("cvdd.backbones.convnet.convnet", norm=norm, width=8), 10, 0)
    assert len(batchnorm_layers(network)) == layers
    assert has_batchnorm(network) == (layers > 0)
    assert network(torch.randn(2, 3, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        # Each convolution with its bias, and the head on 192 channels of 4x4.
        ("alexnet", {}, 9728 + 614592 + 442624 + 442560 + 331968 + 30730),
        ("vgg11", {"norm": "instance"}, 9231114),
        ("resnet18", {"norm": "instance"}, 11173962),
        # The head sees 4x4 instead of 1x1.
        ("resnet18", {"norm": "instance", "downsampling": "pool", "pooled_size": 4}, 11173962 + 512 * 15 * 10),
    ],
)
def test_networks_of_matching_methods(name: str, arguments: dict[str, Any], parameters: int) -> None:
    backbone = load(name)
    network = build_network(backbone.model_copy(update={"arguments": {**backbone.arguments, **arguments}}), 10, 0)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert not has_batchnorm(network)
    groups = [(layer.num_groups, layer.num_channels) for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert all(count == channels for count, channels in groups)
    assert len(groups) == {"alexnet": 0, "vgg11": 8, "resnet18": 20}[name]


@pytest.mark.parametrize(("block", "pooled_after"), [("basic", 1), ("bottleneck", 2)])
def test_residual_networks_can_pool_instead_of_striding(block: str, pooled_after: int) -> None:
    """The convolution that would have a stride is followed by norm and ReLU, and then by the pooling; no other is."""
    arguments = {"block": block, "blocks": [1, 1], "width": 8, "norm": "none", "downsampling": "pool"}
    network = build_network(config("cvdd.backbones.resnet.resnet", **arguments), 10, 0)
    assert {layer.stride for layer in network.modules() if isinstance(layer, nn.Conv2d)} == {(1, 1)}
    halving = network.get_submodule("layer2")[0]
    images = torch.randn(2, halving.conv1.in_channels, 8, 8)
    features = images
    last = {"basic": 2, "bottleneck": 3}[block]
    for index in range(1, last + 1):
        features = halving.get_submodule(f"conv{index}")(features)
        if index < last:
            features = features.relu()
        if index == pooled_after:
            features = nn.functional.avg_pool2d(features, 2)
    shortcut = nn.functional.avg_pool2d(halving.shortcut[0](images), 2)
    assert torch.equal(halving(images), (features + shortcut).relu())


def test_batchnorm_layers_follow_registration_order() -> None:
    network = build_network(load("tiny_densenet121"), 10, 0)
    registered = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [layer for _, layer in batchnorm_layers(network)] == registered
    assert batchnorm_layers(network)[0][0] == "dense1.0.bn1"


def test_seed_decides_the_initialisation_and_nothing_else_moves() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_network(load("tiny_resnet18"), 10, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_network(load("tiny_resnet18"), 10, seed=0).state_dict()
    other = build_network(load("tiny_resnet18"), 10, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "torchvision.io.read_file", "timm", "cvdd..x", "timmy.a"]
)
def test_foreign_targets_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"backbone\.target="):
        config(target)
    unchecked = BackboneConfig.model_construct(name="net", target=target, arguments={}, pretrained=False)
    with pytest.raises(ConfigError, match=r"cvdd\.<\.\.\.>, timm\.<\.\.\.>, torchvision\.models\.<\.\.\.>"):
        build_network(unchecked, 10, 0)


def test_an_installed_package_may_bring_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By an entry point; a configuration alone cannot add one."""
    (tmp_path / "mylib.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"adds its own by an entry point of the group cvdd\.backbones"):
        config("mylib.net")
    found = [EntryPoint("mylib", "mylib", "cvdd.backbones")]
    monkeypatch.setattr("cvdd.backbones.config.entry_points", lambda group: found)
    packages_of_others.cache_clear()
    try:
        assert build_network(config("mylib.net"), 7, 0)(torch.zeros(1, 3, 4, 4)).shape == (1, 7)
    finally:
        packages_of_others.cache_clear()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (config("torchvision.models.resnet19"), "closest: resnet18"),
        (config("cvdd.backbones.resnets.resnet"), "no module cvdd.backbones.resnets"),
        (config("timm.create_model", model_name="resnett18"), r"model_name=resnett18 .*closest: resnet18"),
        (config("timm.create_model", model_name="???"), "model_name is missing"),
        (config("timm.create_model"), "model_name is missing"),
        (config("cvdd.backbones.resnet.resnet", wdith=8), r"refuses them: .*wdith"),
        (config("cvdd.backbones.resnet.resnet", block="basik"), r"block=basik; valid choices: basic, bottleneck"),
        (config("cvdd.backbones.resnet.resnet", blocks=[]), "blocks="),
        (config("cvdd.backbones.resnet.resnet", norm="layer"), "valid choices: batch, instance, none"),
        (config("cvdd.backbones.resnet.resnet", downsampling="max"), "downsampling=max; valid choices: stride, pool"),
        (config("cvdd.backbones.plain.vgg", norm="layer"), "valid choices: batch, instance, none"),
        (config("cvdd.backbones.plain.vgg", widths=[[64], []]), "widths="),
        (config("cvdd.backbones.convnet.convnet", norm="layer"), "valid choices: batch, instance, none"),
        (config("cvdd.backbones.convnet.convnet", depth=0), "depth=0"),
        (config("cvdd.backbones.densenet.densenet", reduction=0.0), "reduction"),
        (config("cvdd.backbones.densenet.densenet", blocks=[0]), "blocks"),
        (config("cvdd.backbones.shufflenet.shufflenet_v2", widths=[9, 16, 32]), "even"),
        (config("cvdd.backbones.shufflenet.shufflenet_v2", blocks=[1]), "one count per stage"),
        (config("cvdd.backbones.mobilenet.mobilenet_v2", stages=[[1, 2]]), "expansion, channels, blocks, stride"),
        (config("cvdd.support.seeds.derive_seed", seed=0), "refuses them"),
        (config("torchvision.models.list_models"), "refuses them"),
        (load("resnet18", pretrained=True), "comes without weights"),
        (load("imagenet_resnet18", target="torchvision.models.inception", pretrained=True), "inception"),
    ],
)
def test_user_errors_name_the_override(broken: BackboneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(broken, 10, 0)


@pytest.mark.parametrize("reserved", ["num_classes", "pretrained", "checkpoint_path", "pretrained_cfg"])
def test_reserved_arguments(reserved: str) -> None:
    """Also what would let timm open a file that a configuration names."""
    with pytest.raises(ValueError, match=rf"backbone.arguments.{reserved} is set by .*; remove it"):
        config("timm.create_model", model_name="resnet18", **{reserved: "x"})


def test_a_builder_must_return_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvdd.backbones.resnet.count", lambda num_classes: num_classes, raising=False)
    with pytest.raises(ConfigError, match=r"made a int, not a torch\.nn\.Module"):
        build_network(config("cvdd.backbones.resnet.count"), 10, 0)


def test_no_classes() -> None:
    with pytest.raises(ConfigError, match="0 classes"):
        build_network(load("tiny_resnet18"), 0, 0)


@pytest.fixture
def offline_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Stand in for the download of torchvision's ShuffleNetV2 weights; the dict is what the file would hold."""
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    state: dict[str, torch.Tensor] = torchvision.models.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **options: state)
    return state


@pytest.mark.parametrize("classes", [10, 1000])
def test_pretrained_torchvision_head(classes: int, offline_weights: dict[str, torch.Tensor]) -> None:
    pretrained = BackboneConfig(name="net", target="torchvision.models.shufflenet_v2_x0_5", pretrained=True)
    state = build_network(pretrained, classes, 0).state_dict()
    assert torch.equal(state["conv1.0.weight"], offline_weights["conv1.0.weight"])
    assert state["fc.weight"].shape[0] == classes
    assert (classes == 1000) == (state["fc.weight"].shape == offline_weights["fc.weight"].shape)
    if classes == 1000:
        assert torch.equal(state["fc.weight"], offline_weights["fc.weight"])


def test_pretrained_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no route")

    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "get_state_dict", refuse)
    pretrained = BackboneConfig(name="net", target="torchvision.models.shufflenet_v2_x0_5", pretrained=True)
    with pytest.raises(ConfigError, match=r"backbone\.pretrained=true.*no route"):
        build_network(pretrained, 10, 0)


@pytest.mark.parametrize(
    ("target", "model_name", "pretrained", "tag"),
    [
        (build.TIMM_FACTORY, "resnet18", True, "of this version"),
        (build.TIMM_FACTORY, "resnet18", False, None),
        # Already said.
        (build.TIMM_FACTORY, "resnet18.tv_in1k", True, None),
        ("torchvision.models.resnet18", "resnet18", True, None),
    ],
)
def test_weights_that_timm_chooses_are_named(
    target: str, model_name: str, pretrained: bool, tag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of timm may choose others under the same name."""
    monkeypatch.setattr(build.timm, "get_pretrained_cfg", lambda name: SimpleNamespace(tag="of this version"))
    asked = BackboneConfig(name="net", target=target, arguments={"model_name": model_name}, pretrained=pretrained)
    assert weights_chosen_by_timm(asked) == tag


def test_timm_yaml_takes_its_name_from_the_model() -> None:
    node = OmegaConf.load(CONFIGS / "timm.yaml")
    OmegaConf.update(node, "arguments.model_name", "resnet10t")
    resolved = OmegaConf.to_container(node, resolve=True)
    assert isinstance(resolved, dict)
    assert BackboneConfig(**{str(key): value for key, value in resolved.items()}).name == "resnet10t"
