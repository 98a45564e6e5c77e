"""The description of a task for the log, the progress bar and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mam2.engine.config.sizes import parameters_by_part
from mam2.engine.model.attention import active_backend
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.runtime.peak import measured_peak_flops
from mam2.engine.train.session import Session
from mam2.engine.train.step import Step
from mam2.engine.units import with_prefix
from mam2.kernels import active_path


@dataclass(frozen=True, kw_only=True)
class Description:
    title: str
    """Title of the progress bar."""
    progress_format: Mapping[str, str]
    """Numbers of a log line that the progress bar shows, each with its format."""
    metadata: Mapping[str, str]
    """Further metadata of the checkpoints."""
    full_clips_per_s: float
    """Clips per second of all processes, if every FLOP of a step ran at the measured rate of large matrix products."""
    lines: Sequence[str]
    """Lines for the log: the sizes of the model, and which implementations run."""


def describe_task(
    title: str,
    session: Session[Any],
    train_step: Step[Any],
    *,
    flops_per_clip: float,
    progress_format: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Description:
    """Describes a task; measures the device's rate of matrix products. flops_per_clip: FLOPs of a clip in a step."""
    device, world = session.device, session.world
    dtype = matmul_dtype(session.config.run, device)
    peak = measured_peak_flops(device, dtype)
    counts = parameters_by_part(train_step.model)
    parts = ", ".join(f"{name.replace('_', ' ')} {with_prefix(count).strip()}" for name, count in counts.items())
    lines = (
        f"model   {title}: {parts} parameters",
        f"paths   kernels: {active_path(device)}; "
        f"attention: {active_backend(device, dtype)}{' for shapes that are not measured' * (device.type == 'cuda')}; "
        f"step: {train_step.compiled}; {str(dtype).removeprefix('torch.')}, matrices at {peak / 1e12:.3g} TFLOP/s",
    )
    return Description(
        title=title,
        progress_format=progress_format,
        metadata=metadata,
        full_clips_per_s=peak * world.size / flops_per_clip,
        lines=lines,
    )
