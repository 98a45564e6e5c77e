"""The cluster examples: the Slurm script with a fake Slurm, and the names in the container file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.data.manifest import Manifest
from tests.helpers.commands import ENVIRONMENT, free_port, wait_for_first_step

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "examples" / "cluster"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
echo "${tasks[@]}" > "$SLURM_STAND_IN/tasks"
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost ;;
    *) echo "$@" >> "$SLURM_STAND_IN/asked" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job with two tasks, with fake srun and scontrol."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_STAND_IN": str(tmp_path)}
    return {**ENVIRONMENT, **job, "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_a_job_near_its_limit_saves_requeues_itself_and_continues(
    tmp_path: Path, slurm: dict[str, str], small: Callable[..., PretrainConfig], videos: Manifest
) -> None:
    config = small(optim={"batch": 8, "epochs": 400.0}, run={"log_every": 1})
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(config)))
    folder = Path(os.path.commonpath([video.path for video in videos.videos]))
    run = tmp_path / "run"
    command = ["bash", str(CLUSTER / "slurm.sh"), str(tmp_path / "recipe.json"), "--data", str(folder)]
    command += ["--out", str(run), "--data.threads", "1"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=slurm, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    steps = []
    for _ in range(2):
        log = run / "log.jsonl"
        if log.exists():
            log.unlink()
        process = start()
        wait_for_first_step(run, process)
        assert process.poll() is None, process.communicate()[0]
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGUSR1)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 138, said
        newest = checkpoint.newest(run)
        assert newest is not None
        steps.append(int(re.sub(r"\D", "", newest.name)))
    assert 0 < steps[0] < steps[1]
    assert (tmp_path / "asked").read_text().splitlines() == [f"requeue {slurm['SLURM_JOB_ID']}"] * 2


def test_the_container_has_nvdec_a_compiler_and_an_extra_that_exists() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    capabilities = re.search(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", text)
    extra = re.search(r"ARG EXTRA=(\w+)", text)
    assert capabilities is not None
    assert extra is not None
    assert "video" in capabilities.group(1).split(","), "without it libnvcuvid.so is not in the container"
    assert re.search(r"apt-get install .*\bg\+\+", text)
    assert re.search(rf'^\s+"{extra.group(1)}": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
