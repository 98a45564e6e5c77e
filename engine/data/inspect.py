"""The summary of an index: codecs, lengths, sizes, rates, decoders and their speed, and advice."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from mam2.engine.data.arrays import read_frames
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.manifest import Manifest, Video
from mam2.engine.data.video import HDR
from mam2.engine.files import one_line, write_whole
from mam2.engine.units import counted, decimal_bytes, duration

CLIP = tuple(range(0, 64, 4))
"""Frames of the clip for the measurement of decoding: 16 frames at stride 4, from a random start."""
RATE_FILES = 12
"""Number of videos decoded to measure the rate, evenly spaced in the manifest."""
DENSE_KEYS = 60
"""If key frames are further apart than this, about the length of a clip, most decoded frames are not used."""
LARGE_SIDE = 480
"""If the shorter side is larger than this, a clip of 224 pixels discards most of the pixels."""
MEASURED_BYTES = 2**29
"""The measurement of the rate skips videos whose decoded clip takes more bytes than this."""
NVDEC_MULTIPLE = 16
"""DALI reuses an NVDEC decoder for the next clip only if both sides are multiples of this (frames_decoder_gpu.cc)."""
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
AV1_GPUS = "A10, A40, L4, L40, RTX 30 and newer"
"""GPUs whose NVDEC decodes AV1; A100, H100 and H200 do not (NVIDIA's NVDEC application note)."""
REASONS = 8
EXAMPLES = 3


def measure_clips_per_s(videos: Sequence[Video], seed: int = 0) -> tuple[float, int]:
    """Returns the random clips per second that one thread decodes here with PyAV, and the number of videos used."""
    generator = np.random.default_rng(seed)
    fit = [video for video in videos if video.frame_bytes * len(CLIP) <= MEASURED_BYTES]
    chosen = [fit[int(place)] for place in np.linspace(0, len(fit) - 1, min(RATE_FILES, len(fit)))]
    seconds, decoded = 0.0, 0
    for video in chosen:
        start = int(generator.integers(max(video.frames - CLIP[-1], 1)))
        begun = time.perf_counter()
        try:
            numbers = [start + frame for frame in CLIP]
            if video.channels:
                read_frames(video.path, numbers, channels=video.channels)
            else:
                decode_frames(video.path, numbers)
        except DecodeError:
            continue
        seconds += time.perf_counter() - begun
        decoded += 1
    return (decoded / seconds if decoded else 0.0), decoded


def summary(manifest: Manifest, rate: tuple[float, int]) -> str:
    """Returns the summary's lines. rate: the result of `measure_clips_per_s`."""
    videos = manifest.videos
    frames = np.array([video.frames for video in videos])
    sides = np.array([min(video.shown_size) for video in videos])
    keys = np.array([video.keyframe_max for video in videos])
    fps = np.array([video.fps for video in videos if video.fps])
    hours = sum(video.duration_s for video in videos) / 3600
    short = int((frames <= CLIP[-1]).sum())
    rotated = sum(video.rotation > 0 for video in videos)
    variable = sum(video.variable_rate for video in videos)
    size = sum(video.bytes for video in videos)
    labels = Counter(video.label for video in videos if video.label >= 0)
    counts = f"{len(videos)} usable, {len(manifest.skipped)} skipped"
    rows = [("videos", f"{counts}; {decimal_bytes(size)}, {duration(hours)}")]
    if labels:
        rows.append(
            (
                "classes",
                f"{len(labels)} with {_range(labels.values(), 'video')}, "
                f"{counted(len(videos) - labels.total(), 'video')} without a label",
            )
        )
    rows += [
        ("codecs", _counted(Counter(video.codec for video in videos))),
        ("pixels", _counted(Counter(video.pixel_format for video in videos))),
        (
            "frames",
            f"{_spread(frames)}; {counted(short, 'video')} shorter than 16 frames at stride 4 ({CLIP[-1] + 1} frames)",
        ),
        ("short side", f"{_spread(sides)} pixels; {counted(rotated, 'video')} rotated"),
        (
            "rate",
            f"{_spread(fps)} frames/s; {counted(variable, 'video')} with a variable rate, "
            f"{len(videos) - len(fps)} without a rate",
        ),
        ("key frames", f"{_spread(keys)} frames in the longest key-frame interval per video"),
    ]
    decoders = Counter(decoder for video in videos for decoder in video.decoders)
    av1 = sum(video.codec == "av1" for video in videos)
    hdr = sum(video.transfer in HDR.values() for video in videos)
    interlaced = sum(video.interlaced for video in videos)
    trimmed = sum(video.trimmed > 0 for video in videos)
    if hdr:
        rows.append(("HDR", f"{counted(hdr, 'video')} decoded without tone mapping: the colors are pale"))
    if interlaced:
        rows.append(("interlaced", f"{counted(interlaced, 'video')} not deinterlaced: moving edges look like combs"))
    speed = f"{rate[0]:.1f} clips/s per thread, measured here on {rate[1]} of them"
    if not rate[1]:
        speed = f"speed not measured: no video can be decoded, or a clip takes more than {MEASURED_BYTES / 2**30:g} GiB"
    only = f"; AV1 ({counted(av1, 'video')}) only on {AV1_GPUS}, so PyAV decodes it here" if av1 else ""
    if trimmed:
        rows.append(
            (
                "edit lists",
                f"{counted(trimmed, 'video')} with hidden frames; PyAV decodes them, since DALI may count these",
            )
        )
    rows += [
        ("NVDEC", f"{counted(decoders['nvdec'], 'video')} on every GPU since Turing{only}"),
        ("DALI on CPU", f"{counted(decoders['dali-cpu'], 'video')}"),
        (
            "PyAV",
            f"{counted(decoders['pyav'], 'video')}; {speed}",
        ),
    ]
    if arrays := [video for video in videos if video.channels]:
        kinds = Counter(f"{video.pixel_format} of {counted(video.channels, 'channel')}" for video in arrays)
        rows.append(("arrays", f"{_counted(kinds)}; needs --data.channels"))
    lines = [f"{name:<12}{text}" for name, text in rows]
    if manifest.skipped:
        lines += ["", "skipped"]
        reasons = Counter(entry.reason for entry in manifest.skipped).most_common()
        for reason, count in reasons[:REASONS]:
            examples = [one_line(entry.path) for entry in manifest.skipped if entry.reason == reason][:EXAMPLES]
            lines.append(
                f"  {count} × {one_line(reason)}: {', '.join(examples)}{', …' if count > len(examples) else ''}"
            )
        if len(reasons) > REASONS:
            lines.append(f"  … and {len(reasons) - REASONS} other reasons; the index lists every file")
    hints = advice(videos)
    return "\n".join([*lines, *(["", "advice"] if hints else []), *(f"  {hint}" for hint in hints)])


def advice(videos: Sequence[Video]) -> list[str]:
    """Returns advice that makes training on these videos faster or more reliable, one item per line; empty if none."""
    files = [video for video in videos if not video.channels]
    count = len(files)
    sparse = [video for video in files if video.keyframe_max > DENSE_KEYS]
    large = [video for video in files if min(video.shown_size) > LARGE_SIDE]
    nvdec = [video for video in files if "nvdec" in video.decoders]
    no_nvdec = count - len(nvdec)
    odd = sum(video.width % NVDEC_MULTIPLE > 0 or video.height % NVDEC_MULTIPLE > 0 for video in nvdec)
    reordered = sum(video.b_frames for video in nvdec)
    fps = [video.fps for video in videos if video.fps]
    contents = {video.path: video.identity for video in videos}
    copies = len(contents) - len(set(contents.values()))
    found = []
    if len(sparse) > count / 10:
        apart = int(np.median([video.keyframe_max for video in sparse]))
        found.append(
            f"{len(sparse)} of {counted(count, 'video')}: key frames up to {apart} frames apart (median); each "
            "clip needs "
            "all frames since the key frame before it: mam2 transcode DATA --out FOLDER --gop 30"
        )
    if len(large) > count / 10:
        found.append(
            f"{len(large)} of {counted(count, 'video')}: a shorter side above {LARGE_SIDE}: "
            "mam2 transcode DATA --out FOLDER --short-side 320"
        )
    if no_nvdec > count / 10:
        found.append(
            f"{no_nvdec} of {counted(count, 'video')}: NVDEC cannot decode them (codec, pixel format, rotation "
            "or edit list): "
            "mam2 transcode DATA --out FOLDER --codec h264"
        )
    if odd > count / 10:
        found.append(
            f"{odd} of {counted(count, 'video')}: sides that are not multiples of {NVDEC_MULTIPLE}: on a GPU, "
            "DALI makes a "
            "new NVDEC decoder for each of their clips: mam2 transcode DATA --out FOLDER"
        )
    if reordered > count / 10:
        found.append(
            f"{reordered} of {counted(count, 'video')}: B-frames, which slow NVDEC down on a GPU: "
            "mam2 transcode DATA --out FOLDER"
        )
    if fps and max(fps) > 1.5 * min(fps):
        found.append(
            f"rates from {min(fps):g} to {max(fps):g} frames/s: clips of one length in seconds need "
            "--data.fps 7.5 --data.stride 0 (or another rate) instead of a stride"
        )
    if copies:
        found.append(
            f"{counted(copies, 'copy', plural='copies')} of other videos: remove them, above all copies "
            "between training and test"
        )
    return found


def draw_histograms(videos: Sequence[Video], path: Path) -> None:
    """Draws histograms of lengths, sizes and key-frame intervals to `path`, which ends in one of PICTURE_SUFFIXES."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    values = {
        "frames": [video.frames for video in videos],
        "shorter side, pixels": [min(video.shown_size) for video in videos],
        "most frames between key frames": [video.keyframe_max for video in videos],
    }
    for axes, (name, numbers) in zip(figure.subplots(1, len(values)), values.items(), strict=True):
        axes.hist(numbers, bins=min(50, len(set(numbers)) + 1), color="tab:blue")
        axes.set(xlabel=name, ylabel="videos")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."), dpi=120)
    write_whole(path, picture.getvalue())


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _range(counts: Collection[int], noun: str) -> str:
    least, most = min(counts), max(counts)
    return f"{counted(least, noun)} each" if least == most else f"{least} to {counted(most, noun)} each"


def _spread(values: np.ndarray) -> str:
    return f"{values.min():g} to {values.max():g}, median {np.median(values):g}" if len(values) else "unknown"
