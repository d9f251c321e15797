"""Reads what an offline run of Weights & Biases would send: its file is a log of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = struct.Struct("<4sHB"), 32768
"""A file begins with the first; records lie in blocks of this size, as in LevelDB's log."""
FRAGMENT = struct.Struct("<IHB")
"""Checksum, length and kind; a record that crosses a block is cut into a first, middle and last fragment."""
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class WandbRun:
    """What a dashboard would show of a run.

    Attributes:
        settings: identifier, name, group, type and project.
        config: the configuration.
        history: the logged rows in order.
        summary: what is true of the whole run.
        files: that were attached, by their paths in the run.
        exit_code: None if the run did not end.
        preempted: whether it was announced that another job goes on with it.
    """

    settings: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None
    preempted: bool = False


def read_run(path: Path) -> WandbRun:
    run = WandbRun()
    for record in read_records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            names = ("run_id", "display_name", "run_group", "job_type", "project")
            run.settings = {name: getattr(record.run, name) for name in names}
            _collect(run.config, record.run.config.update)
        elif kind == "config":
            _collect(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _collect(row, record.history.item)
            run.history.append(row)
        elif kind == "summary":
            _collect(run.summary, record.summary.update)
        elif kind == "preempting":
            run.preempted = True
        elif kind == "files":
            run.files += [file.path for file in record.files.files]
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def read_records(data: bytes) -> Iterator[Record]:
    assert HEADER.unpack_from(data)[:2] == (b":W&B", 0xBEE1)
    place, parts = HEADER.size, []
    while place + FRAGMENT.size <= len(data):
        if BLOCK - place % BLOCK < FRAGMENT.size:
            # Too little room for a fragment: the rest of the block is padding.
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = FRAGMENT.unpack_from(data, place)
        place += FRAGMENT.size
        body = data[place : place + length]
        if len(body) < length:
            # Still being written.
            return
        assert checksum == zlib.crc32(bytes([kind]) + body), "a damaged fragment"
        place += length
        parts = [body] if kind in (WHOLE, FIRST) else [*parts, body]
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record


def _collect(tree: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = json.loads(item.value_json)
