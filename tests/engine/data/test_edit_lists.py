"""Files whose edit list hides frames: counted and decoded by PyAV, never by DALI, which may number them differently."""

import dataclasses
import json

import av
import pytest

from mam2.engine.data import inspect
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.manifest import INDEX_SUFFIX, Manifest, read_manifest, write_manifest
from mam2.engine.data.transcode import transcode
from mam2.engine.data.video import probe_file
from mam2.engine.data.video_decoders import choose_decoder
from mam2.engine.errors import UserError

HIDDEN, FRAMES = 5, 24


def cut(path, source, **options):
    """Writes the packets of `source` with times that start HIDDEN frames before 0; in an MP4 they are hidden."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=options) as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = round(HIDDEN / stream.average_rate / stream.time_base)
        for packet in given.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                out.mux(packet)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_video, numbered_frames):
    folder = tmp_path_factory.mktemp("clips")
    whole = write_video(folder / "whole.mp4", numbered_frames(FRAMES), "libx264", bf="2")
    return whole, cut(folder / "cut.mp4", whole)


def test_hidden_frames_are_counted_and_not_shown(files, frame_numbers):
    whole, trimmed = (probe_file(str(path)) for path in files)
    assert (whole.frames, whole.trimmed) == (FRAMES, 0)
    assert (trimmed.frames, trimmed.trimmed) == (FRAMES - HIDDEN, HIDDEN)
    for first in range(trimmed.frames - 2):
        shown = decode_frames(str(files[1]), [first, first + 1, first + 2])
        assert frame_numbers(shown) == [HIDDEN + first + number for number in range(3)]


def test_only_pyav_decodes_them(files):
    whole, trimmed = (probe_file(str(path)) for path in files)
    assert whole.decoders == ("nvdec", "pyav")
    assert trimmed.decoders == ("pyav",)
    assert choose_decoder("h264", "cuda", **trimmed.traits) == "pyav"
    for decoder, codec in (("nvdec", "h264"), ("dali-cpu", "vp9")):
        assert choose_decoder(codec, "cuda", decoder, trimmed=-1) == decoder  # a manifest of an earlier version
        with pytest.raises(UserError, match=r"an edit list hides 5 of its frames.*use data.decoder=pyav or auto"):
            choose_decoder(codec, "cuda", decoder, trimmed=HIDDEN)


def test_times_before_zero_without_an_edit_list_count_as_well(tmp_path, files):
    """PyAV shows such frames, DALI's index leaves them out."""
    found = probe_file(str(cut(tmp_path / "cut.ts", files[0], avoid_negative_ts="disabled")))
    assert found.frames == FRAMES
    assert found.trimmed == HIDDEN
    assert found.decoders == ("pyav",)


def test_the_index_says_so_and_opens_files_that_an_earlier_version_read(tmp_path, files):
    manifest = read_manifest(files[0].parent, progress=False)
    (line,) = (line for line in inspect.summary(manifest, (0.0, 0)).splitlines() if line.startswith("edit lists"))
    assert "1 video with hidden frames; PyAV decodes them" in line
    whole = [video for video in manifest.videos if not video.trimmed]
    assert "edit lists" not in inspect.summary(Manifest(tuple(whole)), (0.0, 0))
    many = [dataclasses.replace(video, path=str(n)) for n, video in enumerate(manifest.videos * 10)]
    assert any("10 of 20 videos: NVDEC cannot decode them" in hint for hint in inspect.advice(many))

    index = tmp_path / f"clips{INDEX_SUFFIX}"
    write_manifest(manifest, index)
    records = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "trimmed"}) + "\n" for r in records))
    index.rename(files[0].parent.with_name(files[0].parent.name + INDEX_SUFFIX))
    again = read_manifest(files[0].parent, progress=False)
    assert {video.trimmed for video in again.videos} == {0, HIDDEN}


def test_transcoding_writes_only_what_is_shown(tmp_path, files, frame_numbers):
    transcode(files[1], tmp_path / "out", progress=False)
    (path,) = (tmp_path / "out").rglob("*.mp4")
    found = probe_file(str(path))
    assert (found.frames, found.trimmed) == (FRAMES - HIDDEN, 0)
    assert frame_numbers(decode_frames(str(path), [0, found.frames - 1])) == [HIDDEN, FRAMES - 1]
