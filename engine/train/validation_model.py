"""The model that a training run validates: it reads the weights of the trained model, on the same device.

Replicated weights and their moving averages are updated in place, so that the validated model shares their memory.
Weights that FSDP2 shards are gathered on the device before each validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def share_weights(
    model: nn.Module, weights: Callable[[], Mapping[str, Tensor]], *, in_place: bool = True
) -> Callable[[], None]:
    """Makes `model` use the weights of a model in training; returns a function to call before each use.

    Args:
        model: a module without gradients, on the device of the weights.
        weights: returns the trained weights by their names in `model.state_dict()`; training updates them in place.
            Every rank calls the returned function, because it gathers sharded weights.
        in_place: False if `weights` computes new tensors (adapters merged into weights), which are copied each time.
    """
    if not in_place:

        @torch.no_grad()
        def copy() -> None:
            places = model.state_dict()
            for name, one in weights().items():
                places[name].copy_(one.full_tensor() if isinstance(one, DTensor) else one)

        return copy
    own = model.state_dict()
    shared = {name: own[name] if isinstance(one, DTensor) else one.detach() for name, one in weights().items()}
    model.load_state_dict(shared, assign=True)

    @torch.no_grad()
    def gather() -> None:
        places = model.state_dict()
        for name, one in weights().items():
            if isinstance(one, DTensor):
                places[name].copy_(one.full_tensor())

    return gather


def in_equal_batches(classify: Callable[[Tensor], Tensor], clips: int) -> Callable[[Tensor], Tensor]:
    """Returns `classify` for batches of up to `clips` clips, which it fills up, so that torch.compile sees one shape.

    classify: clips [B, C, T, H, W] -> [B, …], each clip independent of the others.
    """

    def filled(video: Tensor) -> Tensor:
        count = len(video)
        if count < clips:
            video = torch.cat([video, video[-1:].expand(clips - count, *video.shape[1:])])
        return classify(video)[:count]

    return filled
