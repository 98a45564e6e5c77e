"""Copies of a run's state: memory is reused, the content is right, and the writer waits for the device."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mam2.engine.checkpoints import checkpoint, host_copies
from mam2.engine.checkpoints.host_copies import HostBuffers
from mam2.engine.checkpoints.saver import Saver
from mam2.engine.config.recipe import load_recipe
from mam2.engine.train.optimizer import build_optimizer

CONFIG = load_recipe("demo")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trained():
    """A model and its optimizer after a step, and a function that runs another step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model, CONFIG.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def step():
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return model, optimizer, step


def written(run, step):
    return load_file(checkpoint.folder_of(run, step) / checkpoint.WEIGHTS)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_every_checkpoint_uses_the_same_memory_and_holds_its_own_step(tmp_path):
    model, optimizer, step = trained()
    sizes = []

    def allocate(size, **options):
        sizes.append(size)
        return torch.full((size,), 7, **options)

    buffers = HostBuffers(CPU, print, allocate=allocate)
    saver = Saver(tmp_path, CONFIG, buffers=buffers)
    expected = {}
    for number in (1, 2, 3):
        step()
        expected[number] = snapshot(model)
        assert saver.save(number, model, optimizer, {"average": model[0].weight.detach()}) is None
    assert saver.wait() is None
    assert len(sizes) == 1
    for number, weights in expected.items():
        assert same(written(tmp_path, number), weights), number
    assert not same(expected[1], expected[3])
    other, other_optimizer, _ = trained()
    average = torch.zeros(4, 3)
    assert checkpoint.restore(checkpoint.folder_of(tmp_path, 3), other, other_optimizer, {"average": average}) == 3
    assert torch.equal(average, model[0].weight)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key]), key


def test_a_failed_write_leaves_the_memory_free_for_the_next(tmp_path, monkeypatch):
    model, optimizer, step = trained()
    saver = Saver(tmp_path, CONFIG, buffers=HostBuffers(CPU, print))
    save_file, called = checkpoint.save_file, threading.Event()

    def full(*_, **__):
        called.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.save(1, model, optimizer)
    assert called.wait(60)  # the writing thread may start late
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    step()
    assert saver.save(2, model, optimizer).errno == 28
    assert saver.wait() is None
    assert same(written(tmp_path, 2), snapshot(model))


def test_the_writer_waits_for_the_device_and_training_does_not(tmp_path):
    """An event that is pending until `done`: the save returns, and no file appears before it."""
    model, optimizer, _ = trained()
    done, recorded = threading.Event(), []

    class Pending:
        def record(self):
            recorded.append(threading.current_thread())

        def synchronize(self):
            assert done.wait(30)

    pinned = []

    def allocate(size, *, dtype, pin_memory=False):
        pinned.append(pin_memory)
        return torch.empty(size, dtype=dtype)

    saver = Saver(tmp_path, CONFIG, buffers=HostBuffers(GPU, print, allocate=allocate, event=Pending))
    assert saver.save(1, model, optimizer) is None
    assert recorded == [threading.main_thread()]
    assert pinned == [True]
    assert not (tmp_path / checkpoint.FOLDER).exists()
    done.set()
    assert saver.wait() is None
    assert same(written(tmp_path, 1), snapshot(model))


def test_without_pinned_memory_it_says_so_and_uses_other_memory(tmp_path):
    model, optimizer, _ = trained()

    def allocate(size, *, dtype, pin_memory=False):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with …")
        return torch.empty(size, dtype=dtype)

    messages = []
    saver = Saver(tmp_path, CONFIG, buffers=HostBuffers(GPU, messages.append, allocate=allocate))
    saver.save(1, model, optimizer)
    assert saver.wait() is None
    assert len(messages) == 1
    assert "pinned host memory cannot be allocated (CUDA error: out of memory)" in messages[0]
    assert same(written(tmp_path, 1), snapshot(model))


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 1000)])
def test_copies_are_contiguous_and_share_blocks_up_to_a_limit(shape, monkeypatch):
    monkeypatch.setattr(host_copies, "CHUNK", 2**20)
    buffers = HostBuffers(CPU, print)
    source = torch.randn(shape)
    found = [buffers.copy(str(number), source + number) for number in range(3)]
    turned = source.permute(tuple(reversed(range(source.ndim))))
    found += [buffers.copy("odd", torch.arange(3, dtype=torch.uint8)), buffers.copy("turned", turned)]
    for number in range(3):
        assert torch.equal(found[number], source + number)
    assert torch.equal(found[4], turned)
    assert all(tensor.is_contiguous() for tensor in found)
    blocks = {tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()}
    assert len(blocks) == (1 if source.numel() < 1000 else 5)
