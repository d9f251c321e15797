"""The simulated GPU refuses what a real one refuses, and replays what was recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from simulated_gpu import simulated_gpu
from simulated_tensors import PLACE, Device, OnGpu
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d


@pytest.fixture
def gpu() -> Iterator[Device]:
    with simulated_gpu() as device:
        yield device


def there(*values: float) -> Tensor:
    return torch.tensor(values, device=PLACE)


def test_it_is_gone_afterwards() -> None:
    asked = torch.cuda.is_available()
    with simulated_gpu():
        assert torch.cuda.is_available()
        assert torch.zeros(1, device="cuda").device == PLACE
    assert torch.cuda.is_available() is asked
    assert type(torch.tensor([1.0])) is Tensor


def test_gradients_are_those_of_the_cpu(gpu: Device) -> None:
    draws = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 3, 5, 5, generator=draws), torch.randn(4, 3, 3, 3, generator=draws)

    def slope(device: torch.device) -> Tensor:
        leaf = images.to(device).requires_grad_()
        # Half precision in between, whose gradient is a copy of another type.
        loss = conv2d(leaf.bfloat16(), weight.to(device).bfloat16()).float().square().sum()
        (found,) = torch.autograd.grad(loss, leaf)
        assert found.device == leaf.device
        return found.cpu()

    assert torch.equal(slope(PLACE), slope(torch.device("cpu")))
    assert gpu.launches > 0


def test_a_shape_may_change_in_place(gpu: Device) -> None:
    column = there(1, 2, 3).unsqueeze_(-1)
    assert column.shape == (3, 1)
    assert torch.equal((column * there(1, 10)).cpu(), torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))


def test_convolutions_round_where_autocast_says_so(gpu: Device) -> None:
    ones = torch.ones(1, 1, 3, 3, device=PLACE)
    with torch.autocast("cuda", torch.bfloat16):
        assert conv2d(ones, ones).dtype == torch.bfloat16


def test_modules_that_move_keep_their_parameters(gpu: Device) -> None:
    module = nn.BatchNorm2d(3)
    weight, optimizer = module.weight, torch.optim.Adam(module.parameters(), fused=True)
    assert module.to(PLACE).weight is weight
    assert weight.device == module.running_mean.device == PLACE
    module(torch.randn(4, 3, 2, 2, device=PLACE)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight.cpu(), torch.ones(3))
    copied = copy.deepcopy(module)
    assert isinstance(copied.weight, nn.Parameter)
    assert copied.weight is not weight
    assert torch.equal(copied.weight.cpu(), weight.cpu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, gpu: here + gpu,
        lambda here, gpu: torch.cat([gpu, here]),
        lambda here, gpu: gpu.mul_(here),
        lambda here, gpu: torch.where(gpu > 0, gpu, here),
    ],
)
def test_tensors_of_two_devices_are_refused(gpu: Device, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        mix(torch.ones(3), there(1, 2, 3))
    with pytest.raises(TypeError, match="numpy"):
        there(1).numpy()


def test_what_may_be_mixed(gpu: Device) -> None:
    values = there(1, 2, 3)
    assert (values * torch.tensor(2.0)).tolist() == [2, 4, 6]
    assert values[torch.tensor([2, 0])].tolist() == [3, 1]
    values.copy_(torch.zeros(3))
    assert values.tolist() == [0, 0, 0]
    here = torch.ones(3)
    assert here.copy_(values) is here
    assert here.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: float(values.sum()),
        lambda values: values.cpu(),
        lambda values: values.tolist(),
        lambda values: bool((values > 0).all()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: torch.ones(3).to(values.device),
        lambda values: torch.tensor(1.0, device=values.device),
        lambda values: torch.cuda.synchronize(),
    ],
)
def test_nothing_waits_while_it_records(gpu: Device, wait: Callable[[Tensor], object]) -> None:
    values = there(1, 2, 3)
    wait(values)
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        wait(values)
    wait(values)
    assert (gpu.recorded, gpu.recording) == (0, False)


def test_a_graph_has_its_effects_when_it_is_replayed(gpu: Device) -> None:
    total, given, mean, variance = there(0.0), there(1.0), there(0.0), there(1.0)
    graph = torch.cuda.CUDAGraph()
    draws = torch.default_generator.get_state()
    with torch.cuda.graph(graph):
        total += given
        doubled, first = total * 2, total[:1]
        batch_norm(given.expand(4, 1), mean, variance, training=True)
        drawn = torch.rand(1, device=PLACE)
    assert torch.equal(torch.default_generator.get_state(), draws)
    assert (total.item(), mean.item()) == (0, 0)
    seen = set()
    for number in (1, 2, 3):
        graph.replay()
        assert (total.item(), doubled.item(), first.item()) == (number, 2 * number, number)
        assert mean.item() == pytest.approx(1 - 0.9**number)
        seen.add(drawn.item())
    given.fill_(10)
    graph.replay()
    assert doubled.item() == 26
    assert len(seen) == 3
    assert (gpu.recorded, gpu.replayed) == (1, 4)


def test_its_memory_has_an_end(gpu: Device) -> None:
    gpu.room = 40
    assert isinstance(torch.zeros(10, device=PLACE), OnGpu)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(11, device=PLACE)
    assert gpu.largest == 40
