"""`optim.micro_batch auto` on two processes with DDP: test_pass_size.py starts `pass_ranks.py OUT` through torchrun.

The second process has less memory (simulated). Rank 0 writes the passes of both and the weights after two steps, with
balanced gradients and with fixed weights.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.distributed import World, join
from mam2.engine.train.objective import MAM2Objective
from mam2.engine.train.step import PretrainStep, Step

BATCH, STEPS = 8, 2


def pretend(most: int) -> None:
    """Makes passes of more than `most` clips run out of memory."""
    original = MAM2Objective.forward

    def forward(self, video, *arguments, **options):
        if len(video) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, video, *arguments, **options)

    MAM2Objective.forward = forward
    Step.tries_passes = True


def train(world: World, balance: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Returns the passes per step of this process, and the weights after STEPS steps."""
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, views=1),
        mask=dataclasses.replace(recipe.mask, kind="tube"),
        model=dataclasses.replace(recipe.model, width=24, depth=1, heads=2),
        loss=dataclasses.replace(recipe.loss, balance=balance, alignment=0.5),
        optim=dataclasses.replace(recipe.optim, batch=BATCH, micro_batch="auto", name="adamw"),
        run=dataclasses.replace(recipe.run, precision="float32", compile=False),
    )
    torch.manual_seed(0)
    step = PretrainStep(config, MAM2(config, 16), torch.device("cpu"), world)
    clips = torch.randint(0, 256, (STEPS, BATCH, 3, 8, 32, 32), dtype=torch.uint8)
    codes = torch.randint(0, 16, (STEPS, BATCH, 64))
    share = BATCH // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    for number in range(STEPS):
        batches = [(clips[number, rows], codes[number, rows])]
        if number == 0:
            step.choose_passes(0, batches)
        step(number, batches, 1e-3, inspect=False)
    return step.passes, {name: tensor.detach().clone() for name, tensor in step.model.state_dict().items()}


if __name__ == "__main__":
    with join(torch.device("cpu")) as joined:
        pretend(4 >> joined.rank)
        everywhere = {balance: joined.all_gather(train(joined, balance)) for balance in ("gradient", "fixed")}
        if joined.main:
            torch.save(everywhere, Path(sys.argv[1]))
