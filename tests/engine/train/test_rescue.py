"""Errors that end a run lose nothing: valid weights are saved first; only steps on the disk count as done."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.lock import RunLock
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.errors import UserError
from mam2.engine.runtime import device as runtime
from mam2.engine.runtime import distributed, signals
from mam2.engine.runtime.distributed import World
from mam2.engine.tokenizer import prepare as tokenizers
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.runs import same_weights

RUN = {"compile": False, "log_every": 1}


@pytest.fixture
def config(finished, small):
    return small(run=RUN, tokenizer={"path": str(finished / "tokenizer.safetensors")})


def failing(original, number, error):
    """`original`, but call `number` raises `error`."""
    calls = []

    def call(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            raise error
        return original(*arguments, **options)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name", "error", "said"),
    [
        (Prefetcher, "__next__", UserError("too many videos"), "too many videos; the state after step 3 is saved in "),
        (Prefetcher, "__next__", ZeroDivisionError("a mistake"), "a mistake"),
        (PretrainStep, "_gradients", MemoryError("no room"), "no room"),
        (PretrainStep, "_gradients", torch.OutOfMemoryError("CUDA out of memory.\nMore"), "is saved in "),
    ],
)
def test_an_error_saves_the_last_whole_step_first(
    place, name, error, said, config, finished, clips, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(getattr(place, name), 4, error))
        with pytest.raises(UserError if isinstance(error, torch.OutOfMemoryError) else type(error), match=said):
            pretrain(config, clips, tmp_path, progress=False)
    saved = checkpoint.newest(tmp_path)
    assert saved == checkpoint.folder_of(tmp_path, 3)
    assert checkpoint.why_damaged(saved) is None
    text = (tmp_path / "log.txt").read_text()
    assert f"error   the state after step 3 is saved in {saved}" in text
    assert "\nended   " in text
    assert not (tmp_path / "lock").exists()
    pretrain(config, clips, tmp_path, resume=True, progress=False)
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_half_a_step_is_not_saved(config, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", failing(torch.optim.AdamW.zero_grad, 3, RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        pretrain(config, clips, tmp_path, progress=False)
    assert checkpoint.newest(tmp_path) is None
    assert "the state after step 2 is not saved (its last step is incomplete)" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_recorded_step_that_fails_is_not_taken_for_sound(config, clips, tmp_path, monkeypatch):
    """A CUDA graph does not call the optimizer's hooks, so that it is unknown whether the update was done."""
    original, calls = PretrainStep._update, []

    def replayed(self, inspect=False):
        hooks = dict(self.optimizer._optimizer_step_pre_hooks)
        self.optimizer._optimizer_step_pre_hooks.clear()
        values = original(self, inspect)
        self.optimizer._optimizer_step_pre_hooks.update(hooks)
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("after the replay")
        return values

    monkeypatch.setattr(PretrainStep, "_update", replayed)
    with pytest.raises(RuntimeError, match="after the replay"):
        pretrain(config, clips, tmp_path, progress=False)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.slow
def test_a_run_that_lost_its_folder_writes_nothing_more(config, clips, tmp_path, monkeypatch):
    original, calls = PretrainStep._gradients, []
    locks = []
    acquire = RunLock.acquire
    monkeypatch.setattr(RunLock, "acquire", lambda self, info: locks.append(self) or acquire(self, info))

    def step(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            locks[0].lost = True
            raise ZeroDivisionError
        return original(self, *arguments)

    monkeypatch.setattr(PretrainStep, "_gradients", step)
    with pytest.raises(ZeroDivisionError):
        pretrain(config, clips, tmp_path, progress=False)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("of safetensors"), MemoryError("no room")])
def test_whatever_fails_in_the_checkpoint_thread_is_an_error(error, config, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, 1, error))
    with pytest.raises(type(error), match=str(error)):
        pretrain(config, clips, tmp_path, progress=False)
    assert "done:" not in (tmp_path / "log.txt").read_text()


def test_a_package_that_is_not_installed_writes_checkpoints_too(monkeypatch):
    checkpoint.code_version.cache_clear()
    missing = checkpoint.importlib.metadata.PackageNotFoundError("mam2")
    monkeypatch.setattr(checkpoint.importlib.metadata, "version", failing(None, 1, missing))
    try:
        assert checkpoint.code_version().startswith("uninstalled ")
    finally:
        checkpoint.code_version.cache_clear()


@pytest.mark.slow
def test_moved_data_is_found_by_its_content(config, finished, clips, tmp_path, monkeypatch, small, synthetic_clips):
    run, there, moved = tmp_path / "run", tmp_path / "there", tmp_path / "elsewhere" / "new"
    shutil.copytree(clips, there)
    with monkeypatch.context() as patch:
        patch.setattr(Prefetcher, "__next__", failing(Prefetcher.__next__, 4, ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            pretrain(config, there, run, progress=False)
    moved.parent.mkdir()
    there.rename(moved)
    with pytest.raises(UserError, match="there: no such file or folder"):
        pretrain(config, there, run, resume=True, progress=False)
    other = tmp_path / "other"
    synthetic_clips(other, train=8)
    for file in sorted((other / "train").rglob("*.*"))[:20]:
        if file.is_file():
            file.write_bytes(file.read_bytes() + b"other")
    with pytest.raises(UserError, match=r"lacks \d+ of the 32 videos on which the run was trained"):
        pretrain(config, other / "train", run, resume=True, progress=False)
    assert pretrain(config, moved, run, resume=True, progress=False).skipped == 0
    assert "resume  32 of 32 videos found at other paths by their content" in (run / "log.txt").read_text()
    assert str(moved) in (run / "manifest.jsonl").read_text()
    assert same_weights(finished, run)


@pytest.mark.slow
def test_a_tokenizer_of_a_killed_run_is_taken_for_the_same_settings_only(clips, tmp_path, monkeypatch, small):
    trained = []
    original = tokenizers.train_vqgan
    monkeypatch.setattr(tokenizers, "train_vqgan", lambda *a, **k: trained.append(None) or original(*a, **k))
    for codes, expected in ((16, 1), (16, 1), (32, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(PretrainStep, "_gradients", failing(None, 1, ZeroDivisionError()))
            with pytest.raises(ZeroDivisionError):
                pretrain(small(run=RUN, tokenizer={"codes": codes}), clips, tmp_path / "run", progress=False)
        assert len(trained) == expected
    fewer = tmp_path / "fewer"
    shutil.copytree(clips, fewer)
    next(path for path in sorted(fewer.rglob("*")) if path.is_file()).unlink()
    small_config = small(run=RUN, tokenizer={"codes": 32})
    pretrain(small_config, fewer, tmp_path / "run", progress=False)
    assert len(trained) == 3
    pretrain(small_config, fewer, tmp_path / "run", resume=True, progress=False)
    assert len(trained) == 3


def test_a_compiler_that_fails_is_one_line_with_the_remedy():
    from torch._inductor.exc import CppCompileError, InductorError

    output = "x.cpp: In function 'kernel'\nx.cpp:3: fatal error: omp.h: No such file\n"
    inner = CppCompileError(["g++", "x.cpp"], output)
    message = runtime.compile_problem(InductorError(inner, None))
    assert message is not None
    assert "x.cpp:3: fatal error: omp.h: No such file" in message
    assert "--run.no-compile" in message
    assert "\n" not in message
    outer = RuntimeError("outer")
    outer.__cause__ = inner
    assert "fatal error" in (runtime.compile_problem(outer) or "")
    assert runtime.compile_problem(ZeroDivisionError()) is None


@pytest.mark.parametrize(
    ("count", "local_rank", "expected"),
    [(1, "3", 0), (4, "3", 3), (4, "0", 0), (2, "3", "LOCAL_RANK is 3, but torch sees 2")],
)
def test_each_process_takes_a_gpu_that_it_sees(count, local_rank, expected, monkeypatch, small):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    config = small(run={"device": "cuda"}).run
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            runtime.pick_device(config)
    else:
        assert runtime.pick_device(config) == torch.device("cuda", expected)


def test_losing_the_others_and_never_reaching_them_are_told_apart(monkeypatch, capsys):
    """NCCL's errors look alike: before the first sum the cause is reported as an error, later as lost processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    error = RuntimeError("\nNCCL error in: x.cpp, unhandled system error\n/dev/shm: No space left on device")
    monkeypatch.setattr(distributed.dist, "init_process_group", failing(None, 1, error))
    with (
        pytest.raises(distributed.RankError, match=r"rank 1: gloo cannot connect the processes: NCCL error in"),
        distributed.join(torch.device("cpu")),
    ):
        pytest.fail("joined")
    monkeypatch.setattr(distributed, "_connect", lambda *_: World(1, 2))
    with (
        pytest.raises(distributed.PeerFailed, match=r"rank 1: lost the other processes: NCCL error in"),
        distributed.join(torch.device("cpu")),
    ):
        raise error
    from mam2.engine import cli
    from mam2.engine.commands import doctor

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(doctor, "run", failing(None, 1, distributed.PeerFailed("rank 1: lost the other processes: x")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "mam2: rank 1: lost the other processes: x\n"


SETTING_UP = """
import sys, threading, time
from mam2.engine import cli
from mam2.engine.runtime import signals
signals.GRACE_S = 0.3
class Verb:
    @staticmethod
    def run(arguments):
        print("ready", flush=True)
        try:
            time.sleep(60)
        except BaseException:
            if arguments == ["swallows"]:
                time.sleep(60)  # as a library that catches everything does
            raise
        finally:
            if arguments == ["threads"]:
                threading.Thread(target=time.sleep, args=[60]).start()
sys.modules["mam2.engine.commands.doctor"] = Verb
cli.main(["doctor", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.ENDING)
@pytest.mark.parametrize("way", ["", "swallows", "threads"])
def test_a_signal_in_set_up_ends_the_command_with_its_status_whatever_libraries_do(number, way):
    command = [sys.executable, "-c", SETTING_UP, *([way] if way else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        message = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert message.startswith(f"mam2: stopped by {signal.Signals(number).name}; saved files are complete")
    assert message.count("\n") == 1


@pytest.mark.slow
def test_the_first_step_says_that_it_compiles(config, clips, tmp_path, monkeypatch):
    """An error before the first batch, which compiles the tokenizer; torch.compile is stubbed."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    monkeypatch.setattr(runtime, "why_not_compile", lambda _: None)
    monkeypatch.setattr(Prefetcher, "__next__", failing(Prefetcher.__next__, 1, ZeroDivisionError()))
    values = dataclasses.replace(config, run=dataclasses.replace(config.run, compile=True))
    with pytest.raises(ZeroDivisionError):
        pretrain(values, clips, tmp_path, progress=False)
    text = (tmp_path / "log.txt").read_text()
    assert "step    the first step compiles the model" in text
    assert f"The code is kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']} for later runs" in text
    assert "--run.no-compile" in text
    pretrain(values, clips, tmp_path, progress=False)
    assert (tmp_path / "log.txt").read_text().count("step    the first step is done, compiled in") == 1


@pytest.mark.slow
def test_fine_tuning_ends_with_its_best_accuracy(clips, tmp_path, small_finetuning):
    from mam2.engine.train.finetune import finetune
    from mam2.engine.train.finetune_tasks import ACCURACY

    finetune(small_finetuning(), clips, tmp_path, val=clips, encoder=None, progress=False)
    best = checkpoint.read_state(tmp_path / checkpoint.BEST)
    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("best ")]
    assert line.startswith(f"best    after step {best['step']}: {ACCURACY} {best[ACCURACY]:.4g}")
    assert line.endswith(str(tmp_path / checkpoint.BEST))
