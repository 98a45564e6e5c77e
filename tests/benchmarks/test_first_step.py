"""The time of the first step: a cold cache is empty, a warm one is what the first process left."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.first_step")


def test_the_second_process_finds_the_code_of_the_first(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []

    def run(objective: str, batch: int, precision: str, way: str, cache: Path) -> float:
        seen.append((way, len(list(cache.iterdir()))))
        (cache / "code").touch()
        return 40.0 if seen[-1][1] == 0 else 4.0

    monkeypatch.setattr(bench, "in_a_process", run)
    assert bench.main(["--ways", "compiled blocks", "compiled", "--batch", "2"]) == 0
    assert seen == [("compiled blocks", 0), ("compiled blocks", 1), ("compiled", 0), ("compiled", 1)]
    assert [line.split("|")[5:7] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        [" 40     ", " 4      "]
    ] * 2


def test_a_process_gets_the_cache_and_its_failure_is_told(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Done:
        returncode, stdout, stderr = 0, "note\n12.5\n", "no compiler"

    given: dict[str, Any] = {}
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **more: given.update(more, command=command) or Done)
    assert bench.in_a_process("videomae", 2, "float32", "compiled", tmp_path) == 12.5
    assert given["env"][bench.CACHE] == str(tmp_path)
    assert given["command"][3:] == [
        *("--here", "--objective", "videomae", "--batch", "2", "--precision", "float32", "--ways", "compiled"),
    ]
    Done.returncode = 1
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.in_a_process("videomae", 2, "float32", "compiled", tmp_path)


@pytest.mark.slow
def test_it_runs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = importlib.import_module("benchmarks.bench_step").TINY
    monkeypatch.setattr(bench, "SMALL", small)
    bench.main(["--here", "--ways", "eager", "--batch", "1", "--precision", "float32"])
    assert float(capsys.readouterr().out) > 0
