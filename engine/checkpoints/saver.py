"""Saves checkpoints of a training run in the background; checkpoint.py writes their files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.host_copies import HostBuffers, copies, new_copy
from mam2.engine.config.training import TrainConfig
from mam2.engine.files import remove_parts


class Saver:
    """Writes checkpoints in the background: `save` queues copies of the tensors and returns, a thread writes them."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        *,
        main: bool = True,
        metadata: Mapping[str, str] | None = None,
        buffers: HostBuffers | None = None,
        kept_step: int = 0,
    ) -> None:
        """main: False on ranks that only take part in gathering tensors. metadata: further metadata of the weights.
        buffers: memory that every checkpoint is copied to; None: new memory for each. kept_step: see checkpoint.py.
        """
        self._kept_step = kept_step
        self._run, self._config, self._main, self._metadata = run, config, main, dict(metadata or {})
        self._buffers = buffers
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        if main:
            checkpoint.code_version()  # an error here should come now, not at the first save
            remove_parts(run / checkpoint.FOLDER)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor] | None = None
    ) -> OSError | None:
        """Copies the state after `step` steps, after the previous checkpoint is written. Returns the result of `wait`.

        extra: further tensors that the run needs to resume.
        """
        problem = self.wait()  # from then on nothing reads the buffers
        files = {checkpoint.WEIGHTS: model.state_dict(), checkpoint.OPTIMIZER: _moments(model, optimizer, extra or {})}
        weights, moments = (copies(part, keep=self._main, to_host=self._to_host(file)) for file, part in files.items())
        if self._main:
            ready = self._buffers.queued() if self._buffers else lambda: None
            arguments = (self._run, step, weights, moments, self._config, self._metadata, self._kept_step)
            self._thread = threading.Thread(target=self._write, args=(ready, *arguments), name="checkpoint")
            self._thread.start()
        return problem

    def _to_host(self, file: str) -> Callable[[str, Tensor], Tensor]:
        buffers = self._buffers
        return new_copy if buffers is None else lambda name, whole: buffers.copy(f"{file}/{name}", whole)

    def add_metadata(self, name: str, value: str) -> None:
        """Adds an entry to the metadata of the weights that are saved from now on."""
        self._metadata = self._metadata | {name: value}

    def wait(self) -> OSError | None:
        """Waits until the last checkpoint is on disk. Returns the OSError that prevented it (disk full, …), or None.

        Raises any other exception of the thread; the checkpoint is then not on disk either.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is None or isinstance(problem, OSError):
            return problem
        raise problem

    def _write(self, ready: Callable[[], None], *arguments: Any) -> None:
        try:
            ready()
            checkpoint.write(*arguments)
        except BaseException as error:  # without any of these, the run would report success
            self._problem = error


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors |= {f"{checkpoint.EXTRA}{name}": tensor for name, tensor in extra.items()}
    tensors[f"{checkpoint.RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors[f"{checkpoint.RNG}cuda"] = torch.cuda.get_rng_state()
    return tensors
