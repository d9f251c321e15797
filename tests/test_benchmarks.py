"""The plain references do the engine's maths, and the benchmark says all that it promises; never how fast."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import MEAN, STD, random_pixels, small_network
from torch import Tensor, nn
from vote_reference import voting_loss

from benchmarks import agreement, engine, precision, settings, speed, timing
from benchmarks.cases import Case, chosen, cpu_cases, gpu_cases, make_program, work_of
from benchmarks.limits import Limits, Work, count_work, measure_limits
from benchmarks.reference import recover, relabel, student
from benchmarks.table import markdown
from cvdd.artifact.manifest import manifest_checksum
from cvdd.augmentation.augment import Views, apply_matrices, pixel_bounds
from cvdd.chain.unit_files import write_unit
from cvdd.computing.passes import Passes
from cvdd.labels.replay import replay
from cvdd.labels.teachers import Teachers
from cvdd.synthesis.units import Unit, unit_matrices
from cvdd.synthesis.voting import Voter
from cvdd.training.losses import soft_label_loss

CPU = torch.device("cpu")
SIZE = 12
LIMITS = Limits({"float32": 1e11, "bfloat16": 1e12}, {"float32": 2e11, "bfloat16": 1e11}, 1e10)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain_settings(r_bn: float = 0.3) -> recover.Settings:
    low, high = pixel_bounds(MEAN, STD)
    return recover.Settings(0.25, (0.5, 0.9), 1e-8, r_bn, 10.0, 100, (0.08, 1.0), True, 4, low, high)


# --- the references do the engine's maths -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        recover.View((0, 0, SIZE, SIZE), False, (0, 0)),
        recover.View((2, 1, 5, 7), True, (3, 2)),
        recover.View((4, 0, 8, 6), False, (0, 4)),
    ],
)
def test_recover_has_the_loss_and_gradient_of_the_engine(view: recover.View) -> None:
    networks = [small_network(seed=1), small_network(seed=2)]
    images = torch.randn(1, 4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(4)[None]
    views = Views(torch.tensor([view.box]), torch.tensor([view.flip]), torch.tensor([view.shift]))
    voters = [Voter(str(index), network) for index, network in enumerate(networks)]
    seen = apply_matrices(images, *unit_matrices(views, SIZE))
    expected = voting_loss(seen, targets, voters, torch.tensor([[0.3], [0.7]]), r_bn=0.3).loss
    (slope,) = torch.autograd.grad(expected, images)

    leaf = images.detach()[0].clone().requires_grad_()
    committee = recover.Committee(networks, [0.3, 0.7])
    loss = committee.loss(recover.show(leaf, view), targets[0], plain_settings())
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, slope[0], rtol=1e-4, atol=1e-6)


def test_recover_stays_between_black_and_white_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    plain = plain_settings()
    recovery = recover.Recovery(
        recover.Committee([small_network()], [1.0]), torch.randn(4, 3, SIZE, SIZE), torch.arange(4), plain
    )
    losses = [recovery.step(recover.View((0, 0, SIZE, SIZE), False, (0, 0))).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert bool(((recovery.images >= plain.low) & (recovery.images <= plain.high)).all())
    assert recovery.iteration == 30


def test_labels_are_those_of_the_engine_for_the_same_views() -> None:
    config = settings.configuration("cifar")
    label = config.label.model_copy(update={"epochs": 1, "batch_size": 8, "dtype": "float32"})
    networks = [small_network(classes=10, seed=1, dropout=0.5), small_network(classes=10, seed=2)]
    pixels = random_pixels(16, size=32)
    plan, expected = engine.make_labels(config, networks, pixels, label, Passes()).epoch(0)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.dataset.mean, config.dataset.std))
    plain = [relabel.use_batch_statistics(copy.deepcopy(network)) for network in networks]
    for start in (0, 8):
        part = plan.batch(start, start + 8)
        rows = zip(part.index.tolist(), part.box.tolist(), part.flip.tolist(), strict=True)
        shown = [(relabel.show(pixels[i].float() / 255, tuple(box), flip) - mean) / std for i, box, flip in rows]
        mixed = relabel.cutmix(torch.stack(shown), part.partner, tuple(part.mix_box[0].tolist()))
        torch.testing.assert_close(
            mixed, replay(pixels, part, config.dataset.mean, config.dataset.std), atol=2e-5, rtol=0
        )
        torch.testing.assert_close(
            relabel.score(plain, [0.5, 0.5], mixed), expected[start : start + 8], atol=1e-4, rtol=0
        )


def test_halves_of_uneven_batches_are_those_of_the_engine() -> None:
    label = settings.configuration("cifar").label
    network, samples = small_network(classes=10), torch.randn(7, 3, SIZE, SIZE)
    expected = Teachers([copy.deepcopy(network)], [1.0], label).score(samples, 7)
    found = relabel.score([relabel.use_batch_statistics(network)], [1.0], samples)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_students_loss_is_that_of_the_engine() -> None:
    one, other = torch.randn(6, 10), torch.randn(6, 10)
    expected = soft_label_loss(one, other, 20.0)
    torch.testing.assert_close(student.distillation_loss(one, other, 20.0), expected)


def test_a_student_sees_the_labelled_images(tmp_path: Path) -> None:
    pixels = random_pixels(5, size=16)
    plain = relabel.Settings(4, (0.3, 1.0), True, MEAN, STD)
    network = relabel.use_batch_statistics(small_network())
    assert relabel.relabel([network], [1.0], pixels, plain, 2, tmp_path) == 10
    names = [f"epoch{epoch}_batch{batch}.pt" for epoch in range(2) for batch in range(2)]
    records = [relabel.Record(**torch.load(tmp_path / name)) for name in names]
    assert [len(record.index) for record in records] == [4, 1, 4, 1]
    known = student.Settings(1e-3, (0.9, 0.999), 0.01, 20.0, 2, MEAN, STD)
    loader = student.make_loader(student.save_images(pixels, tmp_path), records, known, workers=0)
    first = next(iter(loader))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    for shown, index, box, flip in zip(
        first, *(getattr(records[0], n) for n in ("index", "boxes", "flips")), strict=True
    ):
        # The files are resized as 8-bit images, the labels were not.
        expected = relabel.show(pixels[index].float() / 255, box, flip)
        assert (shown * std + mean - expected).abs().max() < 2 / 255
    trained = small_network().train().requires_grad_(True)
    loss = student.train(trained, student.make_optimizer(trained, known), loader, records, known, CPU)
    assert bool(loss.isfinite())
    assert any(
        not torch.equal(one, other)
        for one, other in zip(trained.parameters(), small_network().parameters(), strict=True)
    )


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_setting() -> Callable[..., agreement.Setting]:
    config = settings.configuration("digits")

    def made(dtype: torch.dtype = torch.float32) -> agreement.Setting:
        members: list[nn.Module] = [small_network(classes=10, seed=seed).to(dtype) for seed in (1, 2)]
        return agreement.Setting.random(config, members, units=3, images=4, steps=20)

    return made


def test_engine_and_plain_loop_agree_step_by_step(make_setting: Callable[..., agreement.Setting]) -> None:
    found = agreement.against_reference(make_setting(), CPU)
    assert found.passed(every_image=False)
    assert found.tolerance == 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stack_and_single_units_agree_step_by_step(
    dtype: torch.dtype, make_setting: Callable[..., agreement.Setting]
) -> None:
    found = agreement.against_single_units(make_setting(dtype), CPU)
    assert found.passed(every_image=dtype == torch.float64)
    assert found.tolerance == 1e-5


def test_a_difference_is_seen() -> None:
    one = torch.randn(4, 3, 2, 2)
    other = one.clone()
    other[0] *= 1.1
    gradients = agreement.difference_by_image(other, one)
    found = agreement.Differences.of([1e-7], [gradients], 1e-5)
    assert found.passed(every_image=False)
    assert not found.passed(every_image=True)
    assert found.beyond == 0.25
    assert found.largest == pytest.approx(0.1, rel=1e-4)
    assert not agreement.Differences.of([1e-3], [gradients * 0], 1e-5).passed(every_image=False)


# --- limits and timing ------------------------------------------------------------------------------------------------


def test_work_is_counted_forward_and_backward() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False).requires_grad_(False)
    images = torch.randn(2, 3, 10, 10, requires_grad=True)
    once = 2 * 2 * 8 * 100 * 27
    assert count_work(lambda: layer(images.detach())).flops == once
    both = count_work(lambda: layer(images).sum().backward())
    assert both.flops == 2 * once
    assert count_work(lambda: layer(images.detach())).elements == 600 + 216 + 1600


def test_the_limit_is_the_slower_of_arithmetic_and_memory_in_the_better_precision() -> None:
    assert Work(1e12, 0).seconds_at_best(LIMITS) == pytest.approx(1)
    assert Work(0, 1e10).seconds_at_best(LIMITS) == pytest.approx(2)
    assert Work(4e12, 1e10).scaled(0.5).seconds_at_best(LIMITS) == pytest.approx(2)


def test_of_two_measurements_of_the_limits_the_higher_counts() -> None:
    other = Limits({"float32": 3e11, "bfloat16": 1e11}, {"float32": 1e11, "bfloat16": 2e11}, 5e9)
    best = Limits({"float32": 3e11, "bfloat16": 1e12}, {"float32": 2e11, "bfloat16": 2e11}, 1e10)
    assert LIMITS.better(other) == other.better(LIMITS) == best


def test_limits_are_measured() -> None:
    limits = measure_limits(CPU, seconds=0.01)
    assert min(*limits.matrix.values(), *limits.convolution.values(), limits.copy) > 1e6


def test_programs_alternate_and_neither_is_always_first() -> None:
    calls: list[str] = []

    def program(name: str, seconds: float) -> timing.Program:
        def run() -> float:
            calls.append(name)
            return seconds

        return run

    reference, fast = timing.alternate(program("r", 4.0), program("e", 1.0), repetitions=3)
    assert "".join(calls) == "re" + "re" + "er" + "re"
    assert len(reference.warm_up) == len(fast.warm_up) == 1
    assert timing.ratio(reference, replace(fast, amount=2)) == 8
    assert timing.ratios(reference, fast) == [4, 4, 4]


def test_spread_and_median_are_per_unit_of_work() -> None:
    samples = timing.Samples(10.0, [1.0, 2.0, 4.0])
    assert samples.median == 0.2
    assert samples.spread == pytest.approx(1.5)


# --- cases, table and file --------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own() -> None:
    for cases in (cpu_cases(), gpu_cases(), gpu_cases(more=True)):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
    assert [case.images for case in chosen(cpu_cases(), ["recover_cifar_10"])] == [10, 10, 10]
    assert [len(chosen(gpu_cases(), [f"recover_{size}"])) for size in ("imagenet_100", "cifar_10")] == [10, 10]
    assert [case.images for case in chosen(gpu_cases(more=True), ["recover_cifar_100"])] == [100, 100]
    assert chosen(cpu_cases(), []) == cpu_cases()
    with pytest.raises(ValueError, match=r"no case is called recover_cif; there are recover_digits"):
        chosen(cpu_cases(), ["recover_cif"])


TINY = [
    Case("recover", "digits", ("resnet18",), images=4, steps=2, units=3, reference_units=2),
    Case("relabel", "digits", ("resnet18",), images=20, steps=1, named=False),
    Case("student", "digits", ("resnet18",), images=20, steps=1),
    Case("committee", "digits", ("resnet18",), images=64, steps=1),
]


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_limits", lambda device: LIMITS)
        return speed.run(TINY, CPU, repetitions=2, memory=False)


def test_the_file_has_machine_versions_commit_and_all_samples(result: dict[str, object]) -> None:
    written = json.loads(json.dumps(result))
    assert {"cpu", "cores", "gpu"} <= set(written["machine"])
    assert {"torch", "cvdd"} <= set(written["versions"])
    assert "commit" in written
    assert set(written["limits"]) == {"matrix", "convolution", "copy"}
    assert [case["name"] for case in written["cases"]] == [case.name for case in TINY]
    for case in written["cases"]:
        for side in ("reference", "engine"):
            assert len(case[side]["seconds"]) == len(case[side]["outside"]) == 2
            assert len(case[side]["warm_up"]) == 1
            assert min(case[side]["seconds"]) > 0
        assert case["ratio"] == pytest.approx(
            case["reference"]["median_seconds_per_unit"] / case["engine"]["median_seconds_per_unit"]
        )
        assert case["fraction_of_limit"] > 0
        assert case["flops_per_unit"] > 0


def test_the_table_has_a_row_for_each_case(result: dict[str, object]) -> None:
    table = [line for line in markdown(result).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(TINY)
    assert len({line.count("|") for line in table}) == 1
    for words, line in zip(
        ("ms per image and iteration", "labels per second", "images per second", "s per epoch of 5,188 images"),
        table[2:],
        strict=True,
    ):
        assert words in line


def test_pairs_have_a_mean_and_what_was_left_out_is_named(result: dict[str, object]) -> None:
    case = result["cases"][0]  # type: ignore[index]
    pairs = [{**case, "name": f"recover_cifar_10_{pair}"} for pair in ("a_b", "c_d")]
    shown = markdown({**result, "cases": pairs, "left_out": ["student_cifar_resnet18"]})
    assert "mean of 2: recover_cifar_10 " in shown
    assert "Left out for lack of time: student_cifar_resnet18." in shown


def test_what_was_told_to_some_cases_is_said_of_them(result: dict[str, object]) -> None:
    case = result["cases"][0]  # type: ignore[index]
    half = {**case, "name": "recover_cifar_10_a_b_bf16", "overrides": ["engine.precision=bf16"]}
    both = {**case, "name": "recover_cifar_10_a_b", "overrides": []}
    shown = markdown({**result, "cases": [both, half]})
    assert "With engine.precision=bf16: recover_cifar_10_a_b_bf16." in shown
    assert "mean of" not in shown
    assert "With engine.precision=bf16.\n" in markdown({**result, "cases": [half]})


def test_when_time_is_up_the_rest_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_limits", lambda device: LIMITS)
    result = speed.run(TINY[:1], CPU, repetitions=1, memory=False, minutes=0)
    assert result["left_out"] == [TINY[0].name]
    assert result["cases"] == []


def test_no_name_of_a_machine_and_no_path_is_written(result: dict[str, object]) -> None:
    written = json.dumps(result)
    assert str(Path.cwd()) not in written
    assert "/tmp" not in written
    assert f'"{platform.node()}"' not in written


def test_a_repetition_of_labels_computes_them_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    original = Teachers.score

    def counting(self: Teachers, samples: Tensor, batch_size: int) -> Tensor:
        scored.append(len(samples))
        return original(self, samples, batch_size)

    monkeypatch.setattr(Teachers, "score", counting)
    program = make_program(TINY[1], "engine", CPU, tmp_path)
    for _ in range(2):
        program()
    assert sum(scored) == 2 * TINY[1].amount("engine")


def test_work_of_every_stage_is_counted() -> None:
    assert all(work_of(case, CPU).flops > 0 for case in TINY)


def test_precisions_are_compared_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = [Unit(slot, 0, 0, 2) for slot in range(2)]

    def artefact(kind: str, digest: str, parents: list[dict[str, str]]) -> Path:
        folder = tmp_path / kind / f"a-{digest}"
        (folder / "units").mkdir(parents=True)
        manifest = {"format": 1, "kind": kind, "name": "a", "digest": digest, "parents": parents}
        files = {f"units/{unit.name}.safetensors": {"bytes": 0, "sha256": ""} for unit in units}
        manifest |= {"identity": {}, "metrics": {}, "code": {}, "cost": {}, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
        return folder

    # Losses of two units at one log row, for each of three seeds and both precisions.
    for kind, extra in (("full", 0.0), ("half", 0.5)):
        for seed in range(3):
            digest = f"{kind}{seed}"
            images = artefact("images", digest, [])
            for unit, loss in zip(units, (1.0 + seed + extra, 3.0 + seed + extra), strict=True):
                rows = [{"iteration": 20, "loss": loss}]
                write_unit(images / "units", unit, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), rows, {})
            artefact("students", digest, [{"kind": "images", "name": "a", "digest": digest}])
    results = [
        {"row": "cvdd", "n": 3, "top1_by_seed": [80.0, 82.0, 84.0], "students": [f"a-full{seed}" for seed in range(3)]},
        {"row": "bf16", "n": 3, "top1_by_seed": [81.0, 82.0, 85.0], "students": [f"a-half{seed}" for seed in range(3)]},
    ]
    precision.show(tmp_path, results)
    shown = capsys.readouterr().out
    assert "| fp32 | 3 | 82 +- 1.2 |  |" in shown
    assert "| bf16 | 3 | 82.67 +- 1.2 | +0.67 +- 0.33 |" in shown
    assert "| 20 | 3 +- 0.58 | 3.5 +- 0.58 | +0.5 +- 0 | +0.87 |" in shown
