"""Peer of the step benchmark: Hugging Face's VideoMAEForPreTraining with the sizes and weights of our VideoMAE.

Shapes: B clips, T frames, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    theirs.load_state_dict(weights_for(ours))
    return theirs.train()


def weights_for(ours: VideoMAE) -> dict[str, Tensor]:
    """Returns our weights under their names.

    Rows of the patch embedding, in (t, h, w, c) order, become Conv3d filters.
    """
    state = ours.state_dict()
    embed = "videomae.embeddings.patch_embeddings.projection"
    filters = state["encoder.patch_embed.weight"].unflatten(1, (*ours.patch_size, -1)).permute(0, 4, 1, 2, 3)
    named = {f"{embed}.weight": filters, f"{embed}.bias": state["encoder.patch_embed.bias"]}
    named |= {name: state[name] for name in ("encoder_to_decoder.weight", "mask_token")}
    stacks = [("encoder", "videomae.encoder.layer"), ("decoder", "decoder.decoder_layers")]
    for stack, theirs in stacks:
        for index in range(len(getattr(ours, stack).blocks)):
            named |= _block(state, f"{stack}.blocks.{index}", f"{theirs}.{index}")
    for ours_name, name in [("encoder.norm", "videomae.layernorm"), ("decoder.norm", "decoder.norm"),
                            ("decoder.head", "decoder.head")]:  # fmt: skip
        named |= {f"{name}.{kind}": state[f"{ours_name}.{kind}"] for kind in ("weight", "bias")}
    return named


def _block(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    query, key, value = state[f"{ours}.attn.qkv.weight"].chunk(3)
    inside = f"{theirs}.attention.attention"
    named = {f"{inside}.query.weight": query, f"{inside}.key.weight": key, f"{inside}.value.weight": value}
    named |= {
        f"{inside}.query.bias": state[f"{ours}.attn.q_bias"],
        f"{inside}.value.bias": state[f"{ours}.attn.v_bias"],
    }
    pairs = {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    for name, other in pairs.items():
        named |= {f"{theirs}.{other}.{kind}": state[f"{ours}.{name}.{kind}"] for kind in ("weight", "bias")}
    return named


def pixels(video: Tensor) -> Tensor:
    """Converts as its image processor does: [B, 3, T, H, W] uint8 -> [B, T, 3, H, W] float32, normalized."""
    mean, std = (torch.tensor(values, device=video.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (video.transpose(1, 2) / 255 - mean) / std
