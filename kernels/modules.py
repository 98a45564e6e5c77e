"""The losses as modules, for codebases that first configure a loss and call it later."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .linear_cross_entropy import linear_cross_entropy
from .linear_masked_loss import linear_masked_loss
from .masked_loss import masked_frame_difference_loss, masked_pixel_loss
from .masks import TubeMask


class _Configured(torch.nn.Module):
    """A module that stores the keyword arguments of a loss function."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class _MaskedLoss(_Configured):
    """A loss of masked tokens."""

    _loss: Callable[..., torch.Tensor]

    def forward(
        self,
        pred: torch.Tensor,
        video: torch.Tensor,
        mask: TubeMask | torch.Tensor | None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._loss(pred, video, mask, weight=weight, **self.settings)


class MaskedPixelLoss(_MaskedLoss):
    """`masked_pixel_loss` with fixed settings; arguments, result and errors are that function's."""

    _loss = staticmethod(masked_pixel_loss)

    def __init__(
        self,
        *,
        patch_size: Sequence[int] = (2, 16, 16),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        target: str = "pixel",
        normalize: str | None = "channel",
        eps: float = 1e-6,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            patch_size=tuple(patch_size),
            mean=mean,
            std=std,
            target=target,
            normalize=normalize,
            eps=eps,
            reduction=reduction,
        )


class MaskedFrameDifferenceLoss(_MaskedLoss):
    """`masked_frame_difference_loss` with fixed settings; arguments, result and errors are that function's."""

    _loss = staticmethod(masked_frame_difference_loss)

    def __init__(
        self,
        *,
        patch_size: Sequence[int] = (2, 16, 16),
        difference: str = "adjacent",
        normalize: str | None = "channel",
        eps: float = 0.05,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            patch_size=tuple(patch_size),
            difference=difference,
            normalize=normalize,
            eps=eps,
            mean=mean,
            std=std,
            reduction=reduction,
        )


class LinearCrossEntropyLoss(_Configured):
    """`linear_cross_entropy` with fixed settings. Forward takes the classifier's weight and bias; it owns neither.

    loss = LinearCrossEntropyLoss(label_smoothing=0.1)
    loss(head.weight, hidden, target, head.bias)        # the argument order of Liger's fused module

    forward takes weight [V,D], hidden [M,D], target [M] int64, bias [V] or None.
    """

    def __init__(self, *, reduction: str = "mean", label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        super().__init__(reduction=reduction, label_smoothing=label_smoothing, ignore_index=ignore_index)

    def forward(
        self, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, target, bias, **self.settings)


class LinearMaskedLoss(_Configured):
    """`linear_masked_loss` with fixed settings. Forward takes the head's weight and bias; it owns neither.

    forward takes weight [P,D], hidden [B,Nm,D], the clip, the mask, bias [P] or None, and token weights or None.
    """

    def __init__(
        self,
        *,
        patch_size: Sequence[int] = (2, 16, 16),
        target: str = "pixel",
        normalize: str | None = "channel",
        eps: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            patch_size=tuple(patch_size),
            target=target,
            normalize=normalize,
            eps=eps,
            mean=mean,
            std=std,
            reduction=reduction,
        )

    def forward(
        self,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        video: torch.Tensor,
        mask: TubeMask | torch.Tensor | None,
        bias: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear_masked_loss(hidden, weight, video, mask, bias, token_weight=token_weight, **self.settings)
