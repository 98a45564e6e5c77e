"""Does MAM2 need fewer epochs than VideoMAE, and less time? `make convergence`, or `python -m benchmarks.convergence`.

    prepare    hard synthetic clips as files, decoded once; a tokenizer, and its codes (seconds and FLOPs noted)
    steps      a training step of every variant, all taking turns: the seconds of a training are its steps times that
    sweep      as many learning rates for each method and optimizer, at several budgets, judged on validation clips
    main       both methods under both optimizers at several budgets of epochs, each a training with its own schedule
    ablations  one change of the default each, at one budget
    real       pre-training on real clips and questions about others (--real-train, --real-test), where there are any,
               at the best of three rates per variant, judged by the first question
    finetune   of the encoders of the main comparison

Trainings run side by side, one on each CPU core (on a GPU one after the other), the important ones first. Every one
that is done is kept in OUT/trials.jsonl: an interrupted run continues where it stopped, and encoders that lack answers
of a probe that is new are asked for these only. OUT gets results.json, the page
and its pictures; with --minutes they are of what was done by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.trials import jobs as plan
from benchmarks.trials import prepared, real, worker
from benchmarks.trials.clips import LABELS, write_hard_dataset
from benchmarks.trials.jobs import Job, ranked_rates
from benchmarks.trials.report import around, write_page
from benchmarks.trials.results import Measured, results
from benchmarks.trials.selection import JUDGED, REAL_JUDGED
from benchmarks.trials.settings import SETTINGS, Changes, Setting, changed, optimizer_of, pretraining
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "convergence.md"
WIDENED = 1
"""Number of further rates to try if a best one is the lowest or highest."""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed memory for the next step instead of handing it back: on a CPU 5 to 13 % of a step's time."""
SPLITS = ("train", "validation", "test")
Call = Callable[[], dict[str, Any]]


class Real(NamedTuple):
    """Real clips, as the command line names them."""

    asked: tuple[real.Lists, ...]
    pretrain: Path
    """Clips to pre-train on, whose labels, if any, are not read."""
    group: str = ""
    """TABLE:COLUMN, see `real.prepare_questions`."""


class OutOfTime(Exception):
    """The minutes of this call are over."""


class Run:
    """A run in its folder, with the results so far."""

    def __init__(self, setting: Setting, out: Path, real_clips: Real | None, *, minutes: float = 0.0) -> None:
        self.setting, self.out, self.real, self._minutes = setting, out, real_clips, minutes
        self.workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        self.steps_ms: dict[str, float] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.start = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        same = ("name", "counts", "base", "videomae", "real", "finetune", "labelled", "recorded", "views")
        named = [*(map(str, lists) for lists in real_clips.asked), real_clips.pretrain] if real_clips else []
        mine = json.loads(json.dumps([[getattr(setting, name) for name in same], named], default=_plain))
        described = out / "setting.json"
        if not described.is_file():
            write_whole(described, json.dumps(mine, indent=1))
        elif json.loads(described.read_text(encoding="utf-8")) != mine:
            raise UserError(f"--out {out} holds a run of other settings or data: name another folder")
        seconds = out / "seconds.txt"
        self._before_s = float(seconds.read_text()) if seconds.is_file() else 0.0
        file = out / "trials.jsonl"
        if file.is_file():
            whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
            write_whole(file, "".join(whole))  # without a line that a crash has cut off
            self.done = {line["key"]: line for line in map(json.loads, whole)}

    @property
    def wall_s(self) -> float:
        """Seconds of this call and those before it."""
        return self._before_s + time.perf_counter() - self.start

    def note_time(self) -> None:
        write_whole(self.out / "seconds.txt", str(self.wall_s))

    def all(self) -> dict[str, Any]:
        """Prepares, measures and trains all that is not done; returns the results."""
        setting = self.setting
        self.prepare()
        wanted: list[Job] = []
        try:
            swept = self.sweep(wanted)
            rates = {setting.sweep_epochs: swept}
            self.prepare_real()
            wanted += (early := plan.early_jobs(setting, rates, real=bool(self.real)))
            self.train(early)
            if self.real:
                wanted += (tried := plan.real_sweep_jobs(setting, swept))
                wanted += (real_jobs := plan.real_jobs(setting, self.best_rates(tried, REAL_JUDGED)))
                self.train(real_jobs)
                self.ask_again([job for job in wanted if job.data == "real"])
            for epochs in setting.later_rates:
                rates[epochs] = self.best_rates(plan.later_sweep_jobs(setting, epochs), JUDGED)
            for jobs in (
                plan.middle_jobs(setting, rates),
                plan.finetune_jobs(setting, rates),
                plan.last_jobs(setting, rates),
            ):
                wanted += [job for job in jobs if job not in wanted]
                self.train(jobs)
        except OutOfTime:
            pass
        self.measure()
        later = [job for job in plan.all_later_sweep_jobs(setting) if job.key in self.done]
        measured = Measured(setting, self.out, self.done, self.steps_ms, self.workers, self.wall_s)
        return results(measured, [job for job in wanted if job.key in self.done], later)

    def sweep(self, wanted: list[Job]) -> dict[str, float]:
        """Returns the best learning rate of each variant; adds the trainings to `wanted` before they run.

        If a best rate is the lowest or highest of those tried, one beyond it is tried, at most `WIDENED` times. Every
        other variant then gets one more rate as well, so that all have the same number.
        """
        setting = self.setting
        tried = {variant: sorted(setting.rates[optimizer_of(changes)]) for variant, changes in setting.variants.items()}
        for left in reversed(range(WIDENED + 1)):
            jobs = plan.sweep_jobs(setting, tried)
            wanted[:] = jobs
            ranked = ranked_rates(self.train(jobs))
            if not left or not any(plan.at_an_end(tried[variant], rates[0]) for variant, rates in ranked.items()):
                break
            tried = {
                variant: sorted([*tried[variant], plan.wider(tried[variant], ranked[variant])]) for variant in tried
            }
        return {variant: rates[0] for variant, rates in ranked.items()}

    def best_rates(self, jobs: Sequence[Job], judged: str) -> dict[str, float]:
        """Trains the jobs; returns the learning rate of each of their variants with the highest `judged`."""
        return {variant: rates[0] for variant, rates in ranked_rates(self.train(jobs), judged).items()}

    def prepare(self) -> None:
        worker.limit_threads()
        setting, base = self.setting, pretraining(self.setting, {})
        videos, folder = self.out / "videos", self.out / "synthetic"
        if not (folder / prepared.PREPARED).is_file():
            write_hard_dataset(videos, setting.counts, size=64 if base.data.size <= 64 else 128)
        prepared.prepare(
            {split: videos / split for split in SPLITS},
            folder,
            base,
            recorded=setting.recorded,
            views=setting.views,
            questions=videos / LABELS,
        )
        self._add_codes(videos / "train", folder, base, worker.timed(setting).values())

    def prepare_real(self) -> None:
        if self.real:
            setting = self.setting
            base, folder = changed(pretraining(setting, {}), setting.real), self.out / "real"
            real.prepare_questions(self.real.asked, self.real.group, folder, base)
            prepared.prepare({"train": self.real.pretrain}, folder, base, recorded=1, views=setting.views)
            variants = [setting.all_variants[variant] for variant in setting.real_variants]
            self._add_codes(self.real.pretrain, folder, base, variants)

    def _add_codes(self, train: Path, folder: Path, base: PretrainConfig, variants: Iterable[Changes]) -> None:
        """Prepares further codes per patch, where variants have them; `prepare` of prepared.py has done one."""
        for depth in worker.depths(pretraining(self.setting, changes) for changes in variants):
            if depth > 1:
                prepared.add_codes(train, folder, changed(base, {"tokenizer.codes_per_patch": depth}))

    def measure(self) -> None:
        """Milliseconds of a step of every variant, in a process of its own.

        Variants that a kept run lacks are timed in turns with the default, and relative to its time in that run.
        """
        file, default = self.out / "steps.json", self.setting.default
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if missing := [variant for variant in worker.timed(self.setting) if variant not in known]:
            wanted = list(dict.fromkeys([*missing, default]))
            with self._pool(1) as pool:
                found = pool.submit(worker.time_steps, self.setting, self.out / "synthetic", wanted).result()
            scale = known.get(default, found[default]) / found[default]
            known |= {variant: scale * found[variant] for variant in missing}
            write_whole(file, json.dumps(known, indent=1))
        self.steps_ms = known

    def train(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Runs the jobs that are not done, in their order; returns the results of all. Raises OutOfTime."""
        left = {job: partial(worker.run_job, self.setting, self.out, job) for job in jobs if job.key not in self.done}
        for job, found in self._ended("trainings", left):
            self._keep(job, {"key": job.key, **dataclasses.asdict(job), **found})
        if any(job.key not in self.done for job in jobs):
            raise OutOfTime
        return [self.done[job.key] for job in jobs]

    def ask_again(self, jobs: Sequence[Job]) -> None:
        """Gets from kept encoders the answers about real clips that their trainings, of an earlier version, lack.

        Raises OutOfTime.
        """
        lacking = {job: kinds for job in jobs if (kinds := self._lacking(job))}
        calls = {job: partial(worker.ask_again, self.setting, self.out, job, kinds) for job, kinds in lacking.items()}
        for job, found in self._ended("answers", calls):
            known = self.done[job.key]
            answers = {name: {**each, **found["answers"][name]} for name, each in known["answers"].items()}
            spent = known["measuring_cpu_s"] + found["measuring_cpu_s"]
            self._keep(job, {**known, "answers": answers, "measuring_cpu_s": spent})
        if any(map(self._lacking, jobs)):
            raise OutOfTime

    def _lacking(self, job: Job) -> list[str]:
        """Kinds of answers that a training lacks although its encoder was kept."""
        answers = self.done.get(job.key, {}).get("answers", {})
        kept = worker.encoder_file(self.out, job).is_file()
        return [kind for kind in real.KINDS if kept and any(kind not in each for each in answers.values())]

    def _keep(self, job: Job, found: dict[str, Any]) -> None:
        """Appends a line to trials.jsonl; of several lines with one key the last counts."""
        self.done[job.key] = found
        with (self.out / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        self.note_time()

    def _ended(self, what: str, calls: Mapping[Job, Call]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yields what the calls return when they end; they begin in their order, and none after the time limit."""
        queue, running = iter(calls), dict[Future[dict[str, Any]], Job]()
        with (
            self._pool(self.workers) as pool,
            tqdm(total=len(calls), desc=what, unit=what.removesuffix("s"), disable=not calls) as bar,
        ):
            while True:
                # submits only as many jobs as run at once, so that none starts after the time limit
                while len(running) < self.workers and not self._over() and (job := next(queue, None)):
                    running[pool.submit(calls[job])] = job
                if not running:
                    break
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(ended)
                    try:
                        found = ended.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise
                    yield job, found
                    bar.update()
                    score = found.get("finetune", found.get("probe", found.get(REAL_JUDGED)))
                    result = "" if score is None else f": {100 * score:.1f} %"
                    bar.set_postfix_str(f"{job.group} {job.label or job.variant}, {job.epochs:g} epochs{result}")

    def _over(self) -> bool:
        return self._minutes > 0 and time.perf_counter() - self.start > 60 * self._minutes

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        for name, value in ALLOCATOR.items():
            os.environ.setdefault(name, value)  # read when a process starts
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker.begin)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value)


def _real_clips(options: argparse.Namespace) -> Real | None:
    train, test = options.real_train or [], options.real_test or []
    if len(train) != len(test):
        raise UserError(
            f"--real-train and --real-test belong together: found {len(train)} and {len(test)} of them; give one "
            "--real-test after each --real-train"
        )
    if not train:
        if options.real_pretrain or options.real_group:
            raise UserError("--real-pretrain and --real-group need --real-train and --real-test")
        return None
    asked = [real.Lists(*each) for each in zip(train, test, strict=True)]
    names = [lists.name for lists in asked]
    for text in options.real_shots or []:
        name, _, count = text.partition("=")
        if name not in names or not count.isdecimal() or not int(count):
            raise UserError(f"--real-shots {text}: expected NAME=COUNT with one of the names {', '.join(names)}")
        asked[names.index(name)] = asked[names.index(name)]._replace(shots=int(count))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--real-train: two lists are named {twice}; a question has the name of its list")
    return Real(tuple(asked), options.real_pretrain or train[0], options.real_group)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--setting", choices=list(SETTINGS), default=default, help=f"sizes; here {default}")
    parser.add_argument("--quick", action="store_const", const="quick", dest="setting", help="all of it in small")
    parser.add_argument("--out", type=Path, help="folder of the run; runs/convergence-SETTING if not given")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="minutes after which no training begins; 0: no limit"
    )
    parser.add_argument(
        "--real-train",
        type=Path,
        action="append",
        help="labeled real clips to fit probes on: a folder of classes, or a list; several are questions of their own",
    )
    parser.add_argument(
        "--real-test", type=Path, action="append", help="those to test on, one for each --real-train, of its classes"
    )
    parser.add_argument(
        "--real-pretrain", type=Path, help="real clips to pre-train on; the first --real-train if not given"
    )
    parser.add_argument(
        "--real-shots", action="append", metavar="NAME=COUNT", help="fit a question on this number of clips per class"
    )
    parser.add_argument(
        "--real-group", default="", metavar="TABLE:COLUMN", help="what a clip belongs to (a speaker), for the intervals"
    )
    parser.add_argument(
        "--page", type=Path, help=f"page to bring up to date; a copy of {PAGE.name} in OUT if not given"
    )
    options = parser.parse_args()
    setting: Setting = SETTINGS[options.setting]
    out = options.out or ROOT / "runs" / f"convergence-{setting.name}"
    if options.page:
        around(options.page)  # fails now if it cannot be written in the end
    try:
        run = Run(setting, out, _real_clips(options), minutes=options.minutes)
        try:
            found = run.all()
        finally:
            run.note_time()
    except UserError as error:
        print(f"convergence: error: {error}", file=sys.stderr)
        return 2
    page = options.page or Path(shutil.copy(PAGE, out / PAGE.name))
    write_whole(out / "results.json", json.dumps(found) + "\n")
    write_page(found, page)
    print(f"{len(run.done)} trainings; {page}, {out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
