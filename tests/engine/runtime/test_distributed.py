"""Several processes with gloo: the numbers of one process, one list of skipped files, a common end."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.training import micro_batches_per_step
from mam2.engine.errors import UserError
from mam2.engine.runtime.log import read_log
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import (
    ENVIRONMENT,
    MAM2_COMMAND,
    TORCHRUN,
    free_port,
    run_program,
    torchrun,
    wait_for_first_step,
)
from tests.helpers.runs import newest_weights

RANKS = Path(__file__).with_name("ranks.py")


CASES = (
    "ddp-gradient-0-adamw-codes",
    "ddp-fixed-2-adamw-codes",
    "fsdp-gradient-0-adamw-codes",
    "ddp-gradient-2-muon-codes",
    "fsdp-gradient-0-muon-codes",
    "ddp-fixed-2-adamw-latents",
    "fsdp-fixed-0-adamw-latents",
)
"""Sharding, balance, micro-batch, optimizer and appearance target."""
ALONE = (
    "ddp-fixed-0-adamw-codes",
    "ddp-gradient-0-adamw-codes",
    "ddp-gradient-0-muon-codes",
    "ddp-fixed-0-adamw-latents",
)


def _of_all_processes(case):
    """The part of a case that does not depend on the number of processes."""
    _, balance, _, optimizer, target = case.split("-")
    return balance, optimizer, target


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process, by balance, optimizer and target."""
    out = tmp_path_factory.mktemp("alone")
    done = run_program([sys.executable, RANKS, out, *ALONE])
    assert done.returncode == 0, done.stderr[-3000:]
    return {_of_all_processes(path.name): torch.load(path) for path in out.iterdir()}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Results of two processes, by case."""
    out = tmp_path_factory.mktemp("together")
    done = torchrun(2, RANKS, out, *CASES)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: torch.load(path) for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, alone, together):
    """Losses, gradient norms, every gradient, and the weights after three clipped steps."""
    micro_batch = case.split("-")[2]
    found, single = together[case], alone[_of_all_processes(case)]
    assert found.keys() == single.keys()
    for name, value in single.items():
        if int(micro_batch) and name.startswith("gradient/"):
            continue  # norms are summed over passes
        # AdamW's first steps are near sign(gradient): rounding shows where a gradient is almost zero
        tolerance = {"rtol": 2e-3, "atol": 1e-4} if name.startswith("weight") else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_a_run_of_two_continues_alone(sharding, optimizer, clips, finished, tmp_path, small):
    """Two processes train, stop at a checkpoint, and one goes on: the log is that of one process from the start."""
    config = small(
        optim={"batch": 16, "epochs": 3.0, "warmup_epochs": 0.5, "name": optimizer},
        run={"precision": "float32", "compile": False, "log_every": 1, "save_every": 4, "sharding": sharding},
        loss={"balance": "gradient"},
        tokenizer={"path": str(finished / "tokenizer.safetensors")},
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    done = torchrun(2, "-m", "mam2.engine", "pretrain", recipe, "--data", clips, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: 12 steps; 32 videos used, 0 unusable") == 1
    assert "2 processes" in done.stdout
    last = checkpoint.newest(tmp_path / "two")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    pretrain(config, clips, tmp_path / "two", resume=True, progress=False)
    text = (tmp_path / "two" / "log.txt").read_text()
    assert "resume  from" in text
    assert "8 done of 12" in text
    pretrain(config, clips, tmp_path / "one", progress=False)
    for ours, theirs in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        for name in ("loss/appearance", "loss/motion", "gradient/appearance", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-3), (ours["step"], name)
    weights = [newest_weights(tmp_path / run) for run in ("two", "one")]
    for name in weights[0]:
        close = torch.isclose(weights[0][name], weights[1][name], rtol=2e-2, atol=2e-4).float().mean()
        assert close > 0.95, name


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(clips, tmp_path, small):
    config = small(optim={"batch": 16, "epochs": 5000.0}, run={"compile": False, "log_every": 1, "save_every": 1000})
    recipe, run = tmp_path / "recipe.json", tmp_path / "run"
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    port = free_port()
    command = [*MAM2_COMMAND, "pretrain", recipe, "--data", clips, "--out", run]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command,
            env=ENVIRONMENT | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for_first_step(run, processes[0])
        processes[1].send_signal(signal.SIGTERM)
        messages = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, messages
    assert "stopped by SIGTERM after step" in messages[0]
    assert checkpoint.newest(run) is not None


@pytest.mark.slow
def test_one_failing_process_ends_all_with_one_message(clips, tmp_path, small):
    config = small(optim={"batch": 16, "epochs": 5000.0}, run={"compile": False, "log_every": 1})
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "fails.py").write_text(
        "import os, sys, torch\n"
        "from mam2.engine import cli\n"
        "from mam2.engine.train.step import PretrainStep\n"
        "original = PretrainStep.arguments\n"
        "def arguments(self, step, *rest):\n"
        "    if step == 3 and os.environ['RANK'] == '1':\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return original(self, step, *rest)\n"
        "PretrainStep.arguments = arguments\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["pretrain", tmp_path / "recipe.json", "--data", clips, "--out", tmp_path / "run"]
    done = torchrun(2, tmp_path / "fails.py", *arguments)
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("mam2: error:")]
    assert len(messages) == 1, done.stderr[-3000:]
    assert "rank 1: out of GPU memory with 8 clips per pass" in messages[0]
    assert "Traceback (most recent call last)" not in done.stderr.partition("mam2: error:")[0]


@pytest.mark.slow
def test_ranks_name_each_unusable_file_once(clips, tmp_path, small):
    """Files that break in the middle on both ranks: rank 0 alone writes the list, each file once."""
    data = tmp_path / "data"
    data.mkdir()
    for number, file in enumerate(sorted(clips.rglob("*.webm"))):
        content = file.read_bytes()
        if number % 4 == 0:
            content = content[: len(content) // 3] + bytes(len(content) - len(content) // 3)
        (data / f"{number}.webm").write_bytes(content)
    config = small(optim={"batch": 16, "epochs": 4.0}, data={"views": 1, "threads": 1}, run={"compile": False})
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(config)))
    done = torchrun(
        2, "-m", "mam2.engine", "pretrain", tmp_path / "recipe.json", "--data", data, "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = tmp_path / "run" / "skipped.tsv"
    named = [line.split("\t")[0] for line in skipped.read_text().splitlines()] if skipped.exists() else []
    assert len(named) == len(set(named))
    assert f"{len(named)} unusable" in done.stdout


@pytest.mark.slow
def test_two_nodes_meet_by_the_documented_command(tmp_path):
    """Two launchers with a rendezvous, as on two machines."""
    port = free_port()
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "mam2"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [*command, RANKS, tmp_path, "ddp-fixed-0-adamw-codes"],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    messages = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], messages
    assert (tmp_path / "ddp-fixed-0-adamw-codes").is_file()


def test_a_batch_is_shared_out_evenly_or_refused(small):
    config = small(optim={"batch": 24, "micro_batch": 4}, data={"views": 2})
    assert [micro_batches_per_step(config, processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UserError, match=r"optim\.batch 24: expected a multiple of 10 \(5 processes × data\.views 2\)"):
        micro_batches_per_step(config, 5)
