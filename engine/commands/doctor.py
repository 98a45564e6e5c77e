"""`mam2 doctor`: reports which implementations run on this machine."""

from __future__ import annotations

from mam2.engine.commands.options import run_verb


def run(arguments: list[str]) -> int:
    def doctor() -> int:
        """Print the machine, versions, the implementation of each part, and what to install for faster ones."""
        from mam2.engine.doctor import report

        print(report())
        return 0

    return run_verb(doctor, arguments, "doctor")
