"""Checkpoints are complete or absent, are exact, and raise clear errors if they do not fit."""

import dataclasses
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.saver import Saver
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.train.optimizer import build_optimizer

CONFIG = load_recipe("demo")


def _trained(width=4, steps=2):
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))
    optimizer = build_optimizer(model, CONFIG.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run, step, model, optimizer, config=CONFIG, *, keep=2, keep_every=0):
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, keep=keep, keep_every=keep_every))
    saver = Saver(run, config)
    assert saver.save(step, model, optimizer) is None
    problem = saver.wait()
    if problem:
        raise problem
    return checkpoint.folder_of(run, step)


def test_weights_and_moments_come_back_bit_for_bit(tmp_path):
    model, optimizer = _trained()
    folder = save(tmp_path, 7, model, optimizer, keep=2)
    other, other_optimizer = _trained(steps=0)
    assert checkpoint.restore(folder, other, other_optimizer) == 7
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key]), (name, key)
    assert checkpoint.read_config(folder).model == CONFIG.model


def test_others_may_read_what_they_may_read_of_plain_files(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    tensors = {"a": torch.ones(2)}
    folder = checkpoint.write(tmp_path, 1, tensors, tensors, load_recipe("demo"), {})
    assert {file.stat().st_mode for file in folder.iterdir()} == {plain.stat().st_mode}


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = _trained()
    for step in (1, 4, 8, 9, 10):
        save(tmp_path, step, model, optimizer, keep=2, keep_every=4)
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert names == ["step-00000004", "step-00000008", "step-00000009", "step-00000010"]
    assert checkpoint.newest(tmp_path).name == "step-00000010"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000010\n"
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_save_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    model, optimizer = _trained()
    save(tmp_path, 1, model, optimizer, keep=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, optimizer, keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000001"}


def test_kill_9_at_any_operation_on_files_costs_at_most_the_checkpoint_that_is_written(tmp_path):
    command = [sys.executable, Path(__file__).with_name("kill_phases.py"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_a_copy_by_a_user_is_no_checkpoint(tmp_path):
    model, optimizer = _trained()
    folder = save(tmp_path, 1, model, optimizer, keep=1)
    copy = folder.with_name("step-00000001 before the cooldown")
    shutil.copytree(folder, copy)
    folder.with_name("step-00000009").touch()
    assert checkpoint.newest(tmp_path) == checkpoint.newest_whole(tmp_path, pytest.fail) == folder
    for step in (2, 99_999_999, 100_000_000):
        save(tmp_path, step, model, optimizer, keep=1)
        assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, step)
    assert len(list(folder.parent.iterdir())) == 4  # with the copy, the other file, and `latest`
    assert checkpoint.why_damaged(copy) is None


def test_an_old_checkpoint_that_cannot_be_removed_whole_does_not_fail_the_new_one(tmp_path, monkeypatch):
    """A file server refuses while another process reads from it."""
    model, optimizer = _trained()
    old = save(tmp_path, 1, model, optimizer, keep=1)

    def busy(path, ignore_errors=False):
        (Path(path) / checkpoint.STATE).unlink(missing_ok=True)
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2, model, optimizer, keep=1)
    assert [path.name for path in old.parent.glob("step-*")] == ["step-00000002"]
    Saver(tmp_path, CONFIG)  # the next start
    assert {path.name for path in old.parent.iterdir()} == {"latest", "step-00000002"}


def test_a_checkpoint_on_a_bad_sector_is_damaged(tmp_path, monkeypatch):
    model, optimizer = _trained()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    original = checkpoint._hash

    def read(path):
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    monkeypatch.setattr(checkpoint, "_hash", read)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(UserError, match=r"step-00000002 is damaged .*cannot be renamed \(Read-only.*: remove it"):
            checkpoint.newest_whole(tmp_path, pytest.fail)
    messages = []
    assert checkpoint.newest_whole(tmp_path, messages.append) == checkpoint.folder_of(tmp_path, 1)
    assert "model.safetensors cannot be read: Input/output error" in messages[0]


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    model, optimizer = _trained(width=4)
    folder = save(tmp_path, 1, model, optimizer, keep=1)
    with pytest.raises(UserError, match=r"0\.bias has shape \[4\], the model \[6\]"):
        checkpoint.restore(folder, *_trained(width=6))
    deeper = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"lacks 2\.bias"):
        checkpoint.load_weights(deeper, folder / checkpoint.WEIGHTS)
    with pytest.raises(UserError, match=r"contains 1\.bias, which this model lacks"):
        checkpoint.load_weights(nn.Sequential(nn.Linear(3, 4)), folder / checkpoint.WEIGHTS)


def test_damaged_files_are_one_clear_line(tmp_path):
    model, optimizer = _trained()
    folder = save(tmp_path, 1, model, optimizer, keep=1)
    (folder / checkpoint.WEIGHTS).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.restore(folder, model, optimizer)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_config(folder)
    for content in ("{", "null"):
        (folder / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state\.json cannot be read"):
            checkpoint.read_state(folder)


def test_the_config_is_part_of_it(tmp_path):
    model, optimizer = _trained()
    config = dataclasses.replace(CONFIG, mask=dataclasses.replace(CONFIG.mask, ratio=0.5))
    folder = save(tmp_path, 1, model, optimizer, config, keep=1)
    assert checkpoint.read_config(folder / checkpoint.WEIGHTS).mask.ratio == 0.5
    assert checkpoint.read_state(folder)["config"]["mask"]["ratio"] == 0.5


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_checkpoint_is_found_out_and_set_aside(name, damage, tmp_path):
    model, optimizer = _trained()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    file = checkpoint.newest(tmp_path) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1 if name != checkpoint.STATE else 0x80  # JSON that is not UTF-8
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    messages = []
    assert checkpoint.newest_whole(tmp_path, messages.append) == checkpoint.folder_of(tmp_path, 1)
    assert len(messages) == 1
    assert "step-00000002 is damaged" in messages[0]
    assert name in messages[0]
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()
    assert checkpoint.newest_whole(tmp_path, messages.append) == checkpoint.folder_of(tmp_path, 1)
    assert len(messages) == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    model, optimizer = _trained()
    for step in (1, 2):
        (save(tmp_path, step, model, optimizer) / checkpoint.OPTIMIZER).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(the newest, step-00000002: opti.* missing"):
        checkpoint.newest_whole(tmp_path, pytest.fail)
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoint.newest_whole(tmp_path / "new", pytest.fail) is None


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    (tmp_path / "checkpoints" / ".part-step-00000003").mkdir(parents=True)
    Saver(tmp_path, CONFIG)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_state_of_the_random_generator_comes_back(tmp_path):
    model, optimizer = _trained()
    torch.manual_seed(5)
    torch.rand(3)
    folder = save(tmp_path, 1, model, optimizer)
    expected = torch.rand(4)
    torch.manual_seed(99)
    checkpoint.restore(folder, model, optimizer)
    assert torch.equal(torch.rand(4), expected)
