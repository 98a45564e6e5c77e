"""First derivatives work, also under vmap; other kinds raise an error that names them."""

from collections.abc import Callable

import pytest
import torch

from mam2.kernels import (
    frame_difference,
    gather_tubes,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    running_cell_mask,
    tube_mask,
)

PATCH, GRID = (2, 4, 4), (2, 2, 2)
MASKED = random_mask(2, GRID, 0.5, seed=0).masked
CLIPS = torch.randint(0, 256, (2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGET = torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(0))


def leaves(*leading: int) -> tuple[torch.Tensor, ...]:
    """pred, hidden, weight."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*leading, *size, generator=generator) for size in ((2, 4, 96), (6, 3), (5, 3)))


Loss = Callable[..., torch.Tensor]
LOSSES: dict[str, Loss] = {
    "pixel": lambda pred, hidden, weight: masked_pixel_loss(pred, CLIPS, MASKED, patch_size=PATCH),
    "joint": lambda pred, hidden, weight: masked_pixel_loss(
        pred, CLIPS, MASKED, patch_size=PATCH, target="joint", reduction="none"
    ).sum(),
    "motion": lambda pred, hidden, weight: masked_frame_difference_loss(pred, CLIPS, MASKED, patch_size=PATCH),
    "codes": lambda pred, hidden, weight: linear_cross_entropy(hidden, weight, TARGET),
    "codes by row": lambda pred, hidden, weight: linear_cross_entropy(hidden, weight, TARGET, reduction="none").sum(),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradients(loss: Loss, inputs: tuple[torch.Tensor, ...], **options: bool) -> tuple[torch.Tensor | None, ...]:
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    return torch.autograd.grad(loss(*inputs), inputs, allow_unused=True, **options)


@losses
def test_double_backward_is_refused(loss: Loss) -> None:
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradients(loss, leaves(), create_graph=True)


@losses
def test_derivatives_of_torch_func_are_refused(loss: Loss) -> None:
    inputs, every = leaves(), (0, 1, 2)
    for ask in (
        lambda: torch.func.grad(loss, every)(*inputs),
        lambda: torch.func.jacrev(loss, every)(*inputs),
        lambda: torch.func.vjp(loss, *inputs),
        lambda: torch.func.jvp(loss, inputs, inputs),
        lambda: torch.func.vmap(torch.func.grad(loss, every))(*leaves(2)),
        lambda: torch.func.grad(lambda *mapped: torch.func.vmap(loss)(*mapped).sum(), every)(*leaves(2)),
    ):
        with pytest.raises(RuntimeError, match=r"use backward\(\) or torch.autograd.grad"):
            ask()


@losses
def test_forward_mode_is_refused(loss: Loss) -> None:
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(tensor, tensor) for tensor in leaves()]
        with pytest.raises(RuntimeError, match="forward mode"):
            loss(*duals)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@losses
def test_vmap_maps_losses_and_their_gradients(loss: Loss) -> None:
    mapped = gradients(lambda *inputs: torch.func.vmap(loss)(*inputs).sum(), leaves(3))
    single = [gradients(loss, inputs) for inputs in zip(*(tensor.detach() for tensor in leaves(3)), strict=True)]
    for found, expected in zip(mapped, zip(*single, strict=True), strict=True):
        if expected[0] is None:
            assert found is None or found.abs().max() == 0
        else:
            torch.testing.assert_close(found, torch.stack(expected))
    values = torch.func.vmap(loss)(*leaves(3))
    torch.testing.assert_close(values, torch.stack([loss(*inputs) for inputs in zip(*leaves(3), strict=True)]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "function",
    [
        lambda video: gather_tubes(video, MASKED, patch_size=PATCH),
        lambda video: frame_difference(video, patch_size=PATCH),
        lambda video: motion_tube_mask(video, 0.5, patch_size=PATCH, seed=3).masked,
    ],
)
def test_vmap_maps_what_reads_clips(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    videos = torch.stack([CLIPS, 255 - CLIPS // 2, CLIPS.flip(2)])
    assert torch.equal(torch.func.vmap(function)(videos), torch.stack([function(video) for video in videos]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "draw", [lambda **key: tube_mask(2, GRID, 0.5, **key), lambda **key: running_cell_mask(2, GRID, **key)]
)
def test_vmap_maps_masks_over_steps(draw: Callable) -> None:
    steps = torch.arange(5)
    mapped = torch.func.vmap(lambda step: draw(seed=0, step=step).masked)(steps)
    assert torch.equal(mapped, torch.stack([draw(seed=0, step=step).masked for step in steps]))
    assert len(mapped.unique(dim=0)) > 1


@losses
def test_an_eager_call_takes_the_short_way(loss: Loss) -> None:
    """Replaces the operator's gradient by an autograd.Function, which takes twice the host's time."""
    value = loss(*(tensor.requires_grad_() for tensor in leaves()))  # keeps its graph alive
    pending, names = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None:
            names.add(node.name())
            pending += [following for following, _ in node.next_functions]
    assert "EagerBackward" in names
    assert not any(name.startswith("GeneratedBackward") for name in names)


@losses
def test_nothing_is_recorded_without_gradients(loss: Loss) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in leaves())
    with torch.no_grad():
        plain = loss(*inputs)
    assert not plain.requires_grad
    assert torch.equal(plain, loss(*inputs))
