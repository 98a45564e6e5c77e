"""Tuning chooses only among correct candidates, and a dry run does not change the table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mam2.kernels import launch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    return importlib.import_module("benchmarks.tune")


def test_every_kernel_is_tuned(tune: ModuleType) -> None:
    assert set(tune.TUNED) == set(launch.WARPS["default"])


TINY = {"rounds": 1, "kernels": ("scale_gradient",)}


def test_only_the_kernels_asked_for_are_tuned_and_late_ones_named(tune: ModuleType) -> None:
    rows = list(tune.choices(tune.SMALL, CPU, **TINY))
    assert [(row["tuned"], row["block"]) for row in rows] == [
        ("scale_gradient", block) for block, _ in launch.WARPS["default"]["scale_gradient"]
    ]
    assert {row["verdict"] for row in rows} == {"right"}
    late = list(tune.choices(tune.SMALL, CPU, deadline=0.0, **TINY))
    assert {row["reason"] for row in late} == {"out of time"}
    assert [row["best"] for row in late] == [row["present"] for row in late]


def test_what_was_not_tuned_stays(tune: ModuleType) -> None:
    rows = [
        {"tuned": "scale_gradient", "block": 512, "best": 16, "verdict": "right"},
        {"tuned": "scale_gradient", "block": 1024, "best": 8, "verdict": "skipped"},
        {"tuned": tune.CHUNKS, "block": None, "best": 2**27, "verdict": "right"},
    ]
    before = [list(pair) for pair in launch.WARPS["default"]["scale_gradient"]]
    warps, chunk_bytes = tune.with_choices("sm_80", rows)
    assert warps["sm_80"] == {"scale_gradient": [[512, 16], *before[1:]]}
    assert warps["default"] == launch.WARPS["default"]
    assert chunk_bytes == {**launch.CHUNK_BYTES, "sm_80": 2**27}
    assert launch.WARPS["default"]["scale_gradient"] == before


def test_the_table_goes_where_it_is_told(tune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    assert tune.main(["--dry-run", "--kernels", "scale_gradient", "--out", str(file)]) == 0
    assert set(json.loads(file.read_text(encoding="utf-8"))["warps"]["cpu"]) == {"scale_gradient"}
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(file))


def test_shapes_give_the_blocks(tune: ModuleType) -> None:
    shape = tune.Shape(batch=1)
    for kernel, rows in launch.WARPS["default"].items():
        for block, _ in rows:
            at = tune.TUNED[kernel].shape(shape, block)
            assert block in (at.values, at.codes, at.grid[1] * at.grid[2]), kernel


def test_the_file_is_as_written(tune: ModuleType) -> None:
    text = tune.text_of(launch.WARPS, launch.CHUNK_BYTES)
    assert text == tune.TABLE.read_text(encoding="utf-8")


def test_a_change_must_pay(tune: ModuleType) -> None:
    assert tune.better({1: 1.0, 2: 0.99}, 1) == 1
    assert tune.better({1: 1.0, 2: 0.9, 4: 0.95}, 1) == 2
    assert tune.better({2: 5.0, 4: 4.0}, 1) == 4  # the current one computes wrong results
    assert tune.better({}, 1) == 1


def test_only_right_candidates_are_timed(tune: ModuleType) -> None:
    seen = set()

    def ours(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        count = launch.warps("scale_gradient", gradient.shape[1], gradient.device)
        seen.add(count)
        if count == 16:
            raise RuntimeError("too many")
        return gradient * scale[:, None] + (count == 2)

    operator = tune.replace(tune.SCALE_GRADIENT, providers=lambda shape, device: {"ours": ours})
    shape = tune.Shape(batch=1, size=32, codes=8, dtype=torch.float32)
    before = launch.WARPS
    counts = {count: tune.launched_with("cpu", {"scale_gradient": count}) for count in (1, 2, 16)}
    found = tune.times([operator], shape, CPU, counts, rounds=1)
    assert seen == {1, 2, 16}
    assert set(found) == {1}
    assert launch.WARPS is before
    assert "cpu" not in launch.WARPS


def test_chunks_are_set_within(tune: ModuleType) -> None:
    before = launch.chunk_rows(512, torch.float32, CPU)
    with tune.launched_with("cpu", {}, 2**20):
        assert launch.chunk_rows(512, torch.float32, CPU) == 512
    assert launch.chunk_rows(512, torch.float32, CPU) == before


@pytest.mark.slow
def test_dry_run_is_marked_and_writes_elsewhere(tune: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before = tune.TABLE.read_bytes()
    assert tune.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("NOT a GPU result")
    assert shown[-1].startswith("NOT a GPU result")
    assert not any("ms" in cell.split() for cell in shown[1].split("|"))
    written = json.loads(Path(shown[-1].split(" to ")[1]).read_text(encoding="utf-8"))
    assert set(written["warps"]["cpu"]) == set(launch.WARPS["default"])
    assert tune.TABLE.read_bytes() == before


def test_needs_a_gpu(tune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
