"""The command line: help, one-line errors, exit statuses."""

import sys

import pytest

from mam2.engine import cli
from tests.helpers.commands import MAM2_COMMAND, exit_status, outcome, run_program


def test_help_names_verbs_and_recipes(capsys):
    status, out, _ = outcome(capsys, "--help")
    assert status == 0
    assert all(word in out for word in ("pretrain", "demo", "doctor", "mam2-fast", "mam2-cae", "videomae"))


def test_no_verb_shows_the_help(capsys):
    assert outcome(capsys)[0] == 2


def test_pretrain_help_documents_every_field(capsys):
    status, out, _ = outcome(capsys, "pretrain", "--help")
    assert status == 0
    assert "--data.frames" in out
    assert "--loss.balance" in out
    assert "--tokenizer.path" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "unknown verb 'pretrian'"),
        (["pretrain"], "expected a recipe as first argument: mam2 pretrain RECIPE"),
        (["pretrain", "--data", "x", "demo", "--out", "{}"], "expected a recipe as first argument, found '--data'"),
        (["finetune", "--data", "x", "ssv2/finetune"], "expected a recipe as first argument, found '--data'"),
        (
            ["pretrain", "ssv2/finetune", "--data", ".", "--out", "x"],
            "ssv2/finetune fine-tunes (mam2 finetune); choose",
        ),
        (
            ["finetune", "mam2-fast", "--data", ".", "--out", "x"],
            "mam2-fast pre-trains (mam2 pretrain); choose one that",
        ),
        (["pretrain", "nothing", "--data", ".", "--out", "x"], "recipe 'nothing': neither a file nor one of"),
        (["pretrain", "demo", "--data", "/nowhere/at all", "--out", "{}"], "/nowhere/at all"),
        (["pretrain", "demo", "--data", ".", "--out", "{}", "--data.size", "33"], "data.size 33 is not a multiple"),
        (["pretrain", "demo", "--data", ".", "--out", "{}", "--mask.ratio", "1"], "mask.ratio 1.0 masks 64 of 64"),
        (["pretrain", "demo", "--data", ".", "--out", "{}", "--run.device", "cuda"], "torch sees no GPU"),
        (["pretrain", "demo", "--data", ".", "--out", "/dev/null/run"], "--out /dev/null/run: cannot be written"),
        (["evaluate", "x", "--data", ".", "--out", "{}", "--batch", "-1"], "--batch -1: expected at least 0"),
        (["evaluate", "x", "--data", ".", "--out", "{}", "--threads", "-1"], "--threads -1: expected at least 0"),
        (["evaluate", "x", "--data", ".", "--out", "{}", "--spatial", "-3"], "--spatial -3: expected at least 0"),
        (["embed", "x", "--data", ".", "--out", "{}.npy", "--batch", "0"], "--batch 0: expected at least 1"),
        (["embed", "x", "--data", ".", "--out", "{}.npy", "--stride", "-2"], "--stride -2: expected at least 0"),
        (["embed", "x", "--data", ".", "--out", "{}.npy", "--layer", "-1"], "--layer -1: expected at least 0"),
        (["probe", "x", "--data", ".", "--batch", "0"], "--batch 0: expected at least 1"),
        (["probe", "x", "--data", ".", "--batch", "999999"], "--batch 999999: expected at least 1 and at most 131072"),
        (["probe", "x", "--data", ".", "--layers", "3", "0"], "--layers 0: expected at least 1"),
        (["visualize", "x", "--data", ".", "--out", "{}", "--stride", "-1"], "--stride -1: expected at least 0"),
        (["visualize", "x", "--data", ".", "--out", "{}", "--clips", "0"], "--clips 0: expected at least 1"),
        (["visualize", "x", "--data", ".", "--out", "{}", "--decoder-heads", "0"], "--decoder-heads 0: expected"),
        (["export", "x", "--to", "torch", "--out", "{}", "--heads", "0"], "--heads 0: expected at least 1"),
        (
            ["finetune", "demo/finetune", "--data", ".", "--val", ".", "--out", "{}", "--scratch", "--size", "0"],
            "--size 0: expected at least 1",
        ),
        (["plan", "mam2-fast", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["index", ".", "--threads", "-1"], "--threads -1: expected at least 0"),
        (["transcode", ".", "--out", "{}", "--jobs", "-1"], "--jobs -1: expected"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(capsys, tmp_path, arguments, message):
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("needs a machine without a CUDA GPU")
    status, _, err = outcome(capsys, *(a.format(tmp_path / "run") for a in arguments))
    assert status == 2
    assert message in err
    assert err.startswith("mam2: error: ")
    assert err.count("\n") == 1


def test_an_empty_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    data, out = str(tmp_path / "empty"), str(tmp_path / "run")
    status, _, err = outcome(capsys, "pretrain", "demo", "--data", data, "--out", out)
    assert status == 2
    assert data in err
    assert err.count("\n") == 1


def test_too_little_memory_is_one_line(capsys, monkeypatch, tmp_path):
    """The allocator's words for the memory of the machine, those of torch.OutOfMemoryError for a GPU's."""
    import torch

    def no_gpu_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for verb in (lambda *_, **__: torch.empty(2**60, dtype=torch.uint8), no_gpu_memory):
        monkeypatch.setattr("mam2.engine.train.pretrain.pretrain", verb)
        status, _, err = outcome(capsys, "pretrain", "demo", "--data", ".", "--out", str(tmp_path / "run"))
        assert status == 2
        assert err.startswith("mam2: error: out of memory (")
        assert "optim.micro_batch" in err
        assert err.count("\n") == 1


def test_another_error_of_the_program_stays_what_it_is(capsys, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("mam2.engine.train.pretrain.pretrain", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli.main(["pretrain", "demo", "--data", ".", "--out", str(tmp_path / "run")])


def test_an_unknown_flag_names_the_nearest(capsys, tmp_path):
    status, out, err = outcome(
        capsys, "pretrain", "demo", "--data", ".", "--out", str(tmp_path / "r"), "--data.frame", "8"
    )
    assert status == 2
    assert "--data.frames" in out + err


def test_several_processes_are_refused_clearly_where_they_make_no_sense(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = outcome(capsys, "doctor")
    assert status == 2
    assert "one process" in err


def test_of_several_processes_one_reports_a_mistake_that_all_make(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        status, _, err = outcome(capsys, "pretrain", "nothing", "--data", ".", "--out", "x")
        assert status == 2
        assert err.count("\n") == lines


def test_size_and_preset_replace_the_recipes(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "mam2.engine.train.pretrain.pretrain", lambda config, *_, **__: seen.append(config) or _result()
    )
    options = ["--size", "small", "--preset", "cae", "--optim.batch", "128", "--model.depth", "6"]
    assert exit_status("pretrain", "mam2-fast", "--data", ".", "--out", tmp_path, *options) == 0
    model = seen[0].model
    assert (model.width, model.depth, model.heads) == (384, 6, 6)
    assert (model.regressor.width, model.regressor.keys, model.decoder.width) == (384, "all", 384)
    assert seen[0].optim.batch == 128


def test_tokenize_takes_the_size_that_pretrain_takes(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "mam2.engine.tokenizer.precompute.tokenize", lambda config, *_, **__: seen.append(config) or sys.exit(0)
    )
    assert exit_status("tokenize", "mam2-fast", "--data", ".", "--out", str(tmp_path), "--size", "small") == 0
    assert seen[0].model.width == 384


def _result():
    from mam2.engine.train.loop import TrainResult

    return TrainResult(step=1, steps=1, checkpoint=None, used=1, skipped=0, signal=0)


@pytest.mark.slow
def test_doctor_says_which_path_each_part_takes(capsys):
    status, out, _ = outcome(capsys, "doctor")
    assert status == 0
    for word in ("versions", "torch", "kernels", "attention", "decoding", "step", "to go faster"):
        assert word in out


def test_the_module_is_the_command():
    done = run_program([*MAM2_COMMAND, "--help"])
    assert done.returncode == 0
    assert "pretrain" in done.stdout
