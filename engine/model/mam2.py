"""MAM2: complete what is hidden, then say how it looks (codes) and how it moves (frame difference).

Shapes: B clips, T frames, N tokens, Nv/Nm visible/masked, D the encoder's width, Dr the regressor's, V codes,
Pd values of a motion target. Each method is a graph of its own, so that a training loop may give every loss its own
detached latents, weigh their gradients there, and compile the methods one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.config import PretrainConfig
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.decoders import Decoder
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.motion_targets import motion_loss, motion_values, require_flow
from mam2.engine.model.regressor import Regressor
from mam2.kernels import TubeMask, linear_cross_entropy


class MAM2(nn.Module):
    """Encoder, regressor, appearance decoder and, unless `loss.motion_target` is `none`, motion decoder.

    Args:
        cfg: the run's config; `model`, `loss` and the clip's size are read.
        codes: codebook size V of the tokenizer.

    Raises:
        ValueError: regressor and decoders of different widths; tubelets of one frame where the motion target needs two.
        UserError: a motion target whose package is not installed.
    """

    positions: Tensor

    def __init__(self, cfg: PretrainConfig, codes: int) -> None:
        super().__init__()
        regressor, decoder, mlp_ratio = cfg.model.regressor, cfg.model.decoder, cfg.model.mlp_ratio
        if decoder.width != regressor.width:
            raise ValueError(
                "model.decoder.width: MAM2's decoders work on the regressor's latents; expected "
                f"model.regressor.width = {regressor.width}, found {decoder.width}"
            )
        self.loss_config = cfg.loss
        self.patch_size = cfg.patch_size
        motion = cfg.loss.motion_target
        if motion in ("intra", "hog", "flow") and cfg.model.tubelet < 2:
            raise ValueError(
                f"loss.motion_target: {motion!r} needs model.tubelet of at least 2, found {cfg.model.tubelet}; "
                "use 'adjacent'"
            )
        if motion == "flow":
            require_flow()
        self.encoder = Encoder.from_config(cfg)
        self.regressor = Regressor(
            self.encoder.width,
            width=regressor.width,
            depth=regressor.depth,
            heads=regressor.heads,
            keys=regressor.keys,
            mlp_ratio=mlp_ratio,
        )
        shape = {"width": decoder.width, "depth": decoder.depth, "heads": decoder.heads}
        self.appearance_decoder = Decoder(**shape, outputs=codes, mlp_ratio=mlp_ratio)
        if motion != "none":
            self.motion_decoder = Decoder(**shape, outputs=motion_values(motion, cfg.patch_size), mlp_ratio=mlp_ratio)
        self.register_buffer("positions", sincos_positions(math.prod(cfg.grid), regressor.width), persistent=False)

    def complete(self, video: Tensor, mask: TubeMask) -> Tensor:
        """Latents of the hidden tokens from the visible ones: video [B, 3, T, H, W] -> [B, Nm, Dr].

        video: uint8 (0 to 255) or float (0 to 1), any strides. Hidden pixels are never read.
        """
        visible = self.encoder(self.encoder.tokens(video, mask.visible), mask.visible)
        return self.regressor(visible, self.positions[mask.visible], self.positions[mask.masked])

    def appearance_loss(self, latents: Tensor, mask: TubeMask, codes: Tensor) -> Tensor:
        """Mean cross-entropy of the hidden tokens' codes: latents [B, Nm, Dr], codes [B, N] int64 -> scalar."""
        features = self._appearance_features(latents, mask)
        head = self.appearance_decoder.head
        return linear_cross_entropy(
            features.flatten(0, 1),
            head.weight,
            codes.gather(1, mask.masked).flatten(),
            head.bias,
            label_smoothing=self.loss_config.label_smoothing,
        )

    def motion_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Mean squared error of the hidden tokens' motion: latents [B, Nm, Dr] -> scalar."""
        return motion_loss(self.predict_motion(latents, mask), video, mask, self.loss_config, self.patch_size)

    def alignment_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Mean squared distance of the latents to the encoder's own of the hidden pixels (CAE) -> scalar.

        No gradient reaches the encoder or the projection through the target. Runs the encoder on the Nm tokens.
        """
        with torch.no_grad():
            target = self.encoder(self.encoder.tokens(video, mask.masked), mask.masked)
            target = self.regressor.project(target)
        return F.mse_loss(latents.float(), target.float())

    def predict_codes(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """The likeliest code of every hidden token: latents [B, Nm, Dr] -> [B, Nm] int64."""
        return self.appearance_decoder.head(self._appearance_features(latents, mask)).argmax(-1)

    def predict_motion(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """The motion target of every hidden token, see `motion_targets`: latents [B, Nm, Dr] -> [B, Nm, Pd]."""
        return self.motion_decoder.head(self.motion_decoder(latents + self.positions[mask.masked]))

    def encode(self, video: Tensor) -> Tensor:
        """Every token of the clip, nothing hidden: video [B, 3, T, H, W] -> [B, N, D]."""
        return self.encoder.encode(video)

    def _appearance_features(self, latents: Tensor, mask: TubeMask) -> Tensor:
        return self.appearance_decoder(latents + self.positions[mask.masked])
