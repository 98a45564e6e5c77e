"""Training a small VQGAN on the user's own frames, so that nothing has to be downloaded.

No discriminator and no perceptual loss: the codes are wanted, not the pictures. The autoencoder first trains without
a codebook; k-means on its latents then places all codes at once; from there codes follow the latents as moving
averages, and a code that names almost nothing is moved to a latent of the current batch.

Shapes: B frames, H×W pixels, E code width, V codes, M latents of a batch.
Definition: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937, appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.tokenizer.tokenizer import scale_pixels
from mam2.engine.tokenizer.vqgan import VQGAN, VQGANConfig

CROP_CODES = 4
"""Side of the random crops trained on, in codes: a quarter of the work of 8×8, and the network is convolutional."""
WARMUP_SHARE = 0.3
"""Of the steps, trained without a codebook."""
COMMITMENT = 0.25
"""Weight of the squared distance of a latent to its code."""
DECAY = 0.97
"""Of the moving averages that are the codes."""
DEAD_SHARE = 0.05
"""A code that names fewer latents than this share of the mean is moved."""
LATENTS_PER_CODE = 32
"""k-means sees about this many latents a code."""
ROWS_AT_ONCE = 16384
"""k-means compares so many latents with the codes at once."""
REPORT_EVERY = 20
"""Steps between two calls of `progress`."""

OnStep = Callable[[int, dict[str, float]], None]


def train_vqgan(
    frames: Iterable[Tensor],
    config: VQGANConfig,
    steps: int,
    device: torch.device | str = "cpu",
    progress: OnStep | None = None,
    *,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> VQGAN:
    """A VQGAN trained to reproduce `frames`.

    Args:
        frames: batches [B, H, W, 3] uint8, H and W at least `config.factor`; started anew when they end too soon.
        config: of the `vq` quantizer.
        steps: optimiser steps, one batch each.
        progress: called with the step and `loss` (mean absolute plus squared error, pixels in -1 to 1, since the last
            call), `codes_used` and `perplexity` (of the moving average; 0 while there is no codebook yet).
        learning_rate: Adam's peak; falls to 0 along a cosine.
        seed: of the initial weights, k-means and the moved codes.

    Raises:
        ValueError: another quantizer, no steps, or frames that run out.
    """
    if config.quantizer != "vq":
        raise ValueError(f"config.quantizer: expected 'vq' (the one trained here), found {config.quantizer!r}")
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, found {steps}")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vqgan = VQGAN(config)
        _initialize(vqgan)
    vqgan = vqgan.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    network = [parameter for name, parameter in vqgan.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.Adam(network, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step / steps))
    codebook = MovingCodebook(vqgan.get_parameter("quantize.embedding.weight").data, generator)
    codebook_start = max(1, int(WARMUP_SHARE * steps))
    reservoir: list[Tensor] = []
    losses: list[Tensor] = []
    for step, batch in zip(range(1, steps + 1), _endless(frames), strict=False):
        images = scale_pixels(_random_crop(batch, config.factor, generator).to(device).movedim(-1, 1))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            latents = vqgan.encode(images)
            quantized, commitment = latents, latents.new_zeros(())
            if step > codebook_start:
                codes = vqgan.quantize.codes(latents)
                nearest = vqgan.quantize.lookup(codes).detach()
                codebook.update(_rows(latents), codes.flatten())
                commitment = F.mse_loss(latents.float(), nearest.float())
                quantized = latents + (nearest - latents).detach()
            error = vqgan.decode_latents(quantized).float() - images
            loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        (loss + COMMITMENT * commitment).backward()
        optimizer.step()
        schedule.step()
        if step <= codebook_start:
            reservoir = _newest([*reservoir, _rows(latents)], LATENTS_PER_CODE * config.codes)
        if step == codebook_start:
            codebook.place(torch.cat(reservoir), batch_rows=len(reservoir[-1]))
            reservoir.clear()
        losses.append(loss.detach())
        if progress is not None and (step % REPORT_EVERY == 0 or step == steps):
            progress(step, {"loss": torch.stack(losses).mean().item(), **codebook.usage()})
            losses.clear()
    return vqgan.eval()


class MovingCodebook:
    """Codes [V, E], updated in place, as moving averages of the latents that they name."""

    def __init__(self, codes: Tensor, generator: torch.Generator) -> None:
        self.codes = codes
        self.generator = generator
        self.counts = torch.zeros(len(codes), device=codes.device)
        self.sums = torch.zeros_like(codes)

    def place(self, latents: Tensor, *, batch_rows: int, rounds: int = 10) -> None:
        """k-means on latents [M, E] float32, started from a random choice of them.

        batch_rows: latents of the updates to come; the averages start as if such batches had made them.
        """
        self.codes.copy_(self._draw(latents, len(self.codes)))
        for _ in range(rounds):
            nearest = torch.cat([torch.cdist(part, self.codes).argmin(1) for part in latents.split(ROWS_AT_ONCE)])
            counts, sums = self._tally(latents, nearest)
            self.codes.copy_(sums / counts.clamp(min=1)[:, None])
            self._move(counts == 0, latents)
        self.counts = counts.clamp(min=1) * (batch_rows / len(latents))
        self.sums = self.codes * self.counts[:, None]

    def update(self, latents: Tensor, nearest: Tensor) -> None:
        """latents [M, E] and the code of each [M] int64."""
        counts, sums = self._tally(latents, nearest)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        self.codes.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        self._move(self.counts < DEAD_SHARE * self.counts.mean(), latents)

    def usage(self) -> dict[str, float]:
        """`codes_used` (codes that are not dead) and `perplexity` of the moving average."""
        total = self.counts.sum()
        if not total:
            return {"codes_used": 0.0, "perplexity": 0.0}
        alive = (self.counts >= DEAD_SHARE * self.counts.mean()).sum()
        return {"codes_used": alive.item(), "perplexity": torch.special.entr(self.counts / total).sum().exp().item()}

    def _tally(self, latents: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """How many latents each code names [V], and their sums [V, E]."""
        one_hot = F.one_hot(nearest, len(self.codes)).float()
        return one_hot.sum(0), one_hot.T @ latents

    def _move(self, dead: Tensor, latents: Tensor) -> None:
        """Give the codes where `dead` [V] is true the place of random latents, and the mean count to live on."""
        drawn = self._draw(latents, len(self.codes))
        mean_count = self.counts.mean()
        self.codes.copy_(torch.where(dead[:, None], drawn, self.codes))
        self.counts = torch.where(dead, mean_count, self.counts)
        self.sums = torch.where(dead[:, None], drawn * mean_count, self.sums)

    def _draw(self, latents: Tensor, count: int) -> Tensor:
        return latents[torch.randint(len(latents), (count,), generator=self.generator).to(latents.device)]


def _initialize(vqgan: VQGAN) -> None:
    """Orthogonal convolutions without bias, residual branches small.

    PyTorch's default shrinks the image layer by layer below its biases, and colour is then learned very late.
    """
    for name, layer in vqgan.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain=0.2 if name.endswith(("conv2", "proj_out")) else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _random_crop(frames: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """[B, H, W, 3] -> one random window of at most CROP_CODES × CROP_CODES codes, the same for every frame."""
    height, width = (min(side // factor, CROP_CODES) * factor for side in frames.shape[1:3])
    if not height or not width:
        raise ValueError(f"frames: expected [B, H, W, 3] with H and W at least {factor}, found {tuple(frames.shape)}")
    top = int(torch.randint(frames.shape[1] - height + 1, (), generator=generator))
    left = int(torch.randint(frames.shape[2] - width + 1, (), generator=generator))
    return frames[:, top : top + height, left : left + width]


def _learning_rate_factor(done: float) -> float:
    """Linear warm-up over the first 5 % of the training, then a cosine to 0."""
    return min(1.0, done / 0.05 + 0.05) * (1 + math.cos(math.pi * done)) / 2


def _rows(latents: Tensor) -> Tensor:
    """[B, E, h, w] -> [B·h·w, E] float32, detached."""
    return latents.detach().float().movedim(1, -1).flatten(0, 2)


def _newest(batches: list[Tensor], count: int) -> list[Tensor]:
    """The last of `batches` that hold at least `count` rows, or all."""
    while len(batches) > 1 and sum(map(len, batches[1:])) >= count:
        batches = batches[1:]
    return batches


def _endless(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        count = 0
        for batch in frames:
            count += 1
            yield batch
        if not count:
            raise ValueError("frames: expected batches [B, H, W, 3] for every step or an iterable that starts anew")
