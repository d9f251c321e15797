"""The command line: arguments, help, completion, exit codes."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Compose
from hydra.core.global_hydra import GlobalHydra

from cvdd import cli
from cvdd.composition.arguments import ArgumentError, prepare, preset_numbers
from cvdd.composition.config_directory import config_directory
from cvdd.composition.fields import fields
from cvdd.composition.help import EXAMPLES, help_part
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import INTERRUPTED, USER_ERROR, PointFailed, told

ROOT = Path(__file__).parents[1]
CONF = config_directory()
VERBS = ("train", "distill", "relabel", "evaluate")


def run_script(verb: str, *arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{verb}.py"), *arguments]
    surroundings = {**os.environ, **environment}
    return subprocess.run(command, cwd=directory, env=surroundings, capture_output=True, text=True, timeout=120)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ipc=10", "ipc='10'"),
        ("ipc=1,10,50", "ipc='1','10','50'"),
        ("ipc='10'", "ipc='10'"),
        ("temperature=0.5", "temperature='0.5'"),
        ("temperature=5.0", "temperature='5'"),
        ("temperature=1e1", "temperature='10'"),
        ("ipc.images_per_class=7", "ipc.images_per_class=7"),
        ("temperature.vote=2.5", "temperature.vote=2.5"),
        ("dataset=cifar10", "dataset=cifar10"),
        ("dataset=cifar10,cifar100", "dataset=cifar10,cifar100"),
        ("ipc=mine", "ipc=mine"),
        ("seed=10", "seed=10"),
        ("label.teachers=null", "label.teachers=null"),
        ("dataset.root=null", "dataset.root=null"),
        ("--multirun", "--multirun"),
    ],
)
def test_numbers_become_names_of_files(typed: str, meant: str) -> None:
    assert prepare([typed], CONF) == [meant]


def said_to(typed: str) -> str:
    """The answer to an argument that is refused."""
    with pytest.raises(ArgumentError) as caught:
        prepare([typed], CONF)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("ipc=7", "ipc=7: there is no preset 7; choose 1, 10 or 50, or set ipc.images_per_class=7"),
        ("ipc=1,7,9", "ipc=1,7,9: there is no preset 7, 9; choose 1, 10 or 50, or set ipc.images_per_class=1,7,9"),
        ("ipc=2.5", "set ipc.images_per_class to a whole number of at least 1"),
        ("ipc=0", "set ipc.images_per_class to a whole number of at least 1"),
        ("temperature=3", "there is no preset 3; choose 0.5, 1, 2, 5 or 10, or set temperature.vote=3"),
        ("temperature=-1", "set temperature.vote to a number greater than 0"),
        ("ipc=null", "ipc=null: choose 1, 10 or 50"),
    ],
)
def test_numbers_without_a_file_are_answered(typed: str, answer: str) -> None:
    assert said_to(typed).endswith(answer)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("ipcc=50", "ipcc=50: there is no such field or group; did you mean ipc?"),
        ("comittee.size=3", "comittee.size=3: there is no such field or group; did you mean committee.size?"),
        ("method.lrr=0.1", "method.lrr=0.1: there is no such field or group; did you mean method.lr?"),
        ("students.mine.argument.width=8", "no such field or group; did you mean students.NAME.arguments?"),
        ("protocol=papper", "did you mean paper?"),
        ("method=sre2l,cdaa", "did you mean cda?"),
        ("nothing=1", "nothing=1: there is no such field or group; see --help"),
    ],
)
def test_what_is_not_there_is_answered(typed: str, answer: str) -> None:
    assert said_to(typed).endswith(answer)


@pytest.mark.parametrize(
    "typed",
    [
        "method=sre2l,cda",
        "students.mine.arguments.width=8",
        "committee.members.x.backbone.arguments={width: 8}",
        "method.mtt=null",
        "prior.values={resnet18: 40}",
        "seed=0,1",
        "dataset.classes=[a,b]",
        "hydra.sweep.dir=x",
        "+foo=1",
        "~compare.one_member",
        "hydra/launcher=local",
        "sweep=voter",
        "compare.row={method.lr: 1}",
        "--cfg=job",
        "debug=null,smoke",
        "prior.values={}",
        "students.mine.arguments={}",
        "compare={}",
    ],
)
def test_what_is_there_or_new_is_left_to_hydra(typed: str) -> None:
    assert prepare([typed], CONF) == [typed]


@pytest.mark.parametrize("value", ["", "''", '""', "' '"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_directory_without_a_name_is_refused(key: str, value: str) -> None:
    """It would be the current one, and every run would write over the last."""
    with pytest.raises(ArgumentError, match=f"{key}=: names no directory; type {key}=DIR"):
        prepare(["seed=1", f"{key}={value}"], CONF)


def test_files_of_ones_own_are_not_hidden_by_ours(tmp_path: Path) -> None:
    """Hydra would take ours, without a word."""
    (tmp_path / "protocol").mkdir()
    (tmp_path / "protocol" / "mine.yaml").touch()
    arguments = ["--config-dir", str(tmp_path), "protocol=mine"]
    assert prepare(arguments, CONF) == arguments
    (tmp_path / "protocol" / "tiny.yaml").touch()
    with pytest.raises(
        ArgumentError, match=r"protocol.tiny\.yaml: there is a protocol.tiny\.yaml already, which would"
    ):
        prepare(arguments, CONF)
    with pytest.raises(ArgumentError, match=r"already"):
        prepare([f"--config-dir={tmp_path}"], CONF)
    # Ours is no other, however it is written.
    assert prepare(["--config-dir", os.path.relpath(CONF)], CONF) == ["--config-dir", os.path.relpath(CONF)]
    assert prepare(["--config-dir"], CONF) == ["--config-dir"]


def test_a_folder_of_ones_own_may_have_other_choices(tmp_path: Path) -> None:
    for name in ("ipc/7", "method/mine", "extra/some"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").touch()
    folder = ["--config-dir", str(tmp_path)]
    assert prepare(["ipc=7", *folder], CONF) == [*folder, "ipc='7'"]
    assert prepare([*folder, "method=mine", "+extra=some"], CONF) == [*folder, "method=mine", "+extra=some"]
    for typed, answer in {
        "ipc=8": "there is no preset 8; choose 1, 7, 10 or 50",
        "method=minne": "did you mean mine?",
        "dataset=cifar": "did you mean cifar10?",
        "extr=some": "did you mean extra?",
    }.items():
        with pytest.raises(ArgumentError, match=re.escape(answer)):
            prepare([*folder, typed], CONF)
    with pytest.raises(ArgumentError, match=r"^--config-dir .*nowhere: there is no such directory$"):
        prepare(["--config-dir", str(tmp_path / "nowhere")], CONF)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["seed=0,1", "-m"], ["-m", "seed=0,1"]),
        (["ipc=1", "--multirun", "seed=0,1"], ["--multirun", "ipc='1'", "seed=0,1"]),
        (["seed=1", "-c", "job", "ipc=1", "--resolve"], ["-c", "job", "--resolve", "seed=1", "ipc='1'"]),
        (["seed=1", "--pack", "_group_", "ipc=1"], ["--pack", "_group_", "seed=1", "ipc='1'"]),
        (["seed=1", "--cfg=job", "ipc=1"], ["--cfg=job", "seed=1", "ipc='1'"]),
        (["seed=1", "--info", "ipc=1"], ["--info=all", "seed=1", "ipc='1'"]),
        (["seed=1", "-i", "defaults", "ipc=1"], ["--info=defaults", "seed=1", "ipc='1'"]),
    ],
)
def test_options_may_follow_overrides(typed: list[str], meant: list[str]) -> None:
    """Hydra's parser knows no override after an option that follows others."""
    assert prepare(typed, CONF) == meant


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("students={}", "; choose students=NAME, or leave out what you do not want: ~students.NAME"),
        (
            "committee.members={ }",
            "; choose committee=NAME, or leave out what you do not want: ~committee.members.NAME",
        ),
        ("protocol={}", "hold nothing; choose protocol=NAME"),
        ("students=null", "small_paper, tiny, tiny_all or tiny_convnet3_instance"),
        ("compare=null", "compare=null: choose compare=NAME; ~compare leaves the group out"),
        ("verb=relabel", "each verb is a command of its own; type python relabel.py instead"),
        ("++verb=make", "type python train.py, python distill.py, python relabel.py or python evaluate.py instead"),
        ("smoke", "smoke: write KEY=VALUE, +KEY=VALUE for what is not there yet, or ~KEY to leave it out"),
        ("dataset.root=/a/b=1,2", "cannot read this value; type \"dataset.root='/a/b=1,2'\""),
        ("dataset.root=~/x", "~ means something else to Hydra; type dataset.root=$HOME/x"),
        ("+compare.foo=[method=nope, label.mix=mixup]", "type \"+compare.foo=['method=nope','label.mix=mixup']\""),
        ("+compare.a=[method.betas=[0,1],x]", "type \"+compare.a=['method.betas=[0,1]',x]\""),
        ("+compare.foo={method.lr=1}", 'type "+compare.foo={method.lr: 1}"'),
        ("prior.values={a: 1", "see whether brackets and quotes are closed"),
    ],
)
def test_what_hydra_does_not_read_or_takes_without_a_word_is_answered(typed: str, answer: str) -> None:
    said = said_to(typed)
    assert said.startswith(typed)
    assert said.endswith(answer)


def test_presets_are_listed_by_their_value() -> None:
    assert preset_numbers([CONF], "temperature") == ["0.5", "1", "2", "5", "10"]


# --- how a job ends ---------------------------------------------------------------------------------------------------


def test_an_error_for_users_is_a_message_and_an_exit_code(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop, told(sweeping=False):
        raise ConfigError("seed=x: must be a whole number")
    assert stop.value.code == USER_ERROR
    assert caplog.messages == ["seed=x: must be a whole number"]


def test_a_failing_point_is_told_at_once_and_fails_the_sweep(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PointFailed, match="seed=x"), told(sweeping=True):
        raise ConfigError("seed=x: must be a whole number")
    assert caplog.messages == ["seed=x: must be a whole number"]


@pytest.mark.parametrize("sweeping", [False, True])
def test_a_defect_is_never_hidden(sweeping: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError), told(sweeping):
        _ = 1 / 0
    assert bool(caplog.records) is sweeping
    assert all(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_says_that_work_is_kept(stop: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as left, told(sweeping=False):
        raise stop
    assert left.value.code == INTERRUPTED
    assert "kept" in caplog.text


def test_a_clean_exit_stays_one() -> None:
    with pytest.raises(SystemExit) as stop, told(sweeping=False):
        sys.exit(0)
    assert stop.value.code == 0


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_five_and_start_as_the_command_was_started(verb: str) -> None:
    assert len(EXAMPLES[verb]) == 5
    assert help_part("examples", verb, f"/somewhere/{verb}.py").count(f"python {verb}.py") == 5
    assert help_part("examples", verb, f"/somewhere/cvdd-{verb}").count(f"cvdd-{verb}") == 5


@pytest.mark.parametrize("arguments", sorted({text for verb in VERBS for text, _ in EXAMPLES[verb]}))
def test_examples_in_the_help_compose(arguments: str, compose: Compose) -> None:
    given = [part for part in arguments.split() if not part.startswith("--")]
    compose("evaluate", *(part.partition(",")[0] for part in given))


def test_help_is_not_wider_than_the_page() -> None:
    for part in ("introduction", "fields"):
        assert max(map(len, help_part(part, "evaluate", "evaluate.py").splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_script(verb: str, tmp_path: Path) -> None:
    done = run_script(verb, "--help", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in (
        f"python {verb}.py",
        "dataset: cifar10, cifar100",
        "of published numbers (",
        *(field.key for field in fields()),
    ):
        assert expected in done.stdout
    assert "cvdd_table1_cifar10_ipc10_r18" not in done.stdout


def test_help_and_checks_need_no_pytorch() -> None:
    code = "import sys, cvdd.cli, cvdd.composition.help, cvdd.composition.validation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- configuration and completion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_script_shows_its_resolved_configuration(verb: str, tmp_path: Path) -> None:
    done = run_script(verb, "--cfg", "job", "--resolve", "ipc=1", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"verb: {verb}" in done.stdout
    assert "images_per_class: 1\n" in done.stdout
    assert f"output: {tmp_path}/outputs/{verb}/" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_console_commands_do_the_same_in_process(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"cvdd-{verb}", "--help"])
    with pytest.raises(SystemExit) as stop:
        getattr(cli, verb)()
    GlobalHydra.instance().clear()
    assert stop.value.code == 0
    assert f"cvdd-{verb} " in capsys.readouterr().out


def test_a_wrong_argument_ends_before_hydra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cvdd-train", "ipc=7"])
    with pytest.raises(SystemExit) as stop:
        cli.train()
    assert stop.value.code == USER_ERROR
    assert "ipc.images_per_class=7" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_script_completes(verb: str, tmp_path: Path) -> None:
    line = f"python {verb}.py dataset=cif"
    done = run_script(verb, "-sc", "query=bash", directory=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout.split() == ["dataset=cifar10", "dataset=cifar100"], done.stderr


def test_completion_works_in_a_shell(tmp_path: Path) -> None:
    script = f"""
        cp {ROOT}/evaluate.py .
        eval "$(python evaluate.py -sc install=bash)"
        COMP_LINE="python evaluate.py ipc="; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD=2
        hydra_bash_completion; echo "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.stdout.split() == ["ipc=1", "ipc=10", "ipc=50"], done.stdout + done.stderr


# --- wrong input, as a user sees it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["ipc=7"], USER_ERROR, ["choose 1, 10 or 50", "ipc.images_per_class=7"]),
        (["committee.size=9"], USER_ERROR, ["committee.size=9", "choose 1 to 5"]),
        (["dataset=mnist"], USER_ERROR, ["dataset=mnist: choose cifar10", "digits_photo"]),
        (["method.speed=3"], USER_ERROR, ["method.speed=3: there is no such field", "did you mean method.seed?"]),
        (["hydra.run.dir=/proc/x"], USER_ERROR, ["/proc/x cannot be written (No such", "place with hydra.run.dir=DIR"]),
        (
            ["-m", "hydra.sweep.dir=/dev/null/x"],
            USER_ERROR,
            ["(Not a directory)", "another place with hydra.sweep.dir=DIR"],
        ),
        (["--multirun", "committee.size=8,9"], 1, ["committee.size=8 is", "committee.size=9 is", "choose 1 to 5"]),
    ],
)
def test_wrong_input_ends_with_a_short_message(
    arguments: list[str], code: int, expected: list[str], tmp_path: Path
) -> None:
    done = run_script("evaluate", *arguments, directory=tmp_path)
    told_user = done.stdout + done.stderr
    assert done.returncode == code, told_user
    assert "Traceback" not in told_user
    assert len(told_user.splitlines()) < 25
    for part in expected:
        assert part in told_user
    assert code != USER_ERROR or len(told_user.splitlines()) == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", [f"{ROOT}/evaluate.py --help", "-m cvdd.report experiments"])
def test_output_into_a_closed_pipe_is_no_error(command: str, tmp_path: Path) -> None:
    script = f"{sys.executable} {command} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
