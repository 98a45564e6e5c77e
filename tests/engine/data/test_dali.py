"""DALI's graph crops, mirrors and shrinks as NumPy and PyTorch do, and stays usable after a bad file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import dali as graph
from mam2.engine.data import decoding
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.sampling import View
from tests.helpers.dali import needs_dali

pytestmark = needs_dali
CPU = torch.device("cpu")


def resize(frames: np.ndarray, size: int, *views: View) -> list[torch.Tensor]:
    config = DataConfig(frames=len(frames), stride=1, size=size)
    clips = ClipGraph("pyav", config, views=len(views), samples=1, threads=1, device=CPU)
    return [view[0].clone() for view in clips.run([frames], [range(len(frames))], [views])]


def test_crops_and_flips_are_numpys():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    crop, mirrored = resize(
        frames, 20, View(15 / 60, 10 / 40, 35 / 60, 30 / 40, False), View(15 / 60, 10 / 40, 35 / 60, 30 / 40, True)
    )
    expected = torch.from_numpy(frames[:, 10:30, 15:35])
    assert (crop.int() - expected.int()).abs().max() <= 1
    assert (mirrored.int() - expected.flip(2).int()).abs().max() <= 1


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """DALI requires device_id None for a graph without a GPU; with a number NVDEC would seem to be missing."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    given = {"views": 1, "samples": 1, "threads": 1}
    for device, number in (("cuda", 3), ("cuda:1", 1), ("cpu", None)):
        graph = ClipGraph("nvdec", DataConfig(frames=2, stride=1, size=8), device=torch.device(device), **given)
        assert graph._options["device_id"] == number


def test_a_whole_frame_of_the_right_size_stays_bit_for_bit():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(resize(frames, 32, View(0, 0, 1, 1, False))[0], frames)


def test_shrinking_is_antialiased_as_in_pytorch():
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    (small,) = resize(frames, 24, View(0, 0, 1, 1, False))
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(planes, (24, 24), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    # At the border DALI repeats the edge; PyTorch ignores pixels outside of the frame.
    assert (small.float() - expected)[:, 1:-1, 1:-1].abs().max() <= 1


def test_dali_continues_after_a_file_it_cannot_decode(videos):
    path = next(video.path for video in videos.videos if video.codec == "vp9")
    config = DataConfig(frames=2, stride=1, size=16)
    clips = ClipGraph("dali-cpu", config, views=1, samples=2, threads=1, device=CPU)
    good, whole = np.fromfile(path, np.uint8), [View(0, 0, 1, 1, False)]
    (before,) = (view.clone() for view in clips.run([good], [[1, 2]], [whole]))
    with pytest.raises(decoding.DecodeError, match=r"DALI: Failed to create video decoder") as caught:
        clips.run([good, good[:50]], [[0, 1]] * 2, [whole, whole])
    assert "\n" not in str(caught.value)
    assert torch.equal(before, clips.run([good], [[1, 2]], [whole])[0])
    assert graph.import_dali().__name__ == "nvidia.dali"
