"""The gradients of a step on several processes: started by test_distributed.py through torchrun.

`ranks.py OUT CASE…` with cases as SHARDING-BALANCE-MICRO_BATCH-OPTIMIZER-TARGET: rank 0 writes losses, gradients
and, after three steps, weights of each to OUT/CASE. The encoder's width is odd, so that FSDP2's shards of a matrix
differ in size.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.distributed import World, join
from mam2.engine.train.step import PretrainStep

BATCH, STEPS = 8, 3


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def compute(
    world: World, sharding: str, balance: str, micro_batch: str, optimizer: str, target: str
) -> dict[str, torch.Tensor]:
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, views=1),
        # random masks give clips different numbers of motion values
        mask=dataclasses.replace(recipe.mask, kind="random"),
        model=dataclasses.replace(recipe.model, width=27, depth=2, heads=3),
        loss=dataclasses.replace(
            recipe.loss,
            balance=balance,
            appearance=0.3,
            alignment=0.5,
            appearance_target=target,
            visible=0.5 if target == "latents" else 0.0,
            teacher_momentum=0.9,
        ),
        optim=dataclasses.replace(
            recipe.optim, batch=BATCH, micro_batch=int(micro_batch), clip_norm=0.5, name=optimizer
        ),
        run=dataclasses.replace(recipe.run, precision="float32", compile=False, sharding=sharding),
    )
    torch.manual_seed(0)
    model = MAM2(config, 16 if config.needs_codes else 0)
    step = PretrainStep(config, model, torch.device("cpu"), world)
    clips = torch.randint(0, 256, (STEPS, BATCH, 3, 8, 32, 32), dtype=torch.uint8)
    codes = torch.randint(0, 16, (STEPS, BATCH, 64))
    clips[:, :, :, 1:] = clips[:, :, :, :1]  # mostly still
    part = BATCH // (world.size * step.micro_batches)
    results: dict[str, torch.Tensor] = {}
    for number in range(STEPS):
        rows = [
            slice(first, first + part)
            for first in ((index * world.size + world.rank) * part for index in range(step.micro_batches))
        ]
        batches = [(clips[number, row], codes[number, row]) for row in rows]
        if number == 0:
            values = step._gradients(step._passes(0, batches), step.micro_batches, inspect=True)
            # numbers of single clips belong to the rank
            names = [name for name in values if not name.startswith(("accuracy", "loss/motion_relative", "teacher"))]
            means = world.mean_(torch.stack([values[name].float() for name in names]))
            results |= dict(zip(names, means, strict=True))
            results |= {f"grad {name}": whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
            step._update()
        else:
            step(number, batches, 1e-3, inspect=False, progress=number / STEPS)
    results |= {f"weight {name}": whole(p) for name, p in model.named_parameters()}
    return results


def main(out: Path, *cases: str) -> None:
    with join(torch.device("cpu")) as world:
        for case in cases:
            results = compute(world, *case.split("-"))
            if world.main:
                torch.save(results, out / case)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
