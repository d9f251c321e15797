"""Commands that cannot be composed are answered in a sentence each."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_cli import CONF, run_script

from cvdd.composition.arguments import ArgumentError, prepare
from cvdd.composition.composable import require_composable
from cvdd.composition.sweep import with_points
from cvdd.support.outcome import USER_ERROR


def require(arguments: str) -> None:
    require_composable("evaluate", with_points(prepare(shlex.split(arguments), CONF), CONF), CONF)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("compare.foo=[]", "compare has no foo yet; to add it type +compare.foo=[]"),
        ("prior.values.resnet18=50", "prior.values has no resnet18 yet; to add it type +prior.values.resnet18=50"),
        ("students.tiny_resnet.min_size=8", "students has no tiny_resnet, only tiny_resnet18, or add it: +backbone@"),
        ("committee.members.renset50.bn_scale=2", "densenet121; did you mean resnet50?"),
        (
            "expected.value=33",
            "type it as a whole, expected={source: VALUE, table: VALUE, cell: VALUE, student: VALUE,",
        ),
        ("method.apm.ce=2", "method.apm is null here; choose method=apm or apm_tiny, or leave this out"),
        ("dataset=cifar10 dataset.digits.seed=3", "dataset.digits is null here; choose dataset=digits_photo, or leave"),
        ("seed.x=1", "seed is a single value; type seed=VALUE"),
        ("backbone=resnet18", "nothing is chosen there yet; type +backbone@students.NAME=resnet18"),
        ("~compare.random", "compare has no random, only random_real; did you mean random_real?"),
        ("+seed=3", "+seed=3: seed is there already; leave out the +"),
        ("+method=cda", "+method=cda: method is there already; leave out the +"),
        (
            "\"compare.random_real=['seed=3']\"",
            "random_real is there already, and written in another way; type +compare",
        ),
        ("'method.betas={a: 1}'", "method.betas={a: 1}: must be a list, as in [a,b]"),
        ("hydra/launcher=nope", "hydra/launcher=nope: choose basic, local"),
        ("-m method=cvdd_tiny,apm_tiny method.apm.ce=2", "method.apm is null here"),
        ("label=given --cfg job --resolve", "label.given=null: label=given reads labels that are there; type label"),
        ("label=given label.given=nowhere --cfg job --resolve", "label.given=nowhere holds neither labels of a store"),
    ],
)
def test_what_cannot_be_composed_is_answered(typed: str, answer: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(answer)) as caught:
        require(typed)
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ArgumentError) as caught:
        require("compare.foo=[] method.apm.ce=2 seed=3")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["compare.foo=[]", "method.apm.ce=2"]


@pytest.mark.parametrize(
    "typed",
    [
        "++seed=3",
        "~compare.random_real \"+compare.random_real=['seed=3']\"",
        "-m seed=range(0,4) method=sre2l,cda",
        "-m method=glob(cv*)",
        "sweep=voter",
        "sweep=n_and_temperature --cfg job",
        "-m hydra/launcher=local debug=smoke,null",
        "~experiment",
        "--help nothing.of=this",
        "hydra.searchpath=[pkg://somewhere] compare.foo=[]",
    ],
)
def test_what_composes_or_is_for_hydra_to_judge_goes_on(typed: str) -> None:
    require_composable("evaluate", with_points(shlex.split(typed), CONF), CONF)


OWN = {
    "syntax": (
        "# @package _global_\nprotocol: {epochs: 3\nseed: 3\n",
        "syntax.yaml, line 3: this is no YAML: expected",
    ),
    "list": ("# @package _global_\n- a\n", "experiment/list.yaml holds a list; a file of a group holds KEY: VALUE"),
    "choice": ("# @package _global_\ndefaults: [override /method: cvddd]\n", "method=cvddd: choose apm, "),
    "plain": (
        "protocol: {epochs: 3}\n",
        "experiment: the chosen file of experiment is empty, or its first line is not '#",
    ),
    "empty": ("", "experiment: the chosen file of experiment is empty, or its first line is not '# @package _global_'"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_ones_own_that_is_wrong_is_answered_in_a_line(name: str, tmp_path: Path) -> None:
    text, answer = OWN[name]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_text(text)
    done = run_script("evaluate", "cost=true", "--config-dir", "mine", f"experiment={name}", directory=tmp_path)
    assert done.returncode == USER_ERROR, done.stdout + done.stderr
    (told,) = (done.stdout + done.stderr).splitlines()
    assert answer in told
