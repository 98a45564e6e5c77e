"""The folder of compiled code: one per user, another if the environment says so, none if it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mam2.engine.runtime import compile_cache
from mam2.engine.runtime.compile_cache import VARIABLE, keep_compiled_code


def test_runs_of_a_user_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    folder = keep_compiled_code()
    assert folder == str(tmp_path / "mam2" / "compiled") == os.environ[VARIABLE]
    assert Path(folder).is_dir()
    assert keep_compiled_code() == folder


def test_the_home_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_compiled_code() == str(tmp_path / ".cache" / "mam2" / "compiled")


def test_a_folder_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/somewhere/else")
    assert keep_compiled_code() == "/somewhere/else" == os.environ[VARIABLE]


@pytest.mark.parametrize("problem", ["a file", "read-only"])
def test_without_a_folder_torch_keeps_its_own(problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if problem == "a file":
        (tmp_path / "mam2").write_text("")
    else:
        monkeypatch.setattr(compile_cache.os, "access", lambda path, mode: False)
    assert keep_compiled_code() == ""
    assert os.environ[VARIABLE] == ""
