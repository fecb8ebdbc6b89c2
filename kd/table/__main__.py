"""Entry point of `python -m kd.table`."""

from kd.table import main

if __name__ == "__main__":
    main()
