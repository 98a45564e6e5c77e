"""A labeled set of short synthetic clips as encoded files; the class depends only on the motion.

A bright shape moves over a dim background: left, right, up, down, clockwise, counterclockwise, growing or shrinking.
Shape, colors, size, position, speed and background are drawn independently of the class. The classes form pairs that
are time reversals of each other, so that the frames of a clip without their order do not reveal the class. Half of the
files are mp4/H.264, half webm/VP9.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np

from mam2.engine.data.encoding import encode_frames
from mam2.engine.files import written_aside
from mam2.engine.runtime.progress import Progress

MOTIONS = ("clockwise", "counterclockwise", "down", "grow", "left", "right", "shrink", "up")
SHAPES = ("bar", "triangle", "cross", "half-disc", "corner")
SIZE = 64
FRAMES = 24
FPS = 12
QUALITY = 18
"""Constant rate factor of the encoders."""
STREAMS = {"train": 0, "test": 2}
"""Random streams of the splits. The test clips of stream 1 were used to choose the demo's settings."""


def render_clip(motion: str, rng: np.random.Generator) -> np.ndarray:
    """Renders a clip of a motion: uint8 [FRAMES, SIZE, SIZE, 3], RGB. With equal `rng`, all motions look the same."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    background = _background(rng)
    color = bright_color(rng)
    coverage = draw_coverage(motion, shape, rng)
    return as_pixels(background[None] * (1 - coverage) + color * coverage)


def draw_coverage(
    motion: str, shape: str, rng: np.random.Generator, *, camera: np.ndarray | float = 0.0, size: int = SIZE
) -> np.ndarray:
    """Returns the share of each pixel that a moving shape covers: float [FRAMES, size, size, 1], 0 to 1.

    camera: [FRAMES, 2], shift of everything to the right and down, in pixels of a frame of SIZE.
    """
    radius = rng.uniform(13, 20)
    angle = rng.uniform(0, 2 * np.pi)
    drift = rng.uniform(40, 60)  # pixels over the whole clip
    turn = rng.uniform(0.9, 1.5) * np.pi  # radians over the whole clip
    growth = rng.uniform(1.8, 2.4)  # ratio of the largest to the smallest radius
    place = rng.uniform(0, SIZE, size=2)

    progress = np.linspace(-0.5, 0.5, FRAMES)
    center = np.repeat(place[None], FRAMES, axis=0) + camera
    angles = np.full(FRAMES, angle)
    radii = np.full(FRAMES, radius)
    if motion in ("left", "right"):
        center[:, 0] += progress * drift * (1 if motion == "right" else -1)
    elif motion in ("up", "down"):
        center[:, 1] += progress * drift * (1 if motion == "down" else -1)
    elif motion in ("clockwise", "counterclockwise"):
        angles += progress * turn * (1 if motion == "clockwise" else -1)
    elif motion in ("grow", "shrink"):
        radii *= growth ** (progress * (1 if motion == "grow" else -1))
    else:
        raise ValueError(f"motion: expected one of {', '.join(MOTIONS)}, found {motion!r}")

    y, x = np.mgrid[:size, :size].astype(np.float32) * (SIZE / size)
    # A shape that leaves on one side returns on the other, so that positions do not reveal the direction.
    dx, dy = (_wrapped(a[None] - center[:, i, None, None]) for i, a in enumerate((x, y)))
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    radii = radii[:, None, None]
    # y points down, so a growing angle turns clockwise on the screen.
    distance = _distance(shape, (cos * dx + sin * dy) / radii, (cos * dy - sin * dx) / radii) * radii
    return np.clip(0.5 - distance * (size / SIZE), 0, 1)[..., None]


def as_pixels(clip: np.ndarray) -> np.ndarray:
    """Converts 0 to 1 to uint8."""
    return np.clip(clip * 255 + 0.5, 0, 255).astype(np.uint8)


def _wrapped(offset: np.ndarray) -> np.ndarray:
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the signed distance to a shape of radius about 1, negative inside.

    No shape is symmetric under the rotations drawn here.
    """

    def box(cu: float, cv: float, half_u: float, half_v: float) -> np.ndarray:
        return np.maximum(np.abs(u - cu) - half_u, np.abs(v - cv) - half_v)

    if shape == "bar":
        return box(0, 0, 1.0, 0.35)
    if shape == "triangle":
        return np.maximum(v - 0.6, np.abs(u) * 0.87 - v * 0.5 - 0.6)
    if shape == "cross":
        return np.minimum(box(0, 0, 1.0, 0.28), box(0, 0.25, 0.28, 0.75))
    if shape == "half-disc":
        return np.maximum(np.hypot(u, v) - 1.0, -v - 0.1)
    return np.minimum(box(0, 0.6, 0.9, 0.3), box(-0.6, 0, 0.3, 0.9))


def bright_color(rng: np.random.Generator) -> np.ndarray:
    """Draws an RGB color in 0.4 to 1 with one channel at 1."""
    color = rng.uniform(0.4, 1.0, size=3)
    color[rng.integers(3)] = 1.0
    return color


def _background(rng: np.random.Generator) -> np.ndarray:
    """Draws a dim gradient between two colors in a random direction, with a static disc: [SIZE, SIZE, 3], 0 to 0.25."""
    first, second = rng.uniform(0.0, 0.25, size=(2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    ramp = np.clip(0.5 + (x * np.cos(angle) + y * np.sin(angle)), 0, 1)[..., None]
    background = first * (1 - ramp) + second * ramp
    center, radius = rng.uniform(-0.4, 0.4, size=2), rng.uniform(0.08, 0.2)
    disc = np.clip((radius - np.hypot(x - center[0], y - center[1])) * SIZE, 0, 1)[..., None]
    return background * (1 - disc) + rng.uniform(0.0, 0.25, size=3) * disc


def write_clip(path: Path, clip: np.ndarray, *, fps: int = FPS, quality: int = QUALITY) -> None:
    """Encodes uint8 [T, H, W, 3] as H.264 (.mp4) or VP9 (.webm), with a key frame every 12 frames.

    quality: the constant rate factor; 18 is nearly lossless, 30 shows blocks. The same frames give the same bytes.
    """
    codec, options = {
        # without the macroblock tree, whose result on such small frames differs from call to call
        ".mp4": ("libx264", {"preset": "veryfast", "crf": str(quality), "x264-params": "mbtree=0:rc-lookahead=0"}),
        ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": str(quality), "b:v": "0"}),
    }[path.suffix]
    height, width = clip.shape[1:3]
    exact = {"fflags": "bitexact"}  # otherwise WebM contains a random number
    encode_frames(path, clip, codec, (width, height), rate=fps, gop=12, options=options, container_options=exact)


TRIALS = {
    "h264": (".mp4", "libx264", "yuv420p"),
    "hevc": (".mp4", "libx265", "yuv420p"),
    "vp8": (".webm", "libvpx", "yuv420p"),
    "vp9": (".webm", "libvpx-vp9", "yuv420p"),
    "av1": (".mp4", "libsvtav1", "yuv420p"),
    "mpeg4": (".avi", "mpeg4", "yuv420p"),
    "mjpeg": (".avi", "mjpeg", "yuvj420p"),
}
"""Suffix, FFmpeg's encoder and pixel format of the trial clip of a codec."""


def write_trial(folder: Path, codec: str, *, frames: int, side: int) -> Path | None:
    """Writes a clip to test a decoder: frame t is gray with value 10·t + 5. Returns None without an encoder in PyAV."""
    suffix, encoder, pixels = TRIALS[codec]
    if encoder not in av.codecs_available:
        return None
    path = folder / f"{codec}{suffix}"
    os.environ.setdefault("SVT_LOG", "1")  # makes libsvtav1 print errors only
    options = {"libx265": {"x265-params": "log-level=none"}}.get(encoder, {})
    images = (np.full((side, side, 3), 10 * number + 5, np.uint8) for number in range(frames))
    encode_frames(path, images, encoder, (side, side), pixel_format=pixels, options=options)
    return path


Render = Callable[[str, str, int], tuple[np.ndarray, int]]
"""From split, motion and number to a clip, uint8 [T, H, W, 3], and its encoding quality. Must be picklable."""


def write_dataset(folder: str | Path, *, train: int, test: int, seed: int = 0, progress: bool = True) -> None:
    """Writes `train` clips to `folder/train/<motion>/` and `test` clips to `folder/test/<motion>/`; see `write_clips`.

    Train and test clips come from separate random streams.
    """
    write_clips(Path(folder), {"train": train, "test": test}, functools.partial(_render, seed), progress=progress)


def _render(seed: int, split: str, motion: str, index: int) -> tuple[np.ndarray, int]:
    return render_clip(motion, np.random.default_rng([seed, STREAMS[split], index])), QUALITY


def write_clips(folder: Path, counts: Mapping[str, int], render: Render, *, progress: bool = True) -> None:
    """Writes `counts[split]` clips to `folder/<split>/<motion>/`, with equal numbers per class.

    Half are mp4, half webm. Existing files are kept, so that an interrupted call continues where it stopped.
    """
    jobs = []
    for path, split, motion, index in clip_paths(folder, counts):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            jobs.append((path, render, split, motion, index))
    if not jobs:
        return
    workers = min(len(os.sched_getaffinity(0)), 16)
    # Spawned, not forked: the caller may have threads (torch, DALI).
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(_write_one, jobs, chunksize=32)
        for _ in Progress(done, "writing clips", len(jobs), unit="clip", shown=progress):
            pass


def clip_paths(folder: Path, counts: Mapping[str, int]) -> Iterator[tuple[Path, str, str, int]]:
    """Path, split, motion and number of each clip that `write_clips` writes."""
    for split, count in counts.items():
        for index in range(count):
            motion = MOTIONS[index % len(MOTIONS)]
            suffix = ".mp4" if (index // len(MOTIONS)) % 2 else ".webm"
            yield folder / split / motion / f"{index:05d}{suffix}", split, motion, index


def _write_one(job: tuple[Path, Render, str, str, int]) -> None:
    path, render, split, motion, index = job
    clip, quality = render(split, motion, index)
    with written_aside(path) as aside:  # an incomplete file must not count as complete
        write_clip(aside, clip, quality=quality)
