"""Declared costs of the model against the method's table, PyTorch's counter, the models' parameters, and autograd."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mam2.engine import costs, layer_costs
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe, recipe_names
from mam2.engine.model.blocks import Block, RegressorBlock
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import keep_decoded
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, VQGANConfig, small
from mam2.engine.train.objective import build_objective
from mam2.engine.train.optimizer import build_optimizer, hidden_matrices
from mam2.kernels import tube_mask

CODES = 24


def changed(config: PretrainConfig, **tables: dict[str, Any]) -> PretrainConfig:
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


def regressor(width: int, heads: int, keys: str) -> PretrainConfig:
    config = load_recipe("mam2-cae")
    part = dataclasses.replace(config.model.regressor, width=width, heads=heads, keys=keys)
    decoder = dataclasses.replace(config.model.decoder, width=width, heads=heads)
    return changed(config, model={"regressor": part, "decoder": decoder})


def gmac(flops: int) -> float:
    return flops / 2e9


BASE = load_recipe("mam2-cae")
TABLE = {
    "encoder on 160 visible tokens": (lambda: costs.encoder_blocks(BASE, 160, 2), 14.1),
    "encoder on 392": (lambda: costs.encoder_blocks(BASE, 392, 2), 36.1),
    "VideoMAE decoder 4×384 on 1568": (lambda: costs.part_costs(load_recipe("videomae"))["decoder"], 18.7),
    "regressor 4×768 all keys": (lambda: costs.part_costs(BASE)["regressor"], 54.2),
    "decoder 4×768 on 1408": (lambda: costs.part_costs(BASE)["motion decoder"], 52.0),
    "decoder 4×384 on 1408": (lambda: costs.part_costs(load_recipe("mam2-fast"))["motion decoder"], 16.1),
    "code head 768→8192": (lambda: layer_costs.code_head(1408, 768, 8192, 2), 8.9),
    "code head 384→8192": (lambda: layer_costs.code_head(1408, 384, 8192, 2), 4.4),
    "code head 384→1024": (lambda: layer_costs.code_head(1408, 384, 1024, 2), 0.6),
    "VQGAN f16 at 224, a frame": (lambda: layer_costs.tokenizer_image(CONFIGS["f16-1024"], (14, 14), 2), 53.0),
    "Gumbel f8 at 112, a frame": (lambda: layer_costs.tokenizer_image(CONFIGS["gumbel-f8-8192"], (14, 14), 2), 16.5),
}
"""Expected FLOPs of the forward pass, as the method's page gives them, rounded to one digit."""


@pytest.mark.parametrize("name", TABLE)
def test_the_methods_table(name: str) -> None:
    cost, expected = TABLE[name]
    assert gmac(cost().forward_flops) == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize(("keys", "expected"), [("all", 16.9), ("visible", 9.2)])
def test_the_methods_light_regressors(keys: str, expected: float) -> None:
    config = regressor(384, 6, keys)
    visible, masked = 160, 1408
    without = layer_costs.linear(visible, 768, 384, 2).forward_flops  # the table leaves the projection out
    found = costs.regressor(config, visible, masked, 2).forward_flops - without
    assert gmac(found) == pytest.approx(expected, abs=0.051)


def test_the_methods_totals() -> None:
    assert gmac(sum(costs.step_flops(BASE, 8192).values())) == pytest.approx(549, abs=0.5)
    aligned = changed(BASE, loss={"alignment": 2.0})
    # the table leaves the patch embedding of the masked tokens out
    assert gmac(costs.step_flops(aligned, 8192)["alignment"]) == pytest.approx(156, rel=0.015)


@pytest.mark.parametrize("name", [*recipe_names(), "aligned"])
def test_parameters_are_the_models(name: str) -> None:
    config = load_recipe("demo" if name == "aligned" else name)
    if name == "aligned":
        config = changed(config, loss={"alignment": 2.0})
    with torch.device("meta"):
        model = VideoMAE(config) if config.model.objective == "videomae" else MAM2(config, CODES)
    declared = costs.part_costs(config, CODES)
    assert sum(cost.parameters for cost in declared.values()) == sum(p.numel() for p in model.parameters())


ATTENDING = VQGANConfig(
    codes=CODES,
    channels=32,
    z_channels=16,
    embed_dim=8,
    channel_multipliers=(1, 2),
    attention_levels=(1,),
    res_blocks=1,
)
GUMBEL = dataclasses.replace(ATTENDING, quantizer="gumbel")


DECODING = ("decoder", "post_quant_conv", "patch_out")


@pytest.mark.parametrize(
    "config",
    [small(16, CODES, 4), small(16, CODES, 4, codes_per_patch=3), ATTENDING, GUMBEL],
    ids=["small", "residual", "attention", "gumbel"],
)
def test_the_tokenizer_is_as_counted(config: VQGANConfig) -> None:
    vqgan = VQGAN(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vqgan.codes(torch.randn(1, 3, 4 * config.factor, 6 * config.factor))
    cost = layer_costs.tokenizer_image(config, (4, 6), 4)
    assert cost.forward_flops == counter.get_total_flops()
    used = [p.numel() for name, p in vqgan.named_parameters() if not name.startswith(DECODING)]
    assert cost.parameters == sum(used)


def test_heads_of_128_cost_what_heads_of_64_do() -> None:
    """FLOPs, bytes and parameters of attention do not depend on the number of heads: only a GPU can tell them apart."""
    config = load_recipe("mam2-fast")
    assert config.model.decoder.width == 64 * config.model.decoder.heads == 384
    model = {part: dataclasses.replace(getattr(config.model, part), heads=3) for part in ("regressor", "decoder")}
    assert costs.part_costs(changed(config, model=model), CODES) == costs.part_costs(config, CODES)


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "mam2": {},
    "all keys": {"regressor": {"keys": "all"}},
    "another width": {"regressor": {"width": 32, "heads": 2}, "decoder": {"width": 32, "heads": 2}},
    "intra": {"loss": {"motion_target": "intra"}},
    "hog": {"loss": {"motion_target": "hog"}},
    "no motion": {"loss": {"motion_target": "none", "balance": "fixed"}, "mask": {"kind": "random"}},
    "alignment": {"loss": {"alignment": 2.0}},
    "pixels": {"loss": {"appearance_target": "pixels"}},
    "motion alone": {"loss": {"appearance_target": "none", "balance": "fixed"}},
    "latents": {"loss": {"appearance_target": "latents"}},
    "latents, visible too": {"loss": {"appearance_target": "latents", "visible": 0.5}},
    "latents, no regressor": {
        "loss": {"appearance_target": "latents"},
        "regressor": {"depth": 0, "width": 32, "heads": 2},
        "decoder": {"width": 32, "heads": 2},
        "mask": {"decoded": 0.5},
    },
    "all frames": {"tokenizer": {"frames": "all"}},
    "residual codes": {"tokenizer": {"codes_per_patch": 3}},
    "no regressor": {"regressor": {"depth": 0}},
    "no regressor, one width": {
        "regressor": {"depth": 0, "width": 48},
        "decoder": {"width": 48},
        "loss": {"appearance_target": "pixels"},
    },
    "videomae": {"model": {"objective": "videomae"}},
    "half decoded": {"mask": {"decoded": 0.5}, "loss": {"alignment": 2.0}},
    "half decoded, all keys": {"mask": {"decoded": 0.5}, "regressor": {"keys": "all"}},
    "half decoded, no regressor": {"mask": {"decoded": 0.5}, "regressor": {"depth": 0}},
    "half decoded, videomae": {"mask": {"decoded": 0.5}, "model": {"objective": "videomae"}},
    "layer scale": {
        "model": {"layer_scale": 0.1, "projection_norm": True},
        "regressor": {"width": 32, "heads": 2},
        "decoder": {"width": 32, "heads": 2},
    },
}


def case(name: str, **sizes: Any) -> PretrainConfig:
    tables = CASES[name]
    config = changed(load_recipe("demo"), model={"width": 48, "depth": 2, "heads": 3, **sizes})
    model = changed(config.model, **{part: values for part, values in tables.items() if hasattr(config.model, part)})
    rest = {table: values for table, values in tables.items() if not hasattr(config.model, table)}
    return changed(dataclasses.replace(config, model=model), **rest)


def forward(config: PretrainConfig, batch: int) -> tuple[torch.Tensor, VideoMAE | MAM2]:
    """The loss of random clips, and the model."""
    model = VideoMAE(config) if config.model.objective == "videomae" else MAM2(config, CODES)
    if config.run.recompute:
        for block in (module for module in model.modules() if isinstance(module, Block | RegressorBlock)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    objective = build_objective(model, config, lambda part: part)
    mask = tube_mask(batch, config.grid, config.mask.ratio, seed=0, device="cpu")
    extent = (batch, config.data.frames, config.data.size, config.data.size, 3)
    video = torch.randint(0, 256, extent, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    codes = torch.randint(CODES, (batch, mask.as_bool().shape[1], *config.code_shape))
    mask = keep_decoded(mask, config, step=0)
    return objective(video, mask, codes)[0], model


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_flops_are_as_counted(name: str) -> None:
    config = case(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(config, 1)[0].backward()
    declared = costs.step_flops(config, CODES)
    # the counter does not count inside of linear_cross_entropy and linear_masked_loss
    names = ["code head and loss", "pixel head and loss", "head and pixel loss"]
    names += ["motion head and loss"] if config.loss.motion_target != "hog" else []
    unseen = sum(declared.get(name, 0) for name in names)
    assert counter.get_total_flops() == sum(declared.values()) - unseen


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_every_case(name: str) -> None:
    _, model = forward(case(name), 1)
    declared = costs.part_costs(case(name), CODES)
    assert sum(cost.parameters for cost in declared.values()) == sum(p.numel() for p in model.parameters())


HELD = (
    "mam2",
    "all keys",
    "another width",
    "pixels",
    "motion alone",
    "latents",
    "latents, visible too",
    "all frames",
    "no regressor",
    "videomae",
    "half decoded",
    "layer scale",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("recompute", [False, True])
def test_held_activations_are_what_autograd_saves(name: str, recompute: bool) -> None:
    """Within 15 %: LayerNorm's statistics, attention's sums and index tensors are not declared."""
    config = changed(case(name, depth=6), run={"recompute": recompute})
    batch, held = 4, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, model = forward(config, batch)
    for own in (*model.parameters(), *model.buffers()):
        held.pop(own.untyped_storage().data_ptr(), None)
    parts = costs.part_costs(config, CODES, item_bytes=4)
    declared = sum(cost.held_bytes for cost in parts.values())
    if recompute:  # the activations of the recomputed block are declared, but do not exist yet after the forward pass
        plain = costs.part_costs(changed(config, run={"recompute": False}), CODES, item_bytes=4)
        assert parts["encoder"].held_bytes < 0.5 * plain["encoder"].held_bytes
        assert sum(held.values()) / batch < declared
    else:
        assert declared == pytest.approx(sum(held.values()) / batch, rel=0.15)


@pytest.mark.parametrize("recipe", ["mam2-fast", "videomae", "laptop"])
def test_muons_cost_is_that_of_its_matrices_and_counted_flops(recipe: str) -> None:
    """Shapes and parameters equal those of the recipe's model; FLOPs equal PyTorch's count of a small update."""
    config = changed(load_recipe(recipe), optim={"name": "muon"})
    with torch.device("meta"):
        model = VideoMAE(config) if config.model.objective == "videomae" else MAM2(config, CODES)
    found: Counter[tuple[int, ...]] = Counter()
    for matrix, parts in hidden_matrices(model).items():
        found[len(matrix) // parts, matrix.shape[1]] += parts
    assert costs.hidden_matrix_shapes(config) == found
    assert costs.muon(config, 2).parameters == sum(matrix.numel() for matrix in hidden_matrices(model))
    assert costs.muon(changed(config, optim={"name": "adamw"}), 2) == layer_costs.PartCost()


def test_muons_flops_are_those_counted() -> None:
    config = changed(load_recipe("demo"), optim={"name": "muon"}, model={"mlp_ratio": 2.5})
    model = MAM2(config, CODES)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == costs.muon(config, 2).flops > 0
