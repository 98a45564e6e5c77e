"""The command line: `mam2 VERB …`; each verb is a module of `mam2.engine.commands`, imported when it is used.

Recipes set the values, flags override single ones (`--optim.batch 128`). An error of the user prints one line and exits
with status 2; a run ended by a signal exits with 128 + its number, as usual in a shell.
"""

from __future__ import annotations

import difflib
import importlib
import os
import platform
import re
import signal
import sys

import mam2
from mam2.engine.commands import VERBS
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import recipe_names
from mam2.engine.errors import PeerFailed, RankError, UserError
from mam2.engine.files import FULL_OR_FORBIDDEN, accept_names, one_line
from mam2.engine.runtime import signals

EXTRAS = {
    "engine": ("av", "tyro", "safetensors", "tensorboard", "matplotlib", "PIL", "tqdm", "tomli"),
    "flow": ("cv2",),
    "hub": ("huggingface_hub",),
    "onnx": ("onnx", "onnxscript"),
}
"""Import names of the packages that each extra installs; `pip install mam2` without extras serves only the losses."""
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""PyTorch's messages if the memory of a GPU or of the machine is exhausted."""
DISTRIBUTED = ("pretrain", "finetune", "evaluate")
"""Verbs that can run in several processes, started by torchrun."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb of a command line (default: this program's) and exits."""
    # OpenMP's threads spin for milliseconds while they wait, which slows a step down as soon as another thread needs
    # the core, for example this process's decoders; without any spinning, waking them up costs too much. The variable
    # is read when torch is first imported, and no import above imports torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = sys.argv[1:] if arguments is None else arguments
    accept_names(sys.stdout, sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version", "version"):
        print(f"mam2 {mam2.__version__}, Python {platform.python_version()}")
        sys.exit(0)
    with signals.command_signals():
        signals.end(_run(arguments))


def _run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit status; prints errors of the user and ends by signals."""
    try:
        name = arguments[0]
        if name not in VERBS:
            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown verb {name!r}; expected one of {', '.join(VERBS)}{hint}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and name not in DISTRIBUTED:
            raise UserError(f"{name} runs in one process, but WORLD_SIZE is above 1: start it without torchrun")
        verb = importlib.import_module(f"mam2.engine.commands.{name.replace('-', '_')}")
        from mam2.engine.commands import options  # imports torch, which takes seconds

        options.check_single_data(name, arguments)
        return verb.run(options.with_present_flags(arguments[1:]))
    except UserError as error:
        # Rank 0 prints an error that all processes of a run raise.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"mam2: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"mam2: error: {one_line(place)}{error.strerror}; free space or choose another path", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in EXTRAS.items() if error.name in names), None)
        if extra is None:
            raise
        print(
            f"mam2: error: {arguments[0]} needs {error.name}, which is not installed: pip install 'mam2[{extra}]', "
            f"or in a checkout pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except PeerFailed as error:
        if str(error):
            print(f"mam2: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        reason = one_line(str(error).partition("\n")[0])
        print(
            f"mam2: error: out of memory{f' ({reason})' if reason else ''}: use fewer clips at once (--batch, "
            "optim.micro_batch), smaller or shorter clips, or a smaller model",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, signals.Stopped) else signal.SIGINT
        signals.tell_stopped(number)
        return 128 + number


def usage() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in VERBS.items()]
    end = (
        f"`mam2 VERB --help` lists the options; recipes: {', '.join([*recipe_names(), *recipe_names(FinetuneConfig)])}."
    )
    return "\n".join(["usage: mam2 VERB …", "       mam2 --version", "", *lines, "", end, ""])
