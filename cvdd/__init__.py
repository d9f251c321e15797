"""Dataset distillation that people can run."""

__version__ = "0.1.0"
