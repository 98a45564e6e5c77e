"""The choice of a CUDA graph in two processes: test_cuda_graph.py starts `graph_ranks.py OUT` through torchrun.

A stand-in records work and does it again by calling it, on a simulated clock. Rank 0 writes, of both ranks and for each
case, the reason of the choice and the weights after STEPS steps; `plain` has no choice.
"""

import dataclasses
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.device import paused_gc
from mam2.engine.runtime.distributed import World, join
from mam2.engine.train import cuda_graph
from mam2.engine.train.step import PretrainStep

BATCH, STEPS = 8, 3
CASES = ("plain", "faster", "slower on one", "fails on one", "asked for")


class StandIn:
    """Does recorded work again by calling it."""

    def __init__(self, seconds: float, fails: bool, ddp: Callable[[], object]) -> None:
        """ddp: returns the step's first DDP while it exists."""
        self.now, self.seconds, self.fails, self.ddp = 0.0, seconds, fails, ddp
        self.released = True
        cuda_graph.time = SimpleNamespace(perf_counter=lambda: self.now)

    def record(self, work):
        self.released &= self.ddp() is None
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        values = {}

        def replay():
            values.update(work())
            self.now += self.seconds / 2  # a step is recorded in two parts

        return replay, values

    def warm_up(self, work):
        work()

    def launched(self, take):
        def timed(arguments, inspect):
            self.now += 2.0
            return take(arguments, inspect)

        return timed

    def wait(self):
        pass

    def release(self):
        pass


def train(world: World, case: str) -> dict[str, object]:
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, views=1),
        mask=dataclasses.replace(recipe.mask, kind="random"),  # ranks differ in the number of motion values
        model=dataclasses.replace(recipe.model, width=24, depth=1, heads=2),
        loss=dataclasses.replace(recipe.loss, balance="gradient", alignment=0.5),
        optim=dataclasses.replace(recipe.optim, batch=BATCH, clip_norm=0.5),
        run=dataclasses.replace(
            recipe.run, precision="float32", compile=False, graph="on" if case == "asked for" else "auto"
        ),
    )
    torch.manual_seed(0)
    step = PretrainStep(config, MAM2(config, 16), torch.device("cpu"), world)
    clips = torch.randint(0, 256, (STEPS, BATCH, 3, 8, 32, 32), dtype=torch.uint8)
    codes = torch.randint(0, 16, (STEPS, BATCH, 64))
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    reason, values, ddp, recorders = "", {}, weakref.ref(step.forward), []
    for number in range(STEPS):
        batches = [(clips[number, rows], codes[number, rows])]
        if number == 1 and case != "plain":  # in the middle of a run, with moments
            there = world.rank == 1
            seconds = 3.0 if case == "slower on one" and there else 1.0
            recorder = StandIn(seconds, case == "fails on one" and there, ddp)
            recorders.append(recorder)
            step._one_pass = recorder.launched(step._one_pass)
            reason = step.choose_graph(number, batches, recorder)
        # a graph reads the rate as a float32: these are the same numbers there
        values = step(number, batches, 2.0**-10, inspect=number == 2)
    means = world.mean_(torch.stack([value.float() for value in values.values()]))
    return {
        "reason": reason,
        "ddp": isinstance(step.forward, DistributedDataParallel),
        "released": all(recorder.released for recorder in recorders),
        "values": dict(zip(values, means.tolist(), strict=True)),
        "weights": {name: tensor.detach().clone() for name, tensor in step.model.state_dict().items()},
    }


if __name__ == "__main__":
    with join(torch.device("cpu")) as joined:
        with paused_gc():  # as in the loop
            everywhere = {case: joined.all_gather(train(joined, case)) for case in CASES}
        if joined.main:
            torch.save(everywhere, Path(sys.argv[1]))
