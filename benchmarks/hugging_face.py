"""Peer of the step benchmark: Hugging Face's VideoMAEForPreTraining with the sizes and weights of our VideoMAE.

Shapes: B clips, T frames, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mam2.engine.checkpoints.names import KEY_BIAS, to_hugging_face
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.blocks import LAYER_NORM_EPS
from mam2.engine.model.pixels import PIXEL_MEAN, PIXEL_STD
from mam2.engine.model.videomae import VideoMAE


def build(config: PretrainConfig, ours: VideoMAE) -> nn.Module:
    """Builds Hugging Face's model for a run's config, with PyTorch's fused attention and a copy of our weights."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    model, decoder = config.model, config.model.decoder
    theirs = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=config.data.size,
            patch_size=model.patch,
            num_frames=config.data.frames,
            tubelet_size=model.tubelet,
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=int(model.width * model.mlp_ratio),
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=int(decoder.width * model.mlp_ratio),
            layer_norm_eps=LAYER_NORM_EPS,
            use_mean_pooling=False,
            attn_implementation="sdpa",
        )
    )
    theirs.decoder.norm.eps = LAYER_NORM_EPS  # VideoMAE's value; Hugging Face uses PyTorch's 1e-5 here
    weights = to_hugging_face(ours.state_dict(), ours.patch_size)
    # without the names of other versions of transformers; some also have a bias of the keys, which changes no output
    theirs.load_state_dict(
        {
            name: torch.zeros_like(tensor) if name.endswith(KEY_BIAS) else weights[name]
            for name, tensor in theirs.state_dict().items()
        }
    )
    return theirs.train()


def pixels(video: Tensor) -> Tensor:
    """Converts as its image processor does: [B, 3, T, H, W] uint8 -> [B, T, 3, H, W] float32, normalized."""
    mean, std = (torch.tensor(values, device=video.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (video.transpose(1, 2) / 255 - mean) / std


def loss_of(model: nn.Module, patch: tuple[int, int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the model's loss: normalized clips [B, T, 3, H, W] and a bool mask [B, N] -> scalar."""
    return lambda video, hidden: model(video, bool_masked_pos=hidden).loss
