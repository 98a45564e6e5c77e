"""Paths of the checkout, its clips and real clips."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
CLIPS = ROOT / "tests" / "clips"
"""Clips in many formats, made by us; see its README.md."""
REAL_CLIPS = Path(os.environ.get("MAM2_TEST_CLIPS") or ROOT.parent / "shared" / "clips")
"""Real footage, on machines that have it; see the README.md of CLIPS."""
if "MAM2_TEST_CLIPS" in os.environ and not REAL_CLIPS.is_dir():
    raise pytest.UsageError(f"MAM2_TEST_CLIPS={REAL_CLIPS}: no such folder; expected one as tests/clips/README.md says")

needs_real_clips = pytest.mark.skipif(
    not REAL_CLIPS.is_dir(), reason=f"MAM2_TEST_CLIPS names no folder of real clips, and {REAL_CLIPS} is not there"
)
