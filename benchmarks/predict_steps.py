"""The part of the prediction for an H200 that is about training steps: two bounds, heads of 128, few clips per GPU."""

from benchmarks.bench_step import CODES
from benchmarks.h200 import (
    CLIPS,
    CLOCK,
    COPY,
    EXPONENTIALS,
    GAP,
    GEMM,
    LAUNCH,
    LINKS,
    SMS,
    Profile,
    profile,
    step_seconds,
)
from benchmarks.step_sizes import sized
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.costs import PartCost, part_costs, step_bytes

GOAL_STEPS = {"mam2-fast": 1200, "mam2-fast half decoded": 2000}
"""Recipes and their goals in clips per second."""
FEW = 8
"""Clips per GPU where several small ones share a batch."""
BEST = ("2026-11-27-5", "mam2-fast", "compiled blocks graph")
LAUNCHED = ("2026-11-27-3", "mam2-fast", "compiled blocks")
"""Measured steps, see `step_seconds`: the fastest, and the fastest that was launched kernel by kernel."""
Range = tuple[float, float]


def whole(config: PretrainConfig) -> PartCost:
    return sum(part_costs(config, CODES).values(), start=PartCost())


def bounds() -> list[str]:
    """Returns a line per recipe with a goal: products hide all memory traffic, or nothing overlaps."""
    lines = []
    for name, goal in GOAL_STEPS.items():
        config = sized(name, None, "bfloat16")
        total = whole(config)
        moved = CLIPS * total.bytes_moved + step_bytes(config, total.parameters, 2)
        products, memory = CLIPS * total.flops / GEMM, moved / COPY
        worst, best = CLIPS / (products + memory), CLIPS / max(products, memory)
        lines.append(
            f"| {name} | {total.flops / 1e9:.0f} | {1e3 * products:.1f} | {1e3 * memory:.1f} "
            f"| {worst:.0f} to {best:.0f} | {goal} | {100 * goal * total.flops / GEMM:.0f} % |"
        )
    return lines


def attention_sizes(config: PretrainConfig) -> dict[str, tuple[int, int, int, int, int]]:
    """Returns layers, queries, keys, width and heads of the attention of each part of a step of MAM2."""
    model = config.model
    slots, rows, columns = config.grid
    visible, decoded = slots * rows * columns - config.masked_tokens, config.decoded_tokens
    return {
        "encoder": (model.depth, visible, visible, model.width, model.heads),
        "regressor": (model.regressor.depth, decoded, visible, model.regressor.width, model.regressor.heads),
        "decoders": (2 * model.decoder.depth, decoded, decoded, model.decoder.width, model.decoder.heads),
    }


def exponentials(config: PretrainConfig) -> float:
    """Returns the seconds of a step's exponentials of attention: one per query, key and head, and again in backward."""
    count = sum(layers * queries * keys * heads for layers, queries, keys, _, heads in attention_sizes(config).values())
    return 2 * CLIPS * count / (SMS * EXPONENTIALS * CLOCK)


def narrow_share(config: PretrainConfig) -> float:
    """Returns the share of attention's FLOPs that regressor and decoders have."""
    flops = {
        part: layers * queries * keys * width
        for part, (layers, queries, keys, width, _) in attention_sizes(config).items()
    }
    return 1 - flops["encoder"] / sum(flops.values())


def wide_heads(counted: Profile) -> dict[str, float]:
    """Returns the seconds that heads of 128 save in a step, by what bounds attention."""
    before, after = (sized(name, None, "bfloat16") for name in ("mam2-fast", "mam2-fast heads of 128"))
    return {
        "products, which stay the same": 0.0,
        "products and exponentials, one after the other": exponentials(before) - exponentials(after),
        "exponentials alone, which halve": counted.attention * narrow_share(before) / 2,
    }


def few_clips(counted: Profile, measured: float, launched: float) -> dict[str, Range]:
    """Returns the least and most seconds of a step of FEW clips: replayed, and launched kernel by kernel.

    Args:
        counted: kernels of a step; their number does not depend on the batch.
        measured: seconds of a step of CLIPS clips, replayed.
        launched: the same, launched: no less than what the host needs.
    """
    device = measured * FEW / CLIPS
    return {
        "replayed": (device, device + counted.kernels * GAP),
        "launched": (max(device, counted.kernels * LAUNCH), max(device, launched)),
    }


def report() -> list[str]:
    """Returns the lines of this part."""
    counted, measured, launched = profile(), step_seconds(*BEST), step_seconds(*LAUNCHED)
    fast = sized("mam2-fast", None, "bfloat16")
    gradients = 4 * whole(fast).parameters
    links = ", ".join(
        f"{2e3 * gradients / rate:.1f} ms at {rate / 1e9:.0f} GB/s ({name})" for name, rate in LINKS.items()
    )
    lines = [
        f"Training steps of ViT-B, {CLIPS} clips, bfloat16, {CODES} cached codes. Peak: the rate of a large product.",
        "At best products hide all memory traffic; at worst nothing overlaps. Gaps and slower products are left out.",
        "",
        "| recipe | GFLOP per clip | ms of products | ms of memory | clips per second | goal | goal, of the peak |",
        "|---|---|---|---|---|---|---|",
        *bounds(),
        "",
        "Heads of 128 instead of 64 in regressor and decoders of mam2-fast: FLOPs and bytes stay, exponentials halve",
        f"there. Measured: a step of {1e3 * measured:.1f} ms; attention has {1e3 * counted.attention:.1f} of"
        f" {1e3 * counted.busy:.1f} ms of profiled kernels. Counted:",
        f"regressor and decoders have {100 * narrow_share(fast):.0f} % of attention's FLOPs; all exponentials take"
        f" {1e3 * exponentials(fast):.1f} ms at {EXPONENTIALS} per clock and SM.",
        "Attention of another head size is another kernel, which may be better or worse; that is left out.",
        "",
        "| attention is bound by | ms saved | clips per second |",
        "|---|---|---|",
    ]
    for what, saved in wide_heads(counted).items():
        lines.append(f"| {what} | {1e3 * saved:.1f} | {CLIPS / (measured - saved):.0f} |")
    lines += [
        "",
        f"A step of mam2-fast with {FEW} clips on each of several GPUs, without communication. The device needs at best"
        f" {FEW}/{CLIPS} of",
        f"the time of {CLIPS} clips; the {counted.kernels} profiled kernels of a step stay. Between them are gaps of at"
        f" most {1e6 * GAP:.1f} µs in a",
        f"replay (assumed). The host needs at least {1e6 * LAUNCH:.0f} µs per launch (assumed), and for all at most the"
        f" {1e3 * launched:.1f} ms of the",
        f"launched step of {CLIPS} clips.",
        "",
        "| step | ms | clips per second and GPU |",
        "|---|---|---|",
    ]
    for way, (least, most) in few_clips(counted, measured, launched).items():
        lines.append(f"| {way} | {1e3 * least:.1f} to {1e3 * most:.1f} | {FEW / most:.0f} to {FEW / least:.0f} |")
    lines += [
        "",
        f"All-reduce moves the float32 gradients, {gradients / 1e6:.0f} MB, at most twice through each GPU: {links};",
        "a part of it overlaps with the backward pass.",
    ]
    return lines
