"""Rows of a comparison that are written as one types them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import compose_raw
from helpers import tiny_context
from omegaconf import DictConfig, OmegaConf
from test_cli import run_script

from cvdd.chain.compare import rows_of
from cvdd.chain.priors import shares_priors
from cvdd.composition.arguments import typed_overrides
from cvdd.composition.rows import differences
from cvdd.composition.validation import check
from cvdd.schema import with_overrides
from cvdd.support.config_base import ConfigError


def row_of(directory: Path, row: Sequence[str], *overrides: str) -> DictConfig:
    quoted = ",".join(f"'{override}'" for override in row)
    return compose_raw(directory, "evaluate", "compare=none", f"+compare.row=[{quoted}]", *overrides)


def test_a_row_is_what_the_command_would_be_with_it(tmp_path: Path) -> None:
    row = ("method=sre2l", "label=running", "method.iterations=7")
    config = check(row_of(tmp_path, row, "method.lr=0.5", "seed=3"))
    typed = check(compose_raw(tmp_path, "evaluate", "compare=none", "method.lr=0.5", "seed=3", *row))
    made = with_overrides(config, {**config.compare["row"], "compare": {}})
    assert made == typed
    assert (made.method.name, made.method.voters, made.method.lr) == ("sre2l", ["resnet18"], 0.5)
    # Only what differs is there: the seed is that of the command.
    assert "seed" not in config.compare["row"]


def test_a_row_may_choose_another_committee(tmp_path: Path) -> None:
    config = check(row_of(tmp_path, ["committee=tiny_resnet18"]))
    made = with_overrides(config, {**config.compare["row"], "compare": {}})
    assert list(made.committee.members) == ["resnet18"]


def test_a_row_may_choose_a_numbered_file(tmp_path: Path) -> None:
    config = check(row_of(tmp_path, ["ipc=50", "temperature=1"]))
    made = with_overrides(config, {**config.compare["row"], "compare": {}})
    assert (made.ipc.images_per_class, made.temperature.vote) == (50, 1.0)
    with pytest.raises(ConfigError, match=r"compare\.row=\[ipc=7\]: ipc=7: there is no preset 7; choose"):
        row_of(tmp_path, ["ipc=7"])


SHARED = {
    "students": "students=tiny_all",
    "students.mine": "+backbone@students.mine=timm",
    "trainer.threads": "trainer.threads=3",
    "trainer": "trainer=cpu",
    "paths.store": "paths.store=elsewhere",
    "logger": "logger=wandb",
    "cost": "cost=true",
    "hydra.job.name": "hydra.job.name=x",
    "protocol.full_data": "protocol.full_data=true",
}


@pytest.mark.parametrize(("key", "typed"), SHARED.items())
def test_what_all_rows_share_is_no_matter_of_one(tmp_path: Path, key: str, typed: str) -> None:
    """It would be ignored."""
    with pytest.raises(ConfigError, match=rf"compare\.row=.*: \S*{re.escape(key)}.* is the same for all rows; set it"):
        row_of(tmp_path, [typed])


@pytest.mark.parametrize("key", ["verb", "paths.store", "students.x", "protocol.full_data", "compare"])
def test_nor_is_it_in_a_row_of_fields(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compare\.row: {re.escape(key)} is the same for all rows"):
        check(compose_raw(tmp_path, "evaluate", "compare=none", f"+compare.row={{{key}: x}}"))


def test_a_protocol_of_its_own_does_not_ask_for_another_row_of_all_data(tmp_path: Path) -> None:
    config = check(row_of(tmp_path, ["protocol=paper"], "protocol.full_data=true"))
    assert config.compare["row"]
    assert "protocol.full_data" not in config.compare["row"]


@pytest.mark.parametrize("value", ["fadrm", "fadrmm"])
def test_a_file_is_chosen_in_a_row_that_is_a_list(tmp_path: Path, value: str) -> None:
    wanted = rf"""^compare\.mine: method={value} chooses a file, .*: "\+compare\.mine=\['method={value}'\]"$"""
    with pytest.raises(ConfigError, match=wanted):
        check(compose_raw(tmp_path, "evaluate", f"+compare.mine={{method: {value}}}"))


def test_a_field_of_a_section_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.mtt\.steps=5: method\.mtt is null here; write the row as a list"):
        check(compose_raw(tmp_path, "evaluate", "compare=none", "+compare.row={method.mtt.steps: 5}"))


def test_smoke_is_for_a_moment_whatever_rows_say(tmp_path: Path) -> None:
    typed = ("experiment=compare", "debug=smoke", "+compare.row={method.iterations: 9}")
    config = check(compose_raw(tmp_path, "evaluate", *typed))
    rows = {name: with_overrides(config, {**row, "compare": {}}) for name, row in config.compare.items()}
    assert len(rows) > 20
    assert {row.method.iterations for row in rows.values()} == {0, 8}
    assert {row.protocol.epochs for row in rows.values()} == {1}
    assert config.compare["row"] == {"method.iterations": 8}


@pytest.mark.parametrize(
    ("row", "typed", "told"),
    [
        ("['protocol.epochs=3']", (), "protocol.epochs=3 becomes 1 in compare.row"),
        ("{protocol.epochs: 3}", (), "protocol.epochs=3 becomes 1 in compare.row"),
        ("['label.epochs=5','protocol.epochs=3']", ("protocol.epochs=3",), "label.epochs=5 becomes 3 in compare.row"),
        ("['protocol.epochs=3']", ("protocol.epochs=3",), None),
        # Of a file: a moment is what was asked for.
        ("['protocol=paper']", (), None),
    ],
)
def test_what_smoke_cuts_is_told(
    row: str, typed: tuple[str, ...], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = check(compose_raw(tmp_path, "evaluate", "compare=none", "debug=smoke", f"+compare.row={row}", *typed))
    made = with_overrides(config, {**config.compare["row"], "compare": {}})
    assert made.label.epochs == made.protocol.epochs == config.protocol.epochs
    if told is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert f": {told}. A row may have as much as the command itself: type such a number beside" in message


@pytest.mark.parametrize(
    ("row", "typed", "told"),
    [
        (["method=cvdd"], ["method.iterations=0"], True),
        # Whoever writes it means it, and so do methods that never optimise and rows of the command's own method.
        (["method=cvdd", "method.iterations=0"], ["method.iterations=0"], False),
        (["method=random_real"], ["method.iterations=0"], False),
        (["method.lr=0.5"], ["method.iterations=0"], False),
        (["method=cvdd"], ["method=random_real"], False),
    ],
)
def test_a_row_whose_method_makes_nothing_because_of_what_was_typed_is_told(
    row: list[str], typed: list[str], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = row_of(tmp_path, row, *typed)
    alone = compose_raw(tmp_path, "evaluate", "method=cvdd").method.iterations
    said = [message for message in caplog.messages if "begins with" in message]
    assert len(said) == told
    if told:
        assert config.compare.row.get("method.iterations") is None
        assert f"write [method=cvdd,method.iterations={alone}]" in said[0]
        repeated = check(row_of(tmp_path, [*row, f"method.iterations={alone}"], *typed))
        assert repeated.compare["row"]["method.iterations"] == alone


def test_a_row_that_is_the_commands_own_is_shown_once(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "method=random_real", "method.iterations=0", "compare=random_real")
    assert list(context.config.compare) == ["random_real"]
    assert [name for name, _ in rows_of(context)] == ["random_real"]


@pytest.mark.parametrize("method", ["random_real", "rded", "full"])
def test_smoke_begins_no_work_that_a_method_does_not_have(method: str, tmp_path: Path) -> None:
    config = check(compose_raw(tmp_path, "evaluate", f"method={method}", "debug=smoke", "patches=whole"))
    assert (config.method.iterations, config.protocol.epochs) == (0, 1)
    assert check(compose_raw(tmp_path, "evaluate", "method=cvdd", "debug=smoke")).method.iterations == 8
    with pytest.raises(ConfigError, match=r"method\.iterations=0"):
        check(compose_raw(tmp_path, "evaluate", f"method={method}", "debug=smoke", "method.iterations=3"))


def test_what_is_typed_beside_smoke_holds_for_all_rows(tmp_path: Path) -> None:
    typed = ("experiment=compare", "debug=smoke", "protocol.epochs=3", "prior.iterations=8")
    config = check(compose_raw(tmp_path, "evaluate", *typed))
    rows = [with_overrides(config, {**row, "compare": {}}) for row in config.compare.values()]
    assert {row.protocol.epochs for row in rows} == {config.protocol.epochs} == {3}
    assert all(shares_priors(config, row) for row in rows)


@pytest.mark.parametrize("value", ["abc", "null"])
def test_a_wrong_value_in_a_row_is_answered_with_smoke_too(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^compare\.row: protocol\.warmup="):
        check(compose_raw(tmp_path, "evaluate", "debug=smoke", f"+compare.row={{protocol.warmup: {value}}}"))


def test_rows_of_fields_are_left_alone(tmp_path: Path) -> None:
    config = check(compose_raw(tmp_path, "evaluate", "compare=random_real"))
    assert config.compare["random_real"]["method.init"] == "real"


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ("method=cvdd_tniy", "method=cvdd_tniy: choose apm, .*, tesla; did you mean cvdd_tiny?"),
        ("method.lrr=1", "method.lrr: there is no such field or group; did you mean method.lr?"),
        ("+foo=1", "foo: there is no such field"),
        ("method.apm.ce=2", "method.apm.ce: there is none in this row; choose method=NAME that has it"),
        (
            "prior.values.resnet18=5",
            "prior.values.resnet18: there is none in this row; write +prior.values.resnet18=VALUE",
        ),
        ("lable=tiny", "lable: there is no such field or group; did you mean label?"),
        ("committee.members={}", "committee.members={}: what braces hold is added to what is there"),
        ("prior=null", "prior=null: choose .*"),
    ],
)
def test_a_row_that_cannot_be_composed_is_answered(tmp_path: Path, row: str, advice: str) -> None:
    wanted = re.escape(f"compare.row=[{row}]: {advice}").replace(r"\.\*", ".*")
    with pytest.raises(ConfigError, match=wanted):
        row_of(tmp_path, [row])


def test_a_row_without_brackets_is_answered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.row=method=sre2l: .*write \[method=sre2l\]"):
        compose_raw(tmp_path, "evaluate", "compare=none", "+compare.row='method=sre2l'")


def test_differences_name_leaves_unless_the_keys_differ() -> None:
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {"g": 4}}
    other = {"a": 1, "b": {"c": 5, "d": {"e": 3}}, "f": {"h": 4}}
    assert differences(base, other) == {"b.c": 5, "f": {"h": 4}}
    assert differences(base, base) == {}


@pytest.mark.parametrize("typed", ["+compare.full_data={seed: 1}", "method.name=full_data"])
def test_the_name_of_the_row_of_all_data_is_taken(tmp_path: Path, typed: str) -> None:
    with pytest.raises(
        ConfigError, match=r"full_data: this is the name of the row of protocol\.full_data=true; choose"
    ):
        check(compose_raw(tmp_path, "evaluate", "compare=none", typed))


def test_what_was_typed_keeps_its_interpolations(tmp_path: Path) -> None:
    """A row is composed from what was typed, which may refer to a whole section."""
    tree = OmegaConf.create({"a": {"b": 1}, "task": ["x=${a}", "y=${a.b}"]})
    assert typed_overrides(tree.task) == ["x=${a}", "y=${a.b}"]
    assert typed_overrides(["z=1"]) == ["z=1"]
    other = "+committee.members.other={backbone:${committee.members.resnet18.backbone}}"
    # Numbers are looked at after rows are composed.
    done = run_script("evaluate", other, "+compare.row=['method=sre2l']", "recipe.epochs=0", directory=tmp_path)
    assert "recipe.epochs=0: must be greater than 0" in done.stdout
    assert "compare.row" not in done.stdout
