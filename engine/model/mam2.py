"""MAM2: predicts the latents of masked tokens, and from these their appearance (codes) and motion (frame difference).

Shapes: B clips, C channels, T frames, N tokens, Nv/Nm visible/masked, Nl latents (Nm; without a regressor or with
`loss.visible` Nv + Nm, the visible first), D the encoder's width, Dr the regressor's, V codes, F codes per token (the
dimension is absent if only the first frame has a code, see `tokenizer.frames`), P values per token, Pd values per
motion target. Each method is a separate graph: a training loop can pass detached latents to each loss, weight the
gradients there, and compile the methods one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.blocks import VideoTransformer
from mam2.engine.model.decoders import Decoder
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.motion_targets import TARGETS, motion_head_loss, motion_values, require_flow
from mam2.engine.model.positions import position_table
from mam2.engine.model.regressor import Regressor
from mam2.engine.model.teacher import latent_targets, teacher_of
from mam2.kernels import TubeMask, linear_cross_entropy, linear_masked_loss


class MAM2(VideoTransformer):
    """Encoder, regressor, and an appearance and a motion decoder, each unless its target is `none`.

    With the target `latents` there is also a `teacher`, a moving average of the encoder. The training updates it; no
    gradient does.

    Args:
        cfg: the run's config; the model uses `model`, `loss`, `tokenizer.frames` and the clip's size.
        codes: codebook size V of the tokenizer; ignored if no codes are predicted.

    Raises:
        ValueError: regressor and decoders have different widths; tubelets have one frame but the motion target needs
            two; codes is 0 but codes are the target.
        UserError: the package of the motion target is not installed.
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
                f"codes: expected the codebook size of a tokenizer, found {codes}; pass it, or set "
                "loss.appearance_target to 'pixels', 'latents' or 'none'"
            )
        motion = cfg.loss.motion_target
        if cfg.model.tubelet < TARGETS[motion].tubelet:
            raise ValueError(
                f"loss.motion_target: {motion!r} needs model.tubelet of at least {TARGETS[motion].tubelet}, "
                f"found {cfg.model.tubelet}; "
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
            residual=cfg.model.residual,
        )

        def decode(outputs: int) -> Decoder:
            return Decoder(
                width=decoder.width,
                depth=decoder.depth,
                heads=decoder.heads,
                outputs=outputs,
                mlp_ratio=mlp_ratio,
                layer_scale=cfg.model.layer_scale,
                residual=cfg.model.residual,
            )

        if appearance != "none":
            outputs = {
                "codes": math.prod(cfg.code_shape) * codes,
                "pixels": math.prod(cfg.patch_size) * cfg.data.channels,
                "latents": self.encoder.width,
            }
            self.appearance_decoder = decode(outputs[appearance])
        if motion != "none":
            self.motion_decoder = decode(motion_values(motion, cfg.patch_size, cfg.data.channels))
        positions = position_table(cfg.grid, cfg.trained_grid, regressor.width)
        self.register_buffer("positions", positions, persistent=False)
        self.teacher = teacher_of(self.encoder) if appearance == "latents" else None

    def complete(self, video: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the latents of the masked tokens from the visible ones: video [B, C, T, H, W] -> [B, Nl, Dr].

        Without a regressor it returns the visible latents and mask tokens for the decoders; with `loss.visible` the
        visible latents, too.
        video: uint8 (0 to 255) or float (0 to 1), any strides. Masked pixels are never read.
        """
        visible = self.encoder(self.encoder.tokens(video, mask.visible), mask.visible)
        return self.regressor(
            visible,
            self.positions[mask.visible],
            self.positions[mask.masked],
            keep_visible=self.loss_config.visible > 0,
        )

    def appearance_loss(self, latents: Tensor, mask: TubeMask, codes: Tensor) -> Tensor:
        """Computes the mean cross-entropy of the masked codes: latents [B, Nl, Dr], codes [B, N, F] int64 -> scalar."""
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
        """Computes the mean squared error of the masked pixels, see `predict_pixels`: latents [B, Nl, Dr] -> scalar."""
        normalize = self.loss_config.pixel_normalize
        head = self.appearance_decoder.head
        return linear_masked_loss(
            self._features(self.appearance_decoder, latents, mask),
            head.weight,
            video,
            mask,
            head.bias,
            patch_size=self.patch_size,
            normalize=None if normalize == "none" else normalize,
        )

    def latent_targets(self, video: Tensor) -> Tensor:
        """Returns the teacher's standardized features: video [B, C, T, H, W] -> float32 [B, N, D], without gradient."""
        if self.teacher is None:
            raise ValueError("latent_targets: expected a model with loss.appearance_target 'latents'")
        return latent_targets(self.teacher, video, self.loss_config.teacher_blocks)

    def latent_loss(self, latents: Tensor, mask: TubeMask, targets: Tensor) -> Tensor:
        """Computes the mean absolute error of the masked tokens' features: latents [B, Nl, Dr] -> scalar.

        targets: [B, N, D], see `latent_targets`. With `loss.visible` it adds that weight times the mean absolute error
        of the visible tokens' features.
        """
        weight = self.loss_config.visible
        if not weight:
            return F.l1_loss(self.predict_latents(latents, mask).float(), _tokens(targets, mask.masked))
        features = self._features(self.appearance_decoder, latents, mask, visible=True)
        everywhere = torch.cat([mask.visible, mask.masked], dim=1)
        errors = (self.appearance_decoder.head(features).float() - _tokens(targets, everywhere)).abs()
        visible = mask.visible.shape[1]
        return errors[:, visible:].mean() + weight * errors[:, :visible].mean()

    def motion_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Computes the mean squared error of the masked tokens' motion: latents [B, Nl, Dr] -> scalar."""
        features = self._features(self.motion_decoder, latents, mask)
        return motion_head_loss(self.motion_decoder.head, features, video, mask, self.loss_config, self.patch_size)

    def alignment_loss(self, latents: Tensor, mask: TubeMask, video: Tensor) -> Tensor:
        """Computes the mean squared distance of the latents to the encoder's of the masked pixels (CAE) -> scalar.

        Runs the encoder on the Nm tokens; no gradient reaches the encoder or the projection through this target.
        """
        with torch.no_grad():
            target = self.encoder(self.encoder.tokens(video, mask.masked), mask.masked)
            target = self.regressor.project(target)
        return F.mse_loss(_last(latents, mask).float(), target.float())

    def predict_codes(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the most probable codes of every masked token: latents [B, Nl, Dr] -> [B, Nm, F] int64."""
        logits = self._predict(self.appearance_decoder, latents, mask)
        return logits.unflatten(-1, (*self.code_shape, self.codebook_size)).argmax(-1)

    def predict_pixels(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the pixels of masked tokens, standardized as in the config: latents [B, Nl, Dr] -> [B, Nm, P]."""
        return self._predict(self.appearance_decoder, latents, mask)

    def predict_latents(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the teacher's standardized features of masked tokens: latents [B, Nl, Dr] -> [B, Nm, D]."""
        if not self.loss_config.visible:
            return self._predict(self.appearance_decoder, latents, mask)
        features = self._features(self.appearance_decoder, latents, mask, visible=True)
        return self.appearance_decoder.head(_last(features, mask))

    def predict_motion(self, latents: Tensor, mask: TubeMask) -> Tensor:
        """Predicts the motion target of masked tokens, see `motion_targets`: latents [B, Nl, Dr] -> [B, Nm, Pd]."""
        return self._predict(self.motion_decoder, latents, mask)

    def encode(self, video: Tensor) -> Tensor:
        """Encodes every token of a clip, without a mask: video [B, C, T, H, W] -> [B, N, D]."""
        return self.encoder.encode(video)

    def _predict(self, decoder: Decoder, latents: Tensor, mask: TubeMask) -> Tensor:
        return decoder.head(self._features(decoder, latents, mask))

    def _features(self, decoder: Decoder, latents: Tensor, mask: TubeMask, *, visible: bool = False) -> Tensor:
        """Returns a decoder's features of masked tokens, its head's input: latents [B, Nl, Dr] -> [B, Nm, Dr].

        visible: the decoder gets the visible latents, too; returns [B, Nv + Nm, Dr].
        """
        if self.regressor.blocks and not visible:
            return decoder(_last(latents, mask) + self.positions[mask.masked])
        everywhere = torch.cat([mask.visible, mask.masked], dim=1)
        return decoder(latents + self.positions[everywhere], last=None if visible else mask.masked.shape[1])


def _last(latents: Tensor, mask: TubeMask) -> Tensor:
    """Returns those of the masked tokens, which are the last: [B, Nl, Dr] -> [B, Nm, Dr]."""
    count = mask.masked.shape[1]
    return latents if latents.shape[1] == count else latents[:, -count:]


def _tokens(features: Tensor, index: Tensor) -> Tensor:
    """Selects the tokens at `index` [B, n]: [B, N, D] -> [B, n, D]."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))


def masked_codes(codes: Tensor, mask: TubeMask) -> Tensor:
    """Selects the codes of the masked tokens: [B, N] or [B, N, F] -> [B, Nm] or [B, Nm, F]."""
    index = mask.masked if codes.ndim == 2 else mask.masked[..., None].expand(-1, -1, codes.shape[2])
    return codes.gather(1, index)
