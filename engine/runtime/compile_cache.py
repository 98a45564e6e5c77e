"""The folder in which torch.compile keeps compiled code, so that other processes and later runs need not compile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the folder of torch.compile's code, and of Triton's."""


def keep_compiled_code() -> str:
    """Returns the folder of compiled code; "" if only torch's own folder for temporary files remains.

    It is `$XDG_CACHE_HOME/mam2/compiled` (~/.cache/mam2/compiled), unless the environment variable names another one.
    torch's own default counts as none, because `import torch._dynamo` writes it into the variable. It is lost at a
    restart of the machine, and often at the end of a job. torch finds entries by a hash of code, shapes, device and
    versions and writes them atomically, so that processes and machines can share the folder. The device includes the
    number of the GPU: a process finds what an earlier run, or another machine, compiled for the same number. The
    processes of a machine compile at the same time.
    """
    folder = os.environ.get(VARIABLE, "")
    if folder and not _is_torchs(folder):
        return folder
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mam2" / "compiled"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only or unknown home
        return ""
    if not os.access(path, os.W_OK):
        return ""
    os.environ[VARIABLE] = str(path)
    return str(path)


def _is_torchs(folder: str) -> bool:
    """Returns whether a folder is the one that torch chooses by itself."""
    place, name = os.path.split(os.path.abspath(folder))
    return place == os.path.abspath(tempfile.gettempdir()) and name.startswith("torchinductor_")
