"""Effect of the motion target's floor on real clips: `python -m benchmarks.motion_floor --data CLIPS`.

The motion target is d / (s + floor): d is the difference to the next frame, s the standard deviation of a patch's
pixels, both in the range 0 to 1. A patch of one color has s = 0, and a fade of one gray level then has the target
1/255 / floor. The columns, for each floor:

    mean, most     mean squared target of a clip: mean over all clips, and the largest
    over 100       clips whose mean squared target is above 100
    peak loss      largest motion loss of a step, over the median of all steps
    peak gradient  largest gradient norm of a step, over the median of all steps
    gray, floored  squared error of the predicted differences of held-out clips over that of predicting no motion
                   (1: nothing learned): in gray levels, and divided by s + 0.05, where patches of low contrast count
                   more

`huber` is a robust loss instead of a larger floor: squared up to an error of 1, linear beyond, with VideoMAE's 1e-6.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.trials.settings import changed
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.sizes import resized
from mam2.engine.data.batch import channels_first
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.pretext import evaluation_mask
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.device import pick_device
from mam2.engine.runtime.distributed import World
from mam2.engine.train.optimizer import learning_rate
from mam2.engine.train.step import PretrainStep
from mam2.kernels import TubeMask, frame_difference, gather_tubes

FLOORS = (1e-6, 1 / 255, 0.01, 0.02, 0.05, 0.1, 0.2)
JUDGED_WITH = 0.05
HELD_OUT = 5
"""One of this many clips is held out of training."""
HUGE = 100


def read_clips(data: Path, config: PretrainConfig) -> Tensor:
    """Returns the middle clip of every video that can be decoded: uint8 [B, T, H, W, C]."""
    manifest = read_manifest(data)
    with ClipLoader(manifest, config.data, batch=16, device="cpu", seed=0, train=False) as loader:
        return torch.cat([batch.clip for batch in loader.evaluate()])


def squared_targets(clips: Tensor, config: PretrainConfig) -> Tensor:
    """Returns the mean squared target of each clip: [B]."""
    eps = config.loss.motion_eps
    parts = channels_first(clips).split(8)
    targets = (frame_difference(part, patch_size=config.patch_size, eps=eps) for part in parts)
    return torch.cat([target.double().square().mean((1, 2)) for target in targets])


def huber_loss(model: MAM2, config: PretrainConfig) -> None:
    """Replaces the model's motion loss by the Huber loss."""

    def loss(latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        target = frame_difference(video, patch_size=config.patch_size, eps=config.loss.motion_eps, mask=mask)
        return 2 * F.huber_loss(model.predict_motion(latents, mask), target)

    model.motion_loss = loss  # type: ignore[method-assign]


def train(
    clips: Tensor, config: PretrainConfig, steps: int, *, huber: bool = False
) -> tuple[MAM2, list[float], list[float]]:
    """Returns the model, and the motion loss and gradient norm of every step."""
    torch.manual_seed(config.run.seed)
    model = MAM2(config, 0)  # not build_model: `huber_loss` and `errors` need MAM2's motion decoder
    if huber:
        huber_loss(model, config)
    train_step = PretrainStep(config, model, pick_device(config.run), World())
    order = torch.Generator().manual_seed(config.run.seed)
    losses, norms = [], []
    for step in range(steps):
        chosen = torch.randint(len(clips), (config.optim.batch,), generator=order)
        video = channels_first(clips[chosen].to(train_step.device))
        rate = learning_rate(step, steps, steps, config.optim, global_batch=config.optim.batch)
        values = train_step(step, [(video, None)], rate, inspect=False)
        losses.append(float(values["loss/motion"]))
        norms.append(float(values["gradient/norm"]))
    return model, losses, norms


@torch.no_grad()
def errors(model: MAM2, clips: Tensor, config: PretrainConfig) -> tuple[float, float]:
    """Returns the squared error relative to predicting no motion: in gray levels, and with the floor `JUDGED_WITH`."""
    model.eval()
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for first in range(0, len(clips), 8):
        clip = clips[first : first + 8]
        video, mask = channels_first(clip), evaluation_mask(clip, config, first)
        cubes = gather_tubes(video, mask.masked, patch_size=config.patch_size).unflatten(-1, (-1, 3))
        deviation = cubes.std(2, keepdim=True)
        true = frame_difference(video, patch_size=config.patch_size, normalize=None, mask=mask).unflatten(-1, (-1, 3))
        pred = model.predict_motion(model.complete(video, mask), mask).unflatten(-1, (-1, 3))
        wrong = pred * (deviation + config.loss.motion_eps) - true
        exists = torch.ones_like(true)
        last = mask.masked >= (config.grid[0] - 1) * config.grid[1] * config.grid[2]
        exists[:, :, true.shape[2] // config.model.tubelet * (config.model.tubelet - 1) :] *= ~last[..., None, None]
        for row, scale in enumerate((1.0, deviation + JUDGED_WITH)):
            for column, part in enumerate((wrong, true)):
                sums[row, column] += (part / scale * exists).double().square().sum()
    gray, floored = (sums[:, 0] / sums[:, 1]).tolist()
    return gray, floored


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.motion_floor", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or list of videos")
    parser.add_argument("--size", type=int, default=64, help="pixels of a clip's side")
    parser.add_argument("--steps", type=int, default=250, help="steps of each training; 0 prints only the targets")
    parser.add_argument("--sampling", default="dense", choices=["dense", "uniform"])
    parser.add_argument("--patch", type=int, default=16)
    given = parser.parse_args()
    config = changed(
        load_recipe("mam2-fast"),
        {
            "data.size": given.size,
            "data.sampling": given.sampling,
            "model.patch": given.patch,
            "mask.ratio": 0.75,
            "loss.appearance_target": "none",
            "loss.balance": "fixed",
            "optim.batch": 16,
            "optim.warmup_epochs": 0.1,
            "optim.base_lr": 1e-3 * 256 / 16,
            "optim.min_lr": 1e-5 * 256 / 16,
            "run.compile": False,
            "run.precision": "float32",
        },
    )
    config = changed(config, {"model": resized(config.model, "tiny")})
    check(config)
    clips = read_clips(given.data, config)
    held = torch.arange(len(clips)) % HELD_OUT == 0
    shape = f"{config.data.frames} frames of {given.size}², patches of {given.patch}²"
    print(f"{len(clips)} clips of {shape}; {given.steps} steps")
    print("| floor | gray levels | mean | most | over 100 | peak loss | peak gradient | gray | floored |")
    print("|---|---|---|---|---|---|---|---|---|")
    for floor, huber in [*((floor, False) for floor in FLOORS), (FLOORS[0], True)]:
        now = changed(config, {"loss.motion_eps": floor})
        targets = squared_targets(clips, now)
        row = [f"{floor:.3g}{', huber' * huber}", f"{255 * floor:.2g}", f"{targets.mean():.3g}", f"{targets.max():.3g}"]
        row.append(f"{int((targets > HUGE).sum())}")
        if given.steps:
            model, losses, norms = train(clips[~held], now, given.steps, huber=huber)
            row += [f"{max(each) / statistics.median(each):.3g}" for each in (losses, norms)]
            row += [f"{error:.3f}" if error < 10 else f"{error:.3g}" for error in errors(model, clips[held], now)]
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"motion_floor: {error}", file=sys.stderr)
        sys.exit(2)
