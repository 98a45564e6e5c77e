"""A tokenizer gives each token its codes: their order, shapes, precision and cost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mam2.engine.config.recipe import load_recipe
from mam2.engine.tokenizer import compiled as network
from mam2.engine.tokenizer.tokenizer import Tokenizer, codebook_usage, numbered, scale_pixels
from mam2.engine.tokenizer.training import (
    train_vqgan,
)
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, small
from tests.helpers.frames import toy_frames


def build(factor: int = 4, grid: tuple[int, int, int] = (2, 4, 4), **options: object) -> Tokenizer:
    torch.manual_seed(0)
    # without the linear path, which bfloat16 does not round, so that codes depend on the precision
    vqgan = VQGAN(dataclasses.replace(small(8, 64, factor), patch_path=False))
    with torch.no_grad():
        latents = vqgan.encode(scale_pixels(toy_frames(16).movedim(-1, 1))).movedim(1, -1).flatten(0, 2)
        vqgan.quantize.embedding.weight.copy_(latents[:: len(latents) // 64][:64])
    return Tokenizer(vqgan, grid, **options)


def clip(batch: int = 3, frames: int = 4, size: int = 16) -> Tensor:
    """[B, 3, T, H, W] uint8, by strides from [B, T, H, W, 3]."""
    return toy_frames(batch * frames, size).view(batch, frames, size, size, 3).permute(0, 4, 1, 2, 3)


def test_a_token_has_the_code_of_its_first_frame() -> None:
    tokenizer, video = build(), clip()
    codes = tokenizer.codes(video)
    assert codes.shape == (3, 32)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 8
    for slot in range(2):
        frame = video[:, :, 2 * slot].float() / 127.5 - 1
        assert torch.equal(codes.view(3, 2, 16)[:, slot], tokenizer.vqgan.codes(frame).flatten(1))


@pytest.mark.slow
def test_with_all_frames_each_token_has_one_code_per_frame() -> None:
    tokenizer, video = build(frames="all", images_per_pass=5), clip()
    codes = tokenizer.codes(video)
    assert codes.shape == (3, 32, 2)
    assert torch.equal(codes[..., 0], build().codes(video))
    later = video[:, :, 1::2].repeat_interleave(2, 2)
    assert torch.equal(codes[..., 1], build().codes(later))
    assert tokenizer.changed_share(video) == 0
    pictures = tokenizer.decode(codes)
    assert pictures.shape == (3, 4, 3, 16, 16)
    for frame, (of_first, part) in enumerate((part, slot) for part in range(2) for slot in range(2)):
        torch.testing.assert_close(pictures[:, frame], build().decode(codes[..., part])[:, of_first])


@pytest.mark.parametrize("frames", ["first", "all"])
def test_a_token_has_the_codes_of_its_first_frame_before_those_of_the_next(frames: str) -> None:
    torch.manual_seed(0)
    trained = train_vqgan([toy_frames(64)], small(8, 16, 4, codes_per_patch=3), 2)
    tokenizer, video = Tokenizer(trained.vqgan, (2, 4, 4), frames=frames, images_per_pass=5), clip()
    codes, count = tokenizer.codes(video), 2 if frames == "all" else 1
    assert codes.shape == (3, 32, 3 * count)
    for slot, frame in itertools.product(range(2), range(count)):
        expected = tokenizer.vqgan.codes(video[:, :, 2 * slot + frame].float() / 127.5 - 1)
        assert torch.equal(codes.view(3, 2, 4, 4, count, 3)[:, slot, ..., frame, :], expected)
    pictures = tokenizer.decode(codes)
    assert pictures.shape == (3, 2 * count, 3, 16, 16)
    last = tokenizer.vqgan.decode(codes.view(3, 2, 4, 4, count, 3)[:, -1, ..., -1, :])
    torch.testing.assert_close(pictures[:, -1], ((last + 1) / 2).clamp(0, 1))
    assert tokenizer.changed_share(video) == 0
    with pytest.raises(ValueError, match=r"expected \[B, 32, F·3\], found \(3, 32, 2\)"):
        tokenizer.decode(codes[..., :2])


def test_other_frames_do_not_matter() -> None:
    tokenizer, video = build(), clip()
    other = video.clone()
    other[:, :, 1::2] = 255 - other[:, :, 1::2]
    assert torch.equal(tokenizer.codes(other), tokenizer.codes(video))


def test_uint8_and_float_clips_have_the_same_codes() -> None:
    tokenizer = build()
    agreement = (tokenizer.codes(clip().float() / 255) == tokenizer.codes(clip())).float().mean()
    assert agreement > 0.99  # the two scalings round differently


def test_parts_and_whole_are_the_same() -> None:
    assert torch.equal(build(images_per_pass=1).codes(clip()), build(images_per_pass=64).codes(clip()))


def test_a_larger_clip_is_averaged_down_to_the_grid() -> None:
    """Enlarged four times by repetition, with noise that averaging removes and sampling keeps."""
    large = clip().repeat_interleave(4, 3).repeat_interleave(4, 4).float() / 255
    noise = torch.randn(large.shape, generator=torch.Generator().manual_seed(5))
    codes = build().codes(large + 0.2 * noise)
    assert codes.shape == (3, 32)
    assert (codes == build().codes(large)).float().mean() > 0.7


def test_the_default_tokenizer_gives_the_default_grid() -> None:
    """Gumbel f8 at 112 for clips of 224 and patch 16: 14×14 codes a frame. (A quarter of its channels suffices.)"""
    config = dataclasses.replace(CONFIGS["gumbel-f8-8192"], channels=32)
    tokenizer = Tokenizer(VQGAN(config), (1, 14, 14))
    assert tokenizer.codes(torch.rand(1, 3, 2, 224, 224)).shape == (1, 196)
    assert tokenizer.codebook_size == 8192


def test_bfloat16_changes_few_codes() -> None:
    exact, rounded = build(), build(precision="bfloat16")
    share = float((rounded.codes(clip()) != exact.codes(clip())).float().mean())
    assert 0 < share < 0.2
    assert rounded.changed_share(clip()) == pytest.approx(share)
    assert exact.changed_share(clip()) == 0


def test_a_compiled_network_is_the_one_that_gives_the_codes() -> None:
    calls = []

    def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watched(images: Tensor) -> Tensor:
            calls.append(len(images))
            return function(images)

        return watched

    tokenizer = build(compiled=compiled, images_per_pass=4)
    assert torch.equal(tokenizer.codes(clip()), build(images_per_pass=4).codes(clip()))
    assert calls == [3, 3]


@pytest.mark.slow
def test_on_a_gpu_the_network_is_a_graph_with_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        """Does recorded work again by calling it."""

        def __init__(self) -> None:
            recorders.append(self)
            self.replayed = 0

        def warm_up(self, work: Callable[[], object]) -> None:
            work()

        def record(self, work: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
            values = {name: torch.zeros_like(value) for name, value in work().items()}

            def replay() -> None:
                self.replayed += 1
                for name, value in work().items():
                    values[name].copy_(value)

            return replay, values

        def release(self) -> None:
            pass

    recorders: list[Recorder] = []
    lines: list[str] = []
    monkeypatch.setattr(network, "CudaRecorder", Recorder)

    def codes(device: str, **run: object) -> Tensor:
        config = load_recipe("demo")  # does not compile
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, **run))
        hook = functools.partial(
            network.compiled_network, run=config.run, device=torch.device(device), info=lines.append
        )
        return build(compiled=hook, images_per_pass=4).codes(clip())

    expected = build().codes(clip())
    for device, run in (("cpu", {}), ("cuda", {"graph": "off"}), ("cuda", {"deterministic": True})):
        assert torch.equal(codes(device, **run), expected)
    assert not recorders
    assert torch.equal(codes("cuda"), expected)
    assert [recorder.replayed for recorder in recorders] == [1 + 2]  # six images in parts of three
    assert lines == ["codes   network of the tokenizer, [3, 3, 16, 16]: one CUDA graph"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_have_the_codes_of_launched_kernels(compiled: bool) -> None:
    device, lines = torch.device("cuda", 0), []
    config = load_recipe("demo")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, compile=compiled))
    hook = functools.partial(network.compiled_network, run=config.run, device=device, info=lines.append)
    plain, captured = build().to(device), build(compiled=hook, images_per_pass=4)
    captured.to(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    for batch in (3, 2, 3, 1):
        video = clip(batch).to(device)
        with torch.cuda.stream(side):
            found = captured.codes(video)
        side.synchronize()
        assert (found == plain.codes(video)).float().mean() > 0.99  # a compiled network rounds differently
    assert lines
    assert all(line.endswith("one CUDA graph") for line in lines)


def test_any_number_of_images_costs_few_compilations() -> None:
    """`mam2 tokenize` leaves undecodable clips out, so that batch sizes vary: torch.compile refuses the ninth size."""
    torch._dynamo.reset()
    tokenizer = build(
        images_per_pass=24, compiled=lambda codes: torch.compile(codes, fullgraph=True, dynamic=False, backend="eager")
    )
    plain, sizes = build(images_per_pass=24), []
    inner = tokenizer._image_codes
    tokenizer._image_codes = lambda images: sizes.append(len(images)) or inner(images)
    for clips in [12, 24, *range(1, 13)]:
        assert torch.equal(tokenizer.codes(clip(clips)), plain.codes(clip(clips)))
    assert len(set(sizes)) <= 5
    assert max(sizes) <= 24


@pytest.mark.parametrize(("clips", "parts"), [(10, [7, 7, 7]), (4, [8]), (3, [6])])
def test_constant_batches_are_hardly_padded(clips: int, parts: list[int]) -> None:
    sizes: list[int] = []
    tokenizer = build(images_per_pass=8, compiled=lambda codes: codes)
    codes = tokenizer.vqgan.codes
    tokenizer._image_codes = lambda images: sizes.append(len(images)) or codes(images)
    tokenizer.codes(clip(clips))
    assert sizes == parts


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cudnn_stays_on_and_float32_is_not_tf32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions would otherwise run in PyTorch's own slow kernel, or round to TF32."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "deterministic", True)
    tokenizer = build(precision=precision)
    codes = tokenizer.vqgan.codes

    def watched(images: Tensor) -> Tensor:
        seen.append((cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, torch.is_autocast_enabled("cpu")))
        return codes(images)

    monkeypatch.setattr(tokenizer.vqgan, "codes", watched)
    tokenizer._image_codes = watched
    tokenizer.changed_share(clip())
    tokenizer.decode(tokenizer.codes(clip()))
    rounded = precision == "bfloat16"
    assert seen == [(True, False, True, False), (True, False, True, rounded), (True, False, True, rounded)]
    assert cudnn.allow_tf32


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_one_graph(precision: str) -> None:
    """Traced and differentiated as for any back end, then run by PyTorch: generating code would take a minute."""
    tokenizer = build(
        precision=precision,
        compiled=lambda codes: torch.compile(codes, fullgraph=True, dynamic=False, backend="aot_eager"),
    )
    assert torch.equal(tokenizer.codes(clip()), build(precision=precision).codes(clip()))


def test_outer_autocast_does_not_reach_a_float32_tokenizer() -> None:
    tokenizer = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer.codes(clip())
    assert torch.equal(codes, tokenizer.codes(clip()))


def test_decode_gives_pictures_of_the_codes() -> None:
    tokenizer = build()
    codes = tokenizer.codes(clip())
    pictures = tokenizer.decode(codes)
    assert pictures.shape == (3, 2, 3, 16, 16)
    assert 0 <= pictures.min() < pictures.max() <= 1
    alone = tokenizer.vqgan.decode(codes[1].view(2, 4, 4)[1:])
    torch.testing.assert_close(pictures[1, 1], ((alone[0] + 1) / 2).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_it_is_frozen() -> None:
    tokenizer = build().train()
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.codes(clip()).requires_grad


def test_usage_counts_codes_and_their_evenness() -> None:
    assert codebook_usage(torch.tensor([[3, 3], [3, 3]]), 8) == (1, pytest.approx(1))
    assert codebook_usage(torch.arange(8), 8) == (8, pytest.approx(8))
    used, perplexity = codebook_usage(torch.tensor([0, 0, 0, 1]), 8)
    assert used == 2
    assert perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_wrong_inputs_are_named() -> None:
    tokenizer = build()
    with pytest.raises(ValueError, match=r"T a multiple of 2, found \(3, 3, 3, 16, 16\)"):
        tokenizer.codes(clip()[:, :, :3])
    with pytest.raises(ValueError, match=r"expected \[B, 32\] or \[B, 32, F\], found \(3, 31\)"):
        tokenizer.decode(tokenizer.codes(clip())[:, :31])
    with pytest.raises(ValueError, match=r"precision.*'float16'"):
        build(precision="float16")


def test_codes_of_several_codebooks_are_numbered_consecutively() -> None:
    codes = torch.tensor([[[0, 1, 2, 0]], [[2, 2, 2, 2]]])
    assert numbered(codes, 3, 2).tolist() == [0, 4, 2, 3, 2, 5, 2, 5]
    assert torch.equal(numbered(codes, 3, 1), codes.flatten())
