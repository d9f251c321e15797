"""Whether the code that made a result is that of a commit."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cvdd.support.provenance import _changes, code_version, made_by_other_code


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "cvdd").mkdir()
    (tmp_path / "cvdd" / "one.py").write_text("one = 1\n")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    return tmp_path


def test_code_is_known_by_its_source_without_git_too() -> None:
    known = code_version()
    assert re.fullmatch("[0-9a-f]{12}", known["source"])
    assert not made_by_other_code(known)
    assert made_by_other_code({**known, "source": "0" * 12})
    # Manifests of earlier versions do not say it.
    assert not made_by_other_code({"commit": "abc"})


def test_a_clean_checkout_has_no_changes(checkout: Path) -> None:
    (checkout / "cvdd" / "one.pyc").write_text("ignored")
    (checkout / "notes.txt").write_text("no code")
    assert _changes(checkout) is None


def test_changed_code_is_told_apart(checkout: Path) -> None:
    (checkout / "cvdd" / "one.py").write_text("one = 2\n")
    changed = _changes(checkout)
    # Not every file is text.
    (checkout / "cvdd" / "one.py").write_bytes(b"one = 1 # \xff\n")
    assert None not in (changed, _changes(checkout))
    assert changed != _changes(checkout)


def test_new_code_counts_too(checkout: Path) -> None:
    new = checkout / "cvdd" / "two.py"
    new.write_text("two = 2\n")
    changed = _changes(checkout)
    new.write_text("two = 3\n")
    assert None not in (changed, _changes(checkout))
    assert changed != _changes(checkout)
