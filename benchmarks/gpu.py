"""Runs everything that needs a GPU in one command of twelve minutes: `make gpu`, or `python -m benchmarks.gpu`.

    smoke         tests/kernels/test_gpu.py: capture, autocast, streams
    correctness   every kernel on the device against float64
    operators     forward and backward at 64 clips, compared with the original codebases' forms and with libraries
    sweeps        rows per chunk, warps, attention implementations: the best values for the launch table
    counters      hardware counters of the main kernels, if ncu is installed
    step          a step of mam2-fast: eager, captured, compiled
    variants      operators compiled, at other batches, types and layouts
    videomae      a step of VideoMAE, compared with Hugging Face's
    loader        clips/s from encoded files, by decoder and in a step
    pretrain      a real run, killed and resumed
    files         clips/s for other codecs and key-frame distances, from recorded clips; codes online and from a cache
    mam2-cae      a step of mam2-cae
    compile       the slow tests of tests/kernels/test_gpu.py: torch.compile, opcheck

Each section runs in its own process with a time limit; it is killed if this process dies. Every row is written to
OUT/running.jsonl immediately. After each section all rows go into one file, OUT/<GPU>/<date>.json, next to a page and
plots. `--seconds` limits all sections together; a section that does not fit is reported as not started. Wheels in .whl/
are put on the path. Exit status 1: a kernel was wrong or fell back to PyTorch, or a section failed. `--dry-run` runs
everything on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine, processes
from benchmarks.machine import ROOT, commit
from benchmarks.report import draw, table
from benchmarks.sections import COLUMNS, NO_COMPILER, SECTIONS, Selection, failures, run_section
from mam2.engine.files import write_whole

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 720
STARTUP_S = 120
"""Time that a section may take to import torch and reach the device."""
MARK = "NOT a GPU result"
LOG_CHARACTERS = 4000
DRY_RUN = {"OMP_NUM_THREADS": "1", NO_COMPILER: "1"}
"""Environment variables of a dry run. It compiles nothing; without torch.compile each process also starts in half the
time, and libraries that compile their functions run them eagerly."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; the numbers mean nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit for all together; default: {SECONDS}")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--operators", nargs="+", default=[], help="only these operators, such as masked_pixel_loss")
    parser.add_argument("--shapes", nargs="+", default=[], help="only shapes with this in their name: B64, planar, …")
    parser.add_argument("--ways", nargs="+", default=[], help="only these providers or steps: ours, eager, compiled, …")
    parser.add_argument("--objectives", nargs="+", default=[], help="only these of the section step: mam2-fast, …")
    parser.add_argument("--no-compile", action="store_true", help="skip everything that needs torch.compile")
    parser.add_argument("--child", nargs=3, metavar=("SECTION", "FILE", "UNTIL"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        compiled = not (options.no_compile or options.dry_run)
        lists = (tuple(given) for given in (options.operators, options.shapes, options.ways, options.objectives))
        section, file, until = options.child
        return run_section(section, Path(file), float(until), Selection(options.dry_run, compiled, *lists))
    out = options.out or (Path(tempfile.mkdtemp(prefix="mam2-dry-run-")) if options.dry_run else RESULTS)
    if options.dry_run and out.resolve().is_relative_to(RESULTS):
        parser.error(f"--out {out}: a dry run writes no file to benchmarks/results; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    return measure(options, given, out)


def measure(options: argparse.Namespace, given: list[str], out: Path) -> int:
    """Runs the sections, most important first, and packs their rows; returns 1 if something is wrong."""
    until = time.monotonic() + options.seconds
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *given]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **({"note": f"{MARK}: dry run with tiny shapes on a CPU"} if options.dry_run else {}),
        "machine": {},
        "sections": {},
    }
    file: Path | None = None
    with tempfile.TemporaryDirectory() as folder:
        environment, report["packages"] = machine.environment(Path(folder))
        environment |= DRY_RUN if options.dry_run else {}
        print("\n".join(report["packages"]), flush=True)
        for name in (name for name in SECTIONS if name in options.sections):
            section, found = collect(name, options, given, out, until, environment)
            report["sections"][name] = section
            report["machine"] = report["machine"] or found
            if not report["machine"]:
                print(f"{name}: {section['status']}\n{section.get('log', '')}")
                return 1
            file = file or new_file(out, options.dry_run, report["machine"]["device"])
            pack(report, file, marked=options.dry_run)
            print(section_text(name, section, marked=options.dry_run), flush=True)
    problems = [f"{name}: {line}" for name, part in report["sections"].items() for line in failures(name, part)]
    print("\n".join([*(f"FAILED {line}" for line in problems), f"{MARK + ', ' if options.dry_run else ''}in {file}"]))
    return 1 if problems else 0


def collect(
    name: str, options: argparse.Namespace, given: list[str], out: Path, until: float, environment: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a section in its own process; returns its status, its rows (also those before a failure) and the machine."""
    left, limits = until - time.monotonic(), SECTIONS[name]
    if left < limits.least and not options.dry_run:
        status = f"not started: {max(left, 0):.0f} s left, it needs {limits.least}"
        return {"status": status, "seconds": 0.0, "rows": []}, {}
    rows_file, log = out / "running.jsonl", out / "running.log"
    command = [sys.executable, "-m", "benchmarks.gpu", *given, "--child", name, str(rows_file.resolve()), f"{until}"]
    rows_file.unlink(missing_ok=True)
    started = time.monotonic()
    ready: list[float] = []

    def limit() -> float:
        if not ready and rows_file.exists() and b"\n" in rows_file.read_bytes():
            ready.append(time.monotonic())
        return min(until, ready[0] + limits.most if ready else started + STARTUP_S)

    clocks = machine.Clocks(not options.dry_run)
    with log.open("w+b") as output:
        ended = processes.run(command, limit=limit, cwd=ROOT, environment=environment, output=output)
        output.seek(0)
        text = output.read().decode(errors="replace")
    measured = clocks.stop()
    late = f"cut off after {ended.seconds:.0f} s" + ("" if ready else ", before torch had reached the device")
    status = late if ended.code is None else "done" if ended.code == 0 else f"failed with exit status {ended.code}"
    rows = list(whole(rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []))
    found = rows.pop(0)["machine"] if rows else {}
    section = {"status": status, "seconds": round(ended.seconds, 1), "clocks": measured, "rows": rows}
    if status != "done" or failures(name, section):
        section["log"] = text[-LOG_CHARACTERS:]
    rows_file.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return section, found


def whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Returns the rows of a file whose last line may be incomplete."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def new_file(out: Path, dry_run: bool, device: str) -> Path:
    """Returns <out>/<device>/<date>.json, numbered if that file exists; a dry run's name contains the mark."""
    folder = out / slug(MARK if dry_run else device)
    folder.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    file, number = folder / f"{day}.json", 2
    while file.exists():
        file, number = folder / f"{day}-{number}.json", number + 1
    return file


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def pack(report: dict[str, Any], file: Path, *, marked: bool) -> None:
    """Writes all rows so far into one file, a page next to it, and the plots of the operators."""
    write_whole(file, json.dumps(report, indent=1) + "\n")
    lines = [
        f"# {report['machine']['device']}",
        "",
        f"`{report['command']}`, {report['date']}, commit {report['commit']}",
    ]
    lines += [f"{MARK}: a dry run on a CPU" if marked else json.dumps(report["machine"]), *report["packages"]]
    for name, section in report["sections"].items():
        clocks = "; ".join(f"{key} {'/'.join(f'{v:g}' for v in of)}" for key, of in section.get("clocks", {}).items())
        lines += ["", f"## {name}: {section['status']}, {section['seconds']} s", "", *([clocks, ""] if clocks else [])]
        lines += [table(latest(section["rows"]), COLUMNS[name])]
    if not marked and "operators" in report["sections"]:
        both = (report["sections"].get(name, {}).get("rows", ()) for name in ("operators", "variants"))
        rows = [row for part in both for row in part if not row.get("variant")]
        last = {(row["operator"], row.get("provider"), row.get("batch")): row for row in rows}
        plots = draw(list(last.values()), file.with_suffix(""), machine=report["machine"]["device"])
        lines += ["", plots.replace(str(file.parent) + "/", "")]
    write_whole(file.with_suffix(".md"), "\n".join(lines) + "\n")


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows without those of steps timed alone that were timed in turns later."""
    keys = ("objective", "batch", "precision", "provider", "step", "part")
    found: dict[Any, dict[str, Any]] = {}
    for place, row in enumerate(rows):
        found[tuple(row.get(key) for key in keys) if "timed" in row else place] = row
    return list(found.values())


def section_text(name: str, section: dict[str, Any], *, marked: bool) -> str:
    """Returns a title and the section's rows as text; for checks, only the rows that are not right."""
    rows = latest(section["rows"])
    title = f"{name}: {section['status']}, {section['seconds']} s"
    if name == "correctness":
        right = sum(row["verdict"] == "right" for row in rows)
        title += f"; {right} of {len(rows)} right, path {', '.join(sorted({row['path'] for row in rows}))}"
        rows = [row for row in rows if row["verdict"] != "right"]
    if marked:
        title = f"{MARK} | {title}"
    log = f"\n{section['log']}" if "log" in section else ""
    return f"\n{title}\n{table(rows, COLUMNS[name])}{log}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
