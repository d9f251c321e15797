"""Which device a process computes on, and what it computes there with, as far as that can be told without a GPU."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import label_config, small_network, tiny_context
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cvdd.labels.teachers
from cvdd.chain.context import Context
from cvdd.computing.automatic import has_compiler, precision_of
from cvdd.computing.passes import Passes
from cvdd.labels.teachers import Teachers
from cvdd.running.process import find_device
from cvdd.schema import RunConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.memory import is_out_of_memory
from cvdd.training.fit import devices_of
from cvdd.training.schedules import compute_as_made

CPU, GPU = torch.device("cpu"), torch.device("cuda", 2)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with four GPUs, and those that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1] if current else 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(int(device)))
    for name in ("RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return current


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda **trainer: (
        tiny_context(
            tmp_path, "trainer.accelerator=auto", *(f"trainer.{key}={value}" for key, value in trainer.items())
        ).config
    )


# --- which ------------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there(asked: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu: no GPU was found; choose trainer=cpu"):
        find_device(asked().model_copy(update={"trainer": asked().trainer.model_copy(update={"accelerator": "gpu"})}))


def test_each_rank_has_a_gpu_of_its_own(
    asked: Callable[..., RunConfig], four_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [find_device(asked(devices=4), rank).index for rank in range(4)] == [0, 1, 2, 3] == four_gpus
    with pytest.raises(ConfigError, match=r"trainer\.devices=5, and this process sees 4 GPUs; set trainer\.devices=4"):
        find_device(asked(devices=5), 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(ConfigError, match=r"sees 1 GPUs; .*--gpu-bind=none"):
        find_device(asked(devices=4), 1)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, 0),
        # Tasks that share units through the store, each for itself.
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "6"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, 0),
        # Whoever started ranks has said which GPUs they see.
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3", "RANK": "0"}, 0),
    ],
)
def test_tasks_of_one_machine_do_not_all_take_its_first_gpu(
    environment: dict[str, str],
    chosen: int,
    asked: Callable[..., RunConfig],
    four_gpus: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    assert find_device(asked()) == torch.device("cuda", chosen)
    assert four_gpus == [chosen]


def test_lightning_trains_where_the_context_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ``devices=1`` is the first GPU, whatever the rank."""
    assert devices_of(CPU) == 1
    assert devices_of(GPU) == [2]
    given: dict[str, Any] = {}

    class Noted(pl.Trainer):
        def __init__(self, **arguments: Any) -> None:
            given.update(arguments)
            raise InterruptedError

    monkeypatch.setattr(pl, "Trainer", Noted)
    context = tiny_context(tmp_path)
    elsewhere = Context(context.config, context.store, GPU)
    with pytest.raises(InterruptedError):
        elsewhere.fit(pl.LightningModule(), None, 1, tmp_path / "checkpoint.tmp")
    assert (given["accelerator"], given["devices"]) == ("gpu", [2])


# --- with what --------------------------------------------------------------------------------------------------------


def test_half_precision_is_not_chosen_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch answers on a GPU older than Ampere."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert [precision_of(wanted, GPU) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision_of("auto", GPU) == "bf16"


@pytest.mark.parametrize(("builders", "found"), [(("gcc",), True), (("clang",), True), ((), False)])
def test_triton_needs_a_c_compiler(
    builders: tuple[str, ...], found: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name if name in builders else None)
    monkeypatch.delenv("CC", raising=False)
    has_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert has_compiler("cuda") is found
    has_compiler.cache_clear()
    assert ["torch.compile lacks triton, or the C compiler" in record.getMessage() for record in caplog.records] == [
        True
    ] * (not found)


@pytest.mark.parametrize(
    ("message", "lacking"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_how_gpus_say_that_memory_is_short(message: str, lacking: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is lacking


# --- what another kind of device had begun ----------------------------------------------------------------------------


def test_an_optimiser_of_a_gpu_goes_on_on_a_cpu() -> None:
    """With the bits of one that was never elsewhere."""

    def stepped(loaded: dict[str, Any]) -> Tensor:
        images = nn.Parameter(torch.linspace(0, 1, 100))
        optimizer = torch.optim.Adam([images], lr=0.1, foreach=False)
        usual = {key: optimizer.param_groups[0][key] for key in loaded}
        for step in range(20):
            images.grad = torch.sin(images.detach() * (step + 1))
            if step == 1:
                state = optimizer.state_dict()
                state["param_groups"][0].update(loaded)
                optimizer.load_state_dict(state)
                compute_as_made(optimizer, CPU)
                assert {key: optimizer.param_groups[0][key] for key in loaded} == usual
            optimizer.step()
        return images.detach()

    assert torch.equal(stepped({}), stepped({"capturable": True, "fused": True, "foreach": None}))


def test_an_optimiser_of_a_cpu_can_be_recorded_on_a_gpu() -> None:
    with FakeTensorMode():
        images = nn.Parameter(torch.ones(3, device="cuda"))
        optimizer = torch.optim.Adam([images], lr=0.1, fused=True, capturable=True)
        optimizer.state[images] = {"step": torch.tensor(1.0)}
        # As a checkpoint of a CPU leaves them.
        optimizer.param_groups[0].update(capturable=False, fused=None, foreach=False)
        compute_as_made(optimizer, torch.device("cuda"))
        (group,) = optimizer.param_groups
        assert (group["capturable"], group["fused"], group["foreach"]) == (True, True, None)
        assert optimizer.state[images]["step"].device.type == "cuda"


@pytest.mark.parametrize("begun", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_of_a_network_that_lay_otherwise_belong_to_their_weights(
    kind: type[torch.optim.Adam], begun: torch.memory_format
) -> None:
    """Networks are channels-last on a GPU alone, and a fused step takes weights and moments as they lie."""

    def stepped(formats: Sequence[torch.memory_format]) -> Tensor:
        values = torch.linspace(-1, 1, 2 * 3 * 3 * 3).view(2, 3, 3, 3)
        state: dict[str, Any] | None = None
        for step, memory_format in enumerate(formats):
            weight = nn.Parameter(values.clone(memory_format=memory_format))
            optimizer = kind([weight], lr=0.1, fused=True)
            if state is not None:
                optimizer.load_state_dict(state)
            compute_as_made(optimizer, CPU)
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()
            values, state = weight.detach(), optimizer.state_dict()
        return values

    assert torch.equal(stepped([begun] * 2), stepped([torch.contiguous_format] * 2))
    assert torch.equal(stepped([begun, torch.contiguous_format]), stepped([torch.contiguous_format] * 2))
    assert torch.equal(stepped([torch.contiguous_format, begun]), stepped([torch.contiguous_format] * 2))


# --- what holds its memory --------------------------------------------------------------------------------------------


def test_recorded_teachers_are_gone_with_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector: what is recorded holds memory of the GPU that the next stage needs."""

    class Recording:
        def __init__(self, function: Callable[..., Tensor], device: torch.device, what: str) -> None:
            self.function = function

        def __call__(self, samples: Tensor) -> Tensor:
            return self.function(torch.zeros(samples.shape))

    monkeypatch.setattr(cvdd.labels.teachers, "Recorded", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(cvdd.labels.teachers, "side_by_side", lambda calls, streams: [call() for call in calls])
    with FakeTensorMode():
        samples = torch.zeros(8, 3, 16, 16, device="cuda")
    gc.collect()
    gc.disable()
    try:
        teachers = Teachers([small_network()], [1.0], label_config(), Passes(record=True))
        assert teachers.score(samples, 8).shape == (8, 4)
        recording = weakref.ref(teachers._recorded[8])
        assert recording() is not None
        del teachers
        assert recording() is None
    finally:
        gc.enable()
