"""The modules call the functions with fixed keyword arguments."""

import inspect

import pytest
import torch

from mam2 import kernels
from mam2.kernels import (
    LinearCrossEntropyLoss,
    LinearMaskedLoss,
    MaskedFrameDifferenceLoss,
    MaskedPixelLoss,
    random_mask,
)

VIDEO = torch.randint(0, 256, (2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MASK = random_mask(2, (2, 2, 2), 0.5, seed=0)
FUNCTIONS = {
    MaskedPixelLoss: kernels.masked_pixel_loss,
    MaskedFrameDifferenceLoss: kernels.masked_frame_difference_loss,
    LinearCrossEntropyLoss: kernels.linear_cross_entropy,
    LinearMaskedLoss: kernels.linear_masked_loss,
}


@pytest.mark.parametrize("module", FUNCTIONS)
def test_settings_and_defaults_are_those_of_the_function(module: type[torch.nn.Module]) -> None:
    def keywords(function) -> dict[str, object]:
        parameters = inspect.signature(function).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY
        }

    expected = keywords(FUNCTIONS[module])
    for name in ("weight", "token_weight"):  # arguments of forward
        expected.pop(name, None)
    assert keywords(module) == expected
    assert module().settings == expected


@pytest.mark.parametrize("weight", [None, torch.rand(2, 4)])
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (MaskedPixelLoss, {"patch_size": [2, 4, 4], "target": "joint", "normalize": "patch", "eps": 0.01}),
        (MaskedFrameDifferenceLoss, {"patch_size": (2, 4, 4), "normalize": None, "reduction": "sum"}),
    ],
)
def test_masked_losses_pass_everything_on(module: type[torch.nn.Module], settings: dict, weight) -> None:
    pred = torch.randn(2, 4, 96, requires_grad=True)
    expected = FUNCTIONS[module](pred, VIDEO, MASK, weight=weight, **settings)
    out = module(**settings)(pred, VIDEO, MASK, weight)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(loss, pred)[0] for loss in (out, expected)))


def test_the_classifier_s_weight_comes_first() -> None:
    head, hidden, target = torch.nn.Linear(3, 5), torch.randn(6, 3), torch.randint(0, 5, (6,))
    loss = LinearCrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")(head(hidden), target)
    torch.testing.assert_close(loss(head.weight, hidden, target, head.bias), expected)


def test_the_masked_head_takes_the_layers_weight_and_bias() -> None:
    head, hidden, weight = torch.nn.Linear(5, 96), torch.randn(2, 4, 5), torch.rand(2, 4)
    loss = LinearMaskedLoss(patch_size=(2, 4, 4), target="joint", reduction="sum")
    plain = MaskedPixelLoss(patch_size=(2, 4, 4), target="joint", reduction="sum")
    expected = plain(head(hidden), VIDEO, MASK, weight)
    torch.testing.assert_close(loss(head.weight, hidden, VIDEO, MASK, head.bias, weight), expected)


def test_a_module_shows_its_settings_and_holds_no_state() -> None:
    loss = MaskedPixelLoss(patch_size=[2, 16, 16], normalize=None)
    assert "patch_size=(2, 16, 16), mean=None, std=None, target='pixel', normalize=None" in repr(loss)
    assert not loss.state_dict()
    with pytest.raises(TypeError, match="norm_pix"):
        MaskedPixelLoss(norm_pix=True)
