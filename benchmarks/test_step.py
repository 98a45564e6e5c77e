"""`make bench`: a VideoMAE step of ours beside Hugging Face's of the same model, weights and mask."""

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
        rows += compare("videomae", config, BATCHES[DEVICE.type][0], DEVICE, compiled=cuda, rounds=9)
    timed = [row for row in rows if row["verdict"] != "skipped"]
    with capsys.disabled():
        print("", "VideoMAE, forward + backward + AdamW", table(timed, COLUMNS), sep="\n")
        fastest = {
            provider: min(row["median_ms"] for row in timed if row["provider"] == provider)
            for provider in ("ours", "hugging_face")
        }
        print(f"best settings of both: ours {fastest['hugging_face'] / fastest['ours']:.2f}× as fast as Hugging Face")
        if not cuda:
            usual = next(row for row in timed if (row["provider"], row["precision"]) == ("hugging_face", "float32"))
            print(f"our best setting: {usual['median_ms'] / fastest['ours']:.2f}× as fast as Hugging Face in float32")
            print("compiled steps too: python -m benchmarks.bench_step --compile")
    assert all(row["verdict"] == "right" for row in timed), [row.get("reason") for row in timed]
