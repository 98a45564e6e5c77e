"""`make sanitize` passes on the verdict of compute-sanitizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.benchmarks import module


def test_sanitizer_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sanitize = module("sanitize")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "said"), [(0, 0, "clean"), (99, 1, "FOUND"), (3, 1, "NOT ALL"), (1, 1, "FAILED")]
)
def test_sanitizer_passes_on_the_verdict(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    status: int,
    said: str,
) -> None:
    sanitize = module("sanitize")
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\n[ "$1 $3" = "--tool --error-exitcode" ] && exit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main([]) == status
    assert capsys.readouterr().out.count(said) == 1
    assert sanitize.main(["--tools", *sanitize.TOOLS]) == status
    assert capsys.readouterr().out.count(said) == 2
