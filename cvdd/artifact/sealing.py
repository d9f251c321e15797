"""The last step of every artefact: list its files with their checksums and move it into place."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cvdd.artifact.files import fsync, write_atomically
from cvdd.artifact.manifest import CHECKSUM, MANIFEST, file_checksum, manifest_checksum
from cvdd.artifact.parts import TABLE
from cvdd.artifact.sessions import FOLDER

THREADS = 32
"""Of the last step, which mostly wait for the disk."""


def seal(work: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Add the checksums of all files to the manifest, and move the directory to its final place.

    Args:
        work: where the artefact was built.
        path: its final place.
        manifest: everything but the files.
    """
    leftovers = [*work.glob(f"{FOLDER}*"), work / TABLE, *work.rglob("*.tmp")]
    left = {path for path in leftovers if not path.is_dir()}
    files = sorted(file for file in _files(work) if file not in left and file != work / MANIFEST)
    # Waiting for the disk one by one would take minutes where an artefact has thousands of files.
    with ThreadPoolExecutor(THREADS) as threads:
        entries = list(threads.map(_entry, files))
    names = [file.relative_to(work).as_posix() for file in files]
    manifest["files"] = dict(zip(names, entries, strict=True))
    manifest[CHECKSUM] = manifest_checksum(manifest)
    write_atomically(work / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    # Not before the manifest is written: a full disk must not cost the progress that they hold.
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    # A file is not on disk before its name is: that is in its directory, and the name of that one in the next.
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(work)}
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(fsync, folders | {work}))
    if path.exists():
        # Only a directory without a manifest can be here: somebody deleted half of it.
        shutil.rmtree(path)
    work.rename(path)
    fsync(path.parent)


def _files(work: Path) -> list[Path]:
    return [file for file in work.rglob("*") if file.is_file() and FOLDER not in file.relative_to(work).parts]


def _entry(file: Path) -> dict[str, Any]:
    fsync(file)
    return {"bytes": file.stat().st_size, "sha256": file_checksum(file)}
