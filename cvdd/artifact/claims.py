"""Claims: which process works on what, for all processes and machines that share a store.

Two kinds, behind the same two calls. A *lock* (flock, through filelock) is released by the operating system when its
owner dies, so it can never be stale; this needs a file system whose locks reach all machines, as those of Linux's NFS,
GPFS and CephFS do, and Lustre's where it is mounted with ``flock``. Elsewhere a *lease* is a file that only one
process can create and that its owner touches every few seconds; it is void when it has not been touched for a while by
the watch of whoever wants it, so neither the clocks of the machines nor a clock that is set back matter.

The two do not see each other. So a store in which processes claim by leases says so to all that come later.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import filelock

from cvdd.artifact.places import USERS
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "CVDD_CLAIMS"
LEASED = "leases"
"""A file among those of a store's users: they claim by leases."""
MOUNTS = Path("/proc/self/mounts")
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_OF_SILENCE = 120.0
LONGEST_PAUSE = 2.0

LOCAL_LOCKS = frozenset({"beegfs", "fuse.sshfs", "9p"})
"""File systems whose locks, unless the site says otherwise, are only seen on the machine that took them."""

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What a file system says that has none."""


class Claim(Protocol):
    """Something that this process holds."""

    def release(self, forget: bool = False) -> None:
        """Let others have it; with ``forget`` nobody will want it again and its file can go."""
        ...


class Claims(Protocol):
    """A way to claim things by the path of a file that stands for them."""

    def take(self, path: Path) -> Claim | None:
        """Claim what the path stands for, or return None at once if somebody holds it; its folder exists."""
        ...


class Locks:
    """Claims that the operating system releases when their owner dies."""

    def take(self, path: Path) -> Claim | None:
        """Lock the file, or return None at once.

        Raises:
            ConfigError: there are no locks where it lies.
        """
        if not _can_be_locked(path):
            raise _without_locks(path)
        # Not bound to a thread: what Lightning or a finaliser runs elsewhere may release it.
        lock = filelock.FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise _without_locks(path) from error
        return _Lock(path, lock)


def _can_be_locked(path: Path) -> bool:
    """Whether a file can be, as far as letting go of it tells: filelock would take a marker that outlives its owner."""
    if sys.platform == "win32":
        return True
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _without_locks(path: Path) -> ConfigError:
    return ConfigError(
        f"files in {path.parent} cannot be locked; type {VARIABLE}=leases in front of the command, and of all that "
        "share the store"
    )


class _Lock:
    def __init__(self, path: Path, lock: filelock.BaseFileLock) -> None:
        self.path, self.lock = path, lock

    def release(self, forget: bool = False) -> None:
        if forget:
            # While it is held. Whoever opened it before locks a file without a name, and finds nothing left to do.
            self.path.unlink(missing_ok=True)
        self.lock.release()


class Leases:
    """Claims that are void when their owner has not touched them for a while.

    The files of ``x.lock`` are ``x.lock.0``, ``x.lock.1`` and so on: whoever finds all of them silent creates the next
    one, which only one process can, and steps back if it then sees another that it has not watched die.

    Args:
        beat: seconds between two touches.
        silence: seconds without a touch after which a lease is void; well above what a file system may cache.
    """

    def __init__(self, beat: float | None = None, silence: float | None = None) -> None:
        self.beat = SECONDS_BETWEEN_BEATS if beat is None else beat
        self.silence = SECONDS_OF_SILENCE if silence is None else silence
        self._watched: dict[Path, tuple[int, float]] = {}
        self._held: set[Path] = set()
        self._process: int | None = None
        self._guard = threading.Lock()

    def take(self, path: Path) -> Claim | None:
        """Create the next lease if all earlier ones are silent, or return None at once."""
        if _is_locked(path):
            return None
        earlier = _generations(path)
        # Each is looked at, so that the watch over all of them begins now.
        if sum(not self._silent(lease) for lease in earlier.values()):
            return None
        mine = path.with_name(f"{path.name}.{max(earlier, default=-1) + 1}")
        try:
            with mine.open("x") as stream:
                stream.write(f"{socket.gethostname()} {os.getpid()}\n")
        except FileExistsError:
            return None
        # Not by name: what was silent may have gone since, and somebody else may have begun to count again.
        others = [lease for lease in _generations(path).values() if lease != mine]
        if sum(not self._silent(lease) for lease in others):
            mine.unlink(missing_ok=True)
            return None
        self._hold(mine)
        return _Lease(self, path, mine)

    def _silent(self, lease: Path) -> bool:
        """Whether a lease was not touched while this process watched it for long enough."""
        try:
            # Opening asks the server; a path alone may be answered from a cache.
            with lease.open("rb") as stream:
                touched = os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            self._watched.pop(lease, None)
            return True
        now = time.monotonic()
        known = self._watched.get(lease)
        if known is None or known[0] != touched:
            self._watched[lease] = (touched, now)
            return False
        return now - known[1] >= self.silence

    def _hold(self, lease: Path) -> None:
        with self._guard:
            if self._process != os.getpid():
                # A forked process holds nothing of its parent's and has none of its threads.
                self._process, self._held = os.getpid(), set()
                threading.Thread(target=self._touch, daemon=True, name="leases").start()
            self._held.add(lease)

    def drop(self, path: Path, lease: Path) -> None:
        """Remove a lease that this process holds, and the silent ones before it."""
        with self._guard:
            self._held.discard(lease)
        number = int(lease.suffix[1:])
        # Its own goes last: while it is there, whoever takes the name of a silent one steps back.
        for other, file in sorted(_generations(path).items()):
            if other == number or (other < number and self._silent(file)):
                file.unlink(missing_ok=True)
                self._watched.pop(file, None)

    def _touch(self) -> None:
        while True:
            time.sleep(self.beat)
            with self._guard:
                held = list(self._held)
            for lease in held:
                try:
                    # The server's time, not this machine's.
                    os.utime(lease)
                except FileNotFoundError:
                    if lease in self._held:
                        log.warning("the claim %s was taken over: this process was silent for too long", lease.name)
                        self._held.discard(lease)
                except OSError as error:
                    log.warning("the claim %s could not be renewed (%s)", lease.name, error.strerror)


class _Lease:
    def __init__(self, leases: Leases, path: Path, lease: Path) -> None:
        self.leases, self.path, self.lease = leases, path, lease

    def release(self, forget: bool = False) -> None:
        self.leases.drop(self.path, self.lease)


def _is_locked(path: Path) -> bool:
    """Whether somebody who came before there were leases here holds a lock, as far as it reaches."""
    if not path.exists():
        return False
    try:
        claim = Locks().take(path)
    except ConfigError:
        return False
    if claim is not None:
        claim.release()
    return claim is None


def _generations(path: Path) -> dict[int, Path]:
    prefix = path.name + "."
    with os.scandir(path.parent) as entries:
        numbers = [entry.name.removeprefix(prefix) for entry in entries if entry.name.startswith(prefix)]
    return {int(number): path.with_name(prefix + number) for number in numbers if number.isdecimal()}


def claims_for(root: Path) -> Claims:
    """Return the kind of claims that works where a store lies.

    Args:
        root: of the store; it need not exist.

    Raises:
        ConfigError: the environment asks for a kind that does not exist, or that does not see the claims of others.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "locks", "leases"):
        raise ConfigError(f"{VARIABLE}={wanted}: choose auto, locks or leases")
    leased = root / USERS / LEASED
    if wanted == "locks" and leased.exists():
        raise ConfigError(
            f"{VARIABLE}=locks: others claim by leases in {root}, which locks do not see. Leave the variable out; or, "
            f"once nothing works there, remove {leased}"
        )
    if wanted == "auto":
        mounts = MOUNTS.read_text(errors="replace") if MOUNTS.exists() else ""
        wanted = "leases" if leased.exists() or locks_are_local(root, mounts) else "locks"
    return Leases() if wanted == "leases" else Locks()


def keep_to_kind(root: Path, claims: Claims) -> None:
    """Let all who come later claim in a store as this process does; its folder of users is there."""
    if isinstance(claims, Leases):
        (root / USERS / LEASED).touch()


def locks_are_local(root: Path, mounts: str) -> bool:
    """Whether other machines would not see a lock, as far as the mounts tell.

    Args:
        root: of the store.
        mounts: in the form of ``/proc/self/mounts``.
    """
    place = root.resolve()
    found, longest = False, -1
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        mount = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if not place.is_relative_to(mount) or len(mount.parts) < longest:
            continue
        longest = len(mount.parts)
        kind, options = fields[2], set(fields[3].split(","))
        if kind.startswith("nfs"):
            found = bool(options & {"nolock", "local_lock=all", "local_lock=flock"})
        elif kind == "lustre":
            found = "flock" not in options
        else:
            found = kind in LOCAL_LOCKS
    return found


def pauses(shortest: float = 0.02) -> Iterator[None]:
    """Wait a little longer each time, and not in step with the other processes that wait."""
    pause = shortest
    while True:
        # Chance decides when somebody looks again, never what a result is.
        time.sleep(pause * random.uniform(0.5, 1.5))
        yield
        pause = min(pause * 1.5, LONGEST_PAUSE)


@contextlib.contextmanager
def held(claims: Claims, path: Path, what: str) -> Iterator[None]:
    """Hold what a path stands for while the body runs; wait for it if need be.

    Args:
        claims: of the store.
        path: of the file; its folder is made.
        what: for the message to whoever waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = claims.take(path)
    if claim is None:
        log.info("waiting: another process makes %s", what)
        for _ in pauses():
            claim = claims.take(path)
            if claim is not None:
                break
    assert claim is not None
    try:
        yield
    finally:
        claim.release()
