"""`kd-train` that tokenises all text without labels in the background, however little it is, and has small pools of batches."""

from kd.data import datamodule, sampler
from kd.train import main

POOL = 5


def run() -> None:
    """Do what the command does."""
    datamodule.MOST_BEFORE, sampler.POOL = 0, POOL
    main()


if __name__ == "__main__":
    run()
