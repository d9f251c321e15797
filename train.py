"""Train the committee members. Try: python train.py --help"""

from cvdd.cli import train

if __name__ == "__main__":
    train()
