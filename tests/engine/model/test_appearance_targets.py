"""Appearance targets besides one code per token: pixels, latents, codes of all frames, none; no regressor."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from mam2.engine.checkpoints.load import load_model
from mam2.engine.config.pretrain import check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.evaluation.pretext import measure_pretext, reconstruct
from mam2.engine.evaluation.regressor_attention import regressor_attention
from mam2.engine.evaluation.scores import score
from mam2.engine.evaluation.visualize import visualize
from mam2.engine.model.mam2 import MAM2, masked_codes
from mam2.engine.model.masking import sample_masks
from mam2.engine.planning import plan
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.tokenizer.precompute import tokenize
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.vqgan import VQGAN
from mam2.engine.tokenizer.vqgan import small as small_vqgan
from mam2.engine.train.objective import build_objective
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from mam2.kernels import reference

CODES = 16
PIXELS = {"loss": {"appearance_target": "pixels"}}
MOTION_ALONE = {"loss": {"appearance_target": "none", "balance": "fixed"}}
ALL_FRAMES = {"tokenizer": {"frames": "all"}}
LATENTS = {"loss": {"appearance_target": "latents", "visible": 0.5, "teacher_momentum": 0.9}}
OPTIONS = {"pixels": PIXELS, "motion alone": MOTION_ALONE, "all frames": ALL_FRAMES, "latents": LATENTS}


def without_regressor(config):
    regressor = dataclasses.replace(config.model.regressor, depth=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, regressor=regressor))


def build(config):
    torch.manual_seed(0)
    return MAM2(config, CODES if config.needs_codes else 0)


def clips(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 8, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 4, 1, 2, 3)


def codes_for(config, batch=2):
    if not config.needs_codes:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CODES, (batch, 64, *config.code_shape), generator=generator)


def gradients(loss, model):
    """Names of the model's parts that a loss trains."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    named = zip(model.named_parameters(), found, strict=True)
    return {name.split(".")[0] for (name, _), gradient in named if gradient is not None and gradient.any()}


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["channel", "patch", "none"])
def test_the_pixel_loss_is_the_error_of_the_standardized_pixels(small, normalize):
    config = small(loss={"appearance_target": "pixels", "pixel_normalize": normalize})
    model, video, mask = build(config), clips(), sample_masks(clips(), config, step=0)
    latents = model.complete(video, mask)
    features = model.appearance_decoder(latents + model.positions[mask.masked])
    deviation = None if normalize == "none" else normalize
    target = reference.target(video, mask.masked, (2, 8, 8), "pixel", deviation, 1e-6, None, None, torch.float32)
    expected = F.mse_loss(model.appearance_decoder.head(features), target.view(2, 32, 384))
    loss = model.pixel_loss(latents, mask, video)
    torch.testing.assert_close(loss, expected)
    assert gradients(loss, model) == {"encoder", "regressor", "appearance_decoder"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_all_frames_is_the_mean_of_each_ones_cross_entropy(small, smoothing):
    config = small(**ALL_FRAMES, loss={"label_smoothing": smoothing})
    model, video, mask, codes = build(config), clips(), sample_masks(clips(), config, step=0), codes_for(config)
    latents = model.complete(video, mask)
    features = model.appearance_decoder(latents + model.positions[mask.masked])
    logits = model.appearance_decoder.head(features).unflatten(-1, (2, CODES))
    answers = torch.stack([codes[clip, mask.masked[clip]] for clip in range(2)])
    assert torch.equal(masked_codes(codes, mask), answers)
    expected = F.cross_entropy(logits.flatten(0, 2), answers.flatten(), label_smoothing=smoothing)
    loss = model.appearance_loss(latents, mask, codes)
    torch.testing.assert_close(loss, expected)
    head = list(model.appearance_decoder.head.parameters())
    for found, plain in zip(
        torch.autograd.grad(loss, head, retain_graph=True), torch.autograd.grad(expected, head), strict=True
    ):
        torch.testing.assert_close(found, plain)
    assert torch.equal(model.predict_codes(latents, mask), logits.argmax(-1))


@pytest.mark.slow
def test_without_a_regressor_the_decoders_complete_all_tokens(small):
    config = without_regressor(small(model={"width": 48, "heads": 3}))
    model, video, mask = build(config), clips(), sample_masks(clips(), config, step=0)
    assert not any("blocks" in name or "norm" in name for name in model.regressor.state_dict())
    latents = model.complete(video, mask)
    visible = model.encoder(model.encoder.tokens(video, mask.visible), mask.visible)
    masked = model.regressor.mask_token.expand(2, 32, -1)
    torch.testing.assert_close(latents, torch.cat([model.regressor.project(visible), masked], 1))
    tokens = latents + torch.cat([model.positions[mask.visible], model.positions[mask.masked]], 1)
    for block in model.motion_decoder.blocks:
        tokens = block(tokens)
    expected = model.motion_decoder.head(model.motion_decoder.norm(tokens[:, 32:]))
    torch.testing.assert_close(model.predict_motion(latents, mask), expected)
    for loss, part in (
        (model.appearance_loss(latents, mask, codes_for(config)), "appearance_decoder"),
        (model.motion_loss(latents, mask, video), "motion_decoder"),
    ):
        assert gradients(loss, model) == {"encoder", "regressor", part}
    other = video.clone()
    hidden = mask.as_bool().view(2, 1, 4, 4, 4).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other[hidden.expand_as(other)] ^= 255
    assert torch.equal(model.complete(other, mask), latents)
    with pytest.raises(ValueError, match="a regressor with blocks, found none"):
        regressor_attention(model, video, mask)


@pytest.mark.slow
@pytest.mark.parametrize("regressed", [True, False])
@pytest.mark.parametrize("option", [*OPTIONS, "codes"])
def test_a_step_learns_logs_and_balances_what_there_is(small, option, regressed):
    config = small(**OPTIONS.get(option, {}))
    config = config if regressed else without_regressor(config)
    check(config)
    step = PretrainStep(config, build(config), torch.device("cpu"), World())
    logged = [step(0, [(clips(4), codes_for(config, 4))], 3e-3, inspect=True) for _ in range(20)]
    appearance = {"loss/appearance", "gradient/appearance", "gradient/appearance_decoder"}
    assert {"loss/motion", "gradient/motion", "loss/motion_relative"} <= logged[0].keys()
    assert logged[-1]["loss/motion"] < logged[0]["loss/motion"]
    assert (appearance <= logged[0].keys()) == (option != "motion alone")
    assert bool(appearance & logged[0].keys()) == (option != "motion alone")
    assert ("accuracy/codes" in logged[0]) == config.needs_codes
    assert ("accuracy/commonest_code" in logged[0]) == config.needs_codes
    if option != "motion alone":
        assert logged[-1]["loss/appearance"] < logged[0]["loss/appearance"]


@pytest.mark.parametrize("option", ["pixels", "all frames", "latents"])
def test_the_gradient_is_balanced(small, option):
    """By hand: the appearance gradient at the latents, scaled to the set share of the motion gradient's norm."""
    config = small(**OPTIONS[option])
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, appearance=0.3, motion=2.0))
    model, video, mask, codes = build(config), clips(), sample_masks(clips(), config, step=0), codes_for(config)
    objective = build_objective(model, config, lambda part: part)
    objective(video, mask, codes)[0].backward()
    found = model.regressor.mask_token.grad.clone()
    latents = model.complete(video, mask)
    detached = latents.detach().requires_grad_()
    if option == "latents":
        appearance = model.latent_loss(detached, mask, model.latent_targets(video))
    elif codes is None:
        appearance = model.pixel_loss(detached, mask, video)
    else:
        appearance = model.appearance_loss(detached, mask, codes)
    (first,) = torch.autograd.grad(0.3 * appearance, detached)
    (second,) = torch.autograd.grad(2 * model.motion_loss(detached, mask, video), detached)
    balanced = first * (0.3 / 2 * second.norm() / first.norm()) + second
    (expected,) = torch.autograd.grad(latents, model.regressor.mask_token, balanced)
    torch.testing.assert_close(found, expected)
    norms = objective.gradient_norms()
    torch.testing.assert_close(norms["gradient/appearance"], first.norm())
    torch.testing.assert_close(norms["gradient/motion"], second.norm())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["pixels", "all frames", "latents", "no regressor"])
def test_every_option_compiles_as_one_graph(small, option):
    config = small(**OPTIONS.get(option, {}))
    config = without_regressor(config) if option == "no regressor" else config
    model, video, mask, codes = build(config), clips(), sample_masks(clips(), config, step=0), codes_for(config)
    latents = model.complete(video, mask).detach()
    calls = {"complete": (video, mask), "motion_loss": (latents, mask, video)}
    if option == "latents":
        calls |= {"latent_targets": (video,), "latent_loss": (latents, mask, model.latent_targets(video))}
    else:
        calls |= (
            {"pixel_loss": (latents, mask, video)} if codes is None else {"appearance_loss": (latents, mask, codes)}
        )
    for name, arguments in calls.items():
        method = getattr(model, name)
        found = torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")(*arguments)
        torch.testing.assert_close(found, method(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"loss": {"appearance_target": "none", "motion_target": "none", "balance": "fixed"}},
            "loss.appearance_target and loss.motion_target are both 'none'.*set one",
        ),
        ({"loss": {"appearance_target": "none"}}, "loss.balance 'gradient'.*set loss.balance 'fixed'"),
        ({"loss": {"appearance_target": "pixels", "motion_target": "none"}}, "loss.balance 'fixed'"),
        ({"loss": {"visible": 0.5}}, "loss.visible 0.5.*loss.appearance_target 'latents'"),
        ({"loss": {"appearance_target": "latents", "teacher_blocks": 2}}, "teacher_blocks 2.*at most model.depth 1"),
    ],
)
def test_targets_that_cannot_work_are_named(small, tables, message):
    with pytest.raises(UserError, match=message):
        check(small(**tables))


def test_what_a_model_without_codes_or_regressor_cannot_do_is_named(small):
    with pytest.raises(UserError, match=r"loss.alignment 2 .*model.regressor.depth is 0: set"):
        check(without_regressor(small(loss={"alignment": 2.0})))
    with pytest.raises(UserError, match=r"loss.appearance_target 'pixels' has no codes"):
        tokenize(small(**PIXELS), "nowhere", "nowhere")
    with pytest.raises(ValueError, match=r"codes: expected the codebook size.*'pixels', 'latents' or 'none'"):
        MAM2(small(), 0)
    with pytest.raises(ValueError, match=r"found loss.appearance_target 'none'"):
        measure_pretext(build(small(**MOTION_ALONE)), None, None, small(**MOTION_ALONE))


def test_a_perfect_prediction_of_pixels_gives_the_clip_back(monkeypatch, small):
    config = small(**PIXELS)
    model, clip = build(config), clips().permute(0, 2, 3, 4, 1)

    def predict(latents, mask):
        options = (config.patch_size, "pixel", "channel", 1e-6, None, None, torch.float32)
        return reference.target(clips(), mask.masked, *options).view(2, 32, 384)

    monkeypatch.setattr(model, "predict_pixels", predict)
    strips = reconstruct(model, None, clip, config)
    torch.testing.assert_close(strips.appearance, strips.original, atol=1e-4, rtol=0)
    assert strips.codes is None
    alone = small(**MOTION_ALONE)
    strips = reconstruct(build(alone), None, clip, alone)
    assert strips.appearance is None
    assert strips.predicted_motion.shape == strips.original.shape


def test_a_plan_counts_the_frames_that_are_tokenized():
    config = load_recipe("mam2-fast")
    every = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, frames="all"))
    pixels = dataclasses.replace(config, loss=dataclasses.replace(config.loss, appearance_target="pixels"))
    first, all_of_them = (plan(one, gpu="h200").parts for one in (config, every))
    assert all_of_them["tokenizer"].flops == 2 * first["tokenizer"].flops
    assert all_of_them["tokenizer"].parameters == first["tokenizer"].parameters
    assert all_of_them["code head and loss"].parameters == 2 * first["code head and loss"].parameters
    assert "one of each frame" in plan(every, gpu="h200").report()
    planned = plan(pixels, gpu="h200")
    assert not {"tokenizer", "code head and loss"} & planned.parts.keys()
    assert "codes  " not in planned.report()
    assert "projection" in plan(without_regressor(config), gpu="h200").report()


@pytest.mark.slow
def test_runs_of_each_option(tmp_path, small, monkeypatch, synthetic_clips):
    """Through pre-training on files, loading, and pictures."""
    synthetic_clips(tmp_path / "clips", train=16)
    videos = tmp_path / "clips" / "train"
    tokenized = Tokenizer.codes

    def refuse(*_):
        raise AssertionError("no code is predicted")

    for option in [*OPTIONS, "no regressor"]:
        config, run = small(**OPTIONS.get(option, {}), optim={"epochs": 1.0}), tmp_path / option
        config = without_regressor(config) if option == "no regressor" else config
        monkeypatch.setattr(Tokenizer, "codes", tokenized if config.needs_codes else refuse)
        pretrain(config, videos, run, progress=False)
        line = read_log(run)[-1]
        assert math.isfinite(line["loss/motion_relative"])
        assert ("loss/appearance" in line) == (option != "motion alone")
        assert ("accuracy/codes" in line) == config.needs_codes
        assert (run / "tokenizer.safetensors").is_file() == config.needs_codes
        model = load_model(run)
        assert isinstance(model, MAM2)
        assert model.codebook_size == (CODES if config.needs_codes else 0)
        page = visualize([run], videos, tmp_path / "seen" / option, device="cpu", clips=1, progress=False)
        # original, masked, two of motion; appearance; true codes or features; what the regressor reads
        shown = (
            4 + (option != "motion alone") + (config.needs_codes or config.needs_teacher) + (option != "no regressor")
        )
        assert page.read_text().count('class="tile"') == shown


def test_scores_count_the_codes_of_each_codebook_apart(small):
    config = small(tokenizer={"codes_per_patch": 2})
    torch.manual_seed(0)
    tokenizer = build_tokenizer(VQGAN(small_vqgan(8, CODES, 8, codes_per_patch=2)), config, torch.device("cpu"))
    model, mask, clip = build(config), sample_masks(clips(), config, step=0), clips().permute(0, 2, 3, 4, 1)
    found = score(model, tokenizer, clip, mask, config)
    codes = masked_codes(tokenizer.codes(clips()), mask)
    counts = torch.stack([codes[..., codebook].flatten().bincount(minlength=CODES) for codebook in range(2)])
    assert torch.equal(found.histogram, counts)
    assert found.commonest_code == pytest.approx(float(counts.amax(1).sum() / counts.sum()))
    assert found.commonest_code > float(counts.max() / counts.sum())


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_codes_of_all_frames_from_a_cache_train_to_the_same_bits(tmp_path, small, synthetic_clips, depth):
    synthetic_clips(tmp_path / "clips", train=16)
    videos, sizes = tmp_path / "clips" / "train", {"data": {"recorded": 2}, "optim": {"epochs": 2.0}}
    several = {"frames": "all", "codes_per_patch": depth}
    made = tokenize(small(tokenizer=several, **sizes), videos, tmp_path / "codes", progress=False)
    assert made.cache.codes(*torch.zeros(3, 1, dtype=torch.int64)).shape == (1, 64, 2 * depth)
    logs = []
    for name, source in (("path", tmp_path / "codes" / "tokenizer.safetensors"), ("cache", tmp_path / "codes")):
        pretrain(small(**sizes, tokenizer={**several, name: str(source)}), videos, tmp_path / name, progress=False)
        lines = read_log(tmp_path / name)
        logs.append([{key: value for key, value in line.items() if key.startswith("loss/")} for line in lines])
    assert logs[0] == logs[1]
    with pytest.raises(UserError, match=r"tokenizer.frames = 'all', this run has 'first'"):
        pretrain(
            small(**sizes, tokenizer={"cache": str(tmp_path / "codes")}), videos, tmp_path / "other", progress=False
        )
