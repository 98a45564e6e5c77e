"""mae_st's training step with the fused loss: `python examples/mae_st_step.py`.

mae_st predicts every token of `pred_t_dim` frames selected from the clip, standardizes whole patches, and averages over
the removed tokens by weight. With a mask of indices, as at the end of this file, the loss reads only the masked part.
"""

import torch
from einops import rearrange

from mam2.kernels import TubeMask, masked_pixel_loss, random_mask

MEAN, STD = 0.45, 0.225
FRAMES, PRED_T_DIM, PATCH = 8, 4, 16
PRED_PATCH = (1, PATCH, PATCH)  # tubelets of 2 frames, of which 1 is predicted


class TinyModel(torch.nn.Module):
    """Stands in for MaskedAutoencoderViT's encoder and decoder: clip and mask in, predictions [B,L,768] out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(3, width, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.decoder_pred = torch.nn.Linear(width, PATCH * PATCH * 3)

    def forward(self, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(imgs).flatten(2).transpose(1, 2) * (1 - mask[..., None])
        return self.decoder_pred(tokens + tokens.mean(1, keepdim=True))


def original_loss(imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What MaskedAutoencoderViT.forward_loss computes with norm_pix_loss."""
    target = rearrange(imgs, "n c t (h p) (w q) -> n (t h w) (p q c)", p=PATCH, q=PATCH)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    frames = torch.randint(0, 256, (2, 3, FRAMES, 64, 64), dtype=torch.uint8)
    imgs = (frames / 255 - MEAN) / STD
    mask = random_mask(2, (FRAMES // 2, 4, 4), 0.75, seed=0).as_bool().float()  # mae_st's: 0 is keep, 1 is remove

    pred = model(imgs, mask)
    picked = torch.linspace(0, FRAMES - 1, PRED_T_DIM).long()
    _imgs = imgs.index_select(2, picked)
    # ---- replaces forward_loss's lines after the index_select:
    loss = masked_pixel_loss(pred, _imgs, None, weight=mask, normalize="patch", patch_size=PRED_PATCH)
    # ----
    original = original_loss(_imgs, pred, mask)
    (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (original_gradient,) = torch.autograd.grad(original, pred)
    torch.testing.assert_close(loss, original)
    torch.testing.assert_close(gradient, original_gradient)

    # a uint8 clip gives the same loss, because all channels share one mean and std: eps is then in units of [0,1].
    # Indices are equivalent to weights here, because every clip masks the same number of tokens
    hidden = TubeMask.from_bool(mask.bool())
    settings = {"normalize": "patch", "eps": 1e-6 * STD**2, "patch_size": PRED_PATCH}
    torch.testing.assert_close(masked_pixel_loss(pred, frames[:, :, picked], hidden, **settings), original)

    loss.backward()
    optimizer.step()
    print(f"mae_st: loss {loss.item():.6f}, original {original.item():.6f}; gradients equal")


if __name__ == "__main__":
    main()
