"""MAM2: complete what is hidden, then say how it looks (codes) and how it moves (frame difference).

Shapes: B clips, T frames, N tokens, Nv/Nm visible/masked, Nl latents (Nm; without a regressor Nv + Nm, the visible
first), D the encoder's width, Dr the regressor's, V codes, F codes a token (this dimension is left out where only the
first frame has a code, see `tokenizer.frames`), P values of a token, Pd of a motion target. Each method is a graph of
its own, so that a training loop may give every loss its own detached latents, weigh their gradients there, and compile
the methods one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.decoders import Decoder
from mam2.engine.model.encoder import CHANNELS, Encoder
from mam2.engine.model.motion_targets import motion_loss, motion_values, require_flow
from mam2.engine.model.positions import position_table
from mam2.engine.model.regressor import Regressor
from mam2.kernels import TubeMask, linear_cross_entropy, masked_pixel_loss


class MAM2(nn.Module):
    """Encoder, regressor, and an appearance and a motion decoder unless their targets are `none`.

    Args:
        cfg: the run's config; `model`, `loss`, `tokenizer.frames` and the clip's size are read.
        codes: codebook size V of the tokenizer; not read where no codes are predicted.

    Raises:
        ValueError: regressor and decoders of different widths; tubelets of one frame where the motion target needs two;
            no codes where codes are the target.
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
        self.codebook_size, self.code_shape = codes, cfg.code_shape
        appearance = cfg.loss.appearance_target
        if appearance == "codes" and codes < 1:
            raise ValueError(
                f"codes: expected the codebook size of a tokenizer, found {codes}; give it, or set "
                "loss.appearance_target to 'pixels' or 'none'"
            )
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
            layer_scale=cfg.model.layer_scale,
            projection_norm=cfg.model.projection_norm,
        )

        def decode(outputs: int) -> Decoder:
            return Decoder(
                width=decoder.width,
                depth=decoder.depth,
                heads=decoder.heads,
                outputs=outputs,
                mlp_ratio=mlp_ratio,
                layer_scale=cfg.model.layer_scale,
            )

        if appearance != "none":
            outputs = {"codes": math.prod(cfg.code_shape) * codes, "pixels": math.prod(cfg.patch_size) * CHANNELS}
            self.appearance_decoder = decode(outputs[appearance])
        if motion != "none":
            self.motion_decoder = decode(motion_values(motion, cfg.patch_size))
        positions = position_table(cfg.grid, cfg.trained_grid, regressor.width)
        self.register_buffer("positions", positions, persistent=False)

    def complete(self, video: Tensor, mask: TubeMask) -> Tensor:
        """Latents of the hidden tokens from the visible ones: video [B, 3, T, H, W] -> [B, Nl, Dr].

        Without a regressor the visible latents and mask tokens, for the decoders to complete.
        video: uint8 (0 to 255) or float (0 to 1), any strides. Hidden pixels are never read.
        """
        visible = self.encoder(self.encoder.tokens(video, mask.visible), mask.visible)
        return self.regressor(visible, self.positions[mask.visible], self.positions[mask.masked])

    def appearance_loss(self, latents: Tensor, mask: TubeMask, codes: Tensor) -> Tensor:
        """Mean cross-entropy of the hidden tokens' codes: latents [B, Nl, Dr], codes [B, N, F] int64 -> scalar."""
        features = self._features(self.appearance_decoder, latents, mask).flatten(0, 1)
        head, frames = self.appearance_decoder.head, math.prod(self.code_shape)
        answers = masked_codes(codes, mask).view(len(features), frames)
        losses = [
            linear_cross_entropy(features, weight, answer, bias, label_smoothing=self.loss_config.label_smoothing)
            for weight, bias, answer in zip(
                head.weight.chunk(frames), head.bias.chunk(frames), answers.unbind(1), strict=True
            )
        ]
        return torch.stack(losses).mean()

    def pixel_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Mean squared error of the hidden tokens' pixels, see `predict_pixels`: latents [B, Nl, Dr] -> scalar."""
        normalize = self.loss_config.pixel_normalize
        return masked_pixel_loss(
            self.predict_pixels(latents, mask),
            video,
            mask,
            patch_size=self.patch_size,
            normalize=None if normalize == "none" else normalize,
        )

    def motion_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Mean squared error of the hidden tokens' motion: latents [B, Nl, Dr] -> scalar."""
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
        """The likeliest codes of every hidden token: latents [B, Nl, Dr] -> [B, Nm, F] int64."""
        logits = self._predict(self.appearance_decoder, latents, mask)
        return logits.unflatten(-1, (*self.code_shape, self.codebook_size)).argmax(-1)

    def predict_pixels(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """The pixels of every hidden token, standardised as the config says: latents [B, Nl, Dr] -> [B, Nm, P]."""
        return self._predict(self.appearance_decoder, latents, mask)

    def predict_motion(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """The motion target of every hidden token, see `motion_targets`: latents [B, Nl, Dr] -> [B, Nm, Pd]."""
        return self._predict(self.motion_decoder, latents, mask)

    def encode(self, video: Tensor) -> Tensor:
        """Every token of the clip, nothing hidden: video [B, 3, T, H, W] -> [B, N, D]."""
        return self.encoder.encode(video)

    def _predict(self, decoder: Decoder, latents: Tensor, mask: TubeMask) -> Tensor:
        return decoder.head(self._features(decoder, latents, mask))

    def _features(self, decoder: Decoder, latents: Tensor, mask: TubeMask) -> Tensor:
        """What a decoder's head reads of the hidden tokens: latents [B, Nl, Dr] -> [B, Nm, Dr]."""
        if self.regressor.blocks:
            return decoder(latents + self.positions[mask.masked])
        everywhere = torch.cat([mask.visible, mask.masked], dim=1)
        return decoder(latents + self.positions[everywhere], last=mask.masked.shape[1])


def masked_codes(codes: Tensor, mask: TubeMask) -> Tensor:
    """Codes [B, N] or [B, N, F] of the hidden tokens: [B, Nm] or [B, Nm, F]."""
    index = mask.masked if codes.ndim == 2 else mask.masked[..., None].expand(-1, -1, codes.shape[2])
    return codes.gather(1, index)
