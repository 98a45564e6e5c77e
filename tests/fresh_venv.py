"""Installs the package into fresh environments as a user's pip would, one per Python, and runs the verbs in each.

    python tests/fresh_venv.py                          # every Python from 3.10 found on this machine
    python tests/fresh_venv.py python3.12 python3.13    # these
    python tests/fresh_venv.py --with 'av==16.*'        # an older release of a dependency, in each of them

pip takes the newest release of every dependency that setup.py admits, so this is also the check of the bounds there.
Nothing of the repository's own environment is used; the environments lie in a temporary folder and are deleted. Each
needs up to 6 GB while it exists (torch with its CUDA libraries). Prints a row per Python, and exits with 1 if a step of
any failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
REPORTED = ("torch", "triton", "numpy", "av", "tyro", "safetensors")
SETTINGS = ["--optim.epochs", "0.5", "--optim.warmup-epochs", "0", "--tokenizer.steps", "20", "--run.no-compile"]
WRITE_CLIPS = "from mam2.engine.data.synthetic import write_dataset; write_dataset('clips', train=64, test=16)"


def find_pythons() -> list[str]:
    """Interpreters on the PATH, and those that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for version in VERSIONS:
        candidates = [*sorted(kept.glob(f"{version}.*/bin/python")), Path(shutil.which(f"python{version}") or "/none")]
        for candidate in candidates:
            if candidate.is_file() and _output([candidate, "--version"]).startswith(f"Python {version}."):
                found.append(str(candidate))
                break
    return found


def steps(python: Path) -> dict[str, list[str | Path]]:
    """Commands of a user by name, in an environment whose interpreter is `python`."""
    mam2 = python.with_name("mam2")
    return {
        "version": [mam2, "--version"],
        "doctor": [mam2, "doctor"],
        "clips": [python, "-c", f"if __name__ == '__main__':\n  {WRITE_CLIPS}"],
        "index": [mam2, "index", "clips/train"],
        "pretrain": [mam2, "pretrain", "demo", "--data", "clips/train", "--out", "run", *SETTINGS],
        "resume": [mam2, "pretrain", "demo", "--data", "clips/train", "--out", "run", *SETTINGS, "--resume"],
        "plot": [mam2, "plot", "run"],
        "probe": [mam2, "probe", "run", "--data", "clips/train", "--val", "clips/test"],
        "embed": [mam2, "embed", "run", "--data", "clips/test", "--out", "features.npy"],
        "export": [mam2, "export", "run", "--to", "videomae", "--out", "exported.pth"],
    }


def try_python(python: str, extra: str, pins: list[str], folder: Path) -> tuple[dict[str, str], str]:
    """Returns (versions by package, the error or "") for one interpreter; `folder` is its own, empty."""
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv" / "bin" / "python"
    work = folder / "work"
    work.mkdir()
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".venv", "runs", "build", ".git"))
    installed = _run([inside, "-m", "pip", "install", "-q", f"{folder / 'source'}[{extra}]", *pins], work)
    if installed.returncode:
        return {}, f"pip install: {_last_line(installed)}"
    listed = _output([inside, "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"])
    found = dict(line.split("==") for line in listed.splitlines() if "==" in line)
    versions = {name: found.get(name, "-") for name in REPORTED}
    for name, command in steps(inside).items():
        done = _run(command, work)
        if done.returncode:
            return versions, f"{name}: exit status {done.returncode}: {_last_line(done)}"
    return versions, ""


def _run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of the checkout, without the Python variables of this process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else "nothing printed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="interpreters; default: all that are found")
    parser.add_argument("--extra", default="engine", help="extra of the package to install (default: engine)")
    parser.add_argument("--with", dest="pins", action="append", default=[], help="a requirement to install as well")
    options = parser.parse_args()
    pythons = options.pythons or find_pythons()
    if not pythons:
        sys.exit(f"no Python of {', '.join(VERSIONS)} found: name an interpreter")
    failed = False
    print(f"{'Python':<8}" + "".join(f"{name:<14}" for name in REPORTED) + "minutes  result", flush=True)
    for python in pythons:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mam2-fresh-") as folder:
            versions, problem = try_python(python, options.extra, options.pins, Path(folder))
        failed |= bool(problem)
        row = "".join(f"{versions.get(name, '-'):<14}" for name in REPORTED)
        minutes = (time.monotonic() - start) / 60
        version = _output([python, "--version"]).split()[-1]
        print(f"{version:<8}{row}{minutes:<9.1f}{problem or 'passed'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
