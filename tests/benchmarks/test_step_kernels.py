"""Tests for benchmarks/step_kernels.py."""

import pytest
import torch

from benchmarks import step_kernels


def test_kernels_are_summed_and_sorted() -> None:
    rows = step_kernels.kernel_rows([("a", 1000.0), ("b", 6000.0), ("a", 3000.0)], steps=2)
    assert [(row["kernel"], row["ms"], row["launches"], row["percent"]) for row in rows] == [
        ("b", 3.0, 0.5, 60.0),
        ("a", 2.0, 1.0, 40.0),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_kernels.main([]) == 2
    assert "this needs one" in capsys.readouterr().err
