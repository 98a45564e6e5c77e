"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) of an encoder's linear layers, from the package peft.

Shapes: O outputs and I inputs of a layer, R the rank. A layer W [O, I] computes W x + alpha / R · B A x; A [R, I] is
drawn at random and B [O, R] is zero, so that the first step starts from the encoder's function. Only A and B are
trained. The fused projection of queries, keys and values has one A for the three and a B of 3·O rows.

peft replaces each adapted `nn.Linear` by its own module, whose parameters are called `base_layer.weight`,
`lora_A.default.weight` and `lora_B.default.weight`. `merge_adapters` turns such weights into those of a plain model,
without peft.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mam2.engine.config.finetune import AdapterConfig
from mam2.engine.errors import UserError

LAYERS = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
"""Names of the adapted layers: all linear layers of the blocks. At an equal number of trained parameters, adapters on
all of them learn more than a larger rank on the attention alone (Dettmers et al., arXiv 2305.14314)."""
ADAPTER = ".lora_"
"""Part of the names of an adapter's parameters."""
_NAME = "default"


def check_peft(config: AdapterConfig) -> None:
    """Raises UserError if the config has adapters and peft is not installed."""
    if config.rank:
        _peft(config.rank)


def add_adapters(model: nn.Module, config: AdapterConfig) -> None:
    """Adds adapters to all blocks of `model.encoder`, in place, and freezes the rest of the encoder.

    A is drawn from torch's global generator. Raises UserError if peft is not installed.
    """
    peft = _peft(config.rank)
    encoder = model.encoder
    assert isinstance(encoder, nn.Module)
    encoder.requires_grad_(False)
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=LAYERS, bias="none")
    peft.inject_adapter_in_model(settings, encoder, adapter_name=_NAME)
    for module in encoder.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast chooses the dtype of the products


def merge_adapters(weights: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Returns the weights of the plain model that computes the same: W + alpha / R · B A, in the dtype of W.

    weights: a state dict, with adapters or already merged; the latter is returned unchanged.
    """
    merged = {}
    for name, tensor in weights.items():
        if ADAPTER in name:
            continue
        layer, adapted, parameter = name.partition(".base_layer.")
        if adapted and parameter == "weight":
            down, up = (weights[f"{layer}.lora_{part}.{_NAME}.weight"] for part in "AB")
            tensor = tensor + config.alpha / config.rank * (up @ down)
        merged[f"{layer}.{parameter}" if adapted else name] = tensor
    return merged


def _peft(rank: int):  # type: ignore[no-untyped-def]  # peft is not installed where types are checked
    """Returns the module peft. Raises UserError if it cannot be imported."""
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise UserError(
            f"adapters.rank {rank}: needs {error.name}, which is not installed: pip install 'mam2[adapters]', or in a "
            "checkout pip install '.[adapters]'; adapters.rank 0 trains without adapters"
        ) from None
    return peft
