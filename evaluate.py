"""Train and measure students. For what it can do: python evaluate.py --help."""

from cvdd.cli import evaluate

if __name__ == "__main__":
    evaluate()
