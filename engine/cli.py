"""The command line: `mam2 VERB …`; each verb is a module of `mam2.engine.commands`, imported when it is asked for.

Recipes carry the values, flags change single ones (`--optim.batch 128`). A user's mistake ends in one line and
exit status 2; a run that a signal ended exits with 128 + its number, as a shell expects.
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
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import recipe_names
from mam2.engine.errors import PeerFailed, RankError, UserError
from mam2.engine.files import FULL_OR_FORBIDDEN, accept_names, one_line
from mam2.engine.runtime import signals

VERBS = {
    "demo": "make clips, pre-train on them, measure, draw a report",
    "doctor": "which path each part takes on this machine",
    "index": "DATA   open every video once: what it holds, who decodes it, what to change",
    "transcode": "DATA --out FOLDER   re-encode for fast decoding: small, key frames close together",
    "train-tokenizer": "DATA --out FOLDER   train a VQ model on your own clips, measured on held-out ones",
    "convert-tokenizer": "CHECKPOINT --out FILE   a VQGAN of taming-transformers to safetensors",
    "tokenize": "RECIPE --data PATH --out CODES   compute the codes of recorded augmentations once",
    "plan": "RECIPE   before a run: parameters, FLOPs, bytes, memory; clips/s and hours estimated",
    "pretrain": "RECIPE --data PATH --out RUN   pre-train on a folder or a list of videos",
    "plot": "RUN [RUN …] --out FILE   draw the logs of one run or compare several",
    "visualize": "CHECKPOINT [CHECKPOINT …] --data CLIPS --out FOLDER   what models predict: pictures, a page",
    "probe": "CHECKPOINT [CHECKPOINT …] --data LIST   linear, attentive and k-NN probes of frozen encoders",
    "neighbors": "CHECKPOINT [CHECKPOINT …] --data LIST --out FOLDER   retrieval and mask propagation, no training",
    "embed": "CHECKPOINT --data FOLDER --out FILE   a feature for each video, as .npy or .parquet",
    "finetune": "RECIPE --data LIST --val LIST --checkpoint RUN --out RUN   train a classifier on an encoder",
    "evaluate": "CHECKPOINT --data LIST --out FOLDER   test a classifier with many views of every video",
    "predict": "CHECKPOINT --data VIDEOS   the likeliest classes of videos without labels; - reads a stream of names",
    "export": "CHECKPOINT --to FORMAT --out PATH   to Hugging Face, VideoMAE's code, torch or ONNX",
}
"""What the help says of each verb; a hyphen in its name is an underscore in its module's."""
EXTRAS = {
    "engine": ("av", "tyro", "safetensors", "tensorboard", "matplotlib", "PIL", "tqdm", "tomli"),
    "flow": ("cv2",),
    "hub": ("huggingface_hub",),
    "onnx": ("onnx", "onnxscript"),
}
"""Import names of what each extra of the package installs; `pip install mam2` alone installs the losses' needs."""
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""What PyTorch says where the memory of a GPU or of the machine does not suffice."""
DISTRIBUTED = ("pretrain", "finetune", "evaluate")
"""Verbs that several processes can work on together, started by torchrun."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb of a command line (default: this program's) and exits."""
    # OpenMP's threads spin for milliseconds while they wait, which slows a step badly as soon as anything else wants
    # the core, the decoders of this very process included; without any spinning, waking them up costs too much.
    # Read when torch is first imported, which no import above does.
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
    """Exit status of a command line; whatever went wrong by the user's or a signal's doing is said."""
    try:
        name = arguments[0]
        if name not in VERBS:
            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown verb {name!r}; expected one of {', '.join(VERBS)}{hint}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and name not in DISTRIBUTED:
            raise UserError(f"{name} runs in one process, and WORLD_SIZE is above 1: start it without torchrun")
        verb = importlib.import_module(f"mam2.engine.commands.{name.replace('-', '_')}")
        from mam2.engine.commands.options import with_present_flags  # imports torch, which takes seconds

        return verb.run(with_present_flags(arguments[1:]))
    except UserError as error:
        # What every process of a run sees, the first one says.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"mam2: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"mam2: error: {one_line(place)}{error.strerror}; make room or name another place", file=sys.stderr)
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
        told = one_line(str(error).partition("\n")[0])
        print(
            f"mam2: error: out of memory{f' ({told})' if told else ''}: fewer clips at once (--batch, "
            "optim.micro_batch), smaller or shorter clips, or a smaller model need less",
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
