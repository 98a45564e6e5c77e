"""`mam2 finetune` and `mam2 evaluate`: mistakes on the command line."""

from __future__ import annotations

import pytest

from tests.helpers.commands import outcome


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "expected a recipe as first argument: mam2 finetune RECIPE"),
        (["finetune", "ssv2/finetun", "--data", "."], "did you mean ssv2/finetune"),
        (["finetune", "demo/finetune", "--data", ".", "--val", ".", "--out", "{}"], "or --scratch for random weights"),
        (["evaluate", "/nowhere", "--data", ".", "--out", "{}"], "/nowhere: no such file or folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    status, _, error = outcome(capsys, *[argument.format(tmp_path / "run") for argument in arguments])
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
