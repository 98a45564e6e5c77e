"""Models of a config are built in one place."""

import re

import pytest

from mam2.engine.model.build import build_model
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from tests.helpers.paths import ROOT

CALL = re.compile(r"(?<!class )\b(?:MAM2|VideoMAE)\((?!nn\.Module)")
OTHERS = {
    "engine/demo.py": "needs MAM2",
    "benchmarks/motion_floor.py": "needs MAM2",
    "engine/checkpoints/foreign_models.py": "a decoder of another width than a config can have",
}


@pytest.mark.parametrize(("objective", "kind"), [("mam2", MAM2), ("videomae", VideoMAE)])
def test_the_objective_decides(small, objective, kind):
    assert type(build_model(small(model={"objective": objective}), 16)) is kind


def test_no_other_code_chooses_the_model():
    paths = [path for folder in ("engine", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if CALL.search(path.read_text(encoding="utf-8"))}
    assert found == {"engine/model/build.py", *OTHERS}
