"""Pairs prepared on a side stream: the order of waits, with mock streams that record calls."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from mam2.engine.data.side_stream import on_side_stream
from mam2.engine.tokenizer.source import with_codes


class Stream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def notes(monkeypatch):
    notes = []
    current = [Stream("step", notes)]

    @contextlib.contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side", notes))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: notes.append(f"{int(self)} {stream.name}"))

    def prepared():
        for number in range(2):
            notes.append(f"prepared on {current[-1].name}")
            yield SimpleNamespace(clip=torch.tensor(number)), (torch.tensor(10 + number), None)

    return notes, prepared


def test_pairs_are_prepared_on_the_side_stream_and_the_step_waits_for_them(notes):
    notes, prepared = notes
    pairs = on_side_stream(prepared(), torch.device("cuda"))
    assert [int(batch.clip) for batch, _ in pairs] == [0, 1]
    one = ["prepared on side", "step waits for side"]
    assert notes == ["side waits for step", *one, "0 step", "10 step", *one, "1 step", "11 step"]


def test_on_a_cpu_nothing_changes(notes):
    notes, prepared = notes
    assert len(list(on_side_stream(prepared(), torch.device("cpu")))) == 2
    assert notes == ["prepared on step"] * 2


def test_the_codes_of_a_batch_are_computed_within_the_timer():
    notes = []

    class Timer:
        def __enter__(self):
            notes.append("begun")

        def __exit__(self, *_):
            notes.append("ended")

    def batches():
        for number in range(2):
            notes.append("loaded")
            yield number

    source = SimpleNamespace(codes=lambda batch: notes.append("codes") or batch + 10)
    assert list(with_codes(batches(), source, torch.device("cpu"), Timer())) == [(0, 10), (1, 11)]
    assert notes == ["loaded", "begun", "codes", "ended"] * 2
