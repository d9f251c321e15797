"""The last step of every artefact: list its files with their checksums and move it into place."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from pathlib import Path
from typing import Any

from cvdd.artifact.files import fsync, write_atomically
from cvdd.artifact.manifest import MANIFEST, file_checksum

SESSIONS = ".sessions.json"


def seal(work: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Add the checksums of all files to the manifest, and move the directory to its final place.

    Args:
        work: where the artefact was built.
        path: its final place.
        manifest: everything but the files.
    """
    (work / SESSIONS).unlink(missing_ok=True)
    for leftover in work.rglob("*.tmp"):
        leftover.unlink()
    files = {}
    for file in sorted(file for file in work.rglob("*") if file.is_file() and file.name != MANIFEST):
        fsync(file)
        files[file.relative_to(work).as_posix()] = {"bytes": file.stat().st_size, "sha256": file_checksum(file)}
    manifest["files"] = files
    write_atomically(work / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    fsync(work)
    if path.exists():
        # Only a directory without a manifest can be here: somebody deleted half of it.
        shutil.rmtree(path)
    work.rename(path)
    fsync(path.parent)


def add_session(work: Path, seconds: float) -> list[float]:
    """Note how long a build ran until it ended or failed; return the seconds of all builds so far."""
    file = work / SESSIONS
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(file.read_text()) if file.exists() else []
        sessions = [*earlier, round(seconds, 3)]
        write_atomically(file, json.dumps(sessions).encode())
        return sessions
    return [seconds]


def peak_memory() -> int:
    """Return the most bytes that this process held so far, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
