"""The chain with CIM: which real images, images from them, what of them is logged, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Compose
from helpers import PRIORS, as_files, same_files, tiny_context
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.augmentation.augment import normalise
from cvdd.chain.compare import distil
from cvdd.chain.context import Context
from cvdd.chain.fitting import fit_units
from cvdd.chain.images import _work, make_images
from cvdd.chain.initial import initial_images, make_start
from cvdd.chain.members import load_network, make_member
from cvdd.chain.preflight import check_before_work
from cvdd.chain.real_choice import POSITIONS, anchors_of_units, chosen_positions, make_ranked
from cvdd.chain.unit_files import load_history, load_images
from cvdd.cost.plan import plan_pieces, planning
from cvdd.cost.steps import MeasureStep, VoteStep
from cvdd.cost.work import work_of
from cvdd.data import resize_and_crop
from cvdd.report.gallery import make_gallery
from cvdd.report.plots import term_curves
from cvdd.report.terms import member_terms, terms_of
from cvdd.schema import members_used
from cvdd.statistics.features import feature_layer, require_features
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.units import Unit, plan_stacks, plan_units

pytest_plugins = ["chain_fixtures"]

PACE = ("method.iterations=4", "method.log_every=2", "method.checkpoint_every=4", "method.grid_every=4")
CIM = ("method=cim", "method.crop_scale=null", "method.lr=0.04", "method.ce=0", "method.r_bn=0", *PACE)
KEPT = ("method=random_real", "method.iterations=0", "method.factor=2")
SIZE, IPC = 32, 2


def images_of(home: Path, *overrides: str) -> Artifact:
    return make_images(tiny_context(home, *CIM, *overrides), PRIORS)


def losses_of(context: Context, positions: Tensor, label: int) -> Tensor:
    """Cross-entropy of the observer on whole images, by hand."""
    data = context.data()
    network = load_network(
        context, make_member(context, "resnet18"), context.config.committee.members["resnet18"].backbone
    )
    images = normalise(data.train.stacked()[positions], data.mean, data.std)
    with torch.no_grad():
        logits = network(images)
    return nn.functional.cross_entropy(logits, torch.full((len(images),), label), reduction="none")


# --- which real images ------------------------------------------------------------------------------------------------


def test_the_easiest_of_the_candidates_are_chosen_in_order(chain_home: Path) -> None:
    context = tiny_context(chain_home, *CIM, "patches.candidates=1000")
    chosen = load_file(make_ranked(context).path / POSITIONS)["positions"]
    assert chosen.shape == (10, IPC * 4)
    for label in (0, 7):
        of_class = (context.data().train.labels == label).nonzero()[:, 0]
        losses = losses_of(context, of_class, label)
        torch.testing.assert_close(losses_of(context, chosen[label], label), losses.sort().values[: IPC * 4])


def test_candidates_are_random_ones(chain_home: Path) -> None:
    few = [
        load_file(make_ranked(tiny_context(chain_home, *CIM, "patches.candidates=8", seed)).path / POSITIONS)[
            "positions"
        ]
        for seed in ("method.seed=0", "method.seed=1")
    ]
    assert not torch.equal(few[0].sort().values, few[1].sort().values)


def test_all_images_have_easy_parts_and_less_easy_ones(chain_home: Path) -> None:
    """Number q * IPC + t of a class is part q of image t."""
    context = tiny_context(chain_home, *CIM)
    easiest = make_ranked(context)
    ranked = load_file(easiest.path / POSITIONS)["positions"]
    positions = chosen_positions(context, easiest)
    assert positions.shape == (10, IPC, 4)
    assert positions[3, 1].tolist() == [int(ranked[3, part * IPC + 1]) for part in range(4)]


@pytest.mark.parametrize("init", ["easiest", "real"])
def test_images_begin_as_their_anchors_at_half_the_side(init: str, chain_home: Path) -> None:
    context = tiny_context(chain_home, *CIM, f"method.init={init}")
    start = make_start(context)
    images, positions = initial_images(context, start), chosen_positions(context, start)
    units = [Unit(1, 0, 0, 10), Unit(0, 0, 0, 10)]
    anchors = anchors_of_units(context, positions, units)
    assert anchors.shape == (2, 10, 4, 3, SIZE, SIZE)
    data, half = context.data(), SIZE // 2
    for index, unit in enumerate(units):
        for label in (0, 9):
            whole = data.train.stacked()[positions[label, unit.slot]]
            torch.testing.assert_close(anchors[index, label], normalise(whole, data.mean, data.std))
            image, small = images[label, unit.slot], resize_and_crop(whole, half)
            corners = [(0, 0), (0, half), (half, 0), (half, half)]
            for part, (top, left) in zip(small, corners, strict=True):
                assert torch.equal(image[:, top : top + half, left : left + half], part)
    assert (data.train.labels[positions].transpose(0, 2) == torch.arange(10)).all()


def test_real_images_can_be_the_easiest_without_any_method(chain_home: Path) -> None:
    context = tiny_context(chain_home, *KEPT[:2], "method.init=easiest")
    images, labels = load_images(make_images(context, {}))
    ranked = load_file(make_ranked(context).path / POSITIONS)["positions"]
    assert torch.equal(images, context.data().train.stacked()[ranked.flatten()])
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]


def test_images_are_the_same_from_files(chain_home: Path, tmp_path: Path) -> None:
    usual = images_of(chain_home)
    decoded = as_files(tmp_path, tiny_context(chain_home, *CIM, store=tmp_path / "store"))
    assert same_files(make_images(decoded, PRIORS), usual)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_are_moved_and_say_what_they_are_made_from(chain_home: Path) -> None:
    artifact = images_of(chain_home)
    context = tiny_context(chain_home, *CIM)
    images, _ = load_images(artifact)
    start = initial_images(context, make_start(context)).flatten(0, 1)
    assert images.shape == start.shape == (20, 3, SIZE, SIZE)
    assert 0 < (images.float() - start.float()).abs().mean() < 20
    kinds = [parent["kind"] for parent in artifact.manifest["parents"]]
    assert sorted(kinds) == ["easiest", "members"]
    history = next(iter(load_history(artifact).values()))
    assert set(history["weights"]) == {"resnet18"}
    assert all(set(row["features"]) == {"resnet18"} for row in history["rows"])
    assert history["rows"][-1]["features"]["resnet18"] < history["rows"][0]["features"]["resnet18"]


def test_a_unit_depends_on_nothing_beside_it(chain_home: Path) -> None:
    """The same images from smaller stacks; sums of other lengths show in the last bits."""
    whole, _ = load_images(images_of(chain_home))
    alone, _ = load_images(images_of(chain_home, "method.units_per_stack=1"))
    assert (whole.int() - alone.int()).abs().max() <= 1


def test_a_committee_votes_on_features(chain_home: Path) -> None:
    both = images_of(chain_home, "method.voters=[resnet18,shufflenetv2]")
    history = next(iter(load_history(both).values()))
    assert set(history["rows"][-1]["features"]) == {"resnet18", "shufflenetv2"}
    assert len(set(history["weights"].values())) == 2
    assert set(history["rows"][-1]["agreement"]) != set()


def test_other_terms_can_be_had_with_features(chain_home: Path) -> None:
    """The cross-entropy and the BatchNorm distance of all parts, and features of a layer inside."""
    artifact = images_of(chain_home, "method.ce=1", "method.r_bn=0.1", "method.anchors.layer=layer3")
    assert not torch.equal(load_images(artifact)[0], load_images(images_of(chain_home))[0])


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_pages_show_features_and_no_term_that_is_not_in_the_loss(chain_home: Path) -> None:
    context = tiny_context(chain_home, *CIM, "method.anchors.weight=3")
    distilled = distil(context, "cim")
    terms = member_terms(load_history(distilled.images), context.config)
    assert terms_of(terms) == ["features"]
    rows = next(iter(load_history(distilled.images).values()))["rows"]
    assert terms["resnet18"].curves["features"] == pytest.approx([3 * row["features"]["resnet18"] for row in rows])
    assert terms["resnet18"].share == 1
    drawing = str(term_curves(terms))
    assert "distance of features" in drawing
    assert "BatchNorm" not in drawing
    gallery = make_gallery(distilled)
    assert gallery.start_title == "real images they started from"
    assert len(gallery.rows[0].start) == IPC


def test_what_it_costs(chain_home: Path) -> None:
    """Easiest images are scored once; every iteration shows all parts to the voter, and their anchors forward alone."""
    context = planning(tiny_context(chain_home, *CIM, store=None).config, torch.device("cpu"))
    pieces = {piece.artifact.kind: piece for piece in plan_pieces(context)}
    scored = work_of(pieces["easiest"])
    (times,) = [often for step, often in scored.uses.items() if isinstance(step, MeasureStep)]
    assert times == min(context.config.patches.candidates * 10, len(context.data().train))
    uses = work_of(pieces["images"]).uses
    votes = {step: often for step, often in uses.items() if isinstance(step, VoteStep)}
    assert {step.images for step in votes} == {10 * 4}
    seen = sum(step.units * step.images * often for step, often in votes.items())
    assert seen == 4 * 20 * 4
    assert sum(often for step, often in uses.items() if isinstance(step, MeasureStep)) == seen


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("patches.candidates=7",),
            r"patches\.candidates=7 images of class 0 are looked at, .* needs 8\. Raise patches",
        ),
        (
            ("ipc.images_per_class=200", "method.init=real"),
            r"ipc\.images_per_class=200 of method\.factor=2, 4 real images each, needs 800",
        ),
        (("method.anchors.layer=nothing",), r"anchors\.layer=nothing: member resnet18 has no module of that name"),
    ],
)
def test_what_cannot_be_made_is_refused(overrides: tuple[str, ...], message: str, chain_home: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_before_work(tiny_context(chain_home, *CIM, *overrides))


def test_ranks_do_not_share_such_units(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"say of features \(method\.anchors\); set trainer\.split_units=false"):
        compose("distill", "method=cim", "trainer=ddp", "trainer.devices=2", "trainer.split_units=true")


class Twice(nn.Module):
    """A network that calls a layer twice, keeps one that it never calls, and gives one a list of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.listed = Listed()
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.listed([self.body(self.body(x))])
        logits: Tensor = self.head(self.first(x.mean(dim=(2, 3))))
        return logits


class Listed(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("body", "module body of member a is called 2 times in a forward pass; choose head, or"),
        ("unused", "is called 0 times"),
        ("listed", "is given several maps"),
    ],
)
def test_features_are_of_one_map_of_one_call(layer: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_features(Twice(), layer, "a", SIZE)
    require_features(Twice(), "first", "a", SIZE)
    assert feature_layer(Twice(), "head", "a") == "head"


def test_units_are_planned_for_all_parts(chain_home: Path) -> None:
    """What is shown at once, and what is computed in all, is four times the images."""
    context = tiny_context(chain_home, *CIM)
    units = plan_units(IPC, 10, context.config.method)
    work = _work(context, plan_stacks(units, [(0,)] * len(units), context.config.method))
    assert work.unit_images == 10 * 4
    assert work.image_passes == 4 * 20 * 4


def test_units_are_fitted_for_all_parts(chain_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, shown = tiny_context(chain_home, *CIM), list[int]()
    monkeypatch.setattr("cvdd.chain.fitting.surely_fits", lambda images, *others: shown.append(images) or True)
    units = plan_units(IPC, 10, context.config.method)
    fit_units(context, Engine(), plan_stacks(units, [(0,)] * len(units), context.config.method))
    assert shown == [IPC * 10 * 4]


def test_only_members_that_are_needed_are_trained(compose: Compose) -> None:
    config = compose("evaluate", "method=cim", "label=resnet18", "compare=none")
    assert members_used(config) == ["resnet18"]
    kept = ("method=random_real", "method.iterations=0", "method.init=easiest", "patches.observer=resnet50")
    other = compose("evaluate", *kept, "label=resnet18", "compare=none")
    assert members_used(other) == ["resnet18", "resnet50"]
