"""Kills a pre-training run with SIGKILL at random moments, resuming after each: started by test_exactness.py.

`kill_points.py RECIPE DATA OUT KILLS`: runs OUT/whole to its end, then OUT/killed with KILLS kills. The program
imports everything once and forks, so that a run starts in a moment. Prints how far the run was at each kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.train.pretrain import pretrain


def start(config: PretrainConfig, data: Path, run: Path, *, until_killed: bool = False) -> int:
    """Starts or resumes a run; returns its process, which with until_killed stays after the run's end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with (run.parent / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            pretrain(config, data, run, resume=True, progress=False)
            while until_killed:
                signal.pause()
            status = 0
    finally:
        os._exit(status)


def steps_logged(run: Path) -> int:
    """Returns the step of the last complete log line; cheap, because it is called a hundred times per second."""
    log = run / "log.jsonl"
    whole = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def main(recipe: str, data: Path, out: Path, kills: int) -> None:
    config, chance = load_recipe(recipe), random.Random(0)
    assert os.waitpid(start(config, data, out / "whole"), 0)[1] == 0
    run = out / "killed"
    total = steps_logged(out / "whole")
    for number in range(kills):
        target = total * (number + 1) // (kills + 1)
        child = start(config, data, run, until_killed=True)
        while steps_logged(run) < target:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit(f"the run ended by itself before step {target}")
            time.sleep(0.01)
        time.sleep(chance.random() * 0.15)  # at any time in the next steps, also while a checkpoint is written
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), status
        assert os.WTERMSIG(status) == signal.SIGKILL
        parts = len(list((run / "checkpoints").glob(".part-*")))
        print(
            f"killed after step {steps_logged(run)}, while {'a' if parts else 'no'} checkpoint was written", flush=True
        )
    assert os.waitpid(start(config, data, run), 0)[1] == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
