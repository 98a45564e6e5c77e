"""The target `latents`: the teacher's features, their loss, and how the teacher follows the encoder."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mam2.engine.config.pretrain import LossConfig
from mam2.engine.evaluation.pretext import evaluation_mask, reconstruct
from mam2.engine.evaluation.scores import score
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import keep_decoded, sample_masks
from mam2.engine.model.teacher import latent_targets, momentum, move_teacher, rank_and_deviation
from mam2.engine.train.objective import build_objective
from tests.helpers.small_models import shaken


def built(small, *, regressor=True, depth=2, **loss):
    config = small(loss={"appearance_target": "latents", **loss}, model={"width": 24, "depth": depth, "heads": 2})
    if not regressor:
        plain = dataclasses.replace(config.model.regressor, depth=0)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, regressor=plain))
    torch.manual_seed(0)
    model = shaken(MAM2(config, 0))
    shaken(model.teacher)  # once more: not the encoder's weights
    return config, model


def clips(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)


def standardized(features):
    """Normalization over the last dimension, by its formula."""
    centered = features - features.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_targets_are_the_mean_of_the_last_blocks_standardized_outputs(small, blocks):
    """Against float64: every block by its own call, the last output after the LayerNorm, no mask."""
    _, model = built(small, depth=3, teacher_blocks=blocks)
    video = clips()
    found = model.latent_targets(video)
    teacher = model.teacher.double()
    index = torch.arange(64).expand(2, -1)
    tokens = teacher.patch_embed(teacher.tokens(video, index)) + teacher.positions[index]
    outputs = []
    for block in teacher.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    outputs[-1] = teacher.norm(tokens)
    expected = torch.stack([standardized(output) for output in outputs[-blocks:]]).mean(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regressor", [True, False])
@pytest.mark.parametrize("decoded", [1.0, 0.5])
@pytest.mark.parametrize("visible", [0.0, 0.3])
def test_the_loss_is_the_mean_absolute_error(small, visible, decoded, regressor):
    """Against float64, clip by clip and token by token; with and without visible tokens and dropped ones."""
    config, model = built(small, visible=visible, regressor=regressor)
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, decoded=decoded))
    model, video = model.double(), clips()
    mask = keep_decoded(sample_masks(video, config, step=0), config, step=0)
    targets = model.latent_targets(video).double()
    latents = model.complete(video, mask)
    found = model.latent_loss(latents, mask, targets)
    hidden = mask.masked.shape[1]
    assert hidden == config.decoded_tokens
    index = torch.cat([mask.visible, mask.masked], 1)
    if visible or not regressor:
        assert latents.shape[1] == index.shape[1]
        features = model.appearance_decoder(latents + model.positions[index])
    else:
        assert latents.shape[1] == hidden
        features = model.appearance_decoder(latents + model.positions[mask.masked])
    predicted = model.appearance_decoder.head(features)
    of_masked = torch.stack(
        [(predicted[clip, n - hidden] - targets[clip, mask.masked[clip, n]]).abs().mean()
         for clip in range(2) for n in range(hidden)]
    ).mean()  # fmt: skip
    of_visible = torch.zeros(())
    if visible:
        count = mask.visible.shape[1]
        of_visible = torch.stack(
            [(predicted[clip, n] - targets[clip, mask.visible[clip, n]]).abs().mean()
             for clip in range(2) for n in range(count)]
        ).mean()  # fmt: skip
    torch.testing.assert_close(found, (of_masked + visible * of_visible).to(found.dtype), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.predict_latents(latents, mask), predicted[:, -hidden:])


def test_motion_and_alignment_are_those_without_visible_latents(small):
    """The other decoder and loss do not use the visible latents that the appearance decoder receives."""
    config, model = built(small, visible=0.5, alignment=1.0)
    video = clips()
    mask = sample_masks(video, config, step=0)
    both = model.complete(video, mask)
    hidden = both[:, -mask.masked.shape[1] :]
    for name in ("motion_loss", "alignment_loss"):
        assert torch.equal(getattr(model, name)(both, mask, video), getattr(model, name)(hidden, mask, video))


def test_no_gradient_reaches_the_teacher_and_all_else_learns(small):
    config, model = built(small, visible=0.5)
    video = clips()
    objective = build_objective(model, config, lambda part: part)
    objective(video, sample_masks(video, config, step=0), None)[0].backward()
    assert not model.latent_targets(video).requires_grad
    assert all(not p.requires_grad and p.grad is None for p in model.teacher.parameters())
    for part in (model.encoder, model.regressor, model.appearance_decoder, model.motion_decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    assert any(name.startswith("teacher.") for name in model.state_dict())
    assert model.latent_targets(video).ne(latent_targets(model.encoder, video, 1)).any()


def test_the_teacher_follows_by_the_share_that_is_given(small):
    _, model = built(small)
    before = {name: tensor.double() for name, tensor in model.teacher.state_dict().items()}
    student = {name: tensor.double() for name, tensor in model.encoder.state_dict().items()}
    move_teacher(model.teacher, model.encoder, torch.tensor(0.0))
    assert all(torch.equal(before[name], found.double()) for name, found in model.teacher.state_dict().items())
    move_teacher(model.teacher, model.encoder, torch.tensor(0.25))
    for name, found in model.teacher.state_dict().items():
        torch.testing.assert_close(found.double(), 0.75 * before[name] + 0.25 * student[name], rtol=1e-5, atol=1e-6)
    loss = LossConfig()
    assert momentum(loss.teacher_momentum, loss.teacher_momentum_end, 0.0) == 0.998
    assert momentum(loss.teacher_momentum, loss.teacher_momentum_end, 0.5) == pytest.approx(0.999)
    assert momentum(loss.teacher_momentum, loss.teacher_momentum_end, 1.0) == 1.0


def test_the_effective_rank_is_that_of_the_eigenvalues():
    torch.manual_seed(0)
    features = torch.randn(5, 40, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0]) + 7
    flat = features.flatten(0, 1).double()
    values = torch.linalg.eigvalsh(torch.cov(flat.T, correction=0))
    rank, deviation = rank_and_deviation(features)
    torch.testing.assert_close(rank.double(), values.sum().square() / values.square().sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation.double(), flat.std(0, correction=0).mean(), rtol=1e-4, atol=1e-4)
    assert [float(found) for found in rank_and_deviation(torch.ones(5, 40, 6))] == [0, 0]
    line = torch.randn(200, 1) * torch.tensor([1.0, 2.0, 0.0])
    assert float(rank_and_deviation(line)[0]) == pytest.approx(1, abs=1e-3)
    assert float(rank_and_deviation(torch.eye(8))[0]) == pytest.approx(7, abs=1e-3)


def test_scores_and_pictures_of_a_perfect_prediction(monkeypatch, small):
    config, model = built(small)
    video = clips()
    clip = video.permute(0, 2, 3, 4, 1)
    mask = evaluation_mask(clip, config)
    targets = model.latent_targets(video)
    true = torch.stack([targets[number, mask.masked[number]] for number in range(2)])
    found = score(model, None, clip, mask, config).relative_latents
    with torch.no_grad():
        expected = F.l1_loss(model.predict_latents(model.complete(video, mask), mask), true) / true.abs().mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
    monkeypatch.setattr(model, "predict_latents", lambda latents, mask: true)
    assert score(model, None, clip, mask, config).relative_latents == 0
    strips = reconstruct(model, None, clip, config)
    assert strips.appearance is None
    assert strips.features.shape == strips.original.shape
    hidden = mask.as_bool().view(2, 4, 4, 4, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = torch.where(hidden, strips.features, 0.5)
    torch.testing.assert_close(strips.predicted_features, expected)
    assert strips.features.std() > 0.05
