"""Low-rank adapters: which weights learn, the contents of the files, and an equal model without adapters."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, build_classifier, load_classifier
from mam2.engine.checkpoints.exporting import export
from mam2.engine.checkpoints.load import load_any_classifier, load_encoder, load_model
from mam2.engine.checkpoints.model_card import model_card
from mam2.engine.config.finetune import AdapterConfig
from mam2.engine.data.synthetic import render_clip, write_clip
from mam2.engine.errors import UserError
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.evaluation.prediction import predict
from mam2.engine.model.adapters import add_adapters, merge_adapters
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.train.classifier_step import FinetuneStep
from mam2.engine.train.finetune import finetune
from mam2.engine.train.finetune_tasks import LOSS
from tests.helpers.commands import torchrun
from tests.helpers.runs import newest_weights, same_tensors

MODEL = {"width": 24, "depth": 3, "heads": 2, "classes": 2}
SMALL = {"data": {"frames": 4, "size": 32}, "model": MODEL, "adapters": {"rank": 4}}
RUN = {
    "adapters": {"rank": 4, "alpha": 12.0},
    "augment": {"operations": 1, "mixup": 0.5},
    "optim": {"batch": 8, "epochs": 4.0, "ema": 0.8, "base_lr": 0.1, "layer_decay": 1.0},
    "test": {"every": 4.0, "temporal": 1, "spatial": 1},
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: pip install '.[adapters]'")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number, motion in enumerate(("left", "right") * 4):
        write_clip(folder / f"{number}.mp4", render_clip(motion, np.random.default_rng(number)))
    rows = [f"{number}.mp4,{'left' if number % 2 == 0 else 'right'}" for number in range(8)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return folder / "list.csv"


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory, small_finetuning):
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[adapters]'")
    run = tmp_path_factory.mktemp("run")
    finetune(small_finetuning(**RUN), videos, run, val=videos, encoder=None, progress=False)
    return run


def clip(config, count=4):
    size = config.data.size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, config.data.frames, size, size), dtype=torch.uint8, generator=generator)


def adapted(config, name):
    """A model with adapters whose second matrices are not zero, and its weights before they were added."""
    torch.manual_seed(0)
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name))
    return model, before, FinetuneStep(config, model, torch.device("cpu"), World())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adapters_and_head_learn_and_all_else_stays(peft, name, small_finetuning):
    """The first step starts from the encoder's own function."""
    config = small_finetuning(**SMALL, optim={"batch": 4, "weight_decay": 0.5, "ema": 0.5})
    plain, video = build_classifier(config), clip(config)
    model, before, step = adapted(config, name)
    plain.load_state_dict(before)
    assert torch.equal(model(video), plain(video))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    of_adapters = {
        f"encoder.blocks.{block}.{layer}.lora_{part}.default.weight"
        for block in range(3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for part in "AB"
    }
    assert trained == of_adapters | {key for key in before if key.startswith(("norm.", "head."))}
    first = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for number in range(2):  # A has no gradient before B differs from 0
        step(number, [(video, step.prepare(number, video, torch.tensor([0, 1, 0, 1])))], 1e-2, inspect=True)
    after = model.state_dict()
    assert {key for key in after if torch.equal(after[key], first[key])} == after.keys() - trained
    assert len(step.optimizer.state) == len(trained) == len(step.average)
    plain.load_state_dict(merge_adapters(after, config.adapters))
    torch.testing.assert_close(plain(video), model(video), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.encoder.blocks[0].attn.qkv.weight, before["encoder.blocks.0.attn.qkv.weight"])


def test_products_follow_autocast_and_compile_as_one_graph(peft, small_finetuning):
    config = small_finetuning(**SMALL)
    model, video = adapted(config, "adamw")[0], clip(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    seen = []
    model.encoder.blocks[1].attn.qkv.register_forward_hook(lambda _, given, found: seen.append(found.dtype))
    expected = model(video)
    with torch.autocast("cpu", torch.bfloat16):
        model(video)
    assert seen == [torch.float32, torch.bfloat16]
    model.encoder.blocks[1].attn.qkv._forward_hooks.clear()
    found = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")(video)
    torch.testing.assert_close(found, expected)


def test_merged_weights_are_left_alone():
    weights = {"encoder.blocks.0.attn.qkv.weight": torch.ones(2, 2), "head.bias": torch.ones(3)}
    assert merge_adapters(weights, AdapterConfig(rank=4)) == weights


@pytest.mark.parametrize("rank", [0, 4])
def test_the_model_card_says_that_adapters_were_trained(rank, tmp_path, small_finetuning):
    config = small_finetuning(**(SMALL | {"adapters": {"rank": rank, "alpha": 12.0}}))
    plain = build_classifier(dataclasses.replace(config, adapters=AdapterConfig()))
    checkpoint.write(tmp_path / "run", 7, dict(plain.state_dict()), {}, config, {CLASSES: '["a", "b"]'})
    card = model_card(
        tmp_path / "run", load_model(tmp_path / "run"), name="me/it", license="mit", to="mam2", classes=(), scores=()
    )
    for phrase in (
        "low-rank adapters (LoRA, rank 4) and the head",
        "| `adapters.rank` | `4` |",
        "| `adapters.alpha` | `12.0` |",
    ):
        assert (phrase in card) == bool(rank), phrase


def test_the_best_is_a_plain_model_and_every_verb_takes_it(trained, videos, tmp_path, small_finetuning, monkeypatch):
    """RUN/best, a checkpoint with adapters, and the export compute the same function; reading needs no peft."""
    monkeypatch.setitem(sys.modules, "peft", None)
    config = small_finetuning(**RUN)
    best = load_file(trained / checkpoint.BEST / checkpoint.WEIGHTS)
    model, _, classes = load_classifier(trained)
    assert best.keys() == build_classifier(dataclasses.replace(config, model=model_of(trained))).state_dict().keys()
    assert any(".lora_A." in name for name in newest_weights(trained))
    assert "adapters of rank 4 and the head" in (trained / "log.txt").read_text()
    result = evaluate(trained, videos, tmp_path / "test", progress=False)
    (line,) = (line for line in read_log(trained) if LOSS in line)
    assert line["accuracy/validation"] == pytest.approx(result.top1)
    assert len(predict(trained, videos, progress=False).predictions) == 8
    export(trained, "huggingface", tmp_path / "exported")
    video = clip(config, 2)
    torch.testing.assert_close(load_model(tmp_path / "exported")(video), model(video))
    torch.testing.assert_close(load_encoder(trained).encode(video), model.encoder.encode(video))
    raw = load_any_classifier(checkpoint.newest(trained))[0]  # weights of the last step, without the average
    assert raw.state_dict().keys() == best.keys()
    assert not torch.allclose(raw.head.weight, model.head.weight)
    assert classes == ("left", "right")


def model_of(run):
    return load_classifier(run)[1].model


def test_a_checkpoint_with_adapters_computes_what_the_training_model_does(peft, trained, small_finetuning):
    _, config, _ = load_classifier(trained)
    model = build_classifier(config)
    add_adapters(model, config.adapters)
    checkpoint.load_weights(model, checkpoint.newest(trained) / checkpoint.WEIGHTS)
    plain, video = load_classifier(checkpoint.newest(trained))[0], clip(config, 2)
    torch.testing.assert_close(plain(video), model(video), rtol=1e-4, atol=1e-5)


def test_without_peft_is_one_clear_line_before_anything_is_read(tmp_path, small_finetuning, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = small_finetuning(**RUN)
    with pytest.raises(UserError, match=r"adapters\.rank 4: needs peft.*pip install 'mam2\[adapters\]'") as caught:
        finetune(config, tmp_path / "no", tmp_path / "run", val=tmp_path / "no", encoder=None, progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_adapters_and_trained_blocks_contradict_each_other(small_finetuning):
    with pytest.raises(UserError, match=r"optim\.train_last 1: adapters\.rank 4 freezes the whole encoder"):
        small_finetuning(adapters={"rank": 4}, optim={"train_last": 1}).check()


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bit_for_bit(peft, trained, videos, tmp_path, monkeypatch, small_finetuning):
    original, calls = FinetuneStep.__call__, []

    def stopped(self, *args, **options):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(FinetuneStep, "__call__", stopped)
    config, options = small_finetuning(**RUN), {"val": videos, "encoder": None, "progress": False}
    assert finetune(config, videos, tmp_path, **options).step == 2
    other = dataclasses.replace(config, adapters=AdapterConfig(rank=8))
    with pytest.raises(UserError, match=r"adapters\.rank = 4, now it is 8"):
        finetune(other, videos, tmp_path, **options, resume=True)
    finetune(config, videos, tmp_path, **options, resume=True)
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        whole, resumed = (load_file(checkpoint.newest(run) / name) for run in (trained, tmp_path))
        assert same_tensors(whole, resumed), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_adapters_like_one(peft, sharding, trained, videos, tmp_path, small_finetuning):
    run = {"compile": False, "log_every": 2, "save_every": 1000, "sharding": sharding}
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(small_finetuning(**RUN, run=run))))
    arguments = ["finetune", tmp_path / "recipe.json", "--data", videos, "--val", videos, "--scratch"]
    done = torchrun(2, "-m", "mam2.engine", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = newest_weights(tmp_path / "run")
    for name, whole in newest_weights(trained).items():
        assert torch.isclose(found[name], whole, rtol=2e-2, atol=2e-4).float().mean() > 0.95, name
