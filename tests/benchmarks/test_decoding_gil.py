from __future__ import annotations

import av

from benchmarks import decoding_gil
from mam2.engine.data import decoding
from mam2.engine.data.manifest import Manifest


def test_every_kind_of_call_is_timed_and_nothing_stays_patched(videos: Manifest) -> None:
    before = decoding.decode_packet, decoding.read_packets, decoding.VideoReformatter, decoding._stack
    found = decoding_gil.measure([(video.path, (0, 2, 4)) for video in videos.videos[:4]])
    assert set(found) == {"total", "open", "read", "decode", "convert", "copy"}
    assert all(spent > 0 for spent in found.values())
    assert (decoding.decode_packet, decoding.read_packets, decoding.VideoReformatter, decoding._stack) == before
    assert decoding.av is av
