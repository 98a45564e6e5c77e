"""Weights on a hub of models: pushed with a card that the run's files wrote, read back by name."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mam2.engine import UserError, export, load_encoder, load_model
from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints import hub as module
from mam2.engine.config.recipe import to_dict
from mam2.engine.model.mam2 import MAM2
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status
from tests.helpers.hub_server import hub_server

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        module._download.cache_clear()
        yield server


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=16)
    return folder / "train"


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory, small):
    """A run of MAM2 that trained its tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    pretrain(small(optim={"batch": 8, "epochs": 1.0}), clips, folder, progress=False)
    return folder


def test_a_whole_checkpoint_goes_to_the_hub_and_comes_back(run, clips, hub, tmp_path, capsys, small):
    """The pushed weights also start another run, with the tokenizer that their heads belong to."""
    status = exit_status(
        "export", run, "--to", "mam2", "--push", "somebody/first", "--license", "apache-2.0", "--private"
    )
    output = capsys.readouterr()
    assert status == 0, output.err
    assert f"pushed to {hub.address}/somebody/first; load it as hub:somebody/first" in output.out
    assert hub.private == {"somebody/first": True}
    files = hub.repositories["somebody/first"]
    assert files.keys() == {"README.md", "model.safetensors", "state.json", "tokenizer.safetensors"}
    assert files["tokenizer.safetensors"] == (run / "tokenizer.safetensors").read_bytes()

    loaded, own = load_model("hub:somebody/first"), load_model(run)
    assert isinstance(loaded, MAM2)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in own.state_dict().items())
    config = small(optim={"batch": 8, "epochs": 1.0, "base_lr": 0.0, "min_lr": 0.0})
    pretrain(config, clips, tmp_path / "second", checkpoint="hub:somebody/first", progress=False)
    assert "encoder, regressor, appearance decoder, appearance head" in (tmp_path / "second" / "log.txt").read_text()
    second = load_model(tmp_path / "second").state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in own.state_dict().items())


def test_a_folder_of_hugging_face_comes_back_by_name(run, hub, tmp_path):
    result = export(run, "huggingface", tmp_path / "out", push="somebody/encoder", license="other")
    assert result.address == f"{hub.address}/somebody/encoder"
    assert hub.repositories["somebody/encoder"].keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert "README.md" in hub.repositories["somebody/encoder"]
    found, own = load_encoder("hub:somebody/encoder@main").state_dict(), load_encoder(run).state_dict()
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor)


def test_the_card_says_what_the_files_of_the_run_say(run, clips, tmp_path):
    (run / "probe.json").write_text(
        json.dumps({"test": 40, "scores": [
            {"probe": "linear", "layer": 1, "checkpoint": "x/first", "accuracy": 0.5, "interval": [0.4, 0.6]}
        ]})
    )  # fmt: skip
    export(run, "mam2", tmp_path / "first", license="cc-by-nc-4.0")
    card = (tmp_path / "first" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "license: cc-by-nc-4.0\n" in head
    assert "library_name: mam2\n" in head
    config = checkpoint.read_config(checkpoint.newest(run))
    log = (run / "log.txt").read_text()
    machine = re.search(r"run +\S+ on (.+)", log)
    assert machine
    for line in (
        "| videos | 16 |",
        "| classes | 8 |",
        f"| `optim.epochs` | `{config.optim.epochs}` |",
        f"| `data.size` | `{config.data.size}` |",
        f"| machine | {machine[1]} |",
        "| linear probe, layer 1, first, 40 test videos | 50.0 % (40.0 to 60.0) |",
        f"width {config.model.width}, {config.model.heads} heads",
        "after step 4.",
    ):
        assert line in card, line
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert f"| `loss/motion`, last logged | {last['loss/motion']:.4g} |" in card
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1]) == to_dict(config)


def test_no_path_of_this_machine_is_shared(run, clips, tmp_path, small):
    config = small(tokenizer={"path": str(run / "tokenizer.safetensors")}, optim={"batch": 8, "epochs": 1.0})
    pretrain(config, clips, tmp_path / "run", checkpoint=run, progress=False)
    export(tmp_path / "run", "mam2", tmp_path / "shared", license="other")
    for file in (tmp_path / "shared").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert str(run).encode() not in file.read_bytes()
    assert "from the weights of `first`" in (tmp_path / "shared" / "README.md").read_text()
    load_model(tmp_path / "shared")


def test_mistakes_are_named(run, hub, tmp_path, capsys):
    for arguments, message in (
        ((run, "--to", "mam2", "--push", "somebody/x"), "--push somebody/x: expected the license of the weights"),
        ((run, "--to", "mam2", "--push", "x", "--license", "mit"), "--push x: expected OWNER/NAME"),
        ((run, "--to", "mam2", "--out", tmp_path / "x", "--license", "My own!"), "--license 'My own!': expected"),
        ((run, "--to", "onnx", "--push", "a/b", "--license", "mit"), "--to onnx: a model card and --push are for"),
        ((run, "--to", "mam2"), "expected --out with a folder or file, or --push with a repository"),
        (
            ("hub:somebody/nothing", "--to", "mam2", "--out", tmp_path / "x"),
            "hub:somebody/nothing: cannot be downloaded",
        ),
        (("hub:nothing", "--to", "mam2", "--out", tmp_path / "x"), "hub:nothing: expected OWNER/NAME"),
        (
            (run, "--to", "mam2", "--out", tmp_path / "x", "--license", "mit", "--scores", tmp_path / "none.json"),
            "none.json: expected what mam2 probe or evaluate wrote",
        ),
    ):
        assert exit_status("export", *arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 1
    assert not hub.repositories
    assert not (tmp_path / "x").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(run, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--push a/b: cannot be uploaded: "):
        export(run, "mam2", push="a/b", license="mit")
