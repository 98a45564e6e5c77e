"""VideoMAE, the baseline: predicts the pixels of the masked tokens; and MAE-DFER's joint decoder on the same model.

The weights are initialized as in VideoMAE's code (github.com/MCG-NJU/VideoMAE, modeling_pretrain.py).

Shapes: B clips, C channels, T frames, N tokens, Nv/Nm visible/masked, P values per token, D the encoder's width, Dd the
decoder's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.blocks import MASK_TOKEN_STD, VideoTransformer, initialize, mask_token
from mam2.engine.model.decoders import Decoder
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.positions import position_table
from mam2.kernels import TubeMask, linear_masked_loss


class VideoMAE(VideoTransformer):
    """Encoder on the visible tokens; decoder on all: visible latents and mask tokens, each with its position."""

    positions: Tensor

    def __init__(self, cfg: PretrainConfig, *, decoder_mlp_ratio: float = 0.0) -> None:
        """decoder_mlp_ratio: for a decoder of another project that differs from the encoder's; 0: `model.mlp_ratio`."""
        super().__init__()
        decoder = cfg.model.decoder
        self.patch_size = cfg.patch_size
        self.target = "joint" if cfg.model.objective == "joint" else "pixel"
        self.normalize = None if cfg.loss.pixel_normalize == "none" else cfg.loss.pixel_normalize
        self.encoder = Encoder.from_config(cfg)
        self.encoder_to_decoder = nn.Linear(self.encoder.width, decoder.width, bias=False)
        self.mask_token = mask_token(decoder.width)
        self.decoder = Decoder(
            width=decoder.width,
            depth=decoder.depth,
            heads=decoder.heads,
            outputs=math.prod(cfg.patch_size) * cfg.data.channels,
            mlp_ratio=decoder_mlp_ratio or cfg.model.mlp_ratio,
            layer_scale=cfg.model.layer_scale,
            residual=cfg.model.residual,
        )
        positions = position_table(cfg.grid, cfg.trained_grid, decoder.width)
        self.register_buffer("positions", positions, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Initializes the layers for which VideoMAE does not use Xavier-uniform weights and zero biases."""
        # PyTorch's default, weights and biases uniform in ±1/√inputs: for the patch embedding, a convolution there, and
        # for a layer that VideoMAE does not initialize itself.
        self.encoder.patch_embed.reset_parameters()
        self.encoder_to_decoder.reset_parameters()
        initialize(self.decoder.head)
        # Truncated at one standard deviation.
        nn.init.trunc_normal_(self.mask_token, std=MASK_TOKEN_STD, a=-MASK_TOKEN_STD, b=MASK_TOKEN_STD)

    def loss(self, video: Tensor, mask: TubeMask) -> Tensor:
        """Computes the mean squared error of the masked tokens' standardized pixels.

        Video [B, C, T, H, W] -> scalar.
        """
        return self.loss_of(self._visible(video, mask), video, mask)

    def loss_of(self, visible: Tensor, video: Tensor, mask: TubeMask) -> Tensor:
        """Computes the same from the encoder's latents of the visible tokens, [B, Nv, D]."""
        head = self.decoder.head
        return linear_masked_loss(
            self._features(visible, mask),
            head.weight,
            video,
            mask,
            head.bias,
            patch_size=self.patch_size,
            target=self.target,
            normalize=self.normalize,
        )

    def predict_pixels(self, video: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the pixels of every masked token, standardized as in the config.

        Video [B, C, T, H, W] -> [B, Nm, P]. With the objective `joint` these are the pixels of a tubelet's first frame
        and the later frames' differences to it.
        """
        return self.decoder.head(self._features(self._visible(video, mask), mask))

    def _visible(self, video: Tensor, mask: TubeMask) -> Tensor:
        return self.encoder(self.encoder.tokens(video, mask.visible), mask.visible)

    def _features(self, visible: Tensor, mask: TubeMask) -> Tensor:
        """Returns the decoder's features of the masked tokens, its head's input: [B, Nv, D] -> [B, Nm, Dd]."""
        visible = self.encoder_to_decoder(visible) + self.positions[mask.visible]
        masked = self.mask_token + self.positions[mask.masked]
        tokens = torch.cat([visible, masked], dim=1)
        return self.decoder(tokens, last=mask.masked.shape[1])

    def encode(self, video: Tensor) -> Tensor:
        """Encodes every token of a clip, without a mask: video [B, C, T, H, W] -> [B, N, D]."""
        return self.encoder.encode(video)
