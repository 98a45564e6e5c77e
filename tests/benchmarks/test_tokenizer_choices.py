"""The comparison of kinds of codes: its pictures are those of the codes, and more codes keep more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks import tokenizer_choices
from benchmarks.tokenizer_choices import main, prepare, rows_of
from mam2.engine.tokenizer.fidelity import fidelity, squared_deviations, squared_errors


def frames(count: int, seed: int) -> torch.Tensor:
    """Smooth frames, uint8 [count, 32, 32, 3]."""
    blots = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.interpolate(blots, (32, 32), mode="bicubic").clamp(0, 1)
    return (255 * blurred).to(torch.uint8).movedim(1, -1)


def test_with_all_components_the_coefficients_are_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_choices, "COMPONENTS", 48)
    held_out = frames(3, seed=7)
    patches = prepare(frames(24, seed=1), held_out, 4, 2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(patches.decode(patches.held_out), patches.frames, atol=1e-4, rtol=0)
    torch.testing.assert_close(patches.frames, held_out.movedim(-1, 1) / 127.5 - 1)


def test_every_kind_is_measured_by_its_pictures_and_more_codes_keep_more() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = prepare(frames(64, seed=1), frames(6, seed=7), 4, 4000, generator)
    rows = list(rows_of(patches, generator, residual=((16, 3),), product=((16, 2),)))
    kinds = [(row.kind, row.codes, row.depth) for row in rows]
    assert kinds == [
        *[("one", 16, 1), ("residual", 16, 2), ("residual", 16, 3), ("product", 16, 2)],
        *[("scalar", 8, 3), ("scalar", 8, 4)],
    ]
    original = (patches.frames + 1) / 2
    for row in rows:
        back = ((row.decoded + 1) / 2).clamp(0, 1)
        expected = fidelity(squared_errors(back, original), squared_deviations(original))
        assert row.found.explained == pytest.approx(expected.explained, abs=1e-6)
        assert 1 < row.used <= (8**row.depth if row.kind == "scalar" else 16 * row.depth)
    explained = {(row.kind, row.depth): row.found.explained for row in rows}
    assert 0.3 < explained["one", 1] < explained["residual", 2] < explained["residual", 3]
    assert explained["one", 1] < explained["product", 2]
    assert explained["scalar", 3] < explained["scalar", 4]


@pytest.mark.slow
def test_it_compares_on_videos_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], synthetic_clips: Callable[..., None]
) -> None:
    synthetic_clips(tmp_path / "clips", train=24)
    small = ("--sizes", "1", "--frames", "32", "--patches", "2000", "--divide", "64")
    main([str(tmp_path / "clips" / "train"), *small, "--picture", str(tmp_path / "codes.png")])
    out = capsys.readouterr().out
    assert "32 training frames, 4 held-out frames of other videos" in out
    assert "| 224² | 16 | residual | 4 × 8 |" in out
    assert out.count("| 224² | 16 |") == 10
    assert imread(tmp_path / "codes.png").std() > 0.02
