"""Artefacts of a machine of another kind are used as they are, unless something else is typed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import label_config, method_config

import cvdd.chain.labels
import cvdd.computing.automatic
import cvdd.computing.passes
from cvdd.backbones import BackboneConfig
from cvdd.chain.compare import compare
from cvdd.chain.context import Context
from cvdd.computing.passes import Passes, label_passes_elsewhere, passes_of_labels
from cvdd.cost.plan import plan_pieces, planning
from cvdd.schema import EngineConfig
from cvdd.synthesis.engine import Work, choose_engine, engines_elsewhere

pytest_plugins = ["chain_fixtures"]

CONVNET = BackboneConfig(
    name="net", target="cvdd.backbones.convnet.convnet", arguments={"depth": 1, "width": 4, "norm": "batch"}
)


class OnAGpu(Passes):
    """How a GPU labels where much is to be labelled, as far as a manifest tells."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"compiled": True}


def test_what_another_kind_of_machine_made_is_used(
    again: Callable[..., Context], sealed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    here = again("images", "labels", "students")
    # As a GPU votes by itself.
    there = here.differing({"engine.precision": "bf16"}, "")
    with monkeypatch.context() as patched:
        patched.setattr(cvdd.chain.labels, "passes_of_labels", lambda *arguments: OnAGpu())
        theirs = compare(there)[1][0]
    assert sealed == ["images", "labels", "students"]
    sealed.clear()
    own = compare(here)[1][0]
    assert sealed == []
    assert own.values() == theirs.values()
    told = [message for message in caplog.messages if "made on another kind of machine" in message]
    assert [message.partition("/")[0] for message in told] == ["images", "labels"]
    assert told[0].endswith("engine.compile=false engine.precision=fp32")
    assert told[1].endswith("engine.compile_labels=false")
    # Nothing of it is left to be made, as a plan sees it too.
    assert all(piece.made for piece in plan_pieces(planning(here.config, here.device)))
    typed = here.differing({"engine.precision": "fp32", "engine.compile": False, "engine.compile_labels": False}, "")
    compare(typed)
    assert sealed == ["images", "labels", "students"]
    # From now on this machine's own are there, and come first.
    sealed.clear()
    assert compare(here)[1][0].images != theirs.images
    assert sealed == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", [{}, {"precision": "bf16"}, {"compile": False}, {"units_per_pass": 3}])
def test_all_that_a_machine_may_decide_is_known(
    kind: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config, device = EngineConfig(**wanted), torch.device(kind)
    for compiler, passes in itertools.product((True, False), (1000, 100_000_000)):
        for module in (cvdd.computing.automatic, cvdd.computing.passes):
            monkeypatch.setattr(module, "has_compiler", lambda device, found=compiler: found)
        for changes in ({}, {"statistics_of": "stack"}):
            method, work = method_config(**changes), Work((CONVNET,), passes, 10, 30, 32, 10)
            chosen = choose_engine(config, method, work, device)
            assert chosen.identity in [one.identity for one in engines_elsewhere(config, method, work)]
        for bn_mode in ("batch", "running"):
            chosen_passes = passes_of_labels(config, label_config(bn_mode=bn_mode), [CONVNET], passes, 10, 32, device)
            assert chosen_passes.identity in [one.identity for one in label_passes_elsewhere(config)]


def test_what_is_typed_is_left_to_no_machine() -> None:
    typed = EngineConfig(precision="fp32", compile=False, compile_labels=False)
    work = Work((CONVNET,), 1000, 10, 30, 32, 10)
    assert [one.identity for one in engines_elsewhere(typed, method_config(), work)] == [{}, {}]
    assert label_passes_elsewhere(typed) == []
