"""How networks are trained and images labelled: settings that cannot be used, or that nothing would read."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from conftest import Compose, compose_raw

from cvdd.composition.config_directory import config_directory
from cvdd.composition.fields import model_at
from cvdd.composition.sweep import with_points
from cvdd.composition.validation import check
from cvdd.schema.unread import READ_WHERE
from cvdd.support.config_base import ConfigError


def told(directory: Path, *overrides: str) -> list[str]:
    """What a configuration is refused for."""
    with pytest.raises(ConfigError) as caught:
        check(compose_raw(directory, "evaluate", *overrides))
    return str(caught.value).splitlines()


# --- parts of batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [33, 63, 64, 1000])
def test_no_part_of_a_members_batch_is_a_single_image(number: int, tmp_path: Path) -> None:
    (line,) = told(tmp_path, f"recipe.accumulation={number}")
    assert line.startswith(f"recipe.accumulation={number} would cut recipe.batch_size=64 into 63 parts, some of one")
    assert line.endswith("; set recipe.accumulation to one of 1, 2, 3, 4, 7, 8, 9, 16, 21, 32")


def test_a_members_batch_is_not_cut_into_more_parts_than_asked_for(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "recipe.accumulation=5")
    assert line.startswith("recipe.accumulation=5 would cut recipe.batch_size=64 into 6 parts; set")


@pytest.mark.parametrize("number", [6, 9, 10, 1000])
def test_no_part_of_a_students_batch_is_a_single_image(number: int, tmp_path: Path) -> None:
    (line,) = told(tmp_path, f"protocol.accumulation={number}")
    assert line.startswith(f"protocol.accumulation={number} would cut label.batch_size=10 into 9 parts, some of one")
    assert line.endswith("; set protocol.accumulation to one of 1, 2, 3, 5")


@pytest.mark.parametrize("number", [1, 3, 32])
def test_other_numbers_of_parts_are_possible(number: int, tmp_path: Path) -> None:
    config = check(compose_raw(tmp_path, "evaluate", f"recipe.accumulation={number}"))
    assert config.recipe.accumulation == number


# --- settings that nothing would read ---------------------------------------------------------------------------------


def test_nesterov_needs_a_momentum(tmp_path: Path) -> None:
    sgd = ("recipe.optimizer=sgd", "recipe.nesterov=true")
    (line,) = told(tmp_path, *sgd, "recipe.momentum=0")
    assert line.startswith("recipe.nesterov=true looks ahead along recipe.momentum, which is 0; set recipe.momentum")
    check(compose_raw(tmp_path, "evaluate", *sgd, "recipe.momentum=0.5"))


@pytest.mark.parametrize("method", ["random_real", "rded", "patches"])
def test_images_as_they_are_are_not_optimised_under_their_name(method: str, tmp_path: Path) -> None:
    typed = (f"method={method}", "method.iterations=7")
    (line,) = told(tmp_path, *typed)
    assert line.startswith(f"method.name={method} is that of images as they are")
    check(compose_raw(tmp_path, "evaluate", *typed, "method.name=mine"))


OWN = "method=mtt_tiny label=hard protocol=method"
"""A method that trains students in a way of its own."""

UNREAD = (
    ("recipe.optimizer=adam", "recipe.momentum=0.5"),
    ("recipe.optimizer=adamw", "recipe.nesterov=true"),
    ("recipe.schedule=onecycle", "recipe.cosine_period=3"),
    ("recipe.schedule=constant", "recipe.cosine_period=3"),
    ("recipe.crop=none", "recipe.pad=2"),
    ("recipe.crop=resized", "recipe.pad=2"),
    ("recipe.crop=pad", "recipe.crop_scale=[0.5,1.0]"),
    ("protocol.loss=mse", "protocol.temperature=4"),
    ("protocol.loss=gift", "protocol.temperature=4"),
    ("protocol=hard label=hard protocol.loss=cross_entropy", "protocol.temperature=4"),
    ("protocol.loss=mse", "protocol.temperature_squared=true"),
    ("protocol.loss=mse", "protocol.temperature_factor=0.7"),
    ("protocol.accumulation=1 protocol.loss=mse", "protocol.student_temperature=calibrated"),
    ("protocol.loss=kl", "protocol.hard_label_weight=0.1"),
    ("protocol.optimizer=sgd", "protocol.betas=[0.8,0.9]"),
    ("protocol.optimizer=adamw", "protocol.momentum=0.8"),
    ("protocol.schedule=multistep", "protocol.eta=2"),
    (f"{OWN} protocol.student=method", "protocol.optimizer=sgd"),
    (f"{OWN} protocol.student=method", "protocol.weight_decay=0"),
    (f"{OWN} protocol.student=method", "protocol.decay=all"),
    (f"{OWN} protocol.student=method", "protocol.schedule=linear"),
    (f"{OWN} protocol.student=method", "protocol.eta=2"),
    (f"{OWN} protocol.student=method", "protocol.warmup=2"),
    (f"{OWN} protocol.student=method", "protocol.ema=0.9"),
    (f"{OWN} protocol.student=method", "protocol.accumulation=1"),
    (f"{OWN} protocol.student=method", "protocol.part_weights=by_size"),
    (f"{OWN} protocol.student=method", "protocol.hard_share=0.5"),
    (f"{OWN} protocol.student=method", "protocol.repeat_labels=true"),
    (f"{OWN} protocol.student=method", "protocol.label_smoothing=0.1"),
    (f"{OWN} protocol.student=method", "protocol.betas=[0.8,0.9]"),
    ("label.bn_mode=running", "label.halves=false"),
    ("label.bn_mode=running", "label.dropout=true"),
    ("label.mix=none", "label.mix_alpha=0.5"),
)
"""What leaves a field unread, the switch last, and a value of that field."""


@pytest.mark.parametrize(("switch", "field"), UNREAD)
def test_a_setting_that_nothing_would_read_is_refused(switch: str, field: str, tmp_path: Path) -> None:
    words = switch.split()
    (line,) = told(tmp_path, *words, field)
    key = field.partition("=")[0]
    assert line.startswith(f"{key}=")
    assert f", and {words[-1]}; set {key}=" in line
    # Both ways out that it names are ways out, unless the labels need that switch.
    default, other = line.rpartition("; set ")[2].split(", or ")
    check(compose_raw(tmp_path, "evaluate", *words, default))
    if "label=hard" not in words:
        check(compose_raw(tmp_path, "evaluate", *words[:-1], other, field))


def test_every_field_of_the_table_is_tried_and_exists() -> None:
    assert {field.partition("=")[0] for _, field in UNREAD} == set(READ_WHERE)
    for key, switches in READ_WHERE.items():
        section, _, name = key.partition(".")
        model = model_at([section])
        assert model is not None
        assert not model.model_fields[name].is_required()
        for switch, values in switches.items():
            choices = get_args(model.model_fields[switch].annotation)
            assert set(values) < set(choices)


def test_decay_of_nothing_is_refused(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "protocol.weight_decay=0", "protocol.decay=all")
    assert line == "protocol.decay=all is of protocol.weight_decay, which is 0; set protocol.decay=matrices"


def test_hard_labels_have_no_halves(compose: Compose) -> None:
    assert not compose("evaluate", "label=hard", "protocol=hard").label.halves


def test_the_sweep_of_batch_statistics_goes_with_whole_batches(compose: Compose) -> None:
    with_points(["sweep=batch_specific_labels"], config_directory())
    for point in ("distilled_running", "random_real_running"):
        rows = compose("evaluate", "sweep=batch_specific_labels", "label.halves=false", f"+point='{point}'").compare
        assert rows[point]["label.halves"] is True
