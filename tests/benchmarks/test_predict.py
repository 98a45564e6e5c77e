"""The prediction for an H200: from the committed table, by a model whose parts are checked by hand."""

import importlib
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    return importlib.import_module("benchmarks.predict")


def test_the_checked_in_prediction_is_current_and_says_what_it_is(predict: ModuleType) -> None:
    text = predict.PREDICTION.read_text(encoding="utf-8")
    assert text.startswith("# H200: predicted, not measured\n")
    assert text == predict.report(), "if the change is meant: python -m benchmarks.predict"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 1, 0, 32),  # blocks
        (255, 1, 0, 8),  # registers
        (73, 4, 0, 6),  # 80 registers for each of 128 threads
        (32, 8, 0, 8),  # warps
        (32, 4, 100_000, 2),  # shared memory
    ],
)
def test_programs_that_an_sm_holds(predict: ModuleType, registers, warps, shared, expected) -> None:
    assert predict.resident_programs(registers, warps, shared) == expected


def test_floors_are_those_worked_out_by_hand(predict: ModuleType) -> None:
    """692 and 47 MB at 4.3 TB/s; three products of 90112 x 384 x 8192 at 790 TFLOP/s."""
    pixels, motion, _, planar, gather = predict.kernels().values()
    assert pixels.memory == motion.memory == pytest.approx(0.161e-3, rel=0.01)
    assert planar.memory == pytest.approx(0.258e-3, rel=0.01)
    assert gather.memory == pytest.approx(11e-6, rel=0.02)
    assert predict.head()[0][1] == pytest.approx(2.15e-3, rel=0.01)


def test_littles_law(predict: ModuleType) -> None:
    """With as many bytes in flight as a copy needs, the time is that of the copy."""
    for of in predict.kernels().values():
        share = of.in_flight / (predict.COPY * predict.LATENCY / predict.SMS)
        assert of.latency == pytest.approx(of.memory / share)
        assert of.best <= of.worst <= 3 * of.best
