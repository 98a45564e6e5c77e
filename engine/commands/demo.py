"""`mam2 demo`: runs clips, pre-training, measurement and report in one command."""

from __future__ import annotations

from pathlib import Path

from mam2.engine.commands.options import run_verb


def run(arguments: list[str]) -> int:
    def demo(out: Path = Path("runs/demo")) -> int:
        """Write synthetic clips, pre-train on them, measure on unseen clips, and write a report.

        Args:
            out: folder for clips, run and report; an interrupted demo continues there.
        """
        from mam2.engine.demo import demo

        trained, result = demo(out)
        if result is None:
            return 128 + trained.signal
        return 0 if all(result.verdicts().values()) else 1

    return run_verb(demo, arguments, "demo")
