"""Unusable videos are named once, and too many of them are an error."""

from mam2.engine.data.manifest import Manifest
from mam2.engine.data.unusable import UnusableVideos, none_decoded
from mam2.engine.data.video import Skipped, Video


def manifest(usable: int, skipped: int) -> Manifest:
    videos = [Video(f"{n}.mp4", -1, 8, 64, 48, "h264", 25.0, 0) for n in range(usable)]
    return Manifest(tuple(videos), tuple(Skipped(f"broken {n}.mp4", "empty file") for n in range(skipped)))


def test_each_video_is_reported_once_and_what_the_manifest_names_not_again():
    reported = []
    unusable = UnusableVideos(manifest(4, 1), 0.5, reported.append)
    for path in ("1.mp4", "broken 0.mp4", "1.mp4", "2.mp4"):
        unusable.add(Skipped(path, "damaged"))
    assert reported == unusable.found == [Skipped("1.mp4", "damaged"), Skipped("2.mp4", "damaged")]
    assert (len(unusable), unusable.total) == (3, 5)


def test_more_than_the_allowed_share_is_an_error_that_names_the_last():
    unusable = UnusableVideos(manifest(3, 1), 0.5)
    unusable.add(Skipped("0.mp4", "damaged"))
    assert unusable.too_many() is None  # 2 of 4 are one half
    unusable.add(Skipped("2.mp4", "too short"))
    assert unusable.too_many() == (
        "3 of 4 videos cannot be used, more than data.max_unusable=0.5 allows; the last is 2.mp4: too short"
    )
    assert "broken 1.mp4: empty file" in str(UnusableVideos(manifest(1, 2), 0.5).too_many())


def test_no_decoded_video_is_an_error_that_names_the_source_the_first_file_and_the_remedy():
    message = none_decoded("val.csv", [Skipped("a.mp4", "empty file"), Skipped("b.mp4", "damaged")])
    assert message.startswith("val.csv: no video can be decoded; the first of 2 is a.mp4: empty file. ")
    assert "mam2 index" in message
