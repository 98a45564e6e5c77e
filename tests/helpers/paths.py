"""Where things lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
CLIPS = ROOT.parent / "shared" / "clips"
"""Real videos, on machines that have them."""
