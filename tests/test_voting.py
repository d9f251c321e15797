"""The voting loss against the published implementation, and units that know nothing of each other."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from helpers import FIXTURES, method_config, small_network
from safetensors.torch import load_file
from torch import Tensor, nn
from vote_reference import VoteTerms, voting_loss

from cvdd.augmentation.augment import pixel_bounds
from cvdd.synthesis.committee import vote_weights
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.log_rows import LogRow
from cvdd.synthesis.voting import Judgement, Voter, judge, weigh

EXPECTED = json.loads((FIXTURES / "voting_step" / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "voting_step" / "tensors.safetensors")


def published_member(index: int, width: int) -> Voter:
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )
    prefix = f"member{index}."
    state = {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}
    network.load_state_dict(state)
    return Voter(f"member{index}", network.eval().requires_grad_(False))


VOTERS = [published_member(0, 8), published_member(1, 6)]


def published_weights() -> Tensor:
    return vote_weights(EXPECTED["priors"], EXPECTED["temperature"], EXPECTED["voter"])


def test_weights_of_the_release() -> None:
    assert published_weights().tolist() == pytest.approx(EXPECTED["weights"], rel=1e-6)


def test_loss_and_gradient_of_the_release() -> None:
    images = TENSORS["images"].clone().requires_grad_()
    terms = voting_loss(
        images[None], TENSORS["targets"][None], VOTERS, published_weights()[:, None], r_bn=EXPECTED["r_bn"]
    )
    terms.loss.backward()
    first = EXPECTED["per_step"][0]
    assert terms.ce[:, 0].tolist() == pytest.approx(first["ce"], rel=1e-4)
    assert terms.bn[:, 0].tolist() == pytest.approx(first["bn"], rel=1e-4)
    assert terms.loss.item() == pytest.approx(first["loss"], rel=1e-4)
    difference = (images.grad - TENSORS["grad_step0"]).norm() / TENSORS["grad_step0"].norm()
    assert difference < 1e-4
    assert images.grad.norm().item() == pytest.approx(first["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def five_steps() -> DistillModule:
    """The module's own five steps of a schedule of 4000, in Lightning."""
    method = method_config(
        iterations=EXPECTED["total_iterations"],
        lr=EXPECTED["lr"],
        betas=EXPECTED["adam_betas"],
        eps=EXPECTED["adam_eps"],
        r_bn=EXPECTED["r_bn"],
        first_bn_multiplier=EXPECTED["first_bn_multiplier"],
        log_every=1,
        checkpoint_every=EXPECTED["steps"],
        grid_every=EXPECTED["steps"],
    )
    module = DistillModule(
        TENSORS["images"][None],
        TENSORS["targets"][None],
        None,
        VOTERS,
        published_weights()[:, None],
        method,
        pixel_bounds(EXPECTED["mean"], EXPECTED["std"]),
        lambda row, images: None,
    )
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit(module)
    return module


def test_terms_of_five_steps_of_the_release(five_steps: DistillModule) -> None:
    assert len(five_steps.rows) == EXPECTED["steps"]
    for row, expected in zip(five_steps.rows, EXPECTED["per_step"], strict=True):
        assert row.lr == pytest.approx(expected["lr"], rel=1e-6)
        assert list(row.ce.values()) == pytest.approx(expected["ce"], rel=1e-4)
        assert list(row.bn.values()) == pytest.approx(expected["bn"], rel=1e-4)
        assert row.loss == pytest.approx(expected["loss"], rel=1e-4)
    assert [row.iteration for row in five_steps.rows] == [1, 2, 3, 4, 5]


def test_images_after_five_steps_of_the_release(five_steps: DistillModule) -> None:
    torch.testing.assert_close(five_steps.images.detach()[0], TENSORS["images_after"], rtol=0, atol=1e-3)
    assert (TENSORS["images_after"] - TENSORS["images"]).abs().max() > 0.1


# --- stacks of units --------------------------------------------------------------------------------------------------


def committee() -> list[Voter]:
    return [Voter("a", small_network(seed=1)), Voter("b", small_network(seed=2, width=5), bn_scale=0.5)]


def units(count: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    images = torch.randn(count, 4, 3, 12, 12, generator=source)
    shares = torch.rand(2, count, generator=source)
    return images, torch.arange(4).repeat(count, 1), shares / shares.sum(dim=0)


def vote(images: Tensor, targets: Tensor, weights: Tensor, **options: float) -> tuple[VoteTerms, Tensor]:
    leaf = images.clone().requires_grad_()
    terms = voting_loss(leaf, targets, committee(), weights, **{"r_bn": 0.01, **options})
    terms.loss.backward()
    return terms, leaf.grad


def test_weighing_voter_by_voter_is_the_gradient_of_the_sum() -> None:
    images, targets, weights = units(3)
    terms, gradient = vote(images, targets, weights)

    def opinion(voter: Voter) -> tuple[Judgement, Tensor]:
        leaf = images.clone().requires_grad_()
        said = judge(leaf, targets, voter, r_bn=0.01, first_bn_multiplier=10.0)
        return Judgement(*(part.detach() for part in said)), torch.autograd.grad(said.value.sum(), leaf)[0]

    weighed = weigh(map(opinion, committee()), weights, keep=True)
    assert weighed.loss.item() == pytest.approx(terms.loss.item(), rel=1e-6)
    torch.testing.assert_close(weighed.gradient, gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weighed.ce, terms.ce)
    torch.testing.assert_close(weighed.bn, terms.bn)
    assert weighed.slopes is not None
    shares = weights.view(2, 3, 1, 1, 1, 1)
    torch.testing.assert_close((shares * torch.stack(weighed.slopes)).sum(dim=0), weighed.gradient)
    assert weigh(map(opinion, committee()), weights).slopes is None


def test_a_stack_is_its_units() -> None:
    """Loss, terms and gradient of three units in one pass are those of three passes."""
    images, targets, weights = units(3)
    stacked, gradient = vote(images, targets, weights)
    apart = [vote(images[i : i + 1], targets[i : i + 1], weights[:, i : i + 1]) for i in range(3)]
    assert stacked.loss.item() == pytest.approx(sum(terms.loss.item() for terms, _ in apart), rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([grad for _, grad in apart]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stacked.ce, torch.cat([terms.ce for terms, _ in apart], dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(stacked.bn, torch.cat([terms.bn for terms, _ in apart], dim=1), rtol=1e-5, atol=0)


def test_statistics_of_a_stack_are_those_of_all_its_images() -> None:
    """Every unit counts the distance of all of them as its own."""
    images, targets, _ = units(3)
    voters, weights = [Voter("a", small_network())], torch.ones(1, 3)
    options = {"r_bn": 0.1, "statistics_of": "stack"}
    stacked = voting_loss(images, targets, voters, weights, **options)
    whole = voting_loss(images.view(1, 12, 3, 12, 12), targets.view(1, 12), voters, weights[:, :1], r_bn=0.1)
    torch.testing.assert_close(stacked.bn, whole.bn.expand(1, 3))
    assert stacked.loss.item() == pytest.approx((stacked.ce + 0.1 * stacked.bn).sum().item(), rel=1e-6)


def test_a_units_gradient_ignores_the_others() -> None:
    images, targets, weights = units(2)
    _, before = vote(images, targets, weights)
    images[1] += 3
    _, after = vote(images, targets, weights)
    torch.testing.assert_close(before[0], after[0], rtol=1e-4, atol=1e-6)
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    images, targets, weights = units(2)
    terms, _ = vote(images, targets, weights, ce=0.7, r_bn=0.03)
    scale = torch.tensor([[1.0], [0.5]])
    expected = (weights * (0.7 * terms.ce + 0.03 * scale * terms.bn)).sum()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_the_batchnorm_term() -> None:
    images, targets, weights = units(1)
    terms, _ = vote(images, targets, weights, r_bn=0.0)
    assert not terms.bn.any()
    logits = torch.stack([voter.network(images[0]) for voter in committee()])
    ce = torch.stack([nn.functional.cross_entropy(one, targets[0]) for one in logits])
    assert terms.loss.item() == pytest.approx((weights[:, 0] * ce).sum().item(), rel=1e-6)


def test_members_are_left_as_they_were() -> None:
    voters = committee()
    before = [{name: value.clone() for name, value in voter.network.state_dict().items()} for voter in voters]
    images, targets, weights = units(1)
    voting_loss(images.requires_grad_(), targets, voters, weights, r_bn=0.01).loss.backward()
    for voter, state in zip(voters, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in voter.network.state_dict().items())
        assert all(parameter.grad is None for parameter in voter.network.parameters())


def test_log_rows_name_the_members(five_steps: DistillModule) -> None:
    row = five_steps.rows[0]
    assert isinstance(row, LogRow)
    assert list(row.ce) == list(row.bn) == ["member0", "member1"]
