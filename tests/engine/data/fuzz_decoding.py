"""Damages thousands of video files and decodes them.

    python -m tests.engine.data.fuzz_decoding [SOURCES] [--count N]

Mutant n of a seed is always the same file. The mutants are decoded in processes of their own, one after the other, so
that a crash or a hang of native code is seen, named and survived. Prints their outcomes as JSON; exit status 1
if one crashed the decoder, held it for longer than LIMIT_S, or gave a clip of another shape than asked for.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import faulthandler
import itertools
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, Video, probe_file
from mam2.engine.data.sampling import View
from mam2.engine.data.vetting import vet
from mam2.engine.data.video_decoders import DALI_CPU_CODECS

LIMIT_S = 30
"""A mutant that takes longer counts as a hang; an undamaged file takes milliseconds."""
CONFIG = DataConfig(frames=4, stride=3, size=32, threads=2, timeout_s=LIMIT_S / 2, max_unusable=1.0)
ENCODERS = (
    ("a.mp4", "libx264", {"bf": "2"}),
    ("b.mkv", "libx264", {"preset": "ultrafast"}),
    ("c.mp4", "libx265", {"x265-params": "log-level=none"}),
    ("d.webm", "libvpx-vp9", {"deadline": "realtime"}),
    ("e.webm", "libvpx", {"deadline": "realtime"}),
    ("f.avi", "mjpeg", {}),
    ("g.avi", "mpeg4", {"bf": "2"}),
    ("h.ts", "mpeg2video", {}),
    ("i.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    ("j.mov", "libx264", {"bf": "0"}),
    ("k.mp4", "libvpx-vp9", {"deadline": "realtime"}),
)
BOXES = re.compile(
    rb"ftyp|moov|mdat|trak|mdia|minf|stbl|stsd|stts|ctts|stss|stsc|stsz|stco|co64|elst|avcC|hvcC|av1C|vpcC"
)
ELEMENTS = re.compile(
    rb"\x1f\x43\xb6\x75|\xa3|\x16\x54\xae\x6b|\x1c\x53\xbb\x6b|\x15\x49\xa9\x66|\x00\x00\x01|00dc|idx1|LIST"
)


def write_sources(folder: Path) -> None:
    """Undamaged videos of 30 drifting frames of 64 x 48 in every codec and container that PyAV can write."""
    texture = np.kron(np.random.default_rng(0).integers(0, 256, (6, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frames = np.stack([texture[:, 2 * t : 2 * t + 64] for t in range(30)])
    for name, encoder, options in ENCODERS:
        # Without times, random names and threads, so that a mutant is the same file in every run.
        pixels = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        exact = {"fflags": "+bitexact"}
        encode_frames(
            folder / name,
            frames,
            encoder,
            (64, 48),
            pixel_format=pixels,
            gop=10,
            options=options,
            container_options=exact,
        )


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns the file with one to three kinds of damage, half of them in the headers."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if content:
            DAMAGES[rng.integers(len(DAMAGES))](content, rng)
    return bytes(content)


def _place(content: bytearray, rng: np.random.Generator) -> int:
    reach = len(content) if rng.random() < 0.5 else min(2048, len(content))
    place = int(rng.integers(reach))
    return place if rng.random() < 0.6 else len(content) - 1 - place


def _flip_bytes(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(2 ** rng.uniform(0, 9))):
        content[_place(content, rng)] = int(rng.integers(256))


def _flip_bits(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(2 ** rng.uniform(0, 6))):
        content[_place(content, rng)] ^= 1 << int(rng.integers(8))


def _cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[_place(content, rng) :]


def _write_number(content: bytearray, rng: np.random.Generator) -> None:
    """Writes one of the values that damaged sizes and counts often have."""
    numbers = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x01")
    place = _place(content, rng)
    content[place : place + 4] = numbers[rng.integers(len(numbers))]


def _piece(content: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    """Replaces the name of a box or element by another name or by random bytes."""
    names = [match.start() for match in itertools.chain(BOXES.finditer(content), ELEMENTS.finditer(content))]
    if len(names) < 2 or rng.random() < 0.3:
        first = _place(content, rng)
        return first, min(first + int(2 ** rng.uniform(0, 12)), len(content))
    place = int(rng.integers(len(names)))
    first = max(names[place] - 4, 0)
    return first, max(names[min(place + int(rng.integers(1, 4)), len(names) - 1)] - 4, first)


def _drop_piece(content: bytearray, rng: np.random.Generator) -> None:
    first, last = _piece(content, rng)
    del content[first:last]


def _blank_piece(content: bytearray, rng: np.random.Generator) -> None:
    first, last = _piece(content, rng)
    content[first:last] = bytes(last - first)


def _repeat_piece(content: bytearray, rng: np.random.Generator) -> None:
    first, last = _piece(content, rng)
    place = _place(content, rng)
    content[place:place] = content[first:last]


def _move_piece(content: bytearray, rng: np.random.Generator) -> None:
    first, last = _piece(content, rng)
    piece = content[first:last]
    del content[first:last]
    place = _place(content, rng) if content else 0
    content[place:place] = piece


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(_flip_bytes, _flip_bits, _cut, _write_number),
    *(_drop_piece, _blank_piece, _repeat_piece, _move_piece),
)


class PyAV:
    """Scans a mutant as for a manifest, and decodes it whether or not the scan accepted it."""

    def __init__(self, sources: list[Path], folder: Path) -> None:
        self._sources, self._folder = sources, folder

    def __call__(self, rng: np.random.Generator) -> str:
        source = self._sources[rng.integers(len(self._sources))]
        path = self._folder / f"mutant{source.suffix}"
        path.write_bytes(mutant(source.read_bytes(), rng))
        found = probe_file(str(path))
        first = int(rng.integers(found.frames)) if isinstance(found, Video) else 0
        try:
            clip = decode_frames(str(path), [first + 3 * t for t in range(4)], timeout_s=CONFIG.timeout_s)
        except DecodeError as error:
            return f"refused: {error}"
        right = clip.ndim == 4 and clip.shape[::3] == (4, 3) and min(clip.shape) > 0 and clip.dtype == np.uint8
        return "decoded" if right else f"wrong: {clip.dtype} {clip.shape}"


class DaliCPU:
    """Passes a vetted mutant to DALI's decoder on the CPU, whose pipeline is lost if it fails."""

    def __init__(self, sources: list[Path], folder: Path) -> None:
        videos = {path: probe_file(str(path)) for path in sources}
        self._sources = [path for path, video in videos.items() if getattr(video, "codec", "") in DALI_CPU_CODECS]
        self._graph = ClipGraph("dali-cpu", CONFIG, views=1, samples=1, threads=1, device=torch.device("cpu"))

    def __call__(self, rng: np.random.Generator) -> str:
        source = self._sources[rng.integers(len(self._sources))]
        content = np.frombuffer(mutant(source.read_bytes(), rng), np.uint8)
        first = int(rng.integers(30))
        try:
            vet(content)
            (clips,) = self._graph.run([content], [[first + 3 * t for t in range(4)]], [[View(0, 0, 1, 1, False)]])
        except DecodeError as error:
            return f"refused: {error}"
        return "decoded" if clips.shape == (1, 4, 32, 32, 3) else f"wrong: {clips.shape}"


class Loader:
    """Half of the files are mutants that the manifest lists as usable: four batches, loaded twice, are equal."""

    def __init__(self, sources: list[Path], folder: Path) -> None:
        self._folder = folder
        self._videos = [video for path in sources if isinstance(video := probe_file(str(path)), Video)]

    def __call__(self, rng: np.random.Generator) -> str:
        videos = list(self._videos)
        for place in rng.permutation(len(videos))[: len(videos) // 2]:
            path = self._folder / f"{place}{Path(videos[place].path).suffix}"
            path.write_bytes(mutant(Path(videos[place].path).read_bytes(), rng))
            videos[place] = dataclasses.replace(videos[place], path=str(path))
        seed = int(rng.integers(2**31))
        runs = []
        for threads in (1, 3):
            config = dataclasses.replace(CONFIG, threads=threads)
            with ClipLoader(Manifest(tuple(videos)), config, batch=4, device="cpu", seed=seed) as loader:
                runs.append(list(itertools.islice(loader.stream(), 4)))
        for one, other in zip(*runs, strict=True):
            if one.clip.shape != (4, 4, 32, 32, 3) or not torch.equal(one.clip, other.clip):
                return f"wrong: batch {one.step} of {tuple(one.clip.shape)}, or of other bits the second time"
        return "decoded"


VIDEO_DECODERS = {"pyav": PyAV, "dali-cpu": DaliCPU, "loader": Loader}


def work(sources: list[Path], decoder: str, seed: int, first: int, last: int) -> None:
    """Mutants `first` to `last` - 1: a line for each, before and after it; the process may end in between."""
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        judge = VIDEO_DECODERS[decoder](sources, Path(folder))
        for number in range(first, last):
            print(number, flush=True)
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # its signal ends the process, also in native code
            print(judge(np.random.default_rng([seed, number])), flush=True)
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")


def hunt(sources: Path | None, decoder: str, seed: int, first: int, last: int) -> dict[str, object]:
    """Outcomes of mutants `first` to `last` - 1: counts of outcomes, and the numbers of the bad ones."""
    outcomes: collections.Counter[str] = collections.Counter()
    bad: dict[int, str] = {}
    peak_kib = 0
    while first < last:
        command = [
            sys.executable,
            __file__,
            "--decoder",
            decoder,
            "--seed",
            str(seed),
            "--child",
            f"{first}:{last}",
        ]
        done = subprocess.run(
            [*command, *([str(sources)] if sources else [])],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        lines = done.stdout.splitlines()
        if not lines:
            raise RuntimeError(f"the child did nothing: {done.stderr[-2000:]}")
        if lines[-1].startswith("peak "):
            peak_kib = max(peak_kib, int(lines.pop().split()[1]))
        for number, outcome in itertools.zip_longest(lines[::2], lines[1::2], fillvalue=""):
            first = int(number) + 1
            if not outcome:
                why = "hung" if done.returncode == -signal.SIGALRM else f"ended with {done.returncode}"
                outcome = f"crashed: {why}"
                bad[int(number)] = f"{outcome}; {done.stderr[-1500:]}"
            elif outcome.startswith("wrong"):
                bad[int(number)] = outcome
            outcomes[outcome] += 1
    most = dict(outcomes.most_common(25))
    return {"mutants": outcomes.total(), "outcomes": most, "bad": bad, "peak_mib": peak_kib // 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="?", type=Path, help="folder of videos to damage; small ones are made if absent"
    )
    parser.add_argument("--decoder", choices=VIDEO_DECODERS, default="pyav")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant: to see one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        last = options.first + options.count
        report = hunt(options.sources, options.decoder, options.seed, options.first, last)
        print(json.dumps(report, indent=1))
        return 1 if report["bad"] else 0
    first, last = map(int, options.child.split(":"))
    with tempfile.TemporaryDirectory() as made:
        folder = options.sources or Path(made)
        if not options.sources:
            write_sources(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 400_000)
        work(paths, options.decoder, options.seed, first, last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
