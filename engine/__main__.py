"""`python -m mam2.engine`, the same as `mam2`."""

from mam2.engine.cli import main

if __name__ == "__main__":
    main()
