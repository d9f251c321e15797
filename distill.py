"""Distil synthetic images. Try: python distill.py --help"""

from cvdd.cli import distill

if __name__ == "__main__":
    distill()
