"""The maths of trajectory matching, and its module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import method_config, quiet_trainer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cvdd.augmentation.dsa import FAMILIES
from cvdd.backbones.convnet import convnet
from cvdd.methods.mtt import (
    FlatNetwork,
    Matched,
    Synthetic,
    Task,
    draw_batches,
    draw_step,
    match,
    match_unrolled,
    seen,
    unroll,
)
from cvdd.schema import MethodConfig
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.trajectories import Trajectories, TrajectoryLayout, TrajectoryWriter
from cvdd.synthesis.trajectory_matching import ExplodingGradients, MatchingModule, MatchRow, draw_iteration

SIZE = 8
ALL = tuple(FAMILIES)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, width: int = 4) -> FlatNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlatNetwork(convnet(3, depth=2, width=width, norm="instance", pooled_size=2))


def task_and_set(
    dtype: torch.dtype, steps: int = 4, canvas: int = 1, batch: int | None = 4, families: tuple[str, ...] = ALL
) -> tuple[Task, Synthetic]:
    """Six images of three classes in batches of four; the target is a random way away from the start."""
    flat = network()
    flat.network.to(dtype)
    start = flat.vector()
    target = start + 0.1 * torch.randn(flat.size, generator=source(1)).to(dtype)
    draws = source(2)
    images = torch.randn(6, 3, canvas * SIZE, canvas * SIZE, generator=source(3)).to(dtype)
    targets = torch.randn(6, 3, generator=source(4)).to(dtype).softmax(dim=1)
    chosen = [draw_step(b, families, SIZE, canvas, canvas, draws) for b in draw_batches(6, batch, steps, draws)]
    return Task(flat, start, target, chosen, SIZE), Synthetic(images, targets, torch.tensor(0.3, dtype=dtype))


# --- the unrolled steps -----------------------------------------------------------------------------------------------


def test_one_step_is_the_gradient_by_hand() -> None:
    """A linear classifier: its gradient is (softmax - target) times the input, mean over the batch."""
    flat = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    images = torch.randn(5, 3, 2, 2, generator=source())
    targets = torch.eye(3)[torch.tensor([0, 2, 1, 1, 0])]
    step = draw_step(torch.arange(5), (), 2, 1, 1, source())
    start = flat.vector()
    weight, bias = start[:36].view(3, 12), start[36:]
    error = ((images.flatten(1) @ weight.T + bias).softmax(dim=1) - targets) / 5
    expected = start - 0.5 * torch.cat([(error.T @ images.flatten(1)).flatten(), error.sum(dim=0)])
    task = Task(flat, start, start, [step], 2)
    end = unroll(task, Synthetic(images, targets, torch.tensor(0.5)), start, [step])
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-6)


def test_standing_still_has_a_loss_of_one() -> None:
    task, synthetic = task_and_set(torch.float32)
    assert match_unrolled(task, replace(synthetic, step_size=torch.tensor(0.0))).loss.item() == 1


def test_the_experts_own_batches_lead_where_it_went() -> None:
    """An ordinary training by SGD on the same batches; without augmentation the loss is that of rounding."""
    flat = network()
    start = flat.vector()
    images = torch.randn(12, 3, SIZE, SIZE, generator=source(7))
    labels = torch.arange(12) % 3
    batches = draw_batches(12, 4, 6, source(8))
    expert = network().network
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.2)
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expert(images[batch]), labels[batch]).backward()
        optimizer.step()
    target = torch.cat([parameter.detach().flatten() for parameter in expert.parameters()])
    steps = [draw_step(batch, (), SIZE, 1, 1, source()) for batch in batches]
    matched = match_unrolled(
        Task(flat, start, target, steps, SIZE), Synthetic(images, torch.eye(3)[labels], torch.tensor(0.2))
    )
    assert matched.loss.item() < 1e-9
    assert (target - start).norm() > 0.05


@pytest.mark.parametrize("canvas", [1, 2])
def test_the_gradient_is_that_of_finite_differences(canvas: int) -> None:
    task, synthetic = task_and_set(torch.float64, steps=3, canvas=canvas)
    matched = match_unrolled(task, synthetic)

    def loss(images: Tensor, targets: Tensor, step_size: Tensor) -> float:
        moved = Synthetic(images, targets, step_size)
        with torch.no_grad():
            return float(task.loss(unroll(task, moved, task.start, task.steps)))

    tensors = synthetic.tensors()
    for which, gradient in enumerate(matched.gradient.tensors()):
        # The entries with the largest derivatives, and a few others.
        places = [*gradient.flatten().abs().argsort(descending=True)[:4].tolist(), 0, gradient.numel() // 2]
        for place in places:
            sides = []
            for sign in (1, -1):
                moved = [tensor.clone() for tensor in tensors]
                moved[which].view(-1)[place] += sign * 1e-5
                sides.append(loss(*moved))
            expected = (sides[0] - sides[1]) / 2e-5
            assert float(gradient.flatten()[place]) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert matched.gradient.images.abs().max() > 1e-4


def assert_equal(one: Matched, other: Matched, tolerance: float) -> None:
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=tolerance)
    for ours, theirs in zip(one.gradient.tensors(), other.gradient.tensors(), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("canvas", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tesla_is_equal_to_the_unrolled_gradient(dtype: torch.dtype, canvas: int) -> None:
    task, synthetic = task_and_set(dtype, steps=7, canvas=canvas)
    unrolled = match(task, synthetic, "unrolled")
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert_equal(match(task, synthetic, "tesla"), unrolled, tolerance)
    for part in (2, 3, 6):
        assert_equal(match(task, synthetic, "unrolled", part), unrolled, tolerance)


def test_tesla_detached_leaves_out_the_way_over_later_parameters() -> None:
    """The same graph, in which every inner gradient is taken at parameters that are held fixed."""
    task, synthetic = task_and_set(torch.float64, steps=5, families=())
    leaves = synthetic.leaves()
    vector, total = task.start, torch.zeros_like(task.start)
    for step in task.steps:
        point = vector.detach().requires_grad_()
        batch, wanted = leaves.images[step.indices], leaves.targets[step.indices]
        loss = -(wanted * task.network(point, batch).log_softmax(dim=1)).sum(dim=1).mean()
        (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
        total = total + gradient
        vector = vector - leaves.step_size.detach() * gradient.detach()
    loss = task.loss(task.start - leaves.step_size * total)
    expected = Matched(loss.detach(), Synthetic(*torch.autograd.grad(loss, leaves.tensors())))
    assert_equal(match(task, synthetic, "tesla_detached"), expected, 1e-12)
    exact = match_unrolled(task, synthetic).gradient.images
    assert (expected.gradient.images - exact).norm() > 1e-3 * exact.norm()


def largest_graph(monkeypatch: pytest.MonkeyPatch, steps: int, gradient: str, part: int | None = None) -> int:
    """Number of nodes in the largest graph that is differentiated."""
    task, synthetic = task_and_set(torch.float32, steps=steps, families=())
    sizes: list[int] = []
    original = torch.autograd.grad

    def counting(outputs: Any, *arguments: Any, **options: Any) -> Any:
        reached: set[Any] = set()
        waiting = [output.grad_fn for output in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in reached:
                reached.add(node)
                waiting.extend(following for following, _ in node.next_functions)
        sizes.append(len(reached))
        return original(outputs, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", counting)
        match(task, synthetic, gradient, part)
    return max(sizes)


def test_the_graph_of_tesla_does_not_grow_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_graph(monkeypatch, 8, "unrolled") > 3 * largest_graph(monkeypatch, 2, "unrolled")
    assert largest_graph(monkeypatch, 8, "tesla") == largest_graph(monkeypatch, 2, "tesla")
    assert largest_graph(monkeypatch, 8, "unrolled", 2) < 1.1 * largest_graph(monkeypatch, 2, "unrolled")


def test_batches_hold_every_image_once_in_each_pass_and_a_short_one_comes_first() -> None:
    batches = draw_batches(10, 4, 7, source())
    assert [len(batch) for batch in batches] == [2, 4, 4, 2, 4, 4, 2]
    for first in (0, 3):
        assert sorted(torch.cat(batches[first : first + 3]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:6]))
    assert [len(batch) for batch in draw_batches(10, None, 2, source())] == [10, 10]


def test_canvases_are_rolled_and_cropped() -> None:
    canvases = torch.arange(2 * 3 * 16, dtype=torch.float32).view(2, 3, 4, 4)
    step = draw_step(torch.tensor([1, 0]), (), 2, 2, 3, source(5))
    assert step.offsets is not None
    views, wanted = seen(canvases, torch.eye(2), step, 2)
    assert views.shape == (6, 3, 2, 2)
    assert wanted.argmax(dim=1).tolist() == [1, 0, 1, 0, 1, 0]
    for sample in range(3):
        for place, image in enumerate((1, 0)):
            row, column = step.offsets[sample, place].tolist()
            expected = canvases[image].roll((-row, -column), dims=(1, 2))[:, :2, :2]
            assert torch.equal(views[2 * sample + place], expected)


def test_a_vector_is_no_view_of_the_network() -> None:
    """On a CPU the released program's copies all were the live parameters, and every loss was 0 / 0."""
    flat = network()
    before = flat.vector()
    kept = before.clone()
    with torch.no_grad():
        for parameter in flat.network.parameters():
            parameter.add_(1)
    assert torch.equal(before, kept)
    torch.testing.assert_close(flat.vector(), kept + 1)
    single = FlatNetwork(nn.Linear(2, 1, bias=False))
    before = single.vector()
    with torch.no_grad():
        single.network.weight.fill_(9)
    assert not (before == 9).any()


def test_networks_that_are_more_than_their_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"features\.1\.running_mean.*arguments\.norm=instance"):
        FlatNetwork(convnet(3, depth=1, width=2, norm="batch"))
    with pytest.raises(ConfigError, match="dropout"):
        FlatNetwork(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    with pytest.raises(ConfigError, match="stochastic depth"):
        FlatNetwork(nn.Sequential(nn.Linear(2, 2), StochasticDepth(0.5, "row")))


# --- the module -------------------------------------------------------------------------------------------------------


def mtt_method(iterations: int = 6, **changes: Any) -> MethodConfig:
    backbone = {"name": "convnet", "target": "cvdd.backbones.convnet.convnet"}
    mtt = {
        "experts": {"backbone": backbone, "epochs": 4},
        "student": {},
        "whitening": False,
        "steps": 3,
        "target_epochs": 2,
        "start_epochs": 3,
        "batch_size": 4,
        "lr_images": 1.0,
        "lr_step_size": 1e-3,
        "step_size": 0.1,
        **changes,
    }
    return method_config(iterations=iterations, mtt=mtt, checkpoint_every=4, log_every=2, grid_every=4)


def module_of(
    folder: Path, rows: list[MatchRow] | None = None, start: Tensor | None = None, iterations: int = 6, **changes: Any
) -> MatchingModule:
    flat = network()
    if not (folder / "trajectories.json").exists():
        layout = TrajectoryLayout(2, 5, flat.size, "float32")
        layout.save(folder)
        for expert in range(2):
            vector, writer = network(expert).vector(), TrajectoryWriter(folder, layout, expert)
            for snapshot in range(5):
                writer.write(snapshot, vector)
                vector = vector + 0.05 * torch.randn(flat.size, generator=source(10 * expert + snapshot))
            writer.finish()
    images = torch.randn(6, 3, SIZE, SIZE, generator=source(3)) if start is None else start
    targets = torch.full((6, 3), 0.05) + 0.85 * torch.eye(3).repeat_interleave(2, dim=0)
    kept = [] if rows is None else rows
    return MatchingModule(
        flat,
        Trajectories(folder),
        images,
        targets,
        mtt_method(iterations, **changes),
        SIZE,
        ALL,
        lambda row, current: kept.append(row),
    )


def test_the_module_is_gradient_descent_with_momentum(tmp_path: Path) -> None:
    """Three iterations as a plain loop over the maths; the raw step size has a softplus."""
    learned = {"step_size_form": "softplus", "labels": "learned", "lr_labels": 0.5}
    changes = {**learned, "momentum": 0.25, "target_epochs": 1}
    module = module_of(tmp_path, iterations=3, **changes)
    images, logits = module.images.detach().clone(), module.label_logits.detach().clone()
    raw = module.raw_step_size.detach().clone()
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(0.1, rel=1e-6)
    velocities = [torch.zeros_like(tensor) for tensor in (images, raw, logits)]
    reference = module_of(tmp_path, iterations=3, **changes)
    for iteration in range(3):
        drawn = reference.draw(iteration)
        task, target = reference.task(drawn), Trajectories(tmp_path).snapshot(drawn.expert, drawn.start + 1)
        leaves = [tensor.clone().requires_grad_() for tensor in (images, raw, logits)]
        synthetic = Synthetic(leaves[0], leaves[2].softmax(dim=1), torch.nn.functional.softplus(leaves[1]))
        end = unroll(task, synthetic, task.start, task.steps)
        loss = (end - target).square().sum() / (task.start - target).square().sum()
        gradients = torch.autograd.grad(loss, leaves)
        for tensor, velocity, gradient, lr in zip(
            (images, raw, logits), velocities, gradients, (1.0, 1e-3, 0.5), strict=True
        ):
            velocity.mul_(0.25).add_(gradient)
            tensor.sub_(lr * velocity)
    quiet_trainer(module.epochs).fit(module)
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.raw_step_size.detach(), raw, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.label_logits.detach(), logits, rtol=1e-4, atol=1e-6)
    assert not torch.equal(raw, module_of(tmp_path, **changes).raw_step_size.detach())


def test_interrupted_between_epochs_is_as_uninterrupted(tmp_path: Path) -> None:
    rows: list[MatchRow] = []
    whole = module_of(tmp_path, rows, labels="learned", lr_labels=0.1)
    quiet_trainer(2).fit(whole)
    first = quiet_trainer(1)
    first.fit(module_of(tmp_path, labels="learned", lr_labels=0.1))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module_of(tmp_path, labels="learned", lr_labels=0.1)
    quiet_trainer(2).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row.iteration for row in rows] == [2, 4, 6]
    assert whole.rows == resumed.rows == rows


def test_a_rows_loss_is_the_mean_since_the_row_before(tmp_path: Path) -> None:
    module = module_of(tmp_path)
    module._update = float  # type: ignore[method-assign]
    module.training_step((3, 6), 0)
    assert (module.rows[-1].iteration, module.rows[-1].loss) == (6, 4.0)


def test_an_iteration_depends_on_its_number_alone() -> None:
    method = mtt_method(40)
    drawn = [draw_iteration(method, iteration, 4, 6, SIZE, ALL) for iteration in range(40)]
    for first in range(0, 40, 4):
        assert sorted(one.expert for one in drawn[first : first + 4]) == [0, 1, 2, 3]
    assert {one.start for one in drawn} == {0, 1, 2}
    again = draw_iteration(method, 17, 4, 6, SIZE, ALL)
    assert [step.indices.tolist() for step in again.steps] == [step.indices.tolist() for step in drawn[17].steps]
    families = {step.augmentation.family for one in drawn for step in one.steps if step.augmentation}
    assert families == set(ALL)


@pytest.mark.parametrize("gradient", ["unrolled", "tesla"])
def test_exploding_gradients_stop_and_leave_the_last_good_set(tmp_path: Path, gradient: str) -> None:
    module = module_of(tmp_path, gradient=gradient, lr_images=1e30, loss_limit=None)
    kept: list[Tensor] = []
    gradients = module.draw

    def noting(iteration: int) -> Any:
        kept.append(module.images.detach().clone())
        return gradients(iteration)

    module.draw = noting  # type: ignore[method-assign]
    with pytest.raises(ExplodingGradients, match=r"iteration \d.* before it is kept.*method\.mtt\.lr_images=1e\+30"):
        quiet_trainer(2).fit(module)
    assert torch.equal(module.images.detach(), kept[-1])
    assert bool(module.images.isfinite().all())


def test_a_step_that_is_not_finite_is_named(tmp_path: Path) -> None:
    module = module_of(tmp_path, step_size=1e38, loss_limit=None)
    with pytest.raises(ExplodingGradients, match=r"iteration 1 .*not finite after step [123] of 3"):
        quiet_trainer(1).fit(module)
    assert torch.equal(module.images, module_of(tmp_path).images)


def test_a_loss_beyond_its_limit_stops(tmp_path: Path) -> None:
    module = module_of(tmp_path, step_size=50.0, loss_limit=1.5)
    with pytest.raises(ExplodingGradients, match=r"loss exceeds method\.mtt\.loss_limit in iteration 1 \(loss "):
        quiet_trainer(1).fit(module)


def test_a_step_size_below_zero_stops(tmp_path: Path) -> None:
    """A step size of 5 overshoots, so that its gradient is positive, and this rate takes it far below zero."""
    module = module_of(tmp_path, step_size=5.0, lr_step_size=1e6, loss_limit=None)
    with pytest.raises(ExplodingGradients, match=r"step size became -\S+ in iteration 1; .*step_size_form=softplus"):
        quiet_trainer(2).fit(module)
    assert module.step_size().item() == 5
    changes = {"step_size_form": "softplus", "loss_limit": None}
    positive = module_of(tmp_path, step_size=5.0, lr_step_size=0.01, iterations=1, **changes)
    quiet_trainer(1).fit(positive)
    assert 0 < positive.step_size().item() < 5
