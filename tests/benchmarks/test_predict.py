"""The prediction for an H200: from the committed table and results, by models whose parts are checked by hand."""

import importlib
import math
from types import ModuleType

import pytest

from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "docs" / "benchmarks.md"


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


def test_measured_numbers_are_those_of_the_results() -> None:
    h200 = importlib.import_module("benchmarks.h200")
    found = h200.step_seconds("2026-11-27-5", "mam2-fast", "compiled blocks graph")
    assert found == pytest.approx(77.771e-3, rel=1e-4)  # in turns; alone 75.4
    assert h200.operator_seconds("2026-11-27-6", "linear_cross_entropy") == pytest.approx(3.31e-3, rel=1e-3)
    counted = h200.profile()
    assert (counted.kernels, counted.busy) == (2091, pytest.approx(74.563e-3, rel=1e-4))
    assert counted.attention == pytest.approx((11.042 + 4.638 + 1.139 + 0.902) * 1e-3)


def test_exponentials_of_attention_worked_out_by_hand() -> None:
    """Encoder 12 x 12 heads of 160 x 160, regressor 4 x 6 of 1408 x 160, decoders 8 x 6 of 1408 x 1408."""
    steps = importlib.import_module("benchmarks.predict_steps")
    encoder, others = 144 * 160**2, 24 * 1408 * 160 + 48 * 1408**2
    second = 132 * 16 * 1.755e9
    counted = steps.Profile(kernels=1000, busy=0.07, attention=0.018)
    saved = list(steps.wide_heads(counted).values())
    assert steps.exponentials(steps.sized("mam2-fast", None, "bfloat16")) == 2 * 64 * (encoder + others) / second
    assert saved[0] == 0
    assert saved[1] == pytest.approx(2 * 64 * others / 2 / second)
    assert saved[2] == pytest.approx(0.018 / 2 * others * 64 / (others * 64 + encoder * 64), rel=1e-3)
    assert saved == sorted(saved)


def test_few_clips_are_bound_by_device_gaps_or_host() -> None:
    steps = importlib.import_module("benchmarks.predict_steps")
    counted = steps.Profile(kernels=1000, busy=0.07, attention=0.018)
    found = steps.few_clips(counted, measured=0.08, launched=0.09)
    assert found["replayed"] == (0.01, pytest.approx(0.0115))
    assert found["launched"] == (0.01, 0.09)
    assert steps.few_clips(counted._replace(kernels=4000), 0.08, 0.09)["launched"] == (0.02, 0.09)


def test_frames_that_nvdec_decodes_for_a_clip() -> None:
    """A clip spans 61 frames and starts anywhere in the first 240 of 300; decoding starts at the key frame before."""
    loader = importlib.import_module("benchmarks.predict_loader")
    assert loader.decoded_frames(1) == 61
    assert loader.decoded_frames(300) == pytest.approx(61 + 119.5, rel=0.02)
    assert loader.decoded_frames(30) == pytest.approx(61 + 14.5, rel=0.02)
    assert loader.macroblocks(1920, 1080) == 120 * 68
    assert loader.frame_seconds() == pytest.approx(21 * 16 / 8160 / (771 * 1.545 / 1.86))
    found = loader.decoding(30)
    assert math.isclose(found.rate * found.frames * loader.frame_seconds(), 7)


def test_a_large_head_passes_over_its_weight_a_few_times(predict: ModuleType) -> None:
    """Logits of 131 072 codes fill a chunk of 352 MiB with 1408 rows; chunks have at least as many as the width."""
    assert predict.rows_per_chunk(2048, 131_072) == 2048
    assert "products take 5.7 ms" in predict.large_head()
    assert "0.75 ms of memory traffic per chunk: 1.5 ms for 2 chunks" in predict.large_head()
    assert "22 chunks of 128 rows would take 16.5 ms" in predict.large_head()


def test_the_benchmarks_page_has_the_predicted_numbers(predict: ModuleType) -> None:
    """A changed prediction must not leave the old numbers on the page."""
    steps, loader = (importlib.import_module(f"benchmarks.{name}") for name in ("predict_steps", "predict_loader"))
    page = " ".join(BENCHMARKS.read_text(encoding="utf-8").split())
    counted, fastest = steps.profile(), steps.step_seconds(*steps.BEST)
    few = steps.few_clips(counted, fastest, steps.step_seconds(*steps.LAUNCHED))
    wide = [steps.CLIPS / (fastest - saved) for saved in steps.wide_heads(counted).values()]
    found = [loader.decoding(distance) for distance in loader.KEY_FRAMES]
    ranges = [line.split("|")[5].strip() for line in steps.bounds()]
    expected = [
        "{:.0f} to {:.0f} clips per second and GPU replayed, {:.0f} to {:.0f} launched".format(
            *(steps.FEW / seconds for way in ("replayed", "launched") for seconds in reversed(few[way]))
        ),
        f"{wide[0]:.0f} to {wide[2]:.0f} clips per second, {wide[1]:.0f} if exponentials and products take turns",
        "{:.0f}, {:.0f} or {:.0f} clips of 336×256 per second".format(*(one.rate for one in found)),
        "decodes {:.0f}, {:.0f} or {:.0f} frames".format(*(one.frames for one in found)),
        *(f"Predicted: {clips}" for clips in ranges),
    ]
    assert [text for text in expected if text not in page] == []
