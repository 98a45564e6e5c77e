"""Re-encodes videos for training: a small shorter side, frequent key frames, one codec, upright, without sound.

Every decoded frame becomes one frame of the output at a constant rate, the average of the source. A frame therefore
keeps its number; in a video of variable rate it is displayed at another time than before. A file is written under a
temporary name, decoded to count its frames, and renamed: a file with the final name is complete. Non-square pixels stay
non-square. A folder of images becomes a video.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from tqdm import tqdm

from mam2.engine.data.decoding import (
    FILE_ERRORS,
    FRAMES,
    ONE_THREAD,
    DecodeError,
    available_cores,
    decode_packet,
    frame_files,
    open_video,
)
from mam2.engine.data.encoding import video_writer
from mam2.engine.data.frame_folders import folder_status
from mam2.engine.data.sources import Listing, list_and_split, read_source
from mam2.engine.data.storage import is_plain
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.errors import UserError
from mam2.engine.files import (
    FULL_OR_FORBIDDEN,
    check_apart,
    make_folder,
    one_line,
    unwritable,
    write_table,
    write_whole,
    writing,
    written_aside,
)
from mam2.engine.runtime.progress import Progress


class VideoEncoder(NamedTuple):
    suffix: str
    name: str
    """FFmpeg's name of the encoder."""
    options: dict[str, str]
    container_options: dict[str, str]


ENCODERS = {
    "h264": VideoEncoder(".mp4", "libx264", {"preset": "fast", "crf": "20", "bf": "0"}, {"movflags": "+faststart"}),
    "hevc": VideoEncoder(
        ".mp4",
        "libx265",
        {
            "preset": "fast",
            "crf": "22",
            "bf": "0",
            "x265-params": "open-gop=0:pools=none:frame-threads=1:log-level=error",
        },
        {"movflags": "+faststart"},
    ),
    "vp9": VideoEncoder(".webm", "libvpx-vp9", {"deadline": "good", "cpu-used": "4", "crf": "30", "b:v": "0"}, {}),
}
"""H.264 and HEVC without B-frames, because DALI waits for every picture that NVDEC returns out of order. HEVC with
closed groups of pictures, so that decoding can start at each key frame."""
MULTIPLE = 16
"""Both sides are multiples of this: DALI then reuses an NVDEC decoder for the next video of the same size."""
UNSTATED_RATE = 25.0
"""Frames per second for a source without a stated rate, such as a folder of images."""
MOST_LOST = 0.1
"""Share of the counted frames, plus one frame, that may be missing when a source is decoded: packed B-frames and edit
lists make the count too large. If more are missing, the source is damaged and counts as failed."""
SETTINGS = "transcode.json"
FAILURES = "transcode.failed.tsv"


@dataclass(frozen=True, kw_only=True)
class Settings:
    codec: str = "h264"
    """`h264` or `hevc`, which NVDEC decodes, or `vp9`, which DALI also decodes on a CPU."""
    short_side: int = 320
    """Shorter side in pixels; a smaller video keeps its size. Both sides are then rounded to multiples of 16: at 320
    pixels, that stretches a frame by less than 3 %."""
    gop: int = 30
    """Largest distance of key frames, in frames."""


class Written(NamedTuple):
    """A written file: bytes of the source and of the output."""

    before: int
    after: int


class Outcome(NamedTuple):
    written: tuple[Written, ...]
    kept: int
    """Existing files that are newer than their source."""
    failed: tuple[Skipped, ...]


class _Job(NamedTuple):
    source: str
    target: Path


def transcode(
    data: str | Path,
    out: str | Path,
    *,
    codec: Literal["h264", "hevc", "vp9"] = "h264",
    short_side: int = 320,
    gop: int = 30,
    jobs: int = 0,
    progress: bool = True,
) -> Outcome:
    """Re-encodes the videos of a folder, list or file into the folder `out`; existing files are kept.

    Files keep their path relative to the source folder; files of a list keep their path relative to their common
    folder. For a list, a list of the same name in `out` has the new paths and the old labels, without failed files
    (tab-separated, with a header). `out/transcode.failed.tsv` lists failures.

    Args:
        data: a folder of videos, an annotation list, or a video.
        out: folder for the new videos.
        codec: h264 or hevc, which NVDEC decodes, or vp9, which DALI decodes on a CPU.
        short_side: pixels of the shorter side; smaller videos keep their size.
        gop: largest number of frames from a key frame to the next.
        jobs: files at once; 0: one per core.
        progress: show a progress bar (only on a terminal).

    Raises:
        UserError: a value is invalid, or `out` contains files of other settings.
    """
    settings = Settings(codec=codec, short_side=short_side, gop=gop)
    out = Path(out).absolute()
    _check(settings, jobs)
    listing = read_source(data)
    packed = next((entry.path for entry in listing.entries if not is_plain(entry.path)), None)
    if packed:
        raise UserError(f"{data}: expected video files on a local drive, found {packed}; unpack or copy them first")
    for note in listing.notes:
        tqdm.write(one_line(note), file=sys.stderr)
    source = list_and_split(data)[0]
    plan = _plan(source, listing, out, settings)
    _claim(out, settings)
    stop = threading.Event()
    with ThreadPoolExecutor(jobs or available_cores(), "transcode") as pool:
        try:
            found = pool.map(lambda job: _transcode_one(job, settings, stop), plan)
            results = list(Progress(found, "transcoding", len(plan), unit="file", shown=progress))
        except BaseException:
            stop.set()  # drops files that are being written and does not start others
            pool.shutdown(cancel_futures=True)
            raise
    done = list(zip(plan, results, strict=True))
    failed = tuple(Skipped(job.source, result) for job, result in done if isinstance(result, str))
    with writing(out):
        write_table(out / FAILURES, [("path", "reason"), *((entry.path, entry.reason) for entry in failed)])
        if source.is_file() and plan[0].source != os.path.abspath(source):
            targets = {job.source: job.target for job, result in done if not isinstance(result, str)}
            _write_list(out / f"{source.stem}.tsv", listing, targets)
    written = tuple(result for result in results if isinstance(result, Written))
    return Outcome(written, sum(result is None for result in results), failed)


def _check(settings: Settings, jobs: int) -> None:
    if settings.codec not in ENCODERS:
        raise UserError(f"--codec: expected one of {', '.join(ENCODERS)}; found {settings.codec}")
    if settings.short_side < 2 or settings.gop < 1 or jobs < 0:
        raise UserError(
            f"--short-side {settings.short_side}, --gop {settings.gop}, --jobs {jobs}: expected at least 2, 1 and 0"
        )


def _plan(source: Path, listing: Listing, out: Path, settings: Settings) -> list[_Job]:
    """Returns the target of each source; sources that differ only by their suffix keep it before the new suffix."""
    sources = list(dict.fromkeys(entry.path for entry in listing.entries))
    if source.is_dir():
        root = os.path.abspath(source)
        check_apart(source, out, inside=False)
    else:
        root = os.path.commonpath([os.path.dirname(path) for path in sources])
    suffix = ENCODERS[settings.codec].suffix
    # The data folder itself may be a folder of images.
    names = [os.path.relpath(path, root) if path != root else os.path.basename(path) for path in sources]
    bare = [
        name if os.path.isdir(path) else os.path.splitext(name)[0] for path, name in zip(sources, names, strict=True)
    ]
    counts = Counter(bare)
    stems = [short if counts[short] == 1 else name for short, name in zip(bare, names, strict=True)]
    plan = [_Job(path, out / (stem + suffix)) for path, stem in zip(sources, stems, strict=True)]
    own = {os.path.realpath(path) for path in sources}
    takers = {job.target: job.source for job in plan}
    for job in plan:
        if takers[job.target] != job.source:
            raise UserError(f"{job.source} and {takers[job.target]} would both become {job.target}; rename one")
        if os.path.realpath(job.target) in own:
            raise UserError(f"--out {out}: {job.target} is one of the videos to be read; choose another folder")
    return plan


def _claim(out: Path, settings: Settings) -> None:
    """Creates the folder and stores the settings in it; raises UserError if it holds files of other settings."""
    file, values = out / SETTINGS, dataclasses.asdict(settings) | {"multiple": MULTIPLE, "b_frames": 0}
    make_folder(out)
    try:
        with writing(out):
            if not file.exists():
                write_whole(file, json.dumps(values) + "\n")
            before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a settings file of mam2 transcode ({error}); choose another folder") from error
    if before != values:
        raise UserError(f"--out {out} holds files made with {before}, now {values} is requested; choose another folder")


def _transcode_one(job: _Job, settings: Settings, stop: threading.Event) -> Written | str | None:
    """Returns the written file, None for an existing file, or the reason of a failure."""
    if _is_newer(job.target, job.source):
        return None
    video = probe_file(job.source)
    if isinstance(video, Skipped):
        return video.reason
    if video.channels:
        return "an array: only video files and folders of images are transcoded"
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(job.target) as aside:
            frames = _encode(video, aside, settings, stop)
            if video.frames - frames > 1 + MOST_LOST * video.frames:
                raise DecodeError(f"damaged: {frames} of {video.frames} frames can be decoded")
            found = sum(1 for _ in _decoded([str(aside)], stop))
            if found != frames:
                raise DecodeError(f"the output decodes to {found} frames instead of {frames}")
        return Written(video.bytes, job.target.stat().st_size)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        # av's errors are OSErrors too. A full or read-only disk also affects all following files.
        if error.errno in FULL_OR_FORBIDDEN and not isinstance(error, av.error.InvalidDataError):
            raise unwritable(job.target.parent, error) from error
        return f"{type(error).__name__}: {error}"
    except FILE_ERRORS as error:  # one bad file must not end the run: it is reported, and the others continue
        return f"{type(error).__name__}: {error}"


def _is_newer(target: Path, source: str) -> bool:
    try:
        changed = folder_status(source)[1] if os.path.isdir(source) else os.stat(source).st_mtime_ns
        return target.stat().st_mtime_ns >= changed
    except FileNotFoundError:
        return False


def _encode(video: Video, path: Path, settings: Settings, stop: threading.Event) -> int:
    """Writes all frames of a video; returns their number."""
    encoder = ENCODERS[settings.codec]
    rate = Fraction(video.fps or UNSTATED_RATE).limit_denominator(1001)
    width, height = _coded_size(*video.shown_size, settings.short_side)
    stored = (height, width) if video.rotation % 180 else (width, height)
    reformatter = VideoReformatter()
    sources = frame_files(video.path) if video.codec == FRAMES else [video.path]
    count = 0
    with video_writer(
        path,
        encoder.name,
        (width, height),
        rate=rate,
        gop=settings.gop,
        options=encoder.options,
        container_options=encoder.container_options,
    ) as (container, stream):
        context = stream.codec_context
        for frame in _decoded(sources, stop):
            if not count and not frame.format.is_rgb:
                # Keeps the color matrix: a conversion through RGB would darken the frames by a level or two.
                context.colorspace, context.color_range = frame.colorspace, ColorRange.MPEG
            small = reformatter.reformat(
                frame,
                *stored,
                "yuv420p",
                src_color_range=frame.color_range,
                dst_color_range=ColorRange.MPEG,
                interpolation="BICUBIC",
                **ONE_THREAD,
            )
            picture = _turned(small, video.rotation // 90)
            picture.pts, picture.time_base = count, 1 / rate
            container.mux(stream.encode(picture))
            count += 1
    return count


def _turned(frame: VideoFrame, turns: int) -> VideoFrame:
    """Returns a yuv420p frame, both sides even, after counterclockwise quarter turns."""
    if not turns:
        return frame
    height, width = frame.height, frame.width
    flat = frame.to_ndarray().reshape(-1)
    luma, chroma = flat[: height * width].reshape(height, width), flat[height * width :]
    planes = [luma, *chroma.reshape(2, height // 2, width // 2)]
    turned = np.concatenate([np.rot90(plane, turns).reshape(-1) for plane in planes])
    return VideoFrame.from_ndarray(turned.reshape(-1, height if turns % 2 else width), "yuv420p")


def _decoded(paths: Iterable[str], stop: threading.Event) -> Iterator[VideoFrame]:
    """Yields all frames of the files, one after the other."""
    for path in paths:
        with open_video(path) as (container, stream):
            for packet in container.demux(stream):
                if stop.is_set():
                    raise DecodeError("interrupted")
                if packet.size:
                    yield from decode_packet(stream, packet)
            yield from decode_packet(stream, None)


def _coded_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns the size with a shorter side of about `short_side` or less.

    Both sides are the nearest multiples of 16.
    """
    scale = min(1.0, short_side / min(width, height))
    wide, high = (max(MULTIPLE, MULTIPLE * round(side * scale / MULTIPLE)) for side in (width, height))
    return wide, high


def _write_list(path: Path, listing: Listing, targets: dict[str, Path]) -> None:
    entries = [entry for entry in listing.entries if entry.path in targets]
    paths = [os.path.relpath(targets[entry.path], path.parent) for entry in entries]
    labels = [listing.classes[entry.label] if entry.label >= 0 else "" for entry in entries]
    columns = {"path": paths, "label": labels}
    if any(entry.split for entry in entries):
        columns["split"] = [entry.split for entry in entries]
    write_table(path, [tuple(columns), *zip(*columns.values(), strict=True)])
