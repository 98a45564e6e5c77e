"""Everything that needs a GPU, in one command of at most eight minutes: `make gpu`, or `python -m benchmarks.gpu`.

    correctness   every kernel on the device against float64
    operators     times, bandwidth and memory beside the original codebases' forms, compiled ones and libraries
    step          clips/s and MFU of whole training steps
    loader        clips/s from encoded files; codes from a tokenizer and from a cache

Each section runs in a process of its own with a time limit, so that one that hangs or spoils the device leaves the
others standing, and what it has measured is kept. The numbers go to benchmarks/results/<GPU>/<date>.json after each
section, plots beside them. Exit status 1: a kernel was wrong or a section broke. `--dry-run` goes through all of it on
the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import draw, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = {"correctness": 110, "operators": 160, "step": 140, "loader": 65}
"""Time limit of each section."""
MARK = "NOT a GPU result"
PACKAGES = ("mam2", "torch", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "av", "numpy")
COLUMNS = {
    "correctness": ("check", "error", "verdict", "reason"),
    "operators": (
        *("operator", "shape", "provider", "verdict", "error", "median_ms", "p20_ms", "p80_ms", "replayed", "gb_per_s"),
        *("percent_of_copy", "percent_of_matmul", "ratio_to_eager", "peak_mib", "dispatch_us", "copy_gb_per_s"),
        *("matmul_tflop_per_s", "reason"),
    ),
    "step": (
        *("objective", "batch", "precision", "provider", "step", "verdict", "loss", "median_ms", "p20_ms", "p80_ms"),
        *("clips_per_s", "mfu_percent", "ratio", "ratio_to_best", "peak_gib", "part", "forward_ms", "backward_ms"),
        *("percent", "percent_of_flops", "reason"),
    ),
    "loader": (
        *("front_end", "files", "gop", "threads", "views", "clips_per_s", "frames_per_s", "ratio_to_pyav_alone"),
        *("data_wait_percent", "limit", "tokenizer", "codes", "median_ms_per_clip", "verdict", "reason"),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    parser.add_argument("--sections", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile would give")
    parser.add_argument("--child", nargs=2, metavar=("SECTION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return run_section(options.child[0], Path(options.child[1]), options.dry_run, not options.no_compile)
    out = options.out or (Path(tempfile.mkdtemp(prefix="mam2-dry-run-")) if options.dry_run else RESULTS)
    if options.dry_run and out.resolve().is_relative_to(RESULTS):
        parser.error(f"--out {out}: a dry run leaves no file in benchmarks/results")
    given = sys.argv[1:] if arguments is None else arguments
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *given]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **({"note": f"{MARK}: dry run with tiny shapes on a CPU"} if options.dry_run else {}),
        "machine": {},
        "sections": {},
    }
    file: Path | None = None
    for name in options.sections:
        section, machine = collect(name, options)
        report["sections"][name] = section
        report["machine"] = report["machine"] or machine
        if not report["machine"]:
            print(f"{name}: {section['status']}; is the project installed (pip install --no-deps -e .)?")
            return 1
        file = file or new_file(out, options.dry_run, report["machine"]["device"])
        save(report, file)
        print(section_text(name, section, marked=options.dry_run), flush=True)
        if name == "operators" and not options.dry_run:
            print(draw(section["rows"], file.with_suffix(""), machine=report["machine"]["device"]))
    problems = [f"{name}: {line}" for name in options.sections for line in failures(name, report["sections"][name])]
    print("\n".join([*(f"FAILED {line}" for line in problems), f"{MARK + ', ' if options.dry_run else ''}in {file}"]))
    return 1 if problems else 0


def collect(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a section in a process of its own: its status and rows, also those before a break, and the machine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        flags = [*(["--dry-run"] if options.dry_run else []), *(["--no-compile"] if options.no_compile else [])]
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, str(file), *flags]
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = child.wait(SECONDS[name])
            status = "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {SECONDS[name]} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with the compiler's workers
                child.wait()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = list(whole(lines))
    machine = rows.pop(0)["machine"] if rows else {}
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "rows": rows}, machine


def whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file whose last line may be cut off."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def run_section(name: str, file: Path, dry_run: bool, compiled: bool) -> int:
    """In the process of a section: writes the machine and then every row to `file` as soon as it is there."""
    deadline = time.monotonic() + 0.85 * SECONDS[name]
    import torch

    from mam2.kernels import active_path

    device = torch.device("cpu" if dry_run else "cuda")
    with file.open("w", encoding="utf-8") as stream:

        def write(row: dict[str, Any]) -> None:
            stream.write(json.dumps(tidy(row)) + "\n")
            stream.flush()

        if not dry_run and not torch.cuda.is_available():
            print("torch sees no GPU; --dry-run goes through the same on the CPU", file=sys.stderr)
            return 2
        write({"machine": describe(device)})
        if not dry_run and active_path(device) != "triton":
            print(f"the kernels would run through {active_path(device)}: unset MAM2_KERNELS", file=sys.stderr)
            return 2
        for row in rows_of(name, compiled)(device, deadline):
            write(row)
    return 0


def rows_of(name: str, compiled: bool) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function that yields a section's rows."""
    if name == "correctness":
        from benchmarks.correctness import rows
    elif name == "loader":
        from benchmarks import bench_loader, bench_tokenizer

        def rows(device: Any, deadline: float) -> Iterator[dict[str, Any]]:
            yield from bench_loader.rows(device, deadline)
            yield from bench_tokenizer.rows(device, deadline)

    else:
        from benchmarks import bench_step, operators

        module = operators if name == "operators" else bench_step
        return lambda device, deadline: module.rows(device, deadline, compiled=compiled)
    return rows


def describe(device: Any) -> dict[str, Any]:
    """The machine and the versions that a number depends on."""
    import torch

    from mam2.kernels.launch import table_for

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, Any] = {
        "device": "CPU",
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }
    machine["launch_table"] = table_for(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": properties.L2_cache_size / 2**20,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return machine


def commit() -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None outside of one."""
    try:
        options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        return head + ("+" if subprocess.run(["git", "status", "--porcelain"], **options).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def new_file(out: Path, dry_run: bool, device: str) -> Path:
    """<out>/<device>/<date>.json, numbered where there is one of that day; named by the mark after a dry run."""
    folder = out / slug(MARK if dry_run else device)
    folder.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    file, number = folder / f"{day}.json", 2
    while file.exists():
        file, number = folder / f"{day}-{number}.json", number + 1
    return file


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(report: dict[str, Any], file: Path) -> None:
    """Replaces the file at once, so that a run cut off here keeps the one before."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def tidy(value: Any) -> Any:
    """Floats to six digits; those that JSON does not know as words."""
    if isinstance(value, dict):
        return {key: tidy(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def failures(name: str, section: dict[str, Any]) -> list[str]:
    """What makes a run fail: a broken section, a wrong or unchecked kernel, a part of ours that does not run."""
    rows, status = section["rows"], section["status"]
    bad = [] if status == "done" or (status.startswith("cut off") and name != "correctness") else [status]
    for row in rows:
        verdict = row.get("verdict", "right")
        ours = name == "correctness" or row.get("provider", "ours") == "ours"
        late = verdict == "skipped" and name != "correctness"
        too_large = row.get("reason", "").startswith("OutOfMemoryError")
        if ours and verdict != "right" and not late and not too_large:
            label = next(
                str(row[key]) for key in ("check", "operator", "objective", "front_end", "tokenizer") if key in row
            )
            bad.append(f"{label}: {verdict} {row.get('reason', row.get('error', ''))}")
    return bad


def section_text(name: str, section: dict[str, Any], *, marked: bool) -> str:
    """A title and the section's rows; of the checks, those that are not right."""
    rows = section["rows"]
    title = f"{name}: {section['status']}, {section['seconds']} s"
    if name == "correctness":
        right = sum(row["verdict"] == "right" for row in rows)
        title += f"; {right} of {len(rows)} right, path {', '.join(sorted({row['path'] for row in rows}))}"
        rows = [row for row in rows if row["verdict"] != "right"]
    if marked:
        title = f"{MARK} | {title}" + (" | ratios to eager only" if name == "operators" else "")
    return f"\n{title}\n{table(rows, COLUMNS[name])}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
