"""benchmarks.cluster_codes: histograms of gradients and codes from clusters."""

import numpy as np
import torch

from benchmarks.cluster_codes import BINS, cluster_codes, hog
from benchmarks.trials.prepared import Prepared, Split


def test_the_histogram_of_a_patch_tells_the_direction_of_its_edges() -> None:
    video = torch.zeros(2, 1, 2, 8, 8, dtype=torch.uint8)
    video[0, ..., 2:, :] = 255  # a horizontal edge in the upper half of the first clip; the second has none
    video[:, :, 1] = 7  # the second frame of the tubelet does not count
    edge, none = hog(video, 8, 2).view(2, 2, 2, BINS)
    assert (none == 0).all()
    assert (edge[1] == 0).all()
    assert edge[0].argmax(-1).tolist() == [BINS // 2, BINS // 2]  # a gradient downward: 90 of 180 degrees


def test_codes_are_the_clusters_of_the_descriptions() -> None:
    clips = np.zeros((6, 2, 1, 2, 8, 8, 3), np.uint8)
    clips[3:] = 200
    prepared = Prepared({"train": Split(clips, torch.zeros(6))}, np.zeros(0, np.int16), 2, 1, {})
    codes = cluster_codes(prepared, lambda video: video[:, 0, :1, :1, 0].float(), seed=0)
    assert codes.shape == (6, 2, 1, 1, 1)
    assert codes.dtype == np.int16
    assert (codes[:3] == codes[0, 0]).all()
    assert (codes[3:] == 1 - codes[0, 0]).all()
