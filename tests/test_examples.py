"""The examples of losses run, equal the losses they replace, and train a model."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*_step.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "huggingface" in path.stem:
        pytest.importorskip("transformers")
    changed = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW) -> None:
        before = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        step(self)
        after = [parameter for group in self.param_groups for parameter in group["params"]]
        changed.append(any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)))

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert printed
    assert all(line.endswith("gradients equal") for line in printed)
    assert changed == [True] * len(printed)


def test_there_are_three() -> None:
    assert [path.stem for path in EXAMPLES] == ["huggingface_step", "mae_st_step", "videomae_step"]
