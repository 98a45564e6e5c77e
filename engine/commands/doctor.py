"""`mam2 doctor`: what runs how on this machine."""

from __future__ import annotations

import tyro


def run(arguments: list[str]) -> int:
    def doctor() -> int:
        """Print machine, versions, the path that each part takes, and what to install for a faster one."""
        from mam2.engine.doctor import report

        print(report())
        return 0

    return tyro.cli(doctor, args=arguments, prog="mam2 doctor")
