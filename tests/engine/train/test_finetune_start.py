"""Fine-tuning from a given encoder, with embeddings of texts as the head; inputs that do not fit each other."""

import shutil

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import load_classifier
from mam2.engine.checkpoints.export import write_videomae
from mam2.engine.errors import UserError
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train.finetune import finetune


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, small):
    """A pre-training checkpoint with random weights."""
    config = small(model={"objective": "videomae", "width": 24, "depth": 2, "heads": 2})
    torch.manual_seed(5)
    model = VideoMAE(config)
    run = tmp_path_factory.mktemp("pretrained")
    checkpoint.write(run, 1, model.state_dict(), {"rng.cpu": torch.get_rng_state()}, config, {})
    return run, model


def test_it_starts_from_the_encoder_it_is_given(pretrained, motion_clips, few_clips, tmp_path, small_finetuning):
    """At a learning rate of 0 the encoder does not change, whatever [model] is; its last LayerNorm is dropped."""
    run, model = pretrained
    config = small_finetuning(optim={"batch": 16, "epochs": 1.0, "base_lr": 0.0, "min_lr": 0.0})
    finetune(config, few_clips, tmp_path, val=motion_clips / "test", encoder=run, progress=False)
    classifier, resolved, _ = load_classifier(tmp_path)
    assert (resolved.model.width, resolved.model.depth, resolved.model.heads) == (24, 2, 2)
    own, given = classifier.encoder.state_dict(), model.encoder.state_dict()
    assert own.keys() == {name for name in given if not name.startswith("norm.")}
    assert all(torch.equal(own[name], given[name]) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unsaid", "layer scale"])
def test_it_starts_from_encoders_of_every_kind(kind, motion_clips, few_clips, tmp_path, small, small_finetuning):
    """A .pth that does not state its clips, and an encoder with LayerScale; at a rate of 0 both are unchanged."""
    values = {"objective": "videomae", "width": 24, "depth": 2, "heads": 2}
    model = VideoMAE(small(model=values | ({"layer_scale": 0.1} if kind == "layer scale" else {})))
    options = {}
    if kind == "unsaid":
        path, options = tmp_path / "bare.pth", {"frames": 8, "size": 32, "heads": 2}
        write_videomae(model, path)
        torch.save({"model": torch.load(path)["model"]}, path)
    else:
        path = tmp_path / "run"
        config = small(model=values | {"layer_scale": 0.1})
        checkpoint.write(path, 1, model.state_dict(), {"rng.cpu": torch.get_rng_state()}, config, {})
    config = small_finetuning(optim={"batch": 16, "epochs": 1.0, "base_lr": 0.0, "min_lr": 0.0})
    out = tmp_path / "out"
    finetune(config, few_clips, out, val=motion_clips / "test", encoder=path, progress=False, encoder_options=options)
    classifier, resolved, _ = load_classifier(out)
    assert (resolved.model.frames, resolved.model.size, resolved.model.heads) == (8, 32, 2)
    own, given = classifier.encoder.state_dict(), model.encoder.state_dict()
    assert own.keys() == {name for name in given if not name.startswith("norm.")}
    assert all(torch.equal(own[name], given[name]) for name in own)
    assert any("gamma_1" in name for name in own) == (kind == "layer scale")


def test_another_clip_size_resamples_the_positions_and_is_found_again(
    pretrained, motion_clips, few_clips, tmp_path, small_finetuning
):
    run, model = pretrained
    data = {"size": 48, "frames": 4, "threads": 1}
    config = small_finetuning(data=data, optim={"batch": 8, "epochs": 0.5})
    finetune(config, few_clips, tmp_path, val=motion_clips / "test", encoder=run, progress=False)
    classifier, resolved, _ = load_classifier(tmp_path)
    assert classifier.encoder.grid == (2, 6, 6)
    assert (resolved.model.frames, resolved.model.size) == (8, 32)
    volume = model.encoder.positions.view(1, 4, 4, 4, -1).permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.interpolate(volume, size=(2, 6, 6), mode="trilinear")[0].flatten(1).T
    torch.testing.assert_close(classifier.encoder.positions, expected)


@pytest.mark.slow
def test_a_frozen_text_head_keeps_its_embeddings(motion_clips, few_clips, tmp_path, small_finetuning):
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32))
    (tmp_path / "text.txt").write_text("right\nleft\n")
    table = torch.from_numpy(np.load(tmp_path / "text.npy"))[[1, 0]]
    for frozen in (True, False):
        head = {"text_embeddings": str(tmp_path / "text.npy"), "frozen": frozen}
        config = small_finetuning(head=head, optim={"batch": 16, "epochs": 1.0, "warmup_epochs": 0.0})
        out = tmp_path / str(frozen)
        finetune(config, few_clips, out, val=motion_clips / "test", encoder=None, progress=False)
        classifier, resolved, _ = load_classifier(out)
        assert resolved.model.text_width == 12
        assert torch.equal(classifier.head.embeddings, table) == frozen


def test_what_does_not_fit_is_one_clear_line(motion_clips, few_clips, tmp_path, small_finetuning):
    config, val = small_finetuning(), motion_clips / "test"
    (tmp_path / "other" / "jump").mkdir(parents=True)
    shutil.copy(next((few_clips / "left").iterdir()), tmp_path / "other" / "jump")
    with pytest.raises(UserError, match="the class 'jump' is not one of the classifier's 2"):
        finetune(config, few_clips, tmp_path / "a", val=tmp_path / "other", encoder=None, progress=False)
    with pytest.raises(UserError, match="no label for"):
        finetune(config, few_clips / "left", tmp_path / "b", val=val, encoder=None, progress=False)
    with pytest.raises(UserError, match="no such file or folder; expected a run"):
        finetune(config, tmp_path / "unread", tmp_path / "c", val=val, encoder=tmp_path / "nothing", progress=False)
    with pytest.raises(UserError, match=r"augment\.mixup"):
        finetune(small_finetuning(augment={"mixup": -1.0}), few_clips, tmp_path / "d", val=val, encoder=None)
    with pytest.raises(UserError, match=r"15: expected a multiple of 2 .* videos that are mixed"):
        finetune(small_finetuning(optim={"batch": 15}), few_clips, tmp_path / "e", val=val, encoder=None)


def test_a_run_of_another_kind_is_not_resumed(pretrained, motion_clips, few_clips, small_finetuning):
    with pytest.raises(UserError, match="a run of another kind"):
        finetune(
            small_finetuning(),
            few_clips,
            pretrained[0],
            val=motion_clips / "test",
            encoder=None,
            resume=True,
            progress=False,
        )
