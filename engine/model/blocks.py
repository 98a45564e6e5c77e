"""Building blocks of encoder, regressor and decoders: pre-norm transformer blocks and fixed positions.

Shapes: B clips, N tokens, Nm masked, M context tokens, D width, H heads. LayerNorm eps 1e-6; the query and the value
projection have a bias, the key projection has none (it would cancel in the softmax), as in VideoMAE and CAE.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.model.attention import Choices, attention

LAYER_NORM_EPS = 1e-6
Residual = Literal["float32", "bfloat16"]
"""Types of a residual stream, see `residual_stream`."""
MASK_TOKEN_STD = 0.02


def sincos_positions(count: int, width: int) -> Tensor:
    """Returns VideoMAE's fixed position table over the flattened token index: [count, width] float32 in [-1, 1].

    The angle of token n at value j is n / 10000^(2·⌊j/2⌋ / width); sine at even j, cosine at odd j.
    """
    exponent = 2 * (torch.arange(width, dtype=torch.float64) // 2) / width
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000**exponent
    even = torch.arange(width) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


def initialize(module: nn.Module) -> None:
    """Initializes every linear layer in `module`: Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mask_token(width: int) -> nn.Parameter:
    """Returns the learned [1, 1, D] mask token, drawn with standard deviation 0.02."""
    return nn.Parameter(torch.randn(1, 1, width) * MASK_TOKEN_STD)


def mlp_width(width: int, ratio: float) -> int:
    """Returns the hidden width of an MLP: `width * ratio`, rounded down as in VideoMAE.

    A ratio computed as hidden / width returns hidden again, in spite of the quotient's rounding error.
    """
    return math.floor(width * ratio + 1e-6)


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS)


class Attention(nn.Module):
    """Self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.choices: Choices = {}
        """See `VideoTransformer.set_attention`."""
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self._project(tokens, bias).unflatten(-1, (3, self.heads, -1))
        return self.proj(attention(*qkv.unbind(2), choices=self.choices).flatten(2))

    def _project(self, tokens: Tensor, bias: Tensor) -> Tensor:
        if isinstance(self.qkv, nn.Linear):
            return F.linear(tokens, self.qkv.weight, bias)
        projected = self.qkv(tokens)  # with a low-rank adapter, see adapters.py
        return projected + bias.to(projected.dtype)


class CrossAttention(nn.Module):
    """Attention of queries [B, N, D] over keys and values, both [B, M, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.choices: Choices = {}
        """See `VideoTransformer.set_attention`."""
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        projected = (self.q(queries), self.k(keys), self.v(values))
        q, k, v = (tensor.unflatten(-1, (self.heads, -1)) for tensor in projected)
        return self.proj(attention(q, k, v, choices=self.choices).flatten(2))


class VideoTransformer(nn.Module):
    """Base of the models whose blocks contain attention."""

    def set_attention(self, choices: Choices) -> None:
        """Sets the attention implementations that this model runs for these shapes; drops its earlier choices.

        They are no part of the state dict; a deep copy of the model keeps them. A compiled model is compiled again.
        """
        own = dict(choices)
        for module in self.modules():
            if isinstance(module, Attention | CrossAttention):
                module.choices = own


class Mlp(nn.Module):
    """Linear, GELU, linear: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width(width, ratio))
        self.fc2 = nn.Linear(mlp_width(width, ratio), width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block, [B, N, D] -> [B, N, D].

    layer_scale: initial value of `gamma_1` and `gamma_2` [D], which multiply the attention and MLP branches
    (LayerScale, Touvron et al., arXiv 2103.17239, as in CAE); 0: no LayerScale.

    path_scales [2, B]: factors of each clip's attention and MLP branches, for stochastic depth: 0 for a dropped branch,
    otherwise the inverse of the probability to keep it. They are drawn outside, so that a step can be repeated bit for
    bit and recomputed.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, mlp_ratio)
        self.gamma_1, self.gamma_2 = _gammas(width, layer_scale)

    def forward(self, tokens: Tensor, path_scales: Tensor | None = None) -> Tensor:
        attention, mlp = (None, None) if path_scales is None else path_scales[..., None, None]
        tokens = _sum(tokens, _scaled(self.attn(self.norm1(tokens)), self.gamma_1, attention))
        return _sum(tokens, _scaled(self.mlp(self.norm2(tokens)), self.gamma_2, mlp))


class RegressorBlock(nn.Module):
    """CAE's cross-attention block: masked states attend to the context.

    Positions are added to queries and keys at every block, never to the state or the values. Queries, keys and values
    each have a LayerNorm. The MLP adds to the residual stream; CAE's adds to the normalized state instead.
    layer_scale: as in `Block`.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.norm_q = layer_norm(width)
        self.norm_k = layer_norm(width)
        self.norm_v = layer_norm(width)
        self.attn = CrossAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, mlp_ratio)
        self.gamma_1, self.gamma_2 = _gammas(width, layer_scale)

    def forward(self, masked: Tensor, context: Tensor, masked_positions: Tensor, context_positions: Tensor) -> Tensor:
        """Maps masked states with positions [B, Nm, D] and context with positions [B, M, D] to [B, Nm, D]."""
        queries = self.norm_q(masked + masked_positions)
        keys = self.norm_k(context + context_positions)
        masked = _sum(masked, _scaled(self.attn(queries, keys, self.norm_v(context)), self.gamma_1))
        return _sum(masked, _scaled(self.mlp(self.norm2(masked)), self.gamma_2))


def _gammas(width: int, value: float) -> tuple[nn.Parameter, nn.Parameter] | tuple[None, None]:
    """Returns the two LayerScale parameters of a block, or None twice for a value of 0."""
    return (
        (nn.Parameter(torch.full((width,), value)), nn.Parameter(torch.full((width,), value)))
        if value
        else (None, None)
    )


def _scaled(branch: Tensor, *scales: Tensor | None) -> Tensor:
    for scale in scales:
        branch = branch if scale is None else scale * branch
    return branch


def _sum(stream: Tensor, branch: Tensor) -> Tensor:
    """Returns the sum in the type of the residual stream."""
    return (stream + branch).to(stream.dtype)


def residual_stream(tokens: Tensor, residual: Residual) -> Tensor:
    """Returns tokens as a residual stream: for "bfloat16" in the type of autocast if that is on, else unchanged."""
    device = tokens.device.type
    if residual == "bfloat16" and torch.is_autocast_enabled(device):
        return tokens.to(torch.get_autocast_dtype(device))
    return tokens


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width, heads: expected a width divisible by the heads, found width {width}, heads {heads}")
