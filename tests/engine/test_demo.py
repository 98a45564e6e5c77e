"""The demo in miniature: every part of it runs and what it measures, writes and draws is consistent."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib import image

from mam2.engine import demo as demos
from mam2.engine.demo import DemoResult, demo
from mam2.engine.evaluation.pretext import PretextResult, evaluation_mask, reconstruct
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.motion_targets import motion_target
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def done(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("demo")
    return out, *demo(out, train_clips=48, test_clips=24, config=small())


@pytest.mark.slow
def test_it_measures_writes_and_draws(done, capsys):
    out, trained, result = done
    assert trained.used == 48
    pretext = result.pretext
    assert 0 < pretext.commonest_code < 1
    assert pretext.code_interval[0] <= pretext.code_accuracy <= pretext.code_interval[1]
    assert pretext.motion_interval[0] <= pretext.relative_motion <= pretext.motion_interval[1]
    saved = json.loads((out / "run" / "demo.json").read_text())
    assert saved["probe_pretrained"] == result.probe_pretrained
    assert saved["verdicts"] == result.verdicts()
    page = (out / "run" / "report.html").read_text()
    assert f"{100 * result.probe_random:.1f} %" in page
    assert page.count('class="yes"') + page.count('class="no"') == len(result.verdicts())
    assert "&quot;motion_eps&quot;: " in page
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    for name in ("strips.png", "curves.png"):
        picture = image.imread(out / "run" / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02  # something is drawn


@pytest.mark.slow
def test_a_second_call_continues_from_what_is_there(done, small):
    out, trained, result = done
    again, same = demo(out, train_clips=48, test_clips=24, config=small())
    assert again.step == trained.step
    assert same == result


def test_the_verdicts_can_fail():
    pretext = PretextResult(
        code_accuracy=0.1,
        code_interval=(0.1, 0.1),
        commonest_code=0.06,
        relative_motion=0.9,
        motion_interval=(0.8, 1.01),
    )
    bad = DemoResult(
        pretext=pretext,
        probe_pretrained=0.5,
        probe_pretrained_interval=(0.4, 0.6),
        probe_random=0.45,
        probe_random_interval=(0.4, 0.5),
        probe_gain_interval=(0.0, 0.1),
    )
    assert list(bad.verdicts().values()) == [False, False, False]


def test_strips_show_the_true_motion_and_leave_visible_patches_alone(monkeypatch, small):
    """The true motion as prediction: its picture is the true one in hidden patches and gray elsewhere."""
    config = small()
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8))
    model = MAM2(config, 16)
    video, mask = clip.permute(0, 4, 1, 2, 3), evaluation_mask(clip, config)
    target = motion_target(video, config.loss, config.patch_size)
    masked = target.gather(1, mask.masked[..., None].expand(-1, -1, target.shape[2]))
    monkeypatch.setattr(model, "predict_motion", lambda *_: masked)

    class Tokenizer:
        def codes(self, video):
            return torch.zeros(len(video), math.prod(config.grid), dtype=torch.int64)

        def decode(self, codes):
            return torch.full((len(codes), config.grid[0], 3, 16, 16), 0.25)

    strips = reconstruct(model, Tokenizer(), clip, config)
    assert strips.original.shape == (2, 4, 32, 32, 3)
    torch.testing.assert_close(strips.original, clip[:, ::2] / 255)
    hidden = (strips.masked == 0.5).all(-1) & (strips.original != 0.5).any(-1)
    expected = config.mask.ratio * 32 * 32 * 4 * 2
    assert abs(int(hidden.sum()) - expected) < 0.01 * expected
    torch.testing.assert_close(strips.predicted_motion[hidden], strips.motion[hidden], atol=1e-4, rtol=0)
    assert (strips.predicted_motion[~hidden] == 0.5).all()
    difference = (clip[:, 1::2].float() - clip[:, ::2].float()) / 255
    torch.testing.assert_close(strips.motion, (0.5 + 2 * difference).clamp(0, 1), atol=1e-4, rtol=0)
    assert torch.allclose(strips.appearance, torch.tensor(0.25))


def test_the_shipped_demo_page_is_described_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert "report.html" in readme


def test_on_a_gpu_pyav_decodes_the_small_clips_on_all_cores(monkeypatch, small):
    config = small()
    monkeypatch.setattr(demos, "pick_device", lambda _: torch.device("cpu"))
    assert demos.decoding_for(config) == config
    monkeypatch.setattr(demos, "pick_device", lambda _: torch.device("cuda"))
    data = demos.decoding_for(config).data
    assert (data.decoder, data.threads) == ("pyav", 0)
