"""Compute soft labels. Try: python relabel.py --help"""

from cvdd.cli import relabel

if __name__ == "__main__":
    relabel()
