"""Kills a process at each operation on files with which it writes a checkpoint: started by test_checkpoint.py.

`kill_phases.py FOLDER`: writes step 1, then step 2 in processes that end at their first, second, … operation, each in a
copy. After each, the newest checkpoint must be whole, and a resumed run must leave what one without a kill leaves.
Prints the number of operations. The program imports everything once and forks.
"""

import dataclasses
import itertools
import os
import shutil
import sys
from pathlib import Path

import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.recipe import load_recipe
from mam2.engine.files import remove_parts

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir", "os.truncate"}
CONFIG = load_recipe("demo")
CONFIG = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, keep=1))


def write(run: Path, step: int) -> None:
    tensors = {"a": torch.full((3,), float(step))}
    checkpoint.write(run, step, tensors, tensors, CONFIG, {})
    checkpoint.write_best(run, step, tensors, CONFIG, {}, {"accuracy": float(step)})


def ends_at(run: Path, number: int) -> bool:
    """Writes step 2 in a process that ends before its operation `number`; returns False if it needs fewer."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFEXITED(status), status
        assert os.WEXITSTATUS(status) in (0, 7), status
        return os.WEXITSTATUS(status) == 7
    done = itertools.count()

    def count(event: str, _: object) -> None:
        if event in OPERATIONS and next(done) == number:
            os._exit(7)

    sys.addaudithook(count)
    try:
        write(run, 2)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
    finally:
        os._exit(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main(folder: Path) -> None:
    checkpoint.code_version()
    os.fsync = lambda _: None  # a killed process loses nothing that it has written; a machine without power would
    first, whole, run = folder / "first", folder / "whole", folder / "run"
    write(first, 1)
    shutil.copytree(first, whole)
    write(whole, 2)
    for number in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(first, run)
        if not ends_at(run, number):
            break
        damage: list[str] = []
        newest = checkpoint.newest_whole(run, damage.append)
        assert newest, number
        assert not damage, (number, damage)
        step = checkpoint.read_state(newest)["step"]
        remove_parts(run / checkpoint.FOLDER)  # as a run does at its start
        write(run, 2)
        assert contents(run) == contents(whole), (number, step)
    assert contents(run) == contents(whole)
    print(number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
