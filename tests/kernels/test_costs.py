"""The declared costs against the rooflines worked out by hand (64 clips, 1408 masked of 1568 tokens, 1536 values)."""

import pytest

from mam2.kernels import costs


def test_loss_and_gather_move_what_the_roofline_says() -> None:
    assert costs.masked_loss(64, 1408, 1536).bytes_moved == pytest.approx(692e6, rel=0.01)
    assert costs.gather_tubes(64, 160, 1536).bytes_moved == pytest.approx(47e6, rel=0.01)
    assert costs.frame_difference(1, 1, 1536, tubelet=2).bytes_moved == 1536 + 768 * 4 + 8


def test_linear_cross_entropy_is_three_products_and_no_logits() -> None:
    cost = costs.linear_cross_entropy(90112, 384, 8192)
    assert cost.flops == 3 * 2 * 90112 * 384 * 8192
    assert cost.bytes_moved < 90112 * 8192 * 2 / 5
