"""Further processes on the same machine that make parts of a comparison, members or teachers meanwhile.

Students of small sets cannot use more than one core, but there are many of them; nor does a network of many small
layers fill a GPU. An assistant walks through the same members, priors, rows and seeds from another place; the store's
locks see to it that nothing is made twice, and the main process finds what is there already. Nothing depends on how
many assistants there are, or on what becomes of them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from cvdd.running.children import begin_child, started
from cvdd.schema import SILENT, RunConfig, with_overrides

Item = TypeVar("Item")


@contextlib.contextmanager
def assisted(config: RunConfig) -> Iterator[None]:
    """Run ``trainer.assistants`` further processes while the body runs; they end with it.

    Args:
        config: of a comparison, or of the training of members.
    """
    count = config.trainer.assistants
    if not count:
        yield
        return
    silent = with_overrides(config, SILENT)
    with contextlib.ExitStack() as running:
        for index in range(1, count + 1):
            journal = config.paths.output / f"assistant{index}.log"
            running.enter_context(started("cvdd.chain.assistants", silent, index, count + 1, journal=journal))
        yield


def own_way(items: Sequence[Item], index: int, total: int) -> list[Item]:
    """The same items from another place: every second worker goes backward, towards the one before it.

    Two that go the same way would stay together once they met, one always waiting for what the other makes.

    Args:
        items: all of them.
        index: of the worker; worker 0 begins at the first item.
        total: workers.
    """
    if index % 2 == 0:
        first = index * len(items) // total
        return [*items[first:], *items[:first]]
    last = min(index + 1, total) * len(items) // total
    return [*reversed(items[:last]), *reversed(items[last:])]


def assist(config: RunConfig, index: int, total: int) -> None:
    """Make everything that a comparison needs, or all members where only those are trained, beginning elsewhere.

    Args:
        config: of the comparison, or of the training.
        index: of this assistant; the main process is 0.
        total: assistants and the main process.
    """
    from cvdd.artifact import Store
    from cvdd.chain.compare import make_sets, rows_of, student_of
    from cvdd.chain.context import Context
    from cvdd.chain.members import make_member
    from cvdd.chain.own_engines import own_engine
    from cvdd.chain.priors import Priors, find_priors, measure_prior, priors_needed, priors_of_row
    from cvdd.running.process import prepare_process
    from cvdd.support.hardware import machine_name

    device = prepare_process(config)
    context = Context(config, Store(config.paths.store, machine_name(device)), device)
    if config.verb == "train":
        own = own_engine(config.method)
        if own is not None:
            own.networks(context, own_way(range(own.count(context)), index, total))
            return
        for name in own_way(list(config.committee.members), index, total):
            make_member(context, name)
        return
    if priors_needed(config) and config.prior.source == "measured":
        members = list(config.committee.members)
        for name in own_way(members, index, total):
            make_member(context, name)
        for name in own_way(members, index, total):
            measure_prior(context, name)
    shared = find_priors(context)
    rows = list(rows_of(context))
    priors: dict[str, Priors] = {}
    seeds = sorted({seed for _, row in rows for seed in row.config.protocol.seeds})
    for (row, row_context), seed in own_way(list(itertools.product(rows, seeds)), index, total):
        if seed not in row_context.config.protocol.seeds:
            continue
        if row not in priors:
            priors[row] = priors_of_row(context, row_context, shared)
        made = make_sets(row_context, row, priors[row], [seed])[seed]
        for name, backbone in config.students.items():
            student_of(made, name, backbone, seed)


def _main(arguments: Sequence[str]) -> None:
    # First, so that it ends with its parent even while libraries are being imported, which takes seconds.
    begin_child()
    written, index, total = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    assist(RunConfig.model_validate_json(written.read_text()), index, total)


if __name__ == "__main__":
    _main(sys.argv[1:])
