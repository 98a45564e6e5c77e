"""`mam2 plot`: plots curves of one run and of several from their logs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image

from mam2.engine.evaluation import plots, report
from mam2.engine.runtime.log import read_log
from tests.helpers.commands import outcome

MAM2 = {"loss/appearance": 6.0, "loss/motion_relative": 0.9, "accuracy/codes": 0.1, "accuracy/commonest_code": 0.03}


def write_run(folder: Path, values: dict[str, float], steps: int = 5) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 20 * n, "time": 1000.0 + 36 * n, "gradient/norm": 1 / n, **values} for n in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    return figures


def titles(figure: Any) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_several_runs_share_axes_and_missing_columns_are_left_out(tmp_path: Path, drawn: list[Any]) -> None:
    logs = {
        "mam2": read_log(write_run(tmp_path / "mam2", MAM2)),
        "videomae": read_log(write_run(tmp_path / "videomae", {"loss/pixels": 0.5, "mfu": 0.25})),
    }
    plots.draw_logs(logs, against=("step", "hours"))
    (figure,) = drawn
    shown = titles(figure)
    assert shown[::2] == shown[1::2]
    assert "waiting for data (% of the time)" not in shown
    by_title = {axis.get_title(): axis for axis in figure.axes[::2] if axis.get_title()}
    assert len(by_title["gradient norm"].lines) == 2
    assert len(by_title["pixel loss"].lines) == 1
    np.testing.assert_allclose(by_title["model FLOPs utilization (%)"].lines[0].get_ydata(), 25)
    np.testing.assert_allclose(by_title["gradient norm"].lines[0].get_xdata(), [20, 40, 60, 80, 100])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mam2", "videomae"]
    hours = figure.axes[1].lines[0].get_xdata()
    np.testing.assert_allclose(hours, [0, 0.01, 0.02, 0.03, 0.04])


def test_a_run_of_one_line_is_a_dot(tmp_path: Path, drawn: list[Any]) -> None:
    plots.draw_logs({"short": read_log(write_run(tmp_path / "short", MAM2, steps=1))})
    assert {axis.lines[0].get_marker() for axis in drawn[0].axes if axis.lines} == {"."}


def test_long_labels_next_to_pictures_are_not_cut_off() -> None:
    labels = ["predicted appearance"] * 6 + ["read by the marked patch"]
    picture = report.draw_rows([(label, torch.rand(1, 4, 32, 32, 3)) for label in labels], ["clip"], inches=1.0)
    assert (image.imread(io.BytesIO(picture))[:, :3] == 1).all()


def test_time_between_a_stop_and_a_resume_is_left_out() -> None:
    times = [0, 10, 20, 5000, 5010, 4000, 4010]
    lines = [{"step": step, "time": float(time)} for step, time in enumerate(times)]
    np.testing.assert_allclose(plots.hours(lines), np.arange(7) * 10 / 3600)
    assert plots.hours(lines[:1]) == [0.0]
    assert plots.hours([]) == []


def test_a_run_that_still_writes_and_was_resumed(
    tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", MAM2)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 100, "time": 9000.0, "loss/appearance": 3.0}) + "\n")  # logged twice
        file.write('{"step": 120, "loss/appe')
    assert outcome(capsys, "plot", folder, "--out", tmp_path / "run.png")[0] == 0
    line = drawn[0].axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [20, 40, 60, 80, 100])
    np.testing.assert_allclose(line.get_ydata(), [6, 6, 6, 6, 3])


def test_the_picture_is_a_png_of_page_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "run", MAM2) for name in ("a", "b")]
    out = tmp_path / "both.png"
    status, _, err = outcome(capsys, "plot", *folders, "--out", out)
    assert (status, err) == (0, "")
    picture = image.imread(io.BytesIO(out.read_bytes()), format="png")
    assert 1500 < picture.shape[1] < 2200
    assert picture[..., :3].std() > 0.01


def test_runs_of_one_name_are_told_apart(tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "run", MAM2) for name in ("a", "b")]
    outcome(capsys, "plot", *folders, "--out", tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/run", "b/run"]


def test_a_users_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = outcome(capsys, "plot", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "contains no log.jsonl" in err
    (tmp_path / "log.jsonl").touch()
    status, _, err = outcome(capsys, "plot", tmp_path, "--out", tmp_path / "x.png")
    assert (status, err.count("\n")) == (2, 1)
    assert "no log line yet" in err
    full = write_run(tmp_path / "full", MAM2)
    status, _, err = outcome(capsys, "plot", full, "--out", tmp_path / "nowhere" / "x.png")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written" in err


def test_the_motion_loss_itself_is_drawn_with_its_peaks(tmp_path: Path, drawn: list[Any]) -> None:
    plots.draw_logs({"a": read_log(write_run(tmp_path / "a", {"loss/motion": 0.2, "loss/motion_peak": 30.0}))})
    (axis,) = (axis for axis in drawn[0].axes if axis.get_title() == "motion loss")
    assert axis.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in axis.lines] == [0.2, 30.0]


def test_drawing_leaves_the_plotting_backend_alone() -> None:
    """A notebook's backend stays: no module of the engine uses pyplot, whose import chooses one for the process."""
    code = (
        "import sys, mam2.engine.evaluation.plots, mam2.engine.evaluation.report, mam2.engine.evaluation.visualize\n"
        "from mam2.engine.evaluation.accuracy import draw_confusion\n"
        "import torch; draw_confusion(torch.eye(2), ('a', 'b'))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
