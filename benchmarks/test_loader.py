"""`make bench`: the loader and decoders alone, a training step's wait for clips, and codes online and cached."""

import time

import pytest
import torch

from benchmarks import bench_tokenizer
from benchmarks.bench_loader import file_rows, rows
from benchmarks.recorded_clips import COLUMNS as RECORDED_COLUMNS
from benchmarks.report import table

SECONDS = 50
COLUMNS = (
    *(
        "decoder",
        "files",
        "gop",
        "threads",
        "views",
        "ratio_to_pyav_alone",
        "clips_per_s",
        "frames_per_s",
    ),
    *("data_wait_percent", "limit", "verdict", "reason"),
)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_loader(capsys: pytest.CaptureFixture[str]) -> None:
    until = time.monotonic() + SECONDS
    found = [*rows(DEVICE, until), *file_rows(DEVICE, until)]
    with capsys.disabled():
        print("\nThe loader, with crop and resize, and decoders alone on one thread:")
        print(table([row for row in found if "ratio_to_decoding" not in row], COLUMNS))
        print("\nRecorded clips, read or decoded:")
        print(table([row for row in found if "ratio_to_decoding" in row], RECORDED_COLUMNS))
    bad = [row for row in found if row.get("verdict", "right") != "right" and "provider" not in row]
    assert not [row for row in bad if row["verdict"] != "skipped"]


def test_codes(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(bench_tokenizer.rows(DEVICE, time.monotonic() + SECONDS))
    cached = {row["tokenizer"]: row.get("median_ms_per_clip") for row in found if row.get("codes") == "cached"}
    for row in found:
        if time_ms := row.pop("median_ms_per_clip", None):
            if base := cached[row["tokenizer"]]:
                row["ratio_to_cached"] = time_ms / base
            if DEVICE.type == "cuda":
                row["ms_per_clip"] = time_ms
    with capsys.disabled():
        print("\nCodes of a batch, computed in the step or read from a cache:")
        print(table(found, ("tokenizer", "codes", "precision", "ms_per_clip", "ratio_to_cached", "verdict", "reason")))
    assert all(row.get("verdict", "right") in ("right", "skipped") for row in found)
