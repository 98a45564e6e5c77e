"""`mam2 doctor`: reports which implementations run on this machine."""

from __future__ import annotations

import tyro


def run(arguments: list[str]) -> int:
    def doctor() -> int:
        """Print the machine, versions, the implementation of each part, and what to install for faster ones."""
        from mam2.engine.doctor import report

        print(report())
        return 0

    return tyro.cli(doctor, args=arguments, prog="mam2 doctor")
