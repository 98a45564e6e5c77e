"""VideoMAE's training step with the fused loss: `python examples/videomae_step.py`.

VideoMAE undoes the clip's normalization, cuts and standardizes the whole clip, selects the masked part with a boolean
mask, and compares. Here one call does the same and reads only the masked part. The original formula follows, to show
that both agree.
"""

import torch
from einops import rearrange
from torch.nn.functional import mse_loss

from mam2.kernels import TubeMask, masked_pixel_loss, tube_mask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = (2, 16, 16)


class TinyModel(torch.nn.Module):
    """Stands in for PretrainVisionTransformer: normalized clip and mask in, predictions [B,Nm,1536] out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(3, width, PATCH, PATCH)
        self.head = torch.nn.Linear(width, 1536)

    def forward(self, videos: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(videos).flatten(2).transpose(1, 2)
        context = (tokens * ~mask[..., None]).mean(1, keepdim=True)
        return self.head((tokens.detach() + context)[mask].view(len(videos), -1, tokens.shape[2]))


def original_loss(outputs: torch.Tensor, videos: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What VideoMAE's engine computes."""
    with torch.no_grad():
        pixels = videos * torch.tensor(STD).view(3, 1, 1, 1) + torch.tensor(MEAN).view(3, 1, 1, 1)
        cubes = rearrange(pixels, "b c (t p) (h q) (w r) -> b (t h w) (p q r) c", p=2, q=16, r=16)
        cubes = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        labels = cubes.flatten(2)[mask].view(outputs.shape)
    return mse_loss(outputs, labels)


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    frames = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
    videos = (frames / 255 - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
    bool_masked_pos = tube_mask(2, (2, 4, 4), 0.75, seed=0).as_bool()

    outputs = model(videos, bool_masked_pos)
    # ---- replaces everything between `with torch.no_grad():` and `loss = loss_func(...)`:
    loss = masked_pixel_loss(outputs, videos, bool_masked_pos, patch_size=PATCH, mean=MEAN, std=STD)
    # ----
    original = original_loss(outputs, videos, bool_masked_pos)
    (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    (original_gradient,) = torch.autograd.grad(original, outputs)
    torch.testing.assert_close(loss, original)
    torch.testing.assert_close(gradient, original_gradient)

    # a uint8 clip and a mask of indices need neither a float32 copy of the clip nor a wait for the device
    mask = TubeMask.from_bool(bool_masked_pos)
    torch.testing.assert_close(masked_pixel_loss(outputs, frames, mask, patch_size=PATCH), original)

    loss.backward()
    optimizer.step()
    print(f"VideoMAE: loss {loss.item():.6f}, original {original.item():.6f}; gradients equal")


if __name__ == "__main__":
    main()
