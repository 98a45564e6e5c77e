"""`make bench`: our VideoMAE step beside Hugging Face's and that of VideoMAE's code: one model, weights, mask and loss.

On a CPU in float32 and in bfloat16. The environment variable MAM2_VIDEOMAE names a clone of VideoMAE's code.
"""

from typing import Any

import pytest
import torch

from benchmarks.bench_step import BATCHES, COLUMNS, Row, compare
from benchmarks.report import table
from benchmarks.step_plan import PEERS
from benchmarks.step_sizes import SMALL, sized

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = ("bfloat16",) if DEVICE.type == "cuda" else ("float32", "bfloat16")


def test_step_beside_others(capsys: Any) -> None:
    rows: list[Row] = []
    for precision in PRECISIONS:
        config = sized("videomae", None if DEVICE.type == "cuda" else SMALL, precision)
        found = compare("videomae", config, BATCHES[DEVICE.type][0], DEVICE, compiled=True, rounds=9)
        rows += [row for row in found if row.get("timed") != "alone"]
        torch.compiler.reset()
    skipped = {
        row["provider"]: row["reason"] for row in rows if row["verdict"] == "skipped" and row["provider"] in PEERS
    }
    compared = [row for row in rows if row["verdict"] != "skipped"]
    with capsys.disabled():
        print("", "VideoMAE, forward + backward + AdamW", table(compared, COLUMNS), sep="\n")
        print(*(f"{peer}: skipped: {reason}" for peer, reason in skipped.items()), sep="\n")
        if all(row["verdict"] == "right" for row in compared):
            print(*ratios(compared), sep="\n")
    assert all(row["verdict"] == "right" for row in compared), [row.get("reason") for row in compared]
    if not {row["provider"] for row in compared} & set(PEERS):
        pytest.skip(f"no peer to compare with: {skipped}")


def ratios(rows: list[Row]) -> list[str]:
    """Returns lines: the peers' fastest variants against ours, in each precision and over both, by median times."""
    lines = []
    best = {}
    for precision in (*PRECISIONS, "any precision") if len(PRECISIONS) > 1 else PRECISIONS:
        for provider in ("ours", *PEERS):
            times = {
                f"{row['step']} {row['precision']}": row["median_ms"]
                for row in rows
                if row["provider"] == provider and precision in (row["precision"], "any precision")
            }
            if times:
                best[provider] = min(times, key=lambda variant: times[variant]), min(times.values())
        for peer in PEERS:
            if peer in best:
                (mine, ours), (theirs, time) = best["ours"], best[peer]
                lines.append(f"{precision}: ours ({mine}) {time / ours:.2f} times as fast as {peer} ({theirs})")
    return lines
