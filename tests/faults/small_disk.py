"""A disk of one's own whose size can be changed while files are on it: tmpfs, which only root can mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """A file system in memory.

    Args:
        place: an empty directory.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._used = (0, 0)

    def mount(self) -> str:
        """Put it there; return why that is impossible, or nothing."""
        if os.geteuid():
            return "a disk that fills needs root, to mount a tmpfs"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256m,nr_inodes=100000", "tmpfs", self.place],
            capture_output=True,
            text=True,
        )
        return f"a disk that fills needs a tmpfs: {done.stderr.strip()}" if done.returncode else ""

    def unmount(self) -> None:
        """Take it away with all that is on it."""
        # At once, though a process may still have a file open.
        subprocess.run(["umount", "--lazy", self.place], check=True)

    def fill(self) -> None:
        """Let there be no more room than for what is on it now."""
        state = os.statvfs(self.place)
        self._used = (state.f_blocks - state.f_bfree) * state.f_frsize, state.f_files - state.f_ffree
        self.leave(0, 0)

    def leave(self, pages: int = 60_000, files: int = 90_000) -> None:
        """Let there be room for so many pages and files more than there were when it was filled."""
        size, files = self._used[0] + pages * PAGE, self._used[1] + files
        self._remount(f"size={size},nr_inodes={files}")

    def read_only(self) -> None:
        """Let nothing be changed from now on."""
        self._remount("ro")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    made = Disk(place)
    refused = made.mount()
    if refused:
        pytest.skip(refused)
    yield made
    made.unmount()
