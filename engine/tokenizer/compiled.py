"""The tokenizer's network compiled, and on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mam2.engine.config.training import RunConfig
from mam2.engine.runtime.cuda import Captured, CudaRecorder
from mam2.engine.runtime.device import compiler


def compiled_network(
    codes: Callable[[Tensor], Tensor], run: RunConfig, device: torch.device, info: Callable[[str], None]
) -> Callable[[Tensor], Tensor]:
    """Returns the function from images to codes compiled, and on a GPU as CUDA graphs, according to `run`.

    Launched one by one, its kernels would wait for the host, which also queues the step. info: receives lines for the
    log.
    """
    compiled = compiler(run, device)[0](codes)
    if device.type != "cuda" or run.graph == "off" or run.deterministic:
        return compiled
    return Captured(compiled, CudaRecorder(), info, "codes   network of the tokenizer")
