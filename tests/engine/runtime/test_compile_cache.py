"""The folder of compiled code: one per user, another if the environment says so, none if it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mam2.engine.config.training import RunConfig
from mam2.engine.runtime import compile_cache, device
from mam2.engine.runtime.compile_cache import VARIABLE, keep_compiled_code

RANK = """
import torch
from mam2.engine.config.training import RunConfig
from mam2.engine.runtime.device import compiler
from torch._dynamo.utils import counters

def part(x):
    return (x.sin() + 1).sum()

compiler(RunConfig(), torch.device("cpu"))[0](part)(torch.ones(8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


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


def test_the_folder_that_importing_torchs_compiler_chooses_is_no_choice(tmp_path: Path) -> None:
    """A run imports torch._dynamo with its optimizer, before it asks for a compiler."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    code = "import mam2.engine.train.pretrain, mam2.engine.runtime.compile_cache as c; print(c.keep_compiled_code())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "mam2" / "compiled")


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


def test_a_run_that_compiles_keeps_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(device, "why_not_compile", lambda _: None)
    device.compiler(RunConfig(compile=False), torch.device("cpu"))
    assert os.environ[VARIABLE] == ""
    device.compiler(RunConfig(compile=True), torch.device("cpu"))
    assert os.environ[VARIABLE] == str(tmp_path / "mam2" / "compiled")


@pytest.mark.slow
@pytest.mark.skipif(bool(device.why_not_compile(torch.device("cpu"))), reason="no C++ compiler")
def test_another_rank_finds_the_code_of_the_first(tmp_path: Path) -> None:
    """Each has its own folder for temporary files, torch's default, as on different machines.

    On GPUs torch's key has the number of the GPU, so that there only ranks with the same number share code.
    """
    found = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        environment |= {
            "XDG_CACHE_HOME": str(tmp_path),
            "TMPDIR": str(tmp_path / rank),
            "RANK": rank,
            "LOCAL_RANK": rank,
        }
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found == [["0", "1"], ["1", "0"]]
