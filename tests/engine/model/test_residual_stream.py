"""`model.residual = "bfloat16"` under autocast: regressor and decoders add up in bfloat16, the encoder in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.build import build_model
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.kernels import TubeMask, tube_mask

CODES = 32


def config_of(residual: str, recipe: str = "laptop", **model: Any) -> PretrainConfig:
    config = load_recipe(recipe)
    part = dataclasses.replace(config.model.decoder, width=32, heads=2, depth=2)
    regressor = dataclasses.replace(config.model.regressor, width=32, heads=2, depth=2)
    regressor = dataclasses.replace(regressor, keys=model.pop("keys", regressor.keys))
    sizes = {"width": 48, "heads": 3, "depth": 2, "patch": 8, "decoder": part, "regressor": regressor}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, frames=4, size=32),
        model=dataclasses.replace(config.model, residual=residual, **sizes | model),
    )


def built(config: PretrainConfig) -> MAM2 | VideoMAE:
    torch.manual_seed(0)
    return build_model(config, CODES)


def loss_of(model: MAM2 | VideoMAE) -> Tensor:
    torch.manual_seed(1)
    video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    mask: TubeMask = tube_mask(2, (2, 4, 4), 0.75, seed=0)
    if isinstance(model, VideoMAE):
        return model.loss(video, mask)
    latents = model.complete(video, mask)
    assert latents.dtype == torch.float32
    codes = torch.randint(CODES, (2, 32))
    return model.appearance_loss(latents, mask, codes) + model.motion_loss(latents, mask, video)


def stream_types(model: nn.Module) -> dict[str, set[torch.dtype]]:
    """Returns the types that the blocks of each part return in a pass under autocast."""
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith(".blocks"):
            part = name.partition(".")[0]
            module.register_forward_hook(lambda *call, part=part: seen.setdefault(part, set()).add(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("model", [{}, {"layer_scale": 0.1}, {"keys": "all"}, {"keys": "visible"}])
def test_the_streams_of_regressor_and_decoders_have_the_type(model: dict[str, Any]) -> None:
    parts = ("regressor", "appearance_decoder", "motion_decoder")
    for residual, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        expected = {"encoder": {torch.float32}} | {part: {dtype} for part in parts}
        assert stream_types(built(config_of(residual, **model))) == expected


def test_videomaes_decoder_too() -> None:
    found = stream_types(built(config_of("bfloat16", "videomae", tubelet=2)))
    assert found == {"encoder": {torch.float32}, "decoder": {torch.bfloat16}}


def test_without_autocast_nothing_changes() -> None:
    assert torch.equal(loss_of(built(config_of("bfloat16"))), loss_of(built(config_of("float32"))))


def test_its_gradients_are_those_of_float64_to_a_few_roundings() -> None:
    gradients = []
    for residual in ("float32", "bfloat16"):
        model = built(config_of(residual))
        with torch.autocast("cpu", torch.bfloat16, enabled=residual == "bfloat16"):
            loss = loss_of(model)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, found = gradients
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
