"""Every source that a comment cites is one that a reader can find."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = ("cvdd/**/*.py", "conf/**/*.yaml", "benchmarks/**/*.py", "tests/**/*.py", "docs/*.md", "README.md")
SECTION = r"[AB]?\d+(?:\.\d+)?"
CITATION = re.compile(
    rf"[Ss]pecification of (?:the )?([A-Z][\w+-]*)(?: family)?, sections? ({SECTION}(?:(?:, | and | to |-){SECTION})*)"
)


def cited() -> Iterator[tuple[str, str, str]]:
    """File, source and section of each citation; of a range its ends."""
    for pattern in PLACES:
        for path in ROOT.glob(pattern):
            text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())
            for source, sections in CITATION.findall(text):
                for section in re.findall(SECTION, sections):
                    yield path.name, source, section


def listed() -> set[tuple[str, str]]:
    rows = re.findall(rf"^\| ([\w+-]*) ?\| ({SECTION}) \|", (ROOT / "docs/sources.md").read_text(), flags=re.MULTILINE)
    found, source = set(), ""
    for name, section in rows:
        source = name or source
        found.add((source, section))
    return found


def test_every_citation_is_listed() -> None:
    citations = list(cited())
    assert len(citations) > 50
    known = listed()
    assert not {
        f"{source} {section} in {name}" for name, source, section in citations if (source, section) not in known
    }


def test_every_source_that_is_listed_has_a_paper_or_code() -> None:
    origins, _, _ = (ROOT / "docs/sources.md").read_text().partition("## Sections")
    for source in {source for source, _ in listed()}:
        row = re.search(rf"^\| [^|]*\b{re.escape(source)}\b[^|]*\|(.*)\|$", origins, flags=re.MULTILINE)
        assert row is not None, source
        assert re.search(r"arXiv \d{4}\.\d{5}|`[\w.-]+/[\w.-]+`", row[1]), source
