"""``python -m cvdd.artifact``: what is in the store, whether it is whole, and what of it can go."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cvdd.artifact.claims import claims_for
from cvdd.artifact.cleaning import children, in_use, is_store, removable, remove, size_of, unfinished
from cvdd.artifact.files import store_errors
from cvdd.artifact.manifest import Artifact, DamagedArtifact, kinds, read_manifests, verify
from cvdd.support.config_base import ConfigError
from cvdd.support.console import new_console
from cvdd.support.outcome import INTERRUPTED, USER_ERROR
from cvdd.support.readable import readable_bytes

VARIABLE = "CVDD_STORE"
DAMAGED = 1
NARROWEST = 14
"""Characters of a column beside a name."""


def list_artifacts(root: Path, wanted: Sequence[str] = ()) -> int:
    """Print what is in a store: size, parents and by how many others each is used; return the exit code.

    Args:
        root: of the store.
        wanted: kinds of artefacts that are listed; all if there is none.

    Raises:
        ConfigError: a kind is not in the store.
    """
    _require_kinds(root, wanted, "list ")
    artifacts, damaged = _read(root)
    names = {artifact.digest: f"{artifact.kind}/{artifact.path.name}" for artifact in artifacts}
    made_from = children(artifacts)
    table = _table("artefact", "size", "made from", "used by")
    listed = [artifact for artifact in artifacts if not wanted or artifact.kind in wanted]
    for artifact in listed:
        parents = [names.get(p["digest"], f"{p['kind']}/{p['name']} (gone)") for p in artifact.manifest["parents"]]
        users = [names[child.digest] for child in made_from[artifact.digest]]
        table.add_row(
            escape(names[artifact.digest]),
            readable_bytes(artifact.bytes),
            escape("\n".join(dict.fromkeys(parents))) or "-",
            escape("\n".join(users)) or "-",
        )
    console = new_console()
    _print(console, f"{root}: {len(listed)} artefacts", table)
    paths = [path for path in unfinished(root) if not wanted or path.relative_to(root).parts[0] in wanted]
    used = in_use(root, claims_for(root), paths)
    for path in paths:
        state = "being made" if path in used else "interrupted; the same command goes on"
        _say(console, f"half made: {path.relative_to(root)}, {readable_bytes(size_of(path))} ({state})")
    _say_damaged(console, damaged)
    total = sum(artifact.bytes for artifact in listed)
    _say(console, f"{readable_bytes(total)} in {len(listed)} artefacts, {len(paths)} half made")
    return DAMAGED if damaged else 0


def verify_artifacts(root: Path) -> int:
    """Check the checksums of all files of a store; return the exit code, which is 1 if anything is damaged."""
    artifacts, damaged = _read(root)
    console = new_console()
    problems = len(damaged)
    _say_damaged(console, damaged)
    for artifact in artifacts:
        for problem in verify(artifact):
            problems += 1
            _say(
                console, f"{artifact.path}: {problem}. Delete this directory; the command that needs it makes it again."
            )
    count = len(artifacts) + len(damaged)
    _say(console, f"{count} artefacts: " + (f"{problems} problems" if problems else "all files match their checksums"))
    return DAMAGED if problems else 0


def clean(root: Path, unwanted: Sequence[str], delete: bool) -> int:
    """Print what could go and, with ``delete``, remove it; return the exit code.

    Raises:
        ConfigError: a kind is not in the store, or a damaged manifest hides what it is made from.
    """
    _require_kinds(root, unwanted, "--unused ")
    found = removable(root, unwanted)
    claims = claims_for(root)
    console = new_console()
    if not found:
        _say(console, f"{root}: nothing to remove")
        return 0
    table = _table("directory", "size", "what", "removed" if delete else "would be removed")
    freed = 0
    if delete:
        outcomes = list(remove(root, claims, found))
    else:
        used = in_use(root, claims, [item.path for item in found])
        outcomes = [(item, item.path not in used) for item in found]
    for item, goes in outcomes:
        freed += item.bytes if goes else 0
        place = escape(str(item.path.relative_to(root)))
        table.add_row(place, readable_bytes(item.bytes), item.why, "yes" if goes else "no: a running process uses it")
    _print(console, str(root), table)
    if delete:
        _say(console, f"{readable_bytes(freed)} freed")
    else:
        _say(console, f"{readable_bytes(freed)} would be freed; nothing was removed. Add --delete to do it.")
    return 0


def _require_kinds(root: Path, asked: Sequence[str], typed: str) -> None:
    known = [kind.name for kind in kinds(root)]
    for kind in asked:
        if kind not in known:
            raise ConfigError(f"{typed}{kind}: {root} has no such kind; choose from {', '.join(known) or 'none'}")


def _read(root: Path) -> tuple[list[Artifact], list[DamagedArtifact]]:
    found = list(read_manifests(root))
    artifacts = [artifact for artifact in found if isinstance(artifact, Artifact)]
    return artifacts, [error for error in found if isinstance(error, DamagedArtifact)]


def _table(first: str, size: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    table.add_column(size, justify="right", no_wrap=True)
    for column in others:
        table.add_column(column, overflow="fold")
    return table


def _print(console: Console, title: str, table: Table) -> None:
    """Print a table whose names can be copied."""
    _say(console, title)
    if console.is_terminal:
        name = max(console.measure(cell).maximum for cell in table.columns[0].cells)
        # The terminal itself breaks what is wider, and copies it as one line. The width alone is not heeded in a
        # terminal that says it is dumb.
        console.size = (max(console.width, name + NARROWEST * (len(table.columns) - 1)), console.height)
    console.print(table)


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _say_damaged(console: Console, damaged: Sequence[DamagedArtifact]) -> None:
    for error in damaged:
        _say(console, str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cvdd.artifact", description="The store of artefacts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--store", type=Path, help=f"its directory; otherwise that of the commands: {VARIABLE}, or store/ right here"
    )
    listing = commands.add_parser(
        "list", parents=[place], help="what is there, its size, what it is made from and used by"
    )
    listing.add_argument("kinds", nargs="*", metavar="KIND", help="only artefacts of these kinds, e.g. images labels")
    commands.add_parser("verify", parents=[place], help="read all files and compare their checksums")
    gc = commands.add_parser("gc", parents=[place], help="remove what is half made; without --delete only show it")
    gc.add_argument(
        "--unused",
        nargs="+",
        action="extend",
        default=[],
        metavar="KIND",
        help="also artefacts of these kinds, e.g. labels, that no other artefact is made from",
    )
    gc.add_argument("--delete", action="store_true", help="remove them; what a running process uses stays")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a command; return the exit code."""
    options = _parser().parse_args(arguments)
    root = (options.store or Path(os.environ.get(VARIABLE) or "store")).absolute()
    where = f"say where it is with --store DIR or {VARIABLE}=DIR"
    try:
        if not root.is_dir():
            raise ConfigError(f"there is no store at {root}; {where}")
        with store_errors(root):
            if not is_store(root):
                raise ConfigError(f"{root} is no store, for nothing in it was made by cvdd; {where}")
            if options.command == "list":
                return list_artifacts(root, options.kinds)
            if options.command == "verify":
                return verify_artifacts(root)
            return clean(root, options.unused, options.delete)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
