"""Compute soft labels. For what it can do: python relabel.py --help."""

from cvdd.cli import relabel

if __name__ == "__main__":
    relabel()
