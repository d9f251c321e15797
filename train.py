"""Train the committee members. For what it can do: python train.py --help."""

from cvdd.cli import train

if __name__ == "__main__":
    train()
