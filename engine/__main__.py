"""Runs `mam2` as `python -m mam2.engine`."""

from mam2.engine.cli import main

if __name__ == "__main__":
    main()
