"""Locks and leases: one process holds a file, and what a dead one held is taken over."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ends, in_process, wait_for

from cvdd.artifact import Store
from cvdd.artifact.claims import NO_LOCKS, Claim, Claims, Leases, Locks, claims_for, held, locks_are_local
from cvdd.support.config_base import ConfigError

# --- locks and leases -------------------------------------------------------------------------------------------------


def quick_leases() -> Leases:
    return Leases(beat=0.05, silence=0.6)


def take_and_wait(claims: Claims, path: Path, taken: Path) -> None:
    claim = claims.take(path)
    assert claim is not None
    taken.touch()
    time.sleep(60)
    claim.release()


@pytest.mark.parametrize("kind", [Locks, quick_leases])
def test_only_one_holds_a_claim(kind: Callable[[], Claims], tmp_path: Path) -> None:
    one, two = kind(), kind()
    claim = one.take(tmp_path / "a.lock")
    assert claim is not None
    assert two.take(tmp_path / "a.lock") is None
    other = two.take(tmp_path / "b.lock")
    assert other is not None
    claim.release()
    again = two.take(tmp_path / "a.lock")
    assert again is not None
    again.release(forget=True)
    other.release(forget=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_owner(tmp_path: Path) -> None:
    owner = in_process(take_and_wait, Locks(), tmp_path / "a.lock", tmp_path / "taken")
    wait_for(tmp_path / "taken")
    assert Locks().take(tmp_path / "a.lock") is None
    owner.kill()
    ends(owner)
    assert Locks().take(tmp_path / "a.lock") is not None


def test_a_lease_ends_some_time_after_its_owner(tmp_path: Path) -> None:
    owner = in_process(take_and_wait, quick_leases(), tmp_path / "a.lock", tmp_path / "taken")
    wait_for(tmp_path / "taken")
    mine = quick_leases()
    for _ in range(10):
        # As long as it lives it is touched, so watching it does not make it void.
        assert mine.take(tmp_path / "a.lock") is None
        time.sleep(0.1)
    owner.kill()
    ends(owner)
    assert mine.take(tmp_path / "a.lock") is None
    time.sleep(0.8)
    claim = mine.take(tmp_path / "a.lock")
    assert claim is not None
    assert sorted(path.name for path in tmp_path.glob("a.lock.*")) == ["a.lock.0", "a.lock.1"]
    claim.release()
    assert list(tmp_path.glob("a.lock.*")) == []


@pytest.mark.parametrize("hours", [-1, 1, 24 * 365])
def test_clocks_say_nothing_about_a_lease(hours: int, tmp_path: Path) -> None:
    """A lease whose time stamp is far in the past or in the future is watched like any other."""
    lease = tmp_path / "a.lock.0"
    lease.touch()
    os.utime(lease, (time.time() + 3600 * hours,) * 2)
    mine = Leases(beat=10, silence=0.2)
    assert mine.take(tmp_path / "a.lock") is None
    time.sleep(0.3)
    assert mine.take(tmp_path / "a.lock") is not None


def test_two_that_watched_the_same_owner_die_do_not_both_follow_it(tmp_path: Path) -> None:
    (tmp_path / "a.lock.0").touch()
    one, two = Leases(beat=0.05, silence=0.2), Leases(beat=0.05, silence=0.2)
    assert (one.take(tmp_path / "a.lock"), two.take(tmp_path / "a.lock")) == (None, None)
    time.sleep(0.3)
    assert one.take(tmp_path / "a.lock") is not None
    assert two.take(tmp_path / "a.lock") is None


def watching_the_dead(path: Path, count: int) -> list[Leases]:
    """Several that have all watched the first lease of a path for long enough."""
    path.with_name(f"{path.name}.0").touch()
    all_of_them = [Leases(beat=10, silence=0.2) for _ in range(count)]
    assert [leases.take(path) for leases in all_of_them] == count * [None]
    time.sleep(0.3)
    return all_of_them


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_lease_under_the_name_of_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finds the dead silent. Before it goes on, another takes over and ends, and a third begins to count anew."""
    path = tmp_path / "a.lock"
    one, another = watching_the_dead(path, 2)
    third = Leases(beat=10, silence=0.2)
    silent, taken = one._silent, list[Claim | None]()

    def meanwhile(lease: Path) -> bool:
        found = silent(lease)
        monkeypatch.setattr(one, "_silent", silent)
        claim = another.take(path)
        assert claim is not None
        claim.release()
        assert names(tmp_path) == []
        taken.append(third.take(path))
        return found

    monkeypatch.setattr(one, "_silent", meanwhile)
    assert one.take(path) is None
    (claim,) = taken
    assert claim is not None
    assert names(tmp_path) == ["a.lock.0"]
    claim.release()
    assert names(tmp_path) == []


def test_an_end_takes_only_what_is_silent_with_it(tmp_path: Path) -> None:
    """Somebody who has just taken the name of a dead one has yet to see that it must step back."""
    path = tmp_path / "a.lock"
    (one,) = watching_the_dead(path, 1)
    claim = one.take(path)
    assert claim is not None
    (tmp_path / "a.lock.0").unlink()
    (tmp_path / "a.lock.0").touch()
    claim.release()
    assert names(tmp_path) == ["a.lock.0"]


def test_whoever_waits_gets_it_when_it_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    owner = in_process(take_and_wait, Locks(), tmp_path / "a.lock", tmp_path / "taken")
    wait_for(tmp_path / "taken")
    ending = in_process(lambda: (time.sleep(0.3), os.kill(owner.pid, 9)))
    with held(Locks(), tmp_path / "a.lock", "things/thing"):
        assert "waiting: another process makes things/thing" in caplog.text
    ends(ending)


MOUNTS = """/dev/sda / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2,local_lock=none,proto=tcp 0 0
server:/old /old nfs rw,nolock,local_lock=all 0 0
a@tcp:/l /lustre lustre rw,flock,lazystatfs 0 0
a@tcp:/m /my\\040scratch lustre rw,localflock 0 0
beegfs_nodev /home/fast beegfs rw 0 0
garbled
"""


@pytest.mark.parametrize(
    ("place", "local"),
    [
        ("/data/store", False),
        ("/home/user/store", False),
        ("/old/store", True),
        ("/lustre/store", False),
        ("/my scratch/store", True),
        ("/my", False),
        ("/home/fast/store", True),
        ("/home/faster", False),
    ],
)
def test_mounts_tell_whether_locks_reach_other_machines(place: str, local: bool) -> None:
    assert locks_are_local(Path(place), MOUNTS) == local


def test_the_site_chooses_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVDD_CLAIMS", "leases")
    assert isinstance(claims_for(tmp_path), Leases)
    monkeypatch.setenv("CVDD_CLAIMS", "locks")
    assert isinstance(claims_for(tmp_path), Locks)
    monkeypatch.setenv("CVDD_CLAIMS", "luck")
    with pytest.raises(ConfigError, match="CVDD_CLAIMS=luck: choose auto, locks or leases"):
        Store(tmp_path)


def test_a_store_keeps_to_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever types the variable for jobs may forget it for gc, which would see nobody's claims then."""
    monkeypatch.setenv("CVDD_CLAIMS", "leases")
    store = Store(tmp_path)
    assert store.user
    monkeypatch.delenv("CVDD_CLAIMS")
    assert isinstance(claims_for(tmp_path), Leases)
    assert isinstance(claims_for(tmp_path / "another"), Locks)
    monkeypatch.setenv("CVDD_CLAIMS", "locks")
    with pytest.raises(ConfigError, match=r"CVDD_CLAIMS=locks: others claim by leases in .*remove .*\.users/leases"):
        claims_for(tmp_path)


def test_a_lease_waits_for_a_lock_of_before(tmp_path: Path) -> None:
    lock = Locks().take(tmp_path / "a.lock")
    assert lock is not None
    assert quick_leases().take(tmp_path / "a.lock") is None
    lock.release()
    assert quick_leases().take(tmp_path / "a.lock") is not None


@pytest.mark.parametrize("number", sorted(NO_LOCKS))
def test_a_file_system_without_locks_is_told(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    # A marker that filelock would take for somebody's, for ever.
    (tmp_path / "b.lock").write_text("1\nnode17\n")
    for name in ("a.lock", "b.lock"):
        with pytest.raises(ConfigError, match="cannot be locked; type CVDD_CLAIMS=leases in front"):
            Locks().take(tmp_path / name)
    assert quick_leases().take(tmp_path / "a.lock") is not None
