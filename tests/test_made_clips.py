"""The writer of tests/clips."""

import pytest

from tests.clips import make


@pytest.mark.parametrize("file", ["grow/h264_full_range.mp4", "right/h264_interlaced.mp4", "right/vp8.webm"])
def test_a_clip_has_the_same_bytes_each_time_it_is_written(file, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    (clip,) = (clip for clip in make.CLIPS if clip.file == file)
    frames = make.render(file.split("/")[0], 0, clip.frames, clip.height, clip.width)
    written = set()
    for _ in range(8):
        make.write(clip, frames)
        written.add((tmp_path / file).read_bytes())
    assert len(written) == 1
