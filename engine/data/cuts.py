"""Finds the key frames of a stream at which decoding may start, and the packets that some frames need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from av.packet import Packet

CUTS_HELD = 3
"""Number of key frames to fall back on; packets before them are dropped, so that long videos do not fill the memory."""
REORDER = 32
"""Upper bound on the packets that a decoder holds back before it returns a frame."""


class Cut(NamedTuple):
    """A key frame at which decoding may start: packets before it are displayed before it, packets after it after it."""

    frame: int
    """Number of the key frame."""
    pts: int
    """Timestamp of the key frame, in units of the stream."""
    packets: int
    """Number of packets before the key frame."""


class CutFinder:
    """Finds the cuts of a stream from its packets, passed one after the other.

    A key frame followed by frames that are displayed earlier (an open group of pictures) is not a cut. A stream with
    packets without timestamps has no cuts.
    """

    def __init__(self, index: int = 0) -> None:
        """index: number of the first frame."""
        self.index = index
        """Number of the next frame."""
        self.cuts: list[Cut] = []
        """Cuts found so far, ascending; later packets may still remove the last ones."""
        self.timed = True
        """Whether every packet had a timestamp."""
        self._packets = 0
        self._newest = -math.inf

    def see(self, packet: Packet, *, take: bool = True) -> None:
        """Processes the next non-empty packet. take: whether it may become a cut."""
        if packet.pts is None:
            self.timed = False
        elif self.timed:
            while self.cuts and packet.pts <= self.cuts[-1].pts:
                self.cuts.pop()
            later = packet.pts > self._newest and self.index > 0
            if take and later and packet.is_keyframe and not packet.is_discard:
                self.cuts.append(Cut(self.index, packet.pts, self._packets))
            self._newest = max(self._newest, packet.pts)
        self._packets += 1
        self.index += not packet.is_discard


def packets_for(
    packets: Iterable[Packet], first: int, last: int, index: int = 0
) -> tuple[list[Packet], int, int | None]:
    """Returns the packets to decode for frames `first` to `last`, the number of the first frame, and its timestamp.

    index: number of the first packet's frame. Without a cut it returns all packets, 0 and None; or no packets if the
    first ones are missing, because they were not read or the video was too long to keep them.
    """
    finder = CutFinder(index)
    kept: list[Packet] = []
    dropped = 0
    for packet in packets:
        if not packet.size:
            continue
        finder.see(packet, take=finder.index <= first)
        if len(finder.cuts) > CUTS_HELD:
            del finder.cuts[0]
            gone = finder.cuts[0].packets - dropped
            del kept[:gone]
            dropped += gone
        kept.append(packet)
        if finder.index > last + REORDER:
            break
    if not finder.cuts or not finder.timed:
        return [] if dropped or index else kept, 0, None
    cut = finder.cuts[-1]
    return kept[cut.packets - dropped :], cut.frame, cut.pts
