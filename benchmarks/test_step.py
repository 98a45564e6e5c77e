"""`make bench`: our VideoMAE step, compared with Hugging Face's for the same model, weights and mask."""

from typing import Any

import pytest
import torch

from benchmarks.bench_step import BATCHES, COLUMNS, REDUCED, compare, sized
from benchmarks.report import table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_step_beside_hugging_face(capsys: Any) -> None:
    pytest.importorskip("transformers", reason="the peer is Hugging Face's VideoMAE")
    cuda = DEVICE.type == "cuda"
    rows = []
    for precision in ("bfloat16",) if cuda else ("float32", "bfloat16"):
        config = sized("videomae", None if cuda else REDUCED, precision)
        found = compare("videomae", config, BATCHES[DEVICE.type][0], DEVICE, compiled=True, rounds=9)
        rows += [row for row in found if row.get("timed") != "alone"]
        torch.compiler.reset()
    timed = [row for row in rows if row["verdict"] != "skipped"]
    with capsys.disabled():
        print("", "VideoMAE, forward + backward + AdamW", table(timed, COLUMNS), sep="\n")
        if all(row["verdict"] == "right" for row in timed):
            ours, theirs = (
                {(row["precision"], row["step"]): row["median_ms"] for row in timed if row["provider"] == provider}
                for provider in ("ours", "hugging_face")
            )
            fastest = min(ours.values())
            print(f"each in its fastest variant: ours {min(theirs.values()) / fastest:.2f}× as fast as Hugging Face")
            if not cuda:
                usual = theirs["float32", "eager"]
                print(f"Hugging Face's default, eager in float32: ours {usual / fastest:.2f}× as fast")
    assert all(row["verdict"] == "right" for row in timed), [row.get("reason") for row in timed]
