"""Writes the clips of this folder again, with train.csv, test.csv and manifest.csv: `python -m tests.clips.make`.

A pattern of waves that moves in one of five ways, which is the class of a clip; each clip in a format of its own.
manifest.csv states the requested properties. PyAV 18.1.0 wrote the files that are checked in; each call writes the same
bytes with the same PyAV.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from mam2.engine.data.encoding import encode_frames, video_writer
from tests.helpers.videos import SOUND_RATE, add_sound, mux_sound, rotated, write_sound

HERE = Path(__file__).resolve().parent
MOTIONS = ("left", "right", "up", "down", "grow")
FPS = 25
TONE = 0.1 * np.sin(2 * np.pi * 440 / SOUND_RATE * np.arange(SOUND_RATE))[None].astype(np.float32)
UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 24)).tolist()
"""Times at which frames are shown, in 1 / FPS seconds."""


@dataclass(frozen=True)
class Clip:
    """One video file, named by its motion's folder and its name."""

    file: str
    encoder: str = "libx264"
    pixels: str = "yuv420p"
    width: int = 96
    height: int = 64
    frames: int = 24
    gop: int = 12
    options: dict[str, str] = field(default_factory=dict)
    times: Sequence[int] = ()
    """Time at which each frame is shown, in 1 / FPS seconds; empty: a constant rate."""
    rotation: int = 0
    interlaced: bool = False
    sound: bool = False
    damage: Callable[[bytes], bytes] | None = None
    decodable: bool = True
    """Whether a frame can be decoded."""
    split: str = "train"


def cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 5]


def flip_bits(content: bytes) -> bytes:
    """Changes one byte of 400 after the header."""
    changed, random = bytearray(content), np.random.default_rng(1)
    for place in random.integers(len(content) // 4, len(content), len(content) // 400):
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


X264 = "asm=0"
"""Without it (with vector code) x264 wrote other bytes at each call for frames this small."""
X265 = {"x265-params": "log-level=none:pools=none:frame-threads=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "34", "b:v": "0"}
CLIPS = (
    Clip("left/h264.mp4", options={"bf": "2"}),
    Clip("left/mpeg4.avi", "mpeg4"),
    Clip("left/vp9.webm", "libvpx-vp9", options=VP9, split="test"),
    Clip("left/h264_odd_444.mp4", pixels="yuv444p", width=67, height=49),
    Clip("left/corrupt_cut.webm", "libvpx-vp9", options=VP9, damage=cut),
    Clip("left/corrupt_no_index.mp4", damage=cut, decodable=False),
    Clip("right/h264_10bit.mp4", pixels="yuv420p10le"),
    Clip("right/h264_open_gop.mkv", options={"bf": "2", "x264-params": "open-gop=1"}),
    Clip("right/h264_interlaced.mp4", options={"x264-params": "tff=1"}, interlaced=True),
    Clip("right/hevc.mp4", "libx265", options=X265),
    # `realtime` would let the speed of the machine choose how hard the encoder tries
    Clip("right/vp8.webm", "libvpx", options={"deadline": "good", "cpu-used": "4", "b:v": "200k"}, split="test"),
    Clip("right/corrupt_empty.mp4", damage=lambda _: b"", decodable=False),
    Clip("up/h264_variable_rate.mp4", times=UNEVEN),
    Clip("up/h264_rotated_90.mp4", rotation=90),
    Clip("up/mpeg2.mpg", "mpeg2video"),
    Clip("up/vp9_odd.webm", "libvpx-vp9", width=35, height=27, options=VP9),
    Clip("up/mjpeg.avi", "mjpeg", "yuvj420p", frames=10, split="test"),
    Clip("up/corrupt_noise.mp4", damage=lambda _: np.random.default_rng(0).bytes(2000), decodable=False),
    Clip("down/h264_rotated_180.mp4", rotation=180),
    Clip("down/av1.mkv", "libsvtav1", options={"preset": "10", "svtav1-params": "lp=1"}),
    Clip("down/h263.3gp", "h263", width=128, height=96),
    Clip("down/wmv, with spaces.wmv", "wmv2"),
    Clip("down/h264_one_frame.mp4", frames=1, split="test"),
    Clip("down/corrupt_text.mp4", damage=lambda _: b"a text under a video's name\n" * 40, decodable=False),
    Clip("grow/h264_rotated_270.mov", rotation=270),
    Clip("grow/hevc_10bit.mkv", "libx265", "yuv420p10le", options=X265),
    Clip("grow/h264_full_range.mp4", pixels="yuvj420p"),
    Clip("grow/h264_sound.mp4", sound=True, split="test"),
    Clip("grow/vp9_variable_rate.webm", "libvpx-vp9", options=VP9, times=UNEVEN),
    Clip("grow/corrupt_bitrot.webm", "libvpx-vp9", options=VP9, damage=flip_bits),
    Clip("grow/audio_only.mp4", "", sound=True, decodable=False),
)
FRAMES = Clip("left/frames", "frames", "yuvj420p", frames=8)
"""A folder of images, one per frame."""


def render(motion: str, seed: int, frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3]: eight waves of random direction and length."""
    random = np.random.default_rng(seed)
    directions = random.uniform(-0.25, 0.25, (8, 2))
    phases = random.uniform(0, 2 * np.pi, (8, 1)) + random.uniform(-0.5, 0.5, (8, 3))  # pale colors
    t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
    x, y = x - width / 2, y - height / 2
    shift = {"left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1), "grow": (0, 0)}[motion]
    zoom = 0.97**t if motion == "grow" else 1.0
    x, y = x * zoom + 1.5 * shift[0] * t, y * zoom + 1.5 * shift[1] * t
    waves = sum(np.cos((x * u + y * v)[..., None] + phase) for (u, v), phase in zip(directions, phases, strict=True))
    return np.clip(128 + 28 * waves, 0, 255).astype(np.uint8)


def write(clip: Clip, frames: NDArray[np.uint8]) -> None:
    path = HERE / clip.file
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"rate": FPS, "pixel_format": clip.pixels, "gop": clip.gop, "options": clip.options}
    settings["container_options"] = {"fflags": "bitexact"}
    if clip.encoder == "libx264":
        settings["options"] = clip.options | {
            "x264-params": ":".join(filter(None, (clip.options.get("x264-params"), X264)))
        }
    size = clip.width, clip.height
    if not clip.encoder:
        write_sound(path, TONE, fflags="bitexact")
    elif clip.sound:
        with video_writer(path, clip.encoder, size, **settings) as (container, stream):
            tone = add_sound(container)
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            mux_sound(container, tone, TONE)
    else:
        encode_frames(path, frames, clip.encoder, size, times=clip.times, **settings)
    content = path.read_bytes()
    if clip.rotation:
        content = rotated(content, clip.rotation)
    path.write_bytes(clip.damage(content) if clip.damage else content)


def write_images(clip: Clip, frames: NDArray[np.uint8]) -> None:
    (HERE / clip.file).mkdir(parents=True)
    for number, image in enumerate(frames, 1):
        encode_frames(
            HERE / clip.file / f"img_{number:05d}.jpg",
            [image],
            "mjpeg",
            (clip.width, clip.height),
            rate=1,
            pixel_format=clip.pixels,
            container_format="image2",
        )


def write_lists() -> None:
    for split in ("train", "test"):
        usable = [clip for clip in (*CLIPS, FRAMES) if clip.split == split and clip.decodable and not clip.damage]
        rows = [("file", "label"), *((clip.file, clip.file.split("/")[0]) for clip in usable)]
        with (HERE / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    columns = ("file", "codec", "size", "frames_decoded", "rotation", "vfr", "interlaced", "pixel_format")
    with (HERE / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(columns)
        for clip in (*CLIPS, FRAMES):
            if not clip.decodable:
                lines.writerow([clip.file, *[""] * (len(columns) - 1)])
                continue
            codec = clip.encoder if clip.encoder == "frames" else av.Codec(clip.encoder, "w").canonical_name
            size = f"{clip.width}x{clip.height}"
            traits = (clip.rotation, "VFR" if clip.times else "CFR", int(clip.interlaced), clip.pixels)
            lines.writerow([clip.file, codec, size, clip.frames, *traits])


def main() -> None:
    for motion in MOTIONS:
        shutil.rmtree(HERE / motion, ignore_errors=True)
    for number, clip in enumerate((*CLIPS, FRAMES)):
        frames = render(clip.file.split("/")[0], number, clip.frames, clip.height, clip.width)
        (write_images if clip.encoder == "frames" else write)(clip, frames)
    write_lists()


if __name__ == "__main__":
    main()
