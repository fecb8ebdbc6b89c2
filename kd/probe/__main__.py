"""Entry point of `python -m kd.probe`."""

from kd.probe import main

if __name__ == "__main__":
    main()
