"""Tuning chooses among right candidates only, and a dry run leaves the table as it is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mam2.kernels import launch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tune() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[1])
        yield importlib.import_module("benchmarks.tune")


def test_every_kernel_is_tuned(tune: ModuleType) -> None:
    assert set(tune.TUNED) == set(launch.WARPS["default"])


def test_shapes_give_the_blocks(tune: ModuleType) -> None:
    shape = tune.Shape(batch=1)
    for kernel, rows in launch.WARPS["default"].items():
        for block, _ in rows:
            at = tune.TUNED[kernel].shape(shape, block)
            assert block in (at.values, at.codes, at.grid[1] * at.grid[2]), kernel


def test_the_file_is_as_written(tune: ModuleType) -> None:
    assert tune.text_of(launch.WARPS, launch.CHUNK_BYTES) == tune.TABLE.read_text(encoding="utf-8")


def test_written_at_once(tune: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text("old")
    tune.write("new", file)
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_change_must_pay(tune: ModuleType) -> None:
    assert tune.better({1: 1.0, 2: 0.99}, 1) == 1
    assert tune.better({1: 1.0, 2: 0.9, 4: 0.95}, 1) == 2
    assert tune.better({2: 5.0, 4: 4.0}, 1) == 4  # the present one gives wrong results
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
