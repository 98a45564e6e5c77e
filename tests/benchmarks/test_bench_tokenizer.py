"""The benchmark of tokenizer and code cache runs and reports both."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import bench_tokenizer


def test_every_tokenizer_has_a_row_online_and_one_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_tokenizer.SIZE, "cpu", 32)
    monkeypatch.setitem(bench_tokenizer.BATCH, "cpu", 2)
    rows = list(bench_tokenizer.rows(torch.device("cpu"), time.monotonic() + 60))
    assert [(row["tokenizer"], row["codes"], row["clip_px"]) for row in rows] == [
        ("small", "online", 32),
        ("small", "cached", 32),
    ]
    assert all(row["median_ms_per_clip"] > 0 for row in rows)


def test_without_time_it_says_so() -> None:
    (row,) = bench_tokenizer.rows(torch.device("cpu"), time.monotonic() - 1)
    assert row["verdict"] == "skipped"
