"""`kd-train` that tokenises all text without labels in the background, however little it is."""

from kd.data import datamodule
from kd.train import main


def run() -> None:
    """Do what the command does."""
    datamodule.MOST_BEFORE = 0
    main()


if __name__ == "__main__":
    run()
