"""The tables and checks that every training run has: [data], [optim], [run], and the grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mam2.engine.config.limits import (
    BATCH,
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Limits,
    check_limits,
    limited,
    renamed,
    resumable,
)
from mam2.engine.errors import UserError
from mam2.engine.units import counted

MOST_CHANNELS = 64
"""Maximum channels of a clip: the fused operators compare every value's channel with each of them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sets: tuple[str, ...] = resumable(())
    """Data sets of a pre-training, folders or lists; `--data`, once per set, overrides them. A saved config names them
    only if there are several."""
    weights: tuple[float, ...] = limited((), POSITIVE)
    """Share of each data set in the clips, in the order of `sets` or `--data`: 3 and 1 are three quarters and one
    quarter. Empty: every video equally often, so that a large set contributes more."""
    frames: int = limited(16, COUNT)
    """Frames in a clip (T)."""
    stride: int = limited(4, COUNT_OR_NONE)
    """Distance of two sampled frames, in frames of the file; 0 if `fps` is set."""
    fps: float = limited(0.0, NOT_NEGATIVE)
    """Sampled frames per second, for files with different rates; 0 if `stride` is set. Set exactly one of the two."""
    sampling: Literal["dense", "uniform"] = "dense"
    """`dense`: frames `stride` or 1/`fps` apart; `uniform`: one frame of each of T equal parts of the video (TSN)."""
    size: int = limited(224, COUNT)
    """Height and width of a clip in pixels, a multiple of the patch size."""
    channels: int = limited(3, Limits(at_least=1, at_most=MOST_CHANNELS))
    """Channels of a clip (C): 3 for RGB; 1 for gray, of which a color video gives its luma; those of arrays."""
    value_range: tuple[float, ...] = limited((), Limits())
    """The two values of the files that become 0 and 1; values outside are clipped. Empty: 0 and 255 for 8-bit values, 0
    and 65535 for 16-bit values, 0 and 1 for floats."""
    mean: tuple[float, ...] = limited((), Limits())
    """Mean of each channel, for pixels from 0 to 1, which the model subtracts. Empty: ImageNet's for 3 channels; for
    another number the mean of these three, 0.449."""
    std: tuple[float, ...] = limited((), POSITIVE)
    """Standard deviation of each channel, by which the model then divides. Empty: ImageNet's, or 0.226 likewise."""
    crop: Literal["random-resized", "multi-scale"] = "random-resized"
    """`multi-scale` is VideoMAE's crop: sides of 1, 0.875, 0.75 or 0.66 times the shorter side, at a corner, edge or
    center; it ignores `min_area`, `max_area` and `max_aspect`."""
    min_area: float = limited(0.5, Limits(above=0, at_most=1))
    """Smallest share of the frame's area that a random resized crop keeps, 0 to 1."""
    max_area: float = limited(1.0, Limits(above=0, at_most=1))
    """Largest share of the frame's area that a random resized crop keeps, 0 to 1."""
    max_aspect: float = limited(4 / 3, Limits(at_least=1))
    """Aspect ratios of the crop are drawn log-uniformly from 1/max_aspect to max_aspect; at least 1."""
    flip: bool = True
    """Mirror half of the clips left to right. Turn it off if direction matters (SSv2, the demo)."""
    views: int = limited(1, COUNT)
    """Crops (and masks) drawn from one decoded clip: repeated augmentation. Must divide the batch size."""
    recorded: int = limited(0, COUNT_OR_NONE)
    """Number of augmentations per video: epoch e repeats number e mod `recorded`, so that codes can be computed once
    (`mam2 tokenize`). 0: new augmentations in every epoch."""
    decoder: Literal["auto", "nvdec", "dali-cpu", "pyav"] = renamed("auto", earlier="front_end")
    """Decoder: `auto` uses NVDEC on a GPU for the codecs that it supports, and PyAV for all others. Use `dali-cpu`
    (VP8, VP9, MJPEG) only for undamaged files: damage that the check of packets and key frames misses may end the
    process."""
    threads: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Decoding threads; 0: one per core that this process may use, divided by the processes of the machine."""
    workers: Literal["auto", "threads", "processes"] = resumable("auto")
    """Where PyAV decodes: in `threads` of the training process, or in as many `processes` (Linux; local files).
    Threads hold Python's lock for a part of their time, and the training waits for it. `auto`: processes if there are
    more than 4 threads."""
    nvdec_share: float = limited(0.0, SHARE)
    """With `decoder = "auto"` on a GPU: NVDEC's share of the videos that it can decode, 0 to 1; PyAV decodes the others
    at the same time. 0: a training measures both rates at its start and divides the videos accordingly; other commands
    leave all of them to NVDEC, as 1 does."""
    nvdec_threads: int = limited(32, COUNT, resumable=True)
    """Threads that feed NVDEC; they mostly wait, so that there may be more threads than cores."""
    prefetch: int = limited(2, COUNT, resumable=True)
    """Batches prepared ahead of the step."""
    timeout_s: float = limited(60.0, POSITIVE, resumable=True)
    """Seconds after which a file that is still being decoded counts as unusable, and NVDEC as not working."""
    wait_s: float = limited(300.0, NOT_NEGATIVE, resumable=True)
    """Seconds to wait for unavailable data (a missing folder, an I/O error) before the run ends. Keep it below the 10
    minutes after which the other processes of a run end."""
    max_unusable: float = limited(0.5, SHARE, resumable=True)
    """The run stops if more than this share of the videos cannot be decoded, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW, or Muon for the weight matrices of all blocks and AdamW for the rest."""
    batch: int = limited(64, BATCH)
    """Clips per optimizer step, over all processes. The learning rate is set for it, on any number of GPUs."""
    micro_batch: int | Literal["auto"] = limited(0, COUNT_OR_NONE, resumable=True)
    """Maximum clips of one process per forward pass; gradients are accumulated over the passes of a step. 0: the
    process's whole share of the batch. `auto`: on a GPU the most clips whose pass fits into the memory, found by trying
    before the first step; a resumed run keeps it. It needs `run.sharding` ddp if there are several processes. On a CPU
    `auto` is 0."""
    epochs: float = limited(400, POSITIVE)
    """Passes over the data set; each shows every video once, in `data.views` views."""
    warmup_epochs: float = limited(20, NOT_NEGATIVE)
    """Linear warm-up of the learning rate from 0."""
    schedule: Literal["cosine", "warmup-stable-decay"] = "cosine"
    """Learning rate after the warm-up: `cosine` decreases along half a cosine; `warmup-stable-decay` is constant, then
    decreases linearly in the last `decay_share` of the training, so that a run can be extended before it decays."""
    decay_share: float = limited(0.2, SHARE)
    """Share of the training in which `warmup-stable-decay` decreases the learning rate: 0 never, 1 from the end of the
    warm-up on (a cooldown). No effect with `cosine`."""
    base_lr: float = limited(1.5e-4, NOT_NEGATIVE)
    """Peak learning rate for a batch of 256 clips; scaled linearly with the batch."""
    min_lr: float = limited(1e-5, NOT_NEGATIVE)
    """Learning rate at the end of the decay for a batch of 256 clips; scaled likewise."""
    weight_decay: float = limited(0.05, NOT_NEGATIVE)
    """Weight decay of both optimizers, times the learning rate; not applied to 1-D parameters and mask tokens."""
    beta2: float = limited(0.95, BELOW_ONE)
    """AdamW's second beta; the first is 0.9."""
    momentum: float = limited(0.95, BELOW_ONE)
    """Muon's momentum."""
    muon_rate: float = limited(4.0, POSITIVE)
    """Muon's learning rate, divided by AdamW's, which is `base_lr`. Muon's best rate is the higher one."""
    clip_norm: float = limited(0.0, NOT_NEGATIVE)
    """Largest gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    seed: int = limited(0, SEED)
    """Seed of weights, order, clips and masks."""
    device: Literal["auto", "cuda", "cpu"] = resumable("auto")
    """`auto` uses a GPU if there is one."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products: `auto` is bfloat16 autocast on GPUs (NVIDIA's from Ampere on) and on x86 CPUs with
    AVX512-BF16 or AMX, else float32."""
    compile: bool = resumable(True)
    """Compile the step with torch.compile; the log reports if that is not possible."""
    compile_blocks: bool = resumable(True)
    """Compile only the transformer blocks, and each kind of block once; false compiles the whole step, whose first step
    takes longer. `run.sharding` fsdp always compiles only the blocks."""
    graph: Literal["auto", "on", "off"] = resumable("auto")
    """Run the whole step as a CUDA graph on a GPU: `auto` unless it is measured to be slower (one pass per step;
    several processes with `run.sharding` ddp), `on` without a measurement (raises if not possible), or `off`. The
    network of a tokenizer that runs during training is a graph of its own, unless this is `off`."""
    deterministic: bool = False
    """Use only bit-exact repeatable algorithms on a GPU, some of which are slower; on a CPU all are repeatable."""
    recompute: bool = resumable(False)
    """Recompute the blocks' activations in the backward pass: less memory, about a third more work."""
    log_every: int = limited(20, COUNT, resumable=True)
    """Steps between two lines of the log."""
    save_every: int = limited(1000, COUNT, resumable=True)
    """Steps between two checkpoints; one is always written at the end."""
    sharding: Literal["ddp", "fsdp"] = resumable("ddp")
    """For several processes: `ddp` replicates the model, `fsdp` shards weights, gradients and optimizer moments."""
    keep: int = limited(3, COUNT, resumable=True)
    """Number of newest checkpoints to keep."""
    keep_every: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Also keep checkpoints of steps that are multiples of this number; 0: none."""
    max_nonfinite: int = limited(20, COUNT, resumable=True)
    """The run skips steps whose loss or gradient is not finite, and stops after this many in a row."""
    profile: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Number of steps to profile, from the sixth of this call on; writes a trace and a table of operators to
    RUN/profile/."""
    tracker: Literal["none", "wandb", "trackio"] = resumable("none")
    """Service that also receives the numbers of the log; its package must be installed."""


class TokenGrid:
    """Token-grid sizes of a config that has the tables `data` and `model`."""

    data: Any
    model: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        """Returns the number of tokens along time, height and width."""
        side = self.data.size // self.model.patch
        return self.data.frames // self.model.tubelet, side, side

    @property
    def trained_grid(self) -> tuple[int, int, int]:
        """The token grid of the clips that the weights were trained on, whose positions are resampled to `grid`."""
        side = (self.model.size or self.data.size) // self.model.patch
        return (self.model.frames or self.data.frames) // self.model.tubelet, side, side

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Returns frames, height and width of a token."""
        return self.model.tubelet, self.model.patch, self.model.patch


class TrainConfig(Protocol):
    """The tables that every kind of training run has."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def run(self) -> RunConfig: ...

    @property
    def clips_per_group(self) -> int: ...


def micro_batches_per_step(config: TrainConfig, processes: int) -> int:
    """Returns the forward passes per process and optimizer step: the fewest that `optim.micro_batch` allows.

    Raises UserError if the batch cannot be divided evenly.
    """
    batch, group = config.optim.batch, config.clips_per_group
    most = 0 if config.optim.micro_batch == "auto" else config.optim.micro_batch  # auto divides what the loader yields
    if config.optim.micro_batch == "auto" and processes > 1 and config.run.sharding == "fsdp":
        raise UserError(
            "optim.micro_batch auto: with run.sharding fsdp no process can try passes alone; set a number of clips, "
            "which mam2 plan estimates"
        )
    views = f"data.views {config.data.views}" + " × 2 videos that are mixed" * (group > config.data.views)
    if batch % (processes * group):
        raise UserError(
            f"optim.batch {batch}: expected a multiple of {processes * group} "
            f"({counted(processes, 'process')} × {views})"
        )
    for count in range(1, batch // (processes * group) + 1):
        if batch % (processes * count * group) == 0 and (not most or batch // (processes * count) <= most):
            return count
    raise UserError(
        f"optim.micro_batch {most}: a pass has at least {group} clips ({views}); set it to {group} or more, or to 0"
    )


def equal_passes(clips: int, group: int) -> list[int]:
    """Returns the numbers of equal passes, ascending, into which `clips` clips can be divided without splitting groups
    of `group` clips."""
    return [count for count in range(1, clips // group + 1) if clips % (count * group) == 0]


def check_training(config: TrainConfig, patch: int, tubelet: int) -> None:
    """Does the part of `check` that all kinds of config share; a token has `tubelet` frames and `patch`² pixels."""
    data = config.data
    check_limits(config)
    if data.size % patch:
        below = max(data.size // patch, 1) * patch
        raise UserError(f"data.size {data.size} is not a multiple of model.patch {patch}; use for example {below}")
    if data.frames % tubelet:
        raise UserError(f"data.frames {data.frames} is not a multiple of model.tubelet {tubelet}")
    check_data(data)
    micro_batches_per_step(config, 1)


def check_data(data: DataConfig) -> None:
    """Does the part of `check` that concerns only [data]."""
    check_limits(data, "data.")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) not in (0, data.channels):
            raise UserError(
                f"data.{name}: expected {data.channels} numbers, one per channel (data.channels), found {len(values)}"
            )
    if data.value_range and (len(data.value_range) != 2 or data.value_range[0] >= data.value_range[1]):
        raise UserError(f"data.value_range: expected two numbers, the lower one first, found {list(data.value_range)}")
    if data.min_area > data.max_area:
        raise UserError(f"data.min_area {data.min_area} is above data.max_area {data.max_area}: lower it")
    if data.sampling == "dense" and (data.stride > 0) == (data.fps > 0):
        raise UserError(
            f"data.stride {data.stride}, data.fps {data.fps:g}: dense sampling needs exactly one; set the other to 0"
        )
