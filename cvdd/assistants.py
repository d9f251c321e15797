"""Further processes on the same machine that make parts of a comparison, members or teachers meanwhile.

Students of small sets cannot use more than one core, but there are many of them; nor does a network of many small
layers fill a GPU. An assistant walks through the same members, priors, rows and seeds from another place; the store's
locks see to it that nothing is made twice, and the main process finds what is there already. Nothing depends on how
many assistants there are, or on what becomes of them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from cvdd.schema import SILENT, RunConfig, with_overrides

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 10.0

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
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        written = Path(folder) / "config.json"
        written.write_text(with_overrides(config, SILENT).model_dump_json())
        for index in range(1, count + 1):
            journal = running.enter_context((config.paths.output / f"assistant{index}.log").open("w"))
            command = [sys.executable, "-m", "cvdd.assistants", str(written), str(index), str(count + 1)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=journal, stderr=subprocess.STDOUT)
            running.callback(_stop, process)
        yield


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Whatever it was in the middle of is kept in the store and goes on from there.
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
    from cvdd.chain.members import make_member
    from cvdd.chain.own_engines import own_engine
    from cvdd.chain.priors import find_priors, measure_prior, priors_needed
    from cvdd.context import Context
    from cvdd.runtime import prepare_process

    context = Context(config, Store(config.paths.store), prepare_process(config))
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
    priors = find_priors(context)
    rows = list(rows_of(context))
    seeds = sorted({seed for _, row in rows for seed in row.config.protocol.seeds})
    for (row, row_context), seed in own_way(list(itertools.product(rows, seeds)), index, total):
        if seed not in row_context.config.protocol.seeds:
            continue
        made = make_sets(row_context, row, priors, [seed])[seed]
        for name, backbone in config.students.items():
            student_of(made, name, backbone, seed)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _main(arguments: Sequence[str]) -> None:
    written, index, total = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    assist(RunConfig.model_validate_json(written.read_text()), index, total)


if __name__ == "__main__":
    _main(sys.argv[1:])
