"""The VQGAN of taming-transformers, with the same parameter names, so that its checkpoints load without changes.

Encoder and decoder are convolutional residual networks with a few attention blocks; between them every position of
the code map is quantized to one of V codes, by nearest neighbor (`vq`) or by the largest logit (`gumbel`). With D > 1
codes per patch, a position has D codes, each from a codebook of its own (residual quantization).

Shapes: B images, H×W pixels, h×w positions (H / factor), D codes per position, E code width, V codes, C channels. Code
maps are [B, h, w] if D = 1, else [B, h, w, D].
Definition: Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841.
Residual quantization: Lee et al., "Autoregressive Image Generation using Residual Quantization", arXiv 2203.01941.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.model.attention import attention


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The fields of taming's `ddconfig` and quantizer that define the network."""

    codes: int
    """Codebook size V."""
    quantizer: Literal["vq", "gumbel"] = "vq"
    """Choice of a code: the nearest codebook vector, or the largest of V logits."""
    embed_dim: int = 256
    """Width E of a codebook vector."""
    z_channels: int = 256
    """Output channels of the encoder and input channels of the decoder."""
    channels: int = 128
    """Base width; level i has `channels * channel_multipliers[i]`."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One factor per level; each level but the last halves height and width."""
    res_blocks: int = 2
    """Residual blocks per level in the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...] = (4,)
    """Levels whose residual blocks are followed by attention. (taming specifies resolutions: level i is 256 / 2^i, the
    resolution of its configs, independent of the image size.)"""
    groups: int = 32
    """Groups of the group normalization."""
    image_channels: int = 3
    """Channels C of the images."""
    patch_path: bool = False
    """Adds a linear path past both networks: a patch's pixels to its latent, and a code's vector to pixels. The models
    trained here have it, so that they begin as k-means of patches; taming's do not."""
    codes_per_patch: int = 1
    """Codes D of a position, only with `vq`: the second code is the one nearest to what the first leaves, and so on.
    Each has a codebook of V codes of its own."""

    def __post_init__(self) -> None:
        if self.codes_per_patch < 1 or (self.codes_per_patch > 1 and self.quantizer != "vq"):
            raise ValueError(
                "codes_per_patch: expected at least 1, and 1 with the quantizer 'gumbel', found "
                f"{self.codes_per_patch} with {self.quantizer!r}"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along height and along width."""
        return 2 ** (len(self.channel_multipliers) - 1)


CONFIGS = {
    "f16-1024": VQGANConfig(codes=1024),
    "f16-16384": VQGANConfig(codes=16384),
    "gumbel-f8-8192": VQGANConfig(
        codes=8192, quantizer="gumbel", channel_multipliers=(1, 1, 2, 4), attention_levels=(3,)
    ),
}
"""taming-transformers' published ImageNet (f16) and OpenImages (Gumbel f8) models."""


LEAST_DIMENSIONS = 192
"""Smallest number of dimensions of a small model's latents, unless a patch has fewer values."""


def small(channels: int, codes: int, factor: int, image_channels: int = 3, *, codes_per_patch: int = 1) -> VQGANConfig:
    """Returns a small config, which a CPU trains in seconds.

    One residual block per level, attention only in the middle. A latent has at least one dimension per code, but not
    more than a patch has values, so that the linear path can hold any k-means of patches without loss.

    Args:
        channels: base width, a multiple of 8; 16 is enough for simple frames of 64×64 and factor 8.
        codes: codebook size.
        factor: pixels per code along height and width, a power of two from 2.
        image_channels: C of the images.
        codes_per_patch: codes D of a position.
    """
    levels = factor.bit_length()
    if factor < 2 or factor != 2 ** (levels - 1):
        raise ValueError(f"factor: expected a power of two from 2, found {factor}")
    if channels < 8 or channels % 8:
        raise ValueError(f"channels: expected a multiple of 8, found {channels}")
    return VQGANConfig(
        codes=codes,
        embed_dim=min(max(codes * codes_per_patch, LEAST_DIMENSIONS), image_channels * factor**2),
        z_channels=32,
        channels=channels,
        channel_multipliers=(1,) * (levels - 2) + (2, 4),
        res_blocks=0,
        attention_levels=(),
        groups=channels // 8,
        image_channels=image_channels,
        patch_path=True,
        codes_per_patch=codes_per_patch,
    )


class VQGAN(nn.Module):
    """Encodes and decodes images [B, C, H, W] in [-1, 1]; H and W are multiples of `config.factor`."""

    quantize: VectorQuantizer | GumbelQuantizer
    patch_in: nn.Conv2d
    patch_out: nn.ConvTranspose2d

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config)
        self.decoder = ConvDecoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantize = VectorQuantizer(config) if config.quantizer == "vq" else GumbelQuantizer(config)
        if config.patch_path:
            width, factor = config.embed_dim, config.factor
            self.patch_in = nn.Conv2d(config.image_channels, width, factor, stride=factor)
            self.patch_out = nn.ConvTranspose2d(width, config.image_channels, factor, stride=factor)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images [B, C, H, W] to the latents before quantization [B, E, h, w]."""
        factor, channels = self.config.factor, self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images: expected [B, {channels}, H, W] with H and W multiples of {factor}, found "
                f"{tuple(images.shape)}; resize them first"
            )
        latents = self.quant_conv(self.encoder(images))
        if not self.config.patch_path:
            return latents
        with torch.autocast(images.device.type, enabled=False):  # it costs little, and bfloat16 would change codes
            return latents.float() + self.patch_in(images.float())

    def codes(self, images: Tensor) -> Tensor:
        """Returns the codes of images [B, C, H, W]: [B, h, w] or [B, h, w, D] int64.

        Chosen in float32, without Gumbel training's noise.
        """
        return self.quantize.codes(self.encode(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes [B, h, w] or [B, h, w, D] int64 to images [B, C, H, W], about -1 to 1 (not clamped)."""
        return self.decode_latents(self.quantize.lookup(codes))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes codebook vectors (their sums if D > 1) [B, E, h, w] to images [B, C, H, W], about -1 to 1."""
        images = self.decoder(self.post_quant_conv(latents))
        if not self.config.patch_path:
            return images
        with torch.autocast(latents.device.type, enabled=False):
            return images.float() + self.patch_out(latents.float())


class VectorQuantizer(nn.Module):
    """Chooses the nearest codebook vector, by Euclidean distance in float32: bfloat16 would choose others.

    With D > 1 codes per position, each further one is nearest to what the vectors before it leave of the latent.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codes, 1 / config.codes)
        self.residual = nn.ModuleList(
            nn.Embedding(config.codes, config.embed_dim) for _ in range(config.codes_per_patch - 1)
        )

    @property
    def codebooks(self) -> list[nn.Parameter]:
        """The D codebooks [V, E], in the order of the codes."""
        return [self.get_parameter("embedding.weight"), *self.residual.parameters()]

    def codes(self, latents: Tensor) -> Tensor:
        """latents [B, E, h, w] -> [B, h, w] or [B, h, w, D] int64."""
        with torch.autocast(latents.device.type, enabled=False):
            rest = latents.float().movedim(1, -1)
            maps = []
            for codebook in self.codebooks:
                weight = codebook.float()
                # |z|² is the same for every code and is omitted.
                maps.append((weight.square().sum(1) - 2 * rest @ weight.T).argmin(-1))
                if len(maps) <= len(self.residual):
                    rest = rest - F.embedding(maps[-1], weight)
            return torch.stack(maps, -1) if len(self.residual) else maps[0]

    def lookup(self, codes: Tensor) -> Tensor:
        """codes [B, h, w] or [B, h, w, D] int64 -> codebook vectors, summed over D, [B, E, h, w]."""
        if not len(self.residual):
            return self.embedding(codes).movedim(-1, 1)
        named = [F.embedding(chosen, book) for chosen, book in zip(codes.unbind(-1), self.codebooks, strict=True)]
        return torch.stack(named).sum(0).movedim(-1, 1)


class GumbelQuantizer(nn.Module):
    """Chooses the code with the largest logit, in float32."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.embed_dim, config.codes, 1)
        self.embed = nn.Embedding(config.codes, config.embed_dim)

    def codes(self, latents: Tensor) -> Tensor:
        """latents [B, E, h, w] -> [B, h, w] int64."""
        with torch.autocast(latents.device.type, enabled=False):
            # a matrix product, because a convolution would run in TF32 on a GPU
            rows = latents.float().movedim(1, -1)
            return F.linear(rows, self.proj.weight.flatten(1).float(), self.proj.bias).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes [B, h, w] int64 -> codebook vectors [B, E, h, w]."""
        return self.embed(codes).movedim(-1, 1)


class ConvEncoder(nn.Module):
    """Maps images [B, C, H, W] to [B, z_channels, H / factor, W / factor]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.channels
        for level, multiplier in enumerate(config.channel_multipliers):
            down = Level(config, level, width, config.channels * multiplier, config.res_blocks)
            if config.res_blocks:
                width = config.channels * multiplier
            if level < len(config.channel_multipliers) - 1:
                down.downsample = Downsample(width)
            self.down.append(down)
        self.mid = Middle(width, config.groups)
        self.norm_out = _norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class ConvDecoder(nn.Module):
    """Maps [B, z_channels, h, w] to images [B, C, h · factor, w · factor]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList()  # taming numbers the levels as in the encoder and runs them from the last
        for level, width in enumerate(widths):
            up = Level(config, level, widths[min(level + 1, len(widths) - 1)], width, config.res_blocks + 1)
            if level:
                up.upsample = Upsample(width)
            self.up.append(up)
        self.norm_out = _norm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if configured, then a change of scale."""

    def __init__(self, config: VQGANConfig, level: int, width_in: int, width_out: int, blocks: int) -> None:
        super().__init__()
        widths = [width_in, *[width_out] * blocks]
        self.block = nn.ModuleList(
            ResBlock(before, after, config.groups) for before, after in itertools.pairwise(widths)
        )
        attended = blocks if level in config.attention_levels else 0
        self.attn = nn.ModuleList(AttnBlock(width_out, config.groups) for _ in range(attended))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        scale = self.upsample if self.downsample is None else self.downsample
        return hidden if scale is None else scale(hidden)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class ResBlock(nn.Module):
    """Two normalized convolutions and a shortcut, which is a 1×1 convolution if the width changes."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out, groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        change = self.conv1(F.silu(self.norm1(hidden)))
        change = self.conv2(F.silu(self.norm2(change)))
        return self.nin_shortcut(hidden) + change


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        q, k, v = (conv(normed).flatten(2).mT.contiguous().unsqueeze(2) for conv in (self.q, self.k, self.v))
        mixed = attention(q, k, v).squeeze(2).mT.unflatten(2, hidden.shape[2:])
        return hidden + self.proj_out(mixed)


class Downsample(nn.Module):
    """Convolution of stride 2, padded only at the bottom and the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)
