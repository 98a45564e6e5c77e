"""A run that is killed many times ends with the same bits as one that is not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.runtime.log import read_log

KILLS = 12
TIMES = {"time", "data_wait", "decoded_frames_per_s", "clips_per_s", "step_ms", "mfu", "memory_gib"}
TIMES |= {"host/wait_ms", "host/prepare_ms", "host/step_ms"}


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit(tmp_path, small, synthetic_clips):
    synthetic_clips(tmp_path / "clips", train=32)
    config = small(
        optim={"batch": 16, "epochs": 20.0},
        run={"compile": False, "log_every": 1, "save_every": 2, "keep": 2},
        data={"views": 2, "threads": 1},
    )
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, Path(__file__).with_name("kill_points.py"), tmp_path / "recipe.json"]
    command += [tmp_path / "clips" / "train", tmp_path, str(KILLS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kills = [line for line in done.stdout.splitlines() if line.startswith("killed after step")]
    assert len(kills) == KILLS
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = [line["step"] for line in read_log(whole)]
    assert steps == list(range(1, 81))
    for ours, theirs in zip(read_log(killed), read_log(whole), strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        tensors = [load_file(checkpoint.newest(run) / name) for run in (whole, killed)]
        assert tensors[0].keys() == tensors[1].keys()
        for key in tensors[0]:
            assert torch.equal(tensors[0][key], tensors[1][key]), key
