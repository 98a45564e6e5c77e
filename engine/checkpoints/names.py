"""Converts parameter names between VideoMAE's code, Hugging Face's VideoMAE and ours.

Our names are `encoder.…`, `encoder_to_decoder.weight`, `mask_token`, `decoder.…`, and for a classifier `norm.…`,
`head.…`. They are VideoMAE's, except that our patch embedding is a matrix [D, P] over the pixels in (t, h, w, c) order,
where theirs is a convolution [D, C, t, h, w]. VideoMAE's fine-tuning omits `encoder.` and names the classifier's norm
`fc_norm`. Hugging Face stores query, key and value separately. Position tables are fixed, so that no checkpoint has
them.

D width, P values per token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|model|backbone)\.)+")
"""Prefixes that torch.compile, DistributedDataParallel and modules around the model add to its names."""
FINE_TUNED = (
    ("patch_embed.", "encoder.patch_embed."),
    ("blocks.", "encoder.blocks."),
    ("norm.", "encoder.norm."),
    ("fc_norm.", "norm."),
)
BEGINNINGS = (
    ("embeddings.patch_embeddings.projection.", "encoder.patch_embed."),
    ("encoder.layer.", "encoder.blocks."),
    ("layernorm.", "encoder.norm."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("fc_norm.", "norm."),
    ("classifier.", "head."),
)
INSIDES = (
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
"""Pairs of their name and ours: prefixes of VideoMAE's fine-tuning and Hugging Face's, parts of the latter's names."""
PROJECTIONS = ("query", "key", "value")
BIASES = {"q_bias": ("q_bias", "query.bias"), "v_bias": ("v_bias", "value.bias")}
"""Our name and theirs. transformers 4 and all published checkpoints use `q_bias`, transformers 5 uses `query.bias`.
Version 4 ignores the new name, and some releases of version 5 (5.17) the old one, without an error: both are written.
"""
KEY_BIAS = "key.bias"
"""Some releases of transformers 5 (5.17) also have a bias of the keys; ours and the other releases have none.

It changes no output: q·(k + b) = q·k + q·b, and softmax over the keys cancels q·b, which is equal for all keys of a
query. Reading therefore drops it, whatever its values, and writing omits it; such a release then initializes it to 0.
"""


def from_videomae(state: Tensors) -> Tensors:
    """Converts parameters of VideoMAE's or VideoMAE v2's code, pre-training or fine-tuning, to our names."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if not any(name.startswith("encoder.") for name in state):
        state = {_begun(name, FINE_TUNED): tensor for name, tensor in state.items()}
    return _flattened({name.replace("patch_embed.proj.", "patch_embed."): tensor for name, tensor in state.items()})


def to_videomae(tensors: Tensors, patch_size: Sequence[int]) -> Tensors:
    """Converts our names to VideoMAE's: a classifier's to those of its fine-tuning, others to its pre-training's."""
    state = _convolved(tensors, patch_size)
    if "head.weight" in state:
        state = {_begun(name, _reversed(FINE_TUNED)): tensor for name, tensor in state.items()}
    return {name.replace("patch_embed.", "patch_embed.proj."): tensor for name, tensor in state.items()}


def from_hugging_face(state: Tensors) -> Tensors:
    """Converts parameters of Hugging Face's VideoMAEModel, -ForPreTraining or -ForVideoClassification to our names.

    Drops the biases of the keys (see `KEY_BIAS`).
    """
    found = {}
    for name, tensor in state.items():
        name = _begun(name.removeprefix("videomae."), BEGINNINGS)
        found[_replaced(name, INSIDES).replace(".attention.attention.", ".attn.")] = tensor
    for query in [name for name in found if name.endswith(".attn.query.weight")]:
        layer = query.removesuffix("query.weight")
        parts = [found.pop(f"{layer}{projection}.weight", None) for projection in PROJECTIONS]
        found[f"{layer}qkv.weight"] = torch.cat([part for part in parts if part is not None])
        found.pop(layer + KEY_BIAS, None)
        for ours, theirs in BIASES.items():
            if biases := [found.pop(layer + name) for name in theirs if layer + name in found]:
                found[layer + ours] = biases[0]
    return _flattened(found)


def to_hugging_face(tensors: Tensors, patch_size: Sequence[int]) -> Tensors:
    """Converts our names to Hugging Face's: both names of each bias (see `BIASES`), none of the keys'."""
    found: Tensors = {}
    for ours, tensor in _convolved(tensors, patch_size).items():
        name = _replaced(_begun(ours, _reversed(BEGINNINGS)), _reversed(INSIDES))
        layer, _, value = name.partition(".attn.")
        if value == "qkv.weight":
            for projection, part in zip(PROJECTIONS, tensor.chunk(3), strict=True):
                found[f"{layer}.attention.attention.{projection}.weight"] = part.clone()
        elif value:
            found |= {f"{layer}.attention.attention.{theirs}": tensor.clone() for theirs in BIASES[value]}
        else:
            found[name] = tensor
    if "head.weight" in tensors or "mask_token" in tensors:
        base = ("embeddings.", "encoder.", "layernorm.")
        found = {f"videomae.{name}" if name.startswith(base) else name: tensor for name, tensor in found.items()}
    return found


def _begun(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


def _replaced(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return next((name.replace(old, new) for old, new in pairs if old in name), name)


def _reversed(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(ours, theirs) for theirs, ours in pairs]


def _flattened(state: Tensors) -> Tensors:
    weight = state.get("encoder.patch_embed.weight")
    if weight is None or weight.ndim != 5:
        return state
    return state | {"encoder.patch_embed.weight": weight.permute(0, 2, 3, 4, 1).flatten(1)}


def _convolved(tensors: Tensors, patch_size: Sequence[int]) -> Tensors:
    weight = tensors["encoder.patch_embed.weight"].unflatten(1, (*patch_size, -1))
    return tensors | {"encoder.patch_embed.weight": weight.permute(0, 4, 1, 2, 3).contiguous()}
