"""Collects the numbers of the steps from the device for the log, and reports steps that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mam2.engine.data.batch import Batch
from mam2.engine.files import append_rows
from mam2.engine.runtime.log import Line, Readout
from mam2.engine.runtime.peak import used_gib
from mam2.engine.runtime.progress import Progress
from mam2.engine.train.collapse import Collapse
from mam2.engine.train.session import Session
from mam2.engine.train.spikes import Spikes

RATES = {"clips_per_s": "{:.0f} clips/s", "data_wait": "data wait {:.0%}"}
"""Numbers that the progress bar shows for every task, with their formats."""


class StepLog:
    """Collects the results of steps, and writes a line of RUN/log.jsonl as soon as its numbers are on the host."""

    def __init__(self, session: Session[Any], progress_format: Mapping[str, str]) -> None:
        """progress_format: see `Description`."""
        self._session, self._formats = session, {**progress_format, **RATES}
        self._readout, self._spikes, self._collapse = Readout(session.device), Spikes(), Collapse()
        self._videos: list[Tensor] = []
        self._bad: list[Tensor] = []
        self._bad_in_a_row = 0
        self.last = ""
        """The numbers of the newest line, as the progress bar shows them."""

    def add(self, values: dict[str, Tensor], batches: Iterable[Batch]) -> None:
        """Adds the results of a step, 0-d tensors from which `bad` is removed, and its batches."""
        self._bad.append(values.pop("bad"))
        self._videos.append(torch.stack([batch.index for batch in batches]))
        self._spikes.see(values)

    def put(self, step: int, values: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Starts the line of step `step`: tensors on the device, which are averaged over ranks, and numbers."""
        values = values | self._spikes.peak()
        self._readout.put(step, values, torch.stack(self._bad), numbers, self._videos, self._session.world)
        self._bad, self._videos = [], []

    def write(self, bar: Progress, *, wait: bool = False) -> None:
        """Writes the available lines, with `wait` all lines. Raises UserError after too many bad steps."""
        if words := self.write_lines(wait=wait):
            bar.show(words)
        if self._bad_in_a_row >= self._session.config.run.max_nonfinite:
            raise self._session.world.error(
                f"{self._bad_in_a_row} steps in a row had a loss or gradient that is not finite and were skipped. "
                "Start a new run with a lower optim.base_lr, with optim.clip_norm, or with run.precision=float32"
            )

    def write_lines(self, *, wait: bool) -> list[str]:
        """Writes the available lines; returns the numbers of the newest one as text for the progress bar."""
        words: list[str] = []
        for line in self._readout.collect(wait=wait):
            words = self._write_line(line)
            self.last = " ".join(words)
        return words

    def _write_line(self, line: Line) -> list[str]:
        session, numbers = self._session, line.numbers
        bad = [step for step, flag in zip(line.steps, line.bad, strict=True) if flag]
        if bad:
            numbers["skipped_steps"] = len(bad)
            self._name_clips(bad, line.videos)
        for problem in (self._spikes.warning(line.steps, numbers), self._collapse.warning(line.steps, numbers)):
            if problem:
                session.log.info(f"warning: {problem}")
        for flag in line.bad:
            self._bad_in_a_row = self._bad_in_a_row + 1 if flag else 0
        if session.device.type == "cuda":
            numbers["memory_gib"] = used_gib(session.device)
        session.log.write(line.steps[-1], numbers)
        return [text.format(numbers[name]) for name, text in self._formats.items() if name in numbers]

    def _name_clips(self, bad: list[int], videos: dict[int, list[int]]) -> None:
        """Lists the clips of skipped steps in nonfinite.tsv."""
        session = self._session
        mine = [(step, session.manifest.videos[index].path) for step in bad for index in sorted(set(videos[step]))]
        rows = [row for part in session.world.all_gather(mine) for row in part]
        file = session.folder / "nonfinite.tsv"
        numbers = ", ".join(map(str, bad))
        session.log.info(f"step {numbers}: loss or gradient not finite, skipped; the clips are listed in {file}")
        if session.world.main:
            try:
                append_rows(file, sorted(rows))
            except OSError as error:
                session.log.info(f"log     {file} cannot be written: {error.strerror}. The run continues")
