"""Distil synthetic images. For what it can do: python distill.py --help."""

from cvdd.cli import distill

if __name__ == "__main__":
    distill()
