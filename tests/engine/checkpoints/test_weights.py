"""Which weights a path refers to: the same file is loaded, named, hashed and used for cached features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import load_classifier
from mam2.engine.checkpoints.frozen import load_frozen
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.positions import set_clip_size
from tests.helpers.commands import exit_status
from tests.helpers.small_models import CLASSES, CONFIG, classifier, clip, shaken

CPU = torch.device("cpu")
CLASSIFIER = FinetuneConfig(
    data=CONFIG.data, model=EncoderConfig(patch=8, width=48, depth=2, heads=4, mlp_ratio=2, classes=len(CLASSES))
)
NOTES = {"classes": json.dumps(CLASSES)}


def stepped(seed: int) -> Classifier:
    model = classifier()
    shaken(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run whose best checkpoint is of step 4 and whose newest is of step 8."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in (4, 8):
        checkpoint.write(folder, step, dict(stepped(step).state_dict()), {}, CLASSIFIER, metadata=NOTES)
    checkpoint.write_best(folder, 4, dict(stepped(4).state_dict()), CLASSIFIER, NOTES, {"accuracy": 1.0})
    return folder


def places(run: Path) -> dict[Path, int]:
    """Paths, and the step whose weights each refers to."""
    newest = checkpoint.folder_of(run, 8)
    best = {run: 4, run / "best": 4, run / "best" / checkpoint.WEIGHTS: 4, checkpoint.folder_of(run, 4): 4}
    return best | {newest: 8, newest / checkpoint.WEIGHTS: 8}


@torch.no_grad()
def test_every_reader_takes_the_same_weights(run: Path) -> None:
    for path, step in places(run).items():
        expected = stepped(step)
        file = find_weights(path)
        assert file is not None
        assert checkpoint.read_metadata(file)["step"] == str(step)
        assert torch.equal(load_encoder(path).encode(clip()), expected.encoder.encode(clip()))
        assert torch.equal(load_model(path)(clip()), expected(clip()))
        assert torch.equal(load_classifier(path)[0].eval()(clip()), expected(clip()))
        frozen = load_frozen(path, CPU)
        assert frozen.weights == file
        assert torch.equal(frozen.encoder.encode(clip()), expected.encoder.encode(clip()))


def test_the_hash_is_that_of_the_encoder_that_is_loaded(run: Path, tmp_path: Path) -> None:
    digests = {path: load_frozen(path, CPU).digest for path in places(run)}
    by_step = {step: {digests[path] for path, of in places(run).items() if of == step} for step in (4, 8)}
    assert len(by_step[4]) == len(by_step[8]) == 1
    assert by_step[4] != by_step[8]
    # bit-equal weights in another file, written at another step with another config: the same encoder
    same = checkpoint.write(tmp_path / "again", 9, dict(stepped(4).state_dict()), {}, CLASSIFIER, metadata=NOTES)
    assert {load_frozen(same, CPU).digest} == by_step[4]


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    """safetensors writes metadata in a random order, which differs between files."""
    notes = NOTES | {f"note {number}": 'é\t"\n' for number in range(20)}
    files = [
        checkpoint.write(tmp_path / str(copy), 4, dict(stepped(4).state_dict()), {}, CLASSIFIER, metadata=notes)
        / checkpoint.WEIGHTS
        for copy in range(4)
    ]
    assert len({file.read_bytes() for file in files}) == 1
    assert checkpoint.read_metadata(files[0]).items() >= notes.items()
    assert all(torch.equal(load_file(files[0])[name], tensor) for name, tensor in stepped(4).state_dict().items())
    assert checkpoint.why_damaged(files[0].parent) is None


def test_the_hash_tells_apart_what_computes_other_features(run: Path) -> None:
    from mam2.engine.checkpoints.frozen import digest

    encoders = [load_encoder(run) for _ in range(4)]
    set_clip_size(encoders[1], 8, 24)
    encoders[2].blocks[0].norm1.eps = 1e-5
    encoders[3].blocks[1].attn.heads = 2
    assert len({digest(encoder) for encoder in encoders}) == 4


def test_embed_names_the_weights_it_read(run: Path, videos: Manifest, tmp_path: Path) -> None:
    folder = Path(videos.videos[0].path).parents[1]
    found = {}
    for name, path in {"run": run, "best": run / "best", "newest": checkpoint.folder_of(run, 8)}.items():
        assert exit_status("embed", path, "--data", folder, "--out", tmp_path / f"{name}.npy") == 0
        found[name] = np.load(tmp_path / f"{name}.npy"), json.loads((tmp_path / f"{name}.json").read_text())
    assert np.array_equal(found["run"][0], found["best"][0])
    assert not np.array_equal(found["run"][0], found["newest"][0])
    assert found["run"][1]["sha256"] == found["best"][1]["sha256"] != found["newest"][1]["sha256"]
    assert found["run"][1]["weights"] == str(run / "best" / checkpoint.WEIGHTS)


def test_kept_features_are_those_of_the_weights(run: Path, videos: Manifest, tmp_path: Path) -> None:
    """In one call, in which two paths refer to one encoder, and in successive calls."""
    paths = [run, run / "best", checkpoint.folder_of(run, 8)]
    wanted = [FeatureSpec(load_frozen(path, CPU), 2, "mean") for path in paths]
    together = FeatureCache(tmp_path / "one").get(videos, wanted, batch=5, progress=False)
    assert len(list((tmp_path / "one").iterdir())) == 2
    assert np.array_equal(together[wanted[0]], together[wanted[1]])
    assert not np.array_equal(together[wanted[0]], together[wanted[2]])
    for want in wanted:
        alone = FeatureCache(tmp_path / "two").get(videos, [want], batch=5, progress=False)
        assert np.array_equal(alone[want], together[want])


def test_what_is_no_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        find_weights(tmp_path / "nothing")
    assert find_weights(tmp_path) is None
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / checkpoint.STATE).write_bytes((run / "best" / checkpoint.STATE).read_bytes())
    with pytest.raises(UserError, match=r"half: model\.safetensors is missing"):
        find_weights(tmp_path / "half")
    whole = (run / "best" / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"truncated: {len(whole) - 100} bytes of {len(whole)}"):
        find_weights(tmp_path / "cut.safetensors")
