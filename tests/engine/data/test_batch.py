"""The order of a clip's dimensions is changed in one place."""

import torch

from mam2.engine.data.batch import channels_first
from tests.helpers.paths import ROOT

ORDER = "permute(0, 4, 1, 2, 3)"


def test_it_is_a_view_with_the_channels_first():
    clip = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6)
    video = channels_first(clip)
    assert video.shape == (2, 6, 3, 4, 5)
    assert video.data_ptr() == clip.data_ptr()
    assert video[1, 5, 2, 3, 4] == clip[1, 2, 3, 4, 5]


def test_no_other_code_of_the_engine_changes_the_order():
    own = {"data/batch.py", "checkpoints/names.py"}  # the latter's are weights, not clips
    found = {
        str(path.relative_to(ROOT / "engine"))
        for path in (ROOT / "engine").rglob("*.py")
        if ORDER in path.read_text("utf-8")
    }
    assert found == own
