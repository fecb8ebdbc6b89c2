"""Entry point of `python -m kd.tune`."""

from kd.tune import main

if __name__ == "__main__":
    main()
