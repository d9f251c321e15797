"""Train and measure students. Try: python evaluate.py --help"""

from cvdd.cli import evaluate

if __name__ == "__main__":
    evaluate()
