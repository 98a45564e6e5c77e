"""The engine from Python: what `mam2.engine` offers, and the example that uses it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import image

import mam2.engine
from mam2.engine.config.pretrain import PretrainConfig
from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "pretrain_probe_plot.py"


def test_every_name_is_there_and_says_what_it_takes() -> None:
    for name in mam2.engine.__all__:
        found = getattr(mam2.engine, name)
        assert found.__name__ == name
        assert found.__doc__, name
    assert dir(mam2.engine) == sorted(mam2.engine.__all__)


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load_encodre'; it has .*load_encoder"):
        mam2.engine.load_encodre  # noqa: B018
    with pytest.raises(ImportError):
        from mam2.engine import load_encodre  # noqa: F401


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, mam2.engine; assert 'torch' not in sys.modules; "
        "from mam2.engine import load_recipe; assert 'torch' not in sys.modules; "
        "from mam2.engine import load_encoder; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_example_pre_trains_probes_and_plots(
    tmp_path: Path, small: Callable[..., PretrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(model={"objective": "videomae"}, optim={"epochs": 1.0})
    accuracies = runpy.run_path(str(EXAMPLE))["main"](tmp_path, train_clips=32, test_clips=16, config=config)
    assert accuracies.keys() == {"random", "pre-trained"}
    printed = capsys.readouterr().out
    for name, accuracy in accuracies.items():
        assert f"{name} encoder: {100 * accuracy:.1f} %" in printed
    for name in ("losses.png", "features.png"):
        picture = image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02  # something is drawn
