"""Entry point of `python -m kd.bench`."""

from kd.bench import main

if __name__ == "__main__":
    main()
