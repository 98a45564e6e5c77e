"""Hugging Face's VideoMAE with the fused loss: `python examples/huggingface_step.py` (needs transformers).

VideoMAEForPreTraining computes its loss in forward; the fused loss takes the logits that forward returns. To avoid the
cost of the original loss, call `model.videomae`, `encoder_to_decoder` and `decoder` as forward does, without its loss.
"""

import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from mam2.kernels import masked_pixel_loss, tube_mask

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def main() -> None:
    torch.manual_seed(0)
    for norm_pix_loss in (True, False):
        config = VideoMAEConfig(
            image_size=64,
            num_frames=4,
            norm_pix_loss=norm_pix_loss,
            **SIZES,
            **{f"decoder_{name}": value for name, value in SIZES.items()},
        )
        model = VideoMAEForPreTraining(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        frames = torch.randint(0, 256, (2, 4, 3, 64, 64), dtype=torch.uint8)
        pixel_values = (frames / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)  # what VideoMAEImageProcessor returns
        mask = tube_mask(2, (2, 4, 4), 0.75, seed=0)

        output = model(pixel_values, bool_masked_pos=mask.as_bool())
        # ---- replaces `loss = output.loss`:
        loss = masked_pixel_loss(
            output.logits, frames.transpose(1, 2), mask, normalize="channel" if norm_pix_loss else None
        )
        # ----
        (gradient,) = torch.autograd.grad(loss, output.logits, retain_graph=True)
        (original_gradient,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
        torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, original_gradient, rtol=1e-4, atol=1e-8)

        loss.backward()
        optimizer.step()
        values = f"loss {loss.item():.6f}, original {output.loss.item():.6f}"
        print(f"Hugging Face, norm_pix_loss={norm_pix_loss}: {values}; gradients equal")


if __name__ == "__main__":
    main()
