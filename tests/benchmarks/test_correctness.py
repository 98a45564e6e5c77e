"""The correctness cases of the kernels on the PyTorch path: definitions and result types agree."""

import importlib

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_case_is_right_on_the_pytorch_path() -> None:
    rows = list(importlib.import_module("benchmarks.correctness").rows(CPU, float("inf")))
    assert len(rows) > 80
    assert [row for row in rows if row["verdict"] != "right"] == []


def test_layouts_hold_the_same_kind_of_clip_in_other_memory() -> None:
    cases, correctness = (importlib.import_module(f"benchmarks.{name}") for name in ("cases", "correctness"))
    strides = set()
    for layout in cases.LAYOUTS:
        for dtype in (torch.uint8, torch.float16):
            video = cases.Clip(patch=(2, 3, 4), layout=layout, dtype=dtype, grid=(2, 2, 3)).make()
            assert (video.dtype, video.shape) == (dtype, (2, 3, 4, 6, 12))
            assert not video.isnan().any()
            moved = correctness.on_device(video, CPU)
            assert moved.stride() == video.stride()
            assert torch.equal(moved, video)
        strides.add(video.stride())
    assert len(strides) == len(cases.LAYOUTS)
