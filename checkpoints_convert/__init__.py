"""Converts published PyTorch checkpoints of the Wan networks to rfjax's and back, without PyTorch."""

from checkpoints_convert.cli import add_arguments, run

__all__ = ["add_arguments", "run"]
