"""Trains a small VQGAN on the user's frames, so that nothing has to be downloaded.

It uses neither a discriminator nor a perceptual loss, because only the codes are needed, not the pictures. The network
starts as k-means of the first frames' patches: its linear path has an orthonormal basis of the centers, each code is a
center in this basis, and both convolutional networks start at zero. So it chooses the nearest center of a patch, as
k-means does, and decodes to this center; further codes of a patch start as k-means of what the centers before leave.
Codes are moving averages of their latents, and a code with almost no latents
is moved to a latent that its code describes badly. Of the start and some later states, the one that explains most of
held-out frames is kept: the result is never worse than k-means there.

Shapes: B frames, H×W pixels, D codes per patch, E code width, V codes, M latents of a batch, P values of a patch.
Definition: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937, appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.runtime.device import multiplies_bfloat16
from mam2.engine.tokenizer.fidelity import Fidelity, measure_fidelity
from mam2.engine.tokenizer.kmeans import draw, residual_kmeans, tally
from mam2.engine.tokenizer.tokenizer import scale_pixels
from mam2.engine.tokenizer.vqgan import VQGAN, VectorQuantizer, VQGANConfig

CROP_CODES = 8
"""Side of the largest training windows, in codes; a smaller frame is used as a whole."""
COMMITMENT = 1.0
"""Weight of a latent's squared distance to its code, per pixel value like the loss. With van den Oord's 0.25, latents
drift away from their codes, the more the wider the network is."""
DECAY = 0.99
"""Decay of the moving averages of the codes."""
DEAD_SHARE = 0.01
"""A code with fewer latents than this share of the mean is moved. Rare codes are useful: if most of a frame is
background, the codes of the foreground have few patches but much of the variance."""
PATCHES_PER_CODE, LEAST_PER_CODE = 128, 32
"""Patches per code in k-means, and the minimum if they would exceed `MOST_VALUES`."""
MOST_VALUES = 2**26
"""Maximum number of values of the patches in k-means: 256 MiB."""
SCALES = 3
"""Most scales of `gradient_error`."""
REPORT_EVERY = 20
"""Steps between two calls of `progress`."""

CHECKS = 5
"""States of the training, evenly spaced, that are measured on held-out frames besides the start."""
HELD_OUT = 64
"""Frames that are set aside for this, if the caller passes none."""

OnStep = Callable[[int, dict[str, float]], None]


class Trained(NamedTuple):
    """The best state of a training."""

    vqgan: VQGAN
    """In evaluation mode."""
    centers: Tensor
    """[D, V, P] float32, k-means centers of patches from `frame_patches`, and of what the centers before leave of them:
    the start of the training, on its device."""
    kept: int
    """The step after which the network was as returned; 0: the start."""
    found: Fidelity
    """What it explains of the held-out frames."""
    start: Fidelity
    """What the start explains of them, which is what k-means of raw patches explains."""


def train_vqgan(
    frames: Iterable[Tensor],
    config: VQGANConfig,
    steps: int,
    device: torch.device | str = "cpu",
    progress: OnStep | None = None,
    *,
    learning_rate: float = 1e-3,
    gradient_weight: float = 0.0,
    seed: int = 0,
    held_out: Sequence[Tensor] = (),
) -> Trained:
    """Trains a VQGAN to reconstruct `frames` and returns its best state on held-out frames.

    Args:
        frames: batches [B, H, W, C], uint8 or float (0 to 1), H and W at least `config.factor`; iterated again if they
            end too soon.
        config: config with the `vq` quantizer.
        steps: optimizer steps. Each takes one batch of frames from the pool of k-means, and replaces it by a new batch.
        progress: called with the step and, since the last call, `loss` (mean squared error, pixels in -1 to 1) and
            `explained` (share of the variance within a window, see `Reconstruction.explained`); `codes_used` and
            `perplexity` are of the moving averages of all codebooks.
        learning_rate: Adam's peak learning rate; it decreases to 0 along a cosine.
        gradient_weight: weight of `gradient_error`, which is added to the squared error; 0: without it.
        seed: seed of the initial weights, k-means and the moved codes.
        held_out: batches like `frames`, not trained on. The start and `CHECKS` states are measured on them; the one
            that explains most is kept, but none that explains less of their color than the start. Empty: at least
            `HELD_OUT` frames that follow those of k-means in `frames`.

    Raises:
        ValueError: another quantizer, no linear path, fewer than 2 steps, or too few frames.
    """
    if config.quantizer != "vq" or not config.patch_path:
        raise ValueError(
            "config: expected quantizer 'vq' and patch_path (see `small`), found "
            f"{config.quantizer!r} and {config.patch_path}"
        )
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, found {steps}")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vqgan = VQGAN(config)
        _initialize(vqgan)
    vqgan = vqgan.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    for layer in (vqgan.quantize, vqgan.patch_in, vqgan.patch_out):
        layer.requires_grad_(False)
    network = [parameter for parameter in vqgan.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(network, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step / steps))
    assert isinstance(vqgan.quantize, VectorQuantizer)
    codebooks = [MovingCodebook(codebook.data, generator) for codebook in vqgan.quantize.codebooks]
    stream = _endless(frames)
    first = first_frames(stream, config)
    patches = first_patches(first, config).to(device)
    centers, counts = residual_kmeans(patches, config.codes, config.codes_per_patch, generator)
    unit = _place_patch_path(vqgan, patches, centers)
    batch_rows = len(first[0]) * math.prod(_window(first[0], config.factor))
    for codebook, sizes in zip(codebooks, counts, strict=True):
        codebook.start(sizes, batch_rows / len(patches))
    held_out = held_out or _set_aside(stream)
    start = found = measure_fidelity(vqgan, held_out)
    kept, state = 0, _copy(vqgan)
    pool, at_once = torch.cat(first), len(first[0])
    del first, patches
    sums: list[Tensor] = []
    rounded = device.type == "cuda" and multiplies_bfloat16(device)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(pool), generator=generator)[:at_once].to(pool.device)
        images = scale_pixels(_random_crop(pool[chosen], config.factor, generator).to(device).movedim(-1, 1))
        fresh = next(stream)  # frames of one batch are often of the same videos: the pool separates them
        pool[chosen[: len(fresh)]] = fresh[:at_once]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=rounded):
            latents = vqgan.encode(images)
            codes = vqgan.quantize.codes(latents)
            named = vqgan.quantize.lookup(codes).detach()
            rest = _rows(latents)
            for codebook, assigned in zip(codebooks, codes.reshape(len(rest), -1).T, strict=True):
                left = rest - codebook.codes[assigned]
                codebook.update(rest, assigned)
                rest = left
            commitment = unit * (latents.float() - named.float()).square().sum() / images.numel()
            pictures = vqgan.decode_latents(latents + (named - latents).detach())
            loss = F.mse_loss(pictures.float(), images)
        total = loss + COMMITMENT * commitment
        if gradient_weight:
            total = total + gradient_weight * gradient_error(pictures.float(), images)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        spread = images - images.mean((2, 3), keepdim=True)
        sums.append(torch.stack([loss.detach(), spread.square().mean()]))
        if progress is not None and (step % REPORT_EVERY == 0 or step == steps):
            mean_loss, variance = torch.stack(sums).mean(0).tolist()
            explained = 1 - mean_loss / max(variance, 1e-12)
            progress(step, {"loss": mean_loss, "explained": explained, **usage_of_all(codebooks)})
            sums.clear()
        if step * CHECKS // steps > (step - 1) * CHECKS // steps:
            now = measure_fidelity(vqgan, held_out)
            if now.explained > found.explained and (start.color or 0.0) <= (now.color or 0.0):
                kept, found, state = step, now, _copy(vqgan)
    vqgan.load_state_dict(state)
    return Trained(vqgan.requires_grad_(True).eval(), centers, kept, found, start)


class MovingCodebook:
    """Codes [V, E] as moving averages of their latents, updated in place."""

    def __init__(self, codes: Tensor, generator: torch.Generator) -> None:
        self.codes = codes
        self.generator = generator
        self.counts = torch.zeros(len(codes), device=codes.device)
        self.sums = torch.zeros_like(codes)

    def start(self, counts: Tensor, share: float) -> None:
        """Starts the averages with the present codes.

        counts: vectors of each code [V]; one without any counts as having one. share: a batch's latents per vector.
        """
        self.counts = counts.clamp(min=1) * share
        self.sums = self.codes * self.counts[:, None]

    def update(self, latents: Tensor, assigned: Tensor) -> None:
        """Updates the averages with latents [M, E] and the code of each [M] int64."""
        counts, sums = tally(latents, assigned, len(self.codes))
        distances = (latents - self.codes[assigned]).square().sum(1)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        self.codes.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        drawn = draw(latents, distances, len(self.codes), self.generator)
        self._move(self.counts < DEAD_SHARE * self.counts.mean(), drawn)

    @property
    def alive(self) -> int:
        """Number of codes that are not dead."""
        return int((self.counts >= DEAD_SHARE * self.counts.mean()).sum())

    def _move(self, dead: Tensor, drawn: Tensor) -> None:
        """Moves the codes with `dead` [V] to `drawn` [V, E], and sets their count to the mean."""
        mean_count = self.counts.mean()
        self.codes.copy_(torch.where(dead[:, None], drawn, self.codes))
        self.counts = torch.where(dead, mean_count, self.counts)
        self.sums = torch.where(dead[:, None], drawn * mean_count, self.sums)


def usage_of_all(codebooks: Sequence[MovingCodebook]) -> dict[str, float]:
    """Returns `codes_used` (codes that are not dead) and `perplexity` of the moving averages of all codebooks."""
    counts = torch.cat([codebook.counts for codebook in codebooks])
    total = counts.sum()
    if not total:
        return {"codes_used": 0.0, "perplexity": 0.0}
    perplexity = torch.special.entr(counts / total).sum().exp().item()
    return {"codes_used": sum(codebook.alive for codebook in codebooks), "perplexity": perplexity}


def gradient_error(pictures: Tensor, images: Tensor) -> Tensor:
    """Returns the mean squared error of the differences between neighboring pixels: [B, C, H, W] twice -> scalar.

    The sum over both directions and over up to `SCALES` scales, each of half the resolution of the one before. An edge
    that a picture lacks costs more than a wrong brightness of the same squared error. A squared form of the gradient
    difference loss of Mathieu et al., "Deep multi-scale video prediction beyond mean square error", arXiv 1511.05440.
    """
    error = pictures - images
    total = error.new_zeros(())
    for scale in range(SCALES):
        if scale:
            if min(error.shape[2:]) < 4:  # half of it would have no neighbors
                break
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()
    return total


def frame_patches(frames: Tensor, factor: int) -> Tensor:
    """Cuts uint8 [B, H, W, C] into all whole patches of factor² pixels.

    [B·h·w, P] float32 in -1 to 1, channel first.
    """
    pixels = scale_pixels(frames.movedim(-1, 1))
    return F.unfold(pixels, factor, stride=factor).movedim(1, -1).flatten(0, 1)


def first_frames(frames: Iterator[Tensor], config: VQGANConfig) -> list[Tensor]:
    """Returns the first batches uint8 [B, H, W, C] of `frames`, with the patches for k-means."""
    taken: list[Tensor] = []
    patches = 0
    while patches < _patches_seen(config):
        taken.append(next(frames))
        patches += len(taken[-1]) * math.prod(side // config.factor for side in taken[-1].shape[1:3])
        if not patches:
            _window(taken[-1], config.factor)
    return taken


def first_patches(first: list[Tensor], config: VQGANConfig) -> Tensor:
    """Returns the patches of `first_frames`: [M, P] float32, see `frame_patches`."""
    return torch.cat([frame_patches(batch, config.factor) for batch in first])[: _patches_seen(config)]


def _patches_seen(config: VQGANConfig) -> int:
    """Returns M, the number of patches for k-means."""
    most = max(MOST_VALUES // (config.image_channels * config.factor**2), LEAST_PER_CODE * config.codes)
    return min(PATCHES_PER_CODE * config.codes, most)


def _place_patch_path(vqgan: VQGAN, patches: Tensor, centers: Tensor) -> float:
    """Sets the linear path to a basis of centers [D, V, P], its biases to each channel's mean, the codes to centers.

    The basis is orthonormal and, if a latent has more dimensions than there are centers, continues with directions of
    patches [M, P]. Latents of patches have a mean square of 1.

    Returns:
        The factor from squared distances of latents to those of pixels.
    """
    channels, dimensions = vqgan.config.image_channels, vqgan.config.embed_dim
    mean = patches.unflatten(1, (channels, -1)).mean((0, 2))
    from_mean = mean.repeat_interleave(patches.shape[1] // channels)
    centers = torch.cat([centers[:1] - from_mean, centers[1:]])  # further centers are differences already
    directions = torch.cat([*centers, patches[:dimensions] - from_mean])
    basis = torch.linalg.qr(directions.T.double()).Q[:, :dimensions].T.to(patches.dtype)
    scale = ((patches - from_mean) @ basis.T).square().mean().sqrt().clamp(min=1e-6)
    shape = vqgan.patch_in.weight.shape
    assert vqgan.patch_in.bias is not None
    assert vqgan.patch_out.bias is not None
    with torch.no_grad():
        vqgan.patch_in.weight.copy_((basis / scale).view(shape))
        vqgan.patch_in.bias.copy_(-(basis / scale) @ from_mean)
        vqgan.patch_out.weight.copy_((basis * scale).view(shape))
        vqgan.patch_out.bias.copy_(mean)
        assert isinstance(vqgan.quantize, VectorQuantizer)
        for codebook, of_patches in zip(vqgan.quantize.codebooks, centers, strict=True):
            codebook.copy_(of_patches @ basis.T / scale)
    return scale.square().item()


def _initialize(vqgan: VQGAN) -> None:
    """Initializes convolutions orthogonally without bias, residual branches small, both networks' last layers to zero.

    With PyTorch's default, the signal shrinks from layer to layer below the biases, and color is learned very late.
    """
    for name, layer in vqgan.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain=0.2 if name.endswith(("conv2", "proj_out")) else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.zeros_(vqgan.quant_conv.weight)
    nn.init.zeros_(vqgan.decoder.conv_out.weight)


def _window(frames: Tensor, factor: int) -> tuple[int, int]:
    """Returns the codes along height and width of the training windows of frames [B, H, W, C]."""
    height, width = (min(side // factor, CROP_CODES) for side in frames.shape[1:3])
    if not height or not width:
        raise ValueError(f"frames: expected [B, H, W, C] with H and W at least {factor}, found {tuple(frames.shape)}")
    return height, width


def _random_crop(frames: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """Crops [B, H, W, C] to a random window, the same for every frame."""
    height, width = (side * factor for side in _window(frames, factor))
    top = int(torch.randint(frames.shape[1] - height + 1, (), generator=generator))
    left = int(torch.randint(frames.shape[2] - width + 1, (), generator=generator))
    return frames[:, top : top + height, left : left + width]


def _learning_rate_factor(done: float) -> float:
    """Returns the learning-rate factor: linear warm-up over the first 5 % of the training, then a cosine to 0."""
    return min(1.0, done / 0.05 + 0.05) * (1 + math.cos(math.pi * done)) / 2


def _rows(latents: Tensor) -> Tensor:
    """Rearranges [B, E, h, w] to [B·h·w, E] float32, detached."""
    return latents.detach().float().movedim(1, -1).flatten(0, 2)


def _set_aside(frames: Iterator[Tensor]) -> list[Tensor]:
    """Takes the next batches of `frames`, at least `HELD_OUT` frames."""
    taken = [next(frames)]
    while sum(map(len, taken)) < HELD_OUT:
        taken.append(next(frames))
    return taken


def _copy(vqgan: VQGAN) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vqgan.state_dict().items()}


def _endless(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        count = 0
        for batch in frames:
            count += 1
            yield batch
        if not count:
            raise ValueError(
                "frames: expected batches [B, H, W, C] for every step, or an iterable that can be iterated again"
            )
