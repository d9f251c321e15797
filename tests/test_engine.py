"""How members judge fast: the choices, and that all ways say the same."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from helpers import PRIORS, method_config, quiet_trainer, small_network, tiny_context
from torch import Tensor

import cvdd.computing.automatic
import cvdd.computing.passes
from cvdd.backbones import BackboneConfig
from cvdd.chain.images import make_images
from cvdd.computing.automatic import compiles, forward_flops, has_compiler, precision_of, uncompiled_seconds
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import Passes
from cvdd.schema import EngineConfig
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine, Work, choose_engine, ready_voter, vain_wishes
from cvdd.synthesis.units import Stage, Unit, unit_views
from cvdd.synthesis.voting import judge

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONVNET = BackboneConfig(
    name="net", target="cvdd.backbones.convnet.convnet", arguments={"depth": 1, "width": 4, "norm": "batch"}
)


def work(**changes: object) -> Work:
    return Work(
        **{
            "backbones": (CONVNET,),
            "image_passes": 1000,
            "unit_images": 10,
            "units": 10,
            "size": 32,
            "classes": 10,
            **changes,
        }
    )


@pytest.fixture(autouse=True)
def _with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cvdd.computing.automatic, cvdd.computing.passes):
        monkeypatch.setattr(module, "has_compiler", lambda device: True)


def test_little_work_is_not_compiled_and_much_is() -> None:
    assert choose_engine(EngineConfig(), method_config(), work(), CPU) == Engine()
    # 400,000 images at a millisecond each, and more for their operations, exceed five minutes.
    assert choose_engine(EngineConfig(), method_config(), work(image_passes=400_000), CPU) == Engine(True)
    assert not choose_engine(EngineConfig(compile=False), method_config(), work(image_passes=400_000), CPU).compile


def test_units_of_a_pass_fit_their_size() -> None:
    wanted = EngineConfig(compile=True)
    # Compiled, a hundred images of 32 pixels.
    assert choose_engine(wanted, method_config(), work(units=20), CPU).units_per_pass == 10
    assert choose_engine(wanted, method_config(), work(units=10), CPU).units_per_pass is None
    assert choose_engine(wanted, method_config(), work(size=64), CPU).units_per_pass == 2
    assert choose_engine(wanted, method_config(), work(size=224), CPU).units_per_pass == 1
    assert choose_engine(EngineConfig(units_per_pass=3), method_config(), work(), CPU).units_per_pass == 3
    # A hundred images of 224 pixels are 5.0 million, and 6.6 million are shown at most.
    large = work(unit_images=100, size=224)
    assert choose_engine(EngineConfig(precision="fp32"), method_config(), large, CPU).units_per_pass == 1
    assert choose_engine(EngineConfig(precision="fp32"), method_config(), work(), CPU).units_per_pass is None


@pytest.mark.parametrize("changes", [{"statistics_of": "stack"}, {"statistics": {"momentum": 0.5}}])
def test_statistics_that_need_the_whole_stack(changes: dict[str, object]) -> None:
    wanted, method = EngineConfig(compile=True, units_per_pass=1), method_config(**changes)
    assert choose_engine(wanted, method, work(), CPU) == Engine()
    compiled, units = vain_wishes(wanted, method, split=False)
    (field,) = changes if "statistics_of" in changes else ("statistics.momentum",)
    assert re.match(rf"engine\.compile=true: no .* of method=test, .*\(method\.{field}", compiled)
    assert re.match(rf"engine\.units_per_pass=1: .* by method=test, .*\(method\.{field}", units)
    assert vain_wishes(wanted, method_config(), split=False) == []
    assert vain_wishes(EngineConfig(), method, split=False) == []
    (shared,) = vain_wishes(wanted, method_config(), split=True)
    assert "trainer.split_units" in shared


def test_a_wish_in_vain_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever rows a comparison has."""
    context = tiny_context(tmp_path, "engine.compile=true", "method.statistics.momentum=0.5", "recipe.epochs=1")
    for seed in (0, 1):
        make_images(context.differing({"method.seed": seed}, ""), PRIORS)
    assert [message for message in caplog.messages if message.startswith("engine.compile=true")] == [
        *vain_wishes(context.config.engine, context.config.method, split=False)
    ]


def test_half_as_many_units() -> None:
    assert Engine().fewer(10) == Engine(units_per_pass=5)
    assert Engine(units_per_pass=5).fewer(10) == Engine(units_per_pass=2)
    assert Engine(units_per_pass=5).fewer(3) == Engine(units_per_pass=1)
    assert Engine(units_per_pass=1).fewer(10) is None
    assert Engine(record=True).fewer(2) == Engine(units_per_pass=1, record=True)
    assert Engine(units_per_pass=1, record=True).fewer(2) == Engine(units_per_pass=1)
    assert Engine(record=True).fewer(1) == Engine()


def test_only_what_differs_from_plain_kernels_is_in_the_identity() -> None:
    assert Engine().identity == {}
    assert Engine(precision="bf16").identity == {
        "engine": {"compile": False, "precision": "bf16", "units_per_pass": None}
    }
    assert Passes().identity == {}
    assert Passes(True, "bf16").identity == {"compiled": True, "precision": "bf16"}


def test_labels_are_compiled_for_much_work_and_half_precision_is_for_gpus() -> None:
    many, few = (uncompiled_seconds([CONVNET, CONVNET], images, 1, 10, 32, CPU) for images in (200_000, 100_000))
    # Two networks, a millisecond an image each.
    assert many == pytest.approx(400, rel=0.1)
    assert few == pytest.approx(many / 2)
    assert compiles("auto", lambda: many, CPU)
    assert not compiles("auto", lambda: few, CPU)
    assert compiles(True, lambda: pytest.fail("not asked"), CPU)
    assert not compiles(False, lambda: pytest.fail("not asked"), CPU)
    assert [precision_of(wanted, CPU) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Passes(precision=precision).around(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_without_a_compiler_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(cvdd.computing.automatic, "has_compiler", has_compiler)
    has_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not choose_engine(EngineConfig(compile=True), method_config(), work(), CPU).compile
    has_compiler.cache_clear()
    (record,) = caplog.records
    assert "torch.compile lacks a C++ compiler" in record.getMessage()


def test_operations_of_a_network() -> None:
    # 3x3 convolution of 3 to 4 channels at 8x8, then 4x4 cells to 5 classes; two operations each.
    assert forward_flops(CONVNET, 5, 8) == 2 * (9 * 3 * 4 * 64 + 4 * 16 * 5)


# --- the same vote ----------------------------------------------------------------------------------------------------


def voted(engine: Engine, iterations: int = 20) -> DistillModule:
    """Optimise three units of four images with two members of different shares."""
    method = method_config(iterations=iterations, log_every=1, checkpoint_every=20, grid_every=20)
    units, stage = [Unit(slot, 0, 0, 4) for slot in range(3)], Stage(0, 0, iterations, 12)
    module = DistillModule(
        torch.randn(3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
        torch.stack([unit.targets for unit in units]),
        [unit_views(unit, method, stage) for unit in units],
        [ready_voter(str(seed), small_network(seed=seed), 1.0, engine) for seed in (1, 2)],
        torch.tensor([[0.7], [0.3]]).expand(2, 3),
        method,
        (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)),
        lambda row, images: None,
        stage,
        units_per_pass=engine.units_per_pass,
        opinion=engine.opinion,
    )
    with compiling(engine.compile):
        quiet_trainer(module.epochs).fit(module)
    return module


@pytest.mark.parametrize(
    "engine",
    [Engine(units_per_pass=1), Engine(units_per_pass=2), pytest.param(Engine(True), marks=pytest.mark.slow)],
    ids=["one", "two", "compiled"],
)
def test_twenty_steps_are_those_of_plain_kernels(engine: Engine) -> None:
    """Step by step: loss and terms to 1e-4."""
    plain, other = voted(Engine()).rows, voted(engine).rows
    assert len(plain) == 20
    for one, two in zip(plain, other, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
        assert two.ce == pytest.approx(one.ce, rel=1e-4)
        assert two.bn == pytest.approx(one.bn, rel=1e-4)
        assert two.agreement == pytest.approx(one.agreement, abs=1e-3)


def gradient_and_value(engine: Engine, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    said = judge(
        leaf,
        torch.arange(4).expand(3, 4),
        ready_voter("a", small_network(), 1.0, engine),
        r_bn=0.1,
        first_bn_multiplier=10.0,
    )
    return torch.autograd.grad(said.value.sum(), leaf)[0], said.value.detach()


def test_half_precision_is_of_convolutions_alone() -> None:
    images = torch.randn(3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    plain, value = gradient_and_value(Engine(), images)
    half, half_value = gradient_and_value(Engine(precision="bf16"), images)
    assert (half.dtype, half_value.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(half_value, value, rtol=0.02, atol=0)
    assert float(torch.cosine_similarity(half.flatten(), plain.flatten(), dim=0)) > 0.99
    assert not torch.equal(half, plain)
    original = small_network()
    voter = ready_voter("a", original, 1.0, Engine(precision="bf16"))
    kinds = {
        type(module).__name__: next(module.parameters()).dtype
        for module in voter.network.modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    assert kinds["Conv2d"] == kinds["Linear"] == torch.bfloat16
    assert kinds["BatchNorm2d"] == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in original.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"r_bn": 0.0}, {"ce": 0.0}, {"ce": 0.5}], ids=str)
def test_a_compiled_judgement_has_the_gradient_of_plain_kernels(weights: dict[str, float]) -> None:
    images = torch.randn(3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    targets, gradients = torch.arange(4).repeat(3, 1), []
    for engine in (Engine(), Engine(True)):
        voter, shown = ready_voter("a", small_network(seed=1), 1.0, engine), images.clone().requires_grad_()
        with compiling(engine.compile):
            said = engine.opinion(shown, targets, voter, first_bn_multiplier=10.0, **{"r_bn": 0.01, **weights})
            gradients.append(torch.autograd.grad(said.value.sum(), shown)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
