"""The variants of a step that `bench_step` measures, and the order in which a time limit should find them done."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Way = tuple[str, str]
"""A step and its provider."""
PEERS = ("hugging_face", "official")
"""Other implementations of VideoMAE: Hugging Face's and its authors'."""
BEST = "compiled blocks graph"
"""The step of a run with `run.compile_blocks` on a GPU, where `run.graph` captures it if that is faster."""
WAYS: tuple[Way, ...] = (
    *((BEST, "ours"), ("eager", "ours"), ("graph", "ours"), ("compiled blocks", "ours")),
    *(("eager", "hugging_face"), ("eager", "official")),
    *(("compiled", "ours"), ("compiled graph", "ours"), ("compiled", "hugging_face"), ("compiled", "official")),
)
"""All variants. Those that compile a whole step are last: compiling takes most of the time."""
QUICK = tuple(way for way in WAYS if way[0] not in ("compiled", "compiled graph"))
PARTS = "parts"
"""Stands for the parts of an eager step, timed one by one."""
STAGES: tuple[tuple[Way, ...] | str, ...] = (WAYS[:1], QUICK, PARTS, WAYS)
"""What is measured of all objectives before the next stage begins."""


def stages(
    takes: Callable[[str], bool], why_not: Callable[[Way], str | None], peers: bool
) -> Iterator[tuple[Way, ...] | str]:
    """Yields the ways to measure in each stage for one objective; empty if the stage has nothing new.

    A stage measures the ways of earlier ones again, because only ways that are timed in turns can be compared.

    Args:
        takes: whether a step, a provider or the parts are selected.
        why_not: why a way cannot run here; such a way is yielded once, in the first stage that has it.
        peers: whether the objective is also that of the peers.
    """
    seen: set[Way] = set()
    for stage in STAGES:
        if isinstance(stage, str):
            yield stage if takes(stage) else ()
            continue
        ways = [way for way in stage if takes(way[0]) and takes(way[1]) and (peers or way[1] not in PEERS)]
        new = {way for way in ways if way not in seen}
        again = any(why_not(way) is None for way in new)
        yield tuple(way for way in ways if way in new or (again and why_not(way) is None))
        seen |= new
