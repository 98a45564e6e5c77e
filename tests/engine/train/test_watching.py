"""Progress and other output of a run, and signals at inconvenient moments."""

import json
import os
import signal
import sys
import threading
import time
import types

import pytest
import torch

from mam2.engine.checkpoints import checkpoint, lock
from mam2.engine.checkpoints.saver import Saver
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.errors import UserError
from mam2.engine.runtime import signals
from mam2.engine.runtime.log import read_log
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.runs import same_weights

RUN = {"compile": False, "log_every": 2}  # as in `finished`


@pytest.mark.slow
def test_gradient_norms_of_the_parts_make_up_the_whole(finished):
    line = read_log(finished)[-1]
    parts = ("encoder", "regressor", "appearance_decoder", "motion_decoder")
    whole = sum(line[f"gradient/{part}"] ** 2 for part in parts) ** 0.5
    assert line["gradient/norm"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_profiled_steps_leave_a_trace_and_a_table_and_change_no_bit(finished, clips, tmp_path, small):
    pretrain(small(run=RUN | {"profile": 2}), clips, tmp_path, progress=False)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert sum(event.get("name") == "mam2::masked_loss" for event in trace["traceEvents"]) >= 2
    assert "mam2::masked_loss" in (tmp_path / "profile" / "operators.txt").read_text()
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_tracker_gets_the_numbers_of_the_log(clips, tmp_path, monkeypatch, small):
    messages = []
    package = types.ModuleType("trackio")
    package.init = lambda **options: messages.append(options)
    package.log = lambda values, step: messages.append((step, values))
    package.finish = lambda: messages.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", package)
    pretrain(small(run=RUN | {"tracker": "trackio"}), clips, tmp_path / "mine", progress=False)
    assert messages[0] == {"project": "mam2", "name": "mine"}
    assert messages[-1] == "finish"
    assert [step for step, _ in messages[1:-1]] == [2, 4, 6, 8]
    assert messages[1][1]["loss/motion"] == read_log(tmp_path / "mine")[0]["loss/motion"]


def test_a_tracker_that_is_not_installed_is_one_clear_line(clips, tmp_path, monkeypatch, small):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run\.tracker wandb: .*pip install wandb"):
        pretrain(small(run=RUN | {"tracker": "wandb"}), clips, tmp_path, progress=False)


@pytest.mark.slow
def test_deterministic_algorithms_run_and_are_switched_off_again(finished, clips, tmp_path, small):
    pretrain(small(run=RUN | {"deterministic": True}), clips, tmp_path, progress=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_signal_while_the_loader_hangs_saves_what_is_done(finished, clips, tmp_path, monkeypatch, small):
    original, calls = Prefetcher.__next__, []
    config = small(run=RUN, tokenizer={"path": str(finished / "tokenizer.safetensors")})

    def hangs(self):
        calls.append(None)
        if len(calls) == 4:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Prefetcher, "__next__", hangs)
        result = pretrain(config, clips, tmp_path, progress=False)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    assert result.checkpoint.is_dir()
    assert pretrain(config, clips, tmp_path, resume=True, progress=False).step == 8
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_signal_in_the_first_step_ends_at_once(finished, clips, tmp_path, monkeypatch, small):
    """The first step compiles for minutes; a signal may end the run then, because there is no step to save."""
    config = small(run=RUN, tokenizer={"path": str(finished / "tokenizer.safetensors")})
    monkeypatch.setattr(PretrainStep, "_gradients", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(signals.Stopped, match="SIGTERM"):
        pretrain(config, clips, tmp_path, progress=False)
    assert checkpoint.newest(tmp_path) is None
    assert not (tmp_path / lock.FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.ENDING)
def test_every_signal_that_ends_saves_first(number, finished, clips, tmp_path, monkeypatch, small):
    """The signal is sent twice, as under torchrun: by the terminal and by torchrun."""
    config = small(run=RUN, tokenizer={"path": str(finished / "tokenizer.safetensors")})
    original, calls = PretrainStep._gradients, []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(PretrainStep, "_gradients", interrupted)
    result = pretrain(config, clips, tmp_path, progress=False)
    assert (result.step, result.signal) == (2, number)
    assert checkpoint.why_damaged(result.checkpoint) is None


def test_a_second_ctrl_c_ends_at_once_and_a_hangup_that_nohup_ignores_ends_nothing(monkeypatch):
    monkeypatch.setattr(signals, "SAME_S", 0.0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignal() as stop, stop.looping():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(signals.Stopped):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_signal_during_a_checkpoint_leaves_it_whole(finished, clips, tmp_path, monkeypatch, small):
    config = small(run=RUN | {"save_every": 2}, tokenizer={"path": str(finished / "tokenizer.safetensors")})
    original, calls = checkpoint.write, []

    def slow(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        result = pretrain(config, clips, tmp_path, progress=False)
    assert 2 <= result.step < 8
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        assert checkpoint.why_damaged(folder) is None
    assert pretrain(config, clips, tmp_path, resume=True, progress=False).step == 8
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_comes_after_the_log_of_its_steps(clips, tmp_path, monkeypatch, small):
    """Otherwise a run that is killed in between would lose lines, because the resumed run starts after them."""
    original, logged = Saver.save, []

    def save(self, step, *arguments):
        logged.append((step, read_log(tmp_path)[-1]["step"]))
        return original(self, step, *arguments)

    monkeypatch.setattr(Saver, "save", save)
    config = small(run={"compile": False, "log_every": 1, "save_every": 2})
    pretrain(config, clips, tmp_path, progress=False)
    assert logged == [(2, 2), (4, 4), (6, 6), (8, 8)]


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once_and_harms_nothing(clips, tmp_path, monkeypatch, small):
    from mam2.engine.tokenizer import prepare as tokenizer

    original = tokenizer.train_vqgan

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "train_vqgan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small(run=RUN), clips, tmp_path, progress=False)
    assert checkpoint.newest(tmp_path) is None
    assert not (tmp_path / "tokenizer.safetensors").exists()
    assert pretrain(small(run=RUN), clips, tmp_path, progress=False).step == 8


def test_a_step_on_a_gpu_waits_for_nothing(small):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; on a CPU test_pretrain traces a step without values")
    from mam2.engine.model.mam2 import MAM2
    from mam2.engine.runtime.distributed import World

    config = small(loss={"balance": "gradient"}, optim={"batch": 4, "clip_norm": 1.0})
    device = torch.device("cuda")
    step = PretrainStep(config, MAM2(config, 16), device, World())
    video = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8, device=device)
    codes = torch.zeros(4, 64, dtype=torch.int64, device=device)
    step(0, [(video, codes)], 1e-3, inspect=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1, [(video, codes)], 1e-3, inspect=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
