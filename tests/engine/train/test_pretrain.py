"""Pre-training end to end on small encoded files: it resumes exactly, stops at signals, names unusable inputs."""

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.train.objective import MAM2Objective
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from mam2.kernels import tube_mask
from tests.helpers.commands import MAM2_COMMAND, wait_for_first_step
from tests.helpers.paths import ROOT
from tests.helpers.runs import newest_weights, same_tensors, same_weights


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished, finished_result, small):
    run, result = finished, finished_result
    assert (result.step, result.steps, result.used, result.skipped, result.signal) == (8, 8, 32, 0, 0)
    assert result.checkpoint.name == "step-00000008"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "manifest.jsonl", "tokenizer.safetensors", "log.jsonl", "log.txt", "tensorboard"}
    assert load_recipe(str(run / "config.json")) == small() == checkpoint.read_config(result.checkpoint)
    lines = read_log(run)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    parts = {f"gradient/{name}" for name in ("regressor", "appearance_decoder", "motion_decoder")}
    times = {key for key in lines[-1] if key.startswith(("host/", "device/"))}
    assert [key for key in lines[-1].keys() - parts - times if f"`{key}`" not in page] == []
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    expected = {
        "loss/appearance", "loss/motion", "loss/motion_relative", "accuracy/codes", "accuracy/commonest_code",
        "gradient/appearance", "gradient/motion", "gradient/norm", "learning_rate", "data_wait", "epoch",
    }  # fmt: skip
    assert expected <= lines[-1].keys()
    assert lines[-1].keys() >= {"clips_per_s", "step_ms", "decoded_frames_per_s", "mfu", "host/wait_ms"}
    assert 0 < lines[-1]["mfu"] < 1
    text = (run / "log.txt").read_text()
    assert f"clip    {small().clip_sizes}\n" in text
    assert "kernels: pytorch" in text
    assert "pyav" in text


@pytest.mark.slow
def test_a_second_run_gives_the_same_bits(finished, clips, tmp_path, small):
    pretrain(small(data={"views": 2, "threads": 2}), clips, tmp_path, progress=False)
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(finished, clips, tmp_path, monkeypatch, small):
    """SIGTERM during a step: the step is finished and saved; the resumed run ends with the same bits."""
    original, calls = PretrainStep.__call__, []

    def step(self, *args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(PretrainStep, "__call__", step)
    result = pretrain(small(), clips, tmp_path, progress=False)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    assert result.checkpoint.name == "step-00000003"
    with pytest.raises(UserError, match="--resume"):
        pretrain(small(), clips, tmp_path, progress=False)
    result = pretrain(small(), clips, tmp_path, resume=True, progress=False)
    assert result.step == 8
    assert len(calls) == 8
    assert same_weights(finished, tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.slow
def test_resuming_with_other_values_is_refused(finished, clips, small):
    with pytest.raises(UserError, match=r"mask\.ratio = 0\.5, now it is 0\.75"):
        pretrain(small(mask={"ratio": 0.75}), clips, finished, resume=True, progress=False)


def test_a_wrong_tokenizer_is_told_before_the_videos_are_opened(tmp_path, small):
    with pytest.raises(UserError, match=r"none\.safetensors: expected a VQGAN checkpoint"):
        pretrain(small(tokenizer={"path": "none.safetensors"}), tmp_path / "nowhere", tmp_path / "run", progress=False)


def test_resuming_where_nothing_is_says_that_it_starts_over(tmp_path, small):
    with pytest.raises(UserError, match="nowhere"):
        pretrain(small(), tmp_path / "nowhere", tmp_path / "run", resume=True, progress=False)
    assert (
        "contains no complete checkpoint: the run starts from the beginning"
        in (tmp_path / "run" / "log.txt").read_text()
    )


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(finished, clips, small):
    before = newest_weights(finished)
    assert pretrain(small(), clips, finished, resume=True, progress=False).step == 8
    assert same_tensors(before, newest_weights(finished))


@pytest.mark.slow
def test_what_the_optimizer_does_not_read_may_differ_when_a_run_is_resumed(finished, clips, small):
    other = {"muon_rate": 1.0, "momentum": 0.5}
    assert pretrain(small(optim=other), clips, finished, resume=True, progress=False).step == 8
    with pytest.raises(UserError, match=r"optim\.name = 'adamw', now it is 'muon'"):
        pretrain(small(optim={**other, "name": "muon"}), clips, finished, resume=True, progress=False)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(clips, tmp_path, small):
    """Same clips, same masks, same weights after two steps, up to the order of additions."""
    runs = []
    for most in (16, 8):
        config = small(
            optim={"batch": 16, "epochs": 0.5, "micro_batch": most},
            loss={"balance": "fixed"},
            run={"precision": "float32"},
            tokenizer={"path": str(tmp_path / "16" / "tokenizer.safetensors") if most == 8 else ""},
        )
        pretrain(config, clips, tmp_path / str(most), progress=False)
        runs.append(newest_weights(tmp_path / str(most)))
    for name in runs[0]:
        # Adam's first steps are near sign(gradient): rounding shows where a gradient is almost zero.
        close = torch.isclose(runs[0][name], runs[1][name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.97, name


def objective_and_inputs(config):
    torch.manual_seed(0)
    objective = MAM2Objective(MAM2(config, 16), config, lambda part: part)
    video = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8)
    mask = tube_mask(4, config.grid, config.mask.ratio, seed=0, step=0, device="cpu")
    return objective, video, mask, torch.randint(0, 16, (4, 64))


def test_fixed_weights_give_the_gradient_of_the_weighted_sum(small):
    """The gradients behind the fork equal those of one backward pass through the whole model."""
    config = small(loss={"balance": "fixed", "appearance": 0.3, "motion": 2.0, "alignment": 0.5})
    objective, video, mask, codes = objective_and_inputs(config)
    model = objective.model
    (0.5 * objective(video, mask, codes)[0]).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    latents = model.complete(video, mask)
    total = 0.3 * model.appearance_loss(latents, mask, codes) + 2.0 * model.motion_loss(latents, mask, video)
    (0.5 * (total + 0.5 * model.alignment_loss(latents, mask, video))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_balanced_gradients_have_the_ratio_asked_for(small):
    config = small(loss={"balance": "gradient", "appearance": 0.25, "motion": 1.0})
    objective, video, mask, codes = objective_and_inputs(config)
    model, seen = objective.model, []
    complete = objective._complete

    def watched(*args):
        latents = complete(*args)
        latents.register_hook(seen.append)
        return latents

    objective._complete = watched
    objective(video, mask, codes)[0].backward()
    norms = objective.gradient_norms()
    latents = complete(video, mask).detach().requires_grad_()
    model.motion_loss(latents, mask, video).backward()
    appearance = seen[0] - latents.grad
    assert float(appearance.norm()) == pytest.approx(0.25 * float(norms["gradient/motion"]), rel=1e-3)


@pytest.mark.parametrize(("objective", "optimizer"), [("mam2", "adamw"), ("videomae", "adamw"), ("mam2", "muon")])
def test_a_step_reads_nothing_back_from_the_device(objective, optimizer, small):
    """Traced on tensors without values: code that needs a value (a size, a branch, a printed number) raises."""
    config = small(
        model={"objective": objective, "width": 24, "depth": 1, "heads": 2},
        mask={"kind": "random"},
        loss={"balance": "gradient", "alignment": 1.0},
        optim={"batch": 8, "micro_batch": 4, "clip_norm": 1.0, "name": optimizer},
    )
    model = MAM2(config, 16) if objective == "mam2" else VideoMAE(config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        step = PretrainStep(config, fake_copy(model, fake), torch.device("cpu"), World())
        clips = [
            (torch.empty(4, 3, 8, 32, 32, dtype=torch.uint8), torch.zeros(4, 64, dtype=torch.int64)) for _ in range(2)
        ]
        for group in step.optimizer.param_groups:
            group["lr"] = torch.zeros(())  # as in a CUDA graph
        values = step(0, clips, 1e-3, inspect=True)
    assert values.keys() >= {"gradient/norm", "bad"}
    assert all(value.shape == () for value in values.values())


def fake_copy(model, fake):
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    without_values = fake.from_tensor(tensor.detach())
                    trained = tensor.requires_grad
                    tensors[name] = torch.nn.Parameter(without_values) if trained else without_values
    model.to = lambda _: model  # which swaps tensors
    return model


@pytest.mark.slow
def test_videomae_trains_in_the_same_engine(clips, tmp_path, small):
    config = small(model={"objective": "videomae", "width": 24, "depth": 1, "heads": 2})
    assert pretrain(config, clips, tmp_path, progress=False).step == 8
    lines = read_log(tmp_path)
    assert lines[-1]["loss/pixels"] < lines[0]["loss/pixels"]
    assert not (tmp_path / "tokenizer.safetensors").exists()


def spoil(monkeypatch, step, value):
    """From pass `step` on (the only one, if negative) the loss is `value`."""
    original, calls = MAM2Objective.forward, []

    def forward(self, *args, **options):
        total, losses, figures = original(self, *args, **options)
        calls.append(None)
        spoiled = len(calls) == -step if step < 0 else len(calls) >= step
        return total * value if spoiled else total, losses, figures

    monkeypatch.setattr(MAM2Objective, "forward", forward)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_left_out_counted_and_its_clips_named(value, clips, tmp_path, monkeypatch, small):
    spoil(monkeypatch, -3, value)
    pretrain(small(), clips, tmp_path, progress=False)
    assert all(tensor.isfinite().all() for tensor in newest_weights(tmp_path).values())
    assert [line.get("skipped_steps", 0) for line in read_log(tmp_path)] == [0, 1, 0, 0]
    assert "step 3: loss or gradient not finite, skipped" in (tmp_path / "log.txt").read_text()
    named = [line.split("\t") for line in (tmp_path / "nonfinite.tsv").read_text().splitlines()]
    assert {step for step, _ in named} == {"3"}
    assert len(named) == 8  # 16 clips in two views each
    assert all(Path(path).is_file() for _, path in named)


@pytest.mark.slow
def test_a_run_that_only_meets_bad_losses_stops(clips, tmp_path, monkeypatch, small):
    spoil(monkeypatch, 3, float("nan"))
    with pytest.raises(UserError, match="5 steps in a row had a loss or gradient that is not finite") as stop:
        pretrain(
            small(optim={"batch": 16, "epochs": 8.0}, run={"max_nonfinite": 5, "log_every": 1, "compile": False}),
            clips,
            tmp_path,
            progress=False,
        )
    saved = checkpoint.newest(tmp_path)
    assert str(saved) in str(stop.value)  # before the first checkpoint is due
    assert checkpoint.why_damaged(saved) is None
    assert all(tensor.isfinite().all() for tensor in newest_weights(tmp_path).values())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_one_clear_line(clips, tmp_path, monkeypatch, small):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        pretrain(small(), clips, tmp_path, progress=False)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_loses_nothing(finished, clips, tmp_path, monkeypatch, small):
    original, calls = checkpoint.save_file, []

    def full_at_first(*args, **options):
        calls.append(None)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        return original(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", full_at_first)
    run = {"save_every": 2, "log_every": 2, "compile": False}
    result = pretrain(small(run=run), clips, tmp_path, progress=False)
    assert result.step == 8
    assert same_weights(finished, tmp_path)
    said = f"No space left on device: '{checkpoint.folder_of(tmp_path, 2)}'; there is none yet. The run continues"
    assert said in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_gpu_that_runs_out_of_memory_says_what_to_change(clips, tmp_path, monkeypatch, small):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(PretrainStep, "_gradients", full)
    with pytest.raises(
        UserError, match=r"with 16 clips per pass: .*2\.00 GiB\. Set optim\.micro_batch below 16.*recompute"
    ):
        pretrain(small(), clips, tmp_path, progress=False)


@pytest.mark.slow
def test_a_tokenizer_that_runs_out_of_memory_says_what_to_change(clips, tmp_path, monkeypatch, small):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(Tokenizer, "codes", full)
    with pytest.raises(UserError, match=r"with 16 clips per pass: .*2\.00 GiB\. Set optim\.micro_batch below 16"):
        pretrain(small(), clips, tmp_path, progress=False)


@pytest.mark.slow
def test_recomputed_activations_change_no_bit(finished, clips, tmp_path, small):
    pretrain(small(run={"recompute": True, "compile": False, "log_every": 2}), clips, tmp_path, progress=False)
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, clips, tmp_path, small):
    run = {"save_every": 3, "log_every": 2, "compile": False}
    pretrain(small(run=run), clips, tmp_path, progress=False)
    newest = checkpoint.newest(tmp_path)
    with (newest / checkpoint.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    result = pretrain(small(run=run), clips, tmp_path, resume=True, progress=False)
    text = (tmp_path / "log.txt").read_text()
    assert f"checkpoint {newest} is damaged (SHA-256 mismatch: model.safetensors" in text
    assert "resume  from" in text
    assert "step-00000006" in text
    assert result.step == 8
    assert same_weights(finished, tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process_cleanly(clips, tmp_path, small):
    """SIGINT to `python -m mam2.engine pretrain`: exit status 130, a checkpoint, no stack trace."""
    values = json.dumps(dataclasses.asdict(small(optim={"batch": 16, "epochs": 5000.0})))
    (tmp_path / "recipe.json").write_text(values)
    command = [*MAM2_COMMAND, "pretrain", tmp_path / "recipe.json", "--data", clips]
    process = subprocess.Popen([*command, "--out", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_first_step(tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 130, output
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output
    assert checkpoint.newest(tmp_path / "run") is not None


@pytest.mark.slow
def test_a_folder_of_every_format_is_taken_as_it_is(tmp_path, small, clip_set):
    """Many codecs, odd sizes, variable rates, short and broken files: it finishes and names each unusable file once."""
    config = small(optim={"batch": 16, "epochs": 2.0}, data={"views": 1, "threads": 2})
    result = pretrain(config, clip_set.folder, tmp_path, progress=False)
    lines = [line.split("\t") for line in (tmp_path / "skipped.tsv").read_text().splitlines()]
    named = {clip_set.name(path): reason for path, reason in lines}
    assert len(lines) == len(named) == result.skipped
    broken = clip_set.broken
    assert set(named) == broken
    assert all(reason.strip() for reason in named.values())
    assert result.used == len(clip_set.listed) - len(broken)
    text = (tmp_path / "log.txt").read_text()
    assert all(text.count(f"{clip_set.folder / name}:") == 1 for name in broken)
    assert f"{result.used} videos used, {len(broken)} unusable" in text
