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
that is done is kept in OUT/trials.jsonl: an interrupted run continues where it stopped. OUT gets results.json, the page
and its pictures; with --minutes they are of what was done by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.trials import jobs as plan
from benchmarks.trials import prepared, real, worker
from benchmarks.trials.clips import LABELS, write_hard_dataset
from benchmarks.trials.jobs import Job, ranked_rates
from benchmarks.trials.report import around, write_page
from benchmarks.trials.selection import JUDGED, REAL_JUDGED
from benchmarks.trials.settings import SETTINGS, Setting, changed, optimizer_of, pretraining
from mam2.engine.config.recipe import to_dict
from mam2.engine.costs import step_flops
from mam2.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "convergence.md"
PACKAGES = ("mam2", "torch", "numpy")
WIDENED = 1
"""So many rates more are tried where a best one is the lowest or highest."""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed memory for the next step instead of handing it back: on a CPU 5 to 13 % of a step's time."""
SPLITS = ("train", "validation", "test")


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
    """A run in its folder, with what it has done so far."""

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
            described.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        elif json.loads(described.read_text(encoding="utf-8")) != mine:
            raise UserError(f"--out {out} holds a run of other settings or data: name another folder")
        seconds = out / "seconds.txt"
        self._before_s = float(seconds.read_text()) if seconds.is_file() else 0.0
        file = out / "trials.jsonl"
        if file.is_file():
            whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
            file.write_text("".join(whole), encoding="utf-8")  # without one that a sudden end has cut off
            self.done = {line["key"]: line for line in map(json.loads, whole)}

    @property
    def wall_s(self) -> float:
        """Seconds of this call and those before it."""
        return self._before_s + time.perf_counter() - self.start

    def note_time(self) -> None:
        (self.out / "seconds.txt").write_text(str(self.wall_s))

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
        return self.results([job for job in wanted if job.key in self.done], later)

    def sweep(self, wanted: list[Job]) -> dict[str, float]:
        """The best learning rate of each variant. Its trainings are added to `wanted` before they are done.

        Where a best rate is the lowest or highest tried, one beyond it is tried as well, `WIDENED` times at most; of
        the other variants then one more, too, so that each has had as many.
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
        videos = self.out / "videos"
        if not (self.out / "synthetic" / prepared.PREPARED).is_file():
            write_hard_dataset(videos, setting.counts, size=64 if base.data.size <= 64 else 128)
        prepared.prepare(
            {split: videos / split for split in SPLITS},
            self.out / "synthetic",
            base,
            recorded=setting.recorded,
            views=setting.views,
            questions=videos / LABELS,
        )

    def prepare_real(self) -> None:
        if self.real:
            base, folder = changed(pretraining(self.setting, {}), self.setting.real), self.out / "real"
            real.prepare_questions(self.real.asked, self.real.group, folder, base)
            prepared.prepare({"train": self.real.pretrain}, folder, base, recorded=1, views=self.setting.views)

    def measure(self) -> None:
        """Milliseconds of a step of every variant, in a process of its own."""
        file = self.out / "steps.json"
        if not file.is_file() or not set(worker.timed(self.setting)) <= set(json.loads(file.read_text("utf-8"))):
            with self._pool(1) as pool:
                found = pool.submit(worker.time_steps, self.setting, self.out / "synthetic").result()
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        self.steps_ms = json.loads(file.read_text(encoding="utf-8"))

    def train(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What came of the jobs; runs those that are not done, in their order. OutOfTime where not all could be."""
        left = [job for job in jobs if job.key not in self.done]
        queue, running = iter(left), {}
        with (
            self._pool(self.workers) as pool,
            (self.out / "trials.jsonl").open("a", encoding="utf-8") as file,
            tqdm(total=len(left), desc="trainings", unit="training", disable=not left) as bar,
        ):
            while True:
                # no more than are run at once: what is not begun when the time is over is left
                while len(running) < self.workers and not self._over() and (job := next(queue, None)):
                    running[pool.submit(worker.run_job, self.setting, self.out, job)] = job
                if not running:
                    break
                ended: Future[dict[str, Any]]
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(ended)
                    try:
                        found = ended.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise
                    self.done[job.key] = {"key": job.key, **dataclasses.asdict(job), **found}
                    file.write(json.dumps(self.done[job.key]) + "\n")
                    file.flush()
                    self.note_time()
                    bar.update()
                    score = found.get("finetune", found.get("probe", found.get(REAL_JUDGED)))
                    result = "" if score is None else f": {100 * score:.1f} %"
                    bar.set_postfix_str(f"{job.group} {job.label or job.variant}, {job.epochs:g} epochs{result}")
        if any(job.key not in self.done for job in jobs):
            raise OutOfTime
        return [self.done[job.key] for job in jobs]

    def _over(self) -> bool:
        return self._minutes > 0 and time.perf_counter() - self.start > 60 * self._minutes

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        for name, value in ALLOCATOR.items():
            os.environ.setdefault(name, value)  # read when a process starts
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker.begin)

    def results(self, jobs: Sequence[Job], later: Sequence[Job]) -> dict[str, Any]:
        """What the report is made of. later: the sweeps at larger budgets; their best ones are among the jobs, too."""
        there = self.real and (self.out / "real" / prepared.PREPARED).is_file()
        names = ("synthetic", *(["real"] if there else []))
        facts = {name: json.loads((self.out / name / prepared.PREPARED).read_text(encoding="utf-8")) for name in names}
        tuned = {plan.trained_by(job).key: self.done[job.key] for job in jobs if job.group == "finetune"}
        trained = [job for job in jobs if job.group != "finetune"]
        trials = [self._trial(job, facts[job.data], tuned) for job in trained if job.group != "random"]
        trials += [{**self._trial(job, facts[job.data], {}), "group": "sweep"} for job in later]
        trials += [
            {**trial, "group": "ablation", "family": "default", "label": "default"}
            for trial in trials
            if (trial["group"], trial["variant"], trial["epochs"])
            == ("main", self.setting.default, self.setting.ablation_epochs)
        ]
        untrained = [
            {**self.done[job.key], "finetune": tuned.get(job.key, {}).get("finetune")}
            for job in trained
            if job.group == "random"
        ]
        found = {
            "machine": _machine(self.workers),
            "setting": self.setting.name,
            "default": self.setting.default,
            "budgets": list(self.setting.budgets),
            "seeds": self.setting.seeds,
            "config": to_dict(pretraining(self.setting, {})),
            "date": datetime.date.today().isoformat(),
            "wall_s": self.wall_s,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "data": {name: {"validation": 0, **fact["videos"], "classes": fact["classes"]}
                     for name, fact in facts.items()},
            "preparation": {name: facts["synthetic"][name] for name in
                            ("tokenizer_s", "tokenize_s", "tokenizer_flops", "tokenize_flops")},
            "steps_ms": self.steps_ms,
            "trials": [_shown(trial) for trial in trials],
            "random": [_shown(trial) for trial in untrained],
        }  # fmt: skip
        if there:
            found["real"] = self._real()
        return found

    def _real(self) -> dict[str, Any]:
        """The questions about real clips, and what the pixel baseline answers."""
        clips = real.load_questions(self.out / "real")
        file = self.out / "pixels.json"
        if not file.is_file():
            answers = {
                name: {kind: answer._asdict() for kind, answer in answers.items()}
                for name, answers in real.pixel_answers(clips).items()
            }
            file.write_text(json.dumps(answers), encoding="utf-8")
        return {
            "pixels": json.loads(file.read_text(encoding="utf-8")),
            "questions": {
                name: {
                    "train": len(asked.train),
                    "test": len(asked.test),
                    "classes": int(asked.train_labels.max()) + 1,
                    "groups": asked.test_groups.tolist(),
                }
                for name, asked in clips.questions.items()
            },
        }

    def _trial(self, job: Job, facts: dict[str, Any], tuned: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found = self.done[job.key]
        config = worker.config_of(self.setting, job)
        codes = facts["codebook_size"] if config.needs_codes else 0
        frames = config.model.tubelet if config.code_shape else 1
        clips = found["steps"] * config.optim.batch
        step_s = self.steps_ms[job.label or job.variant] / 1000
        tokenize = {unit: frames * facts[f"tokenize_{unit}"] for unit in ("s", "flops")}
        return found | {
            "changes": dict(job.changes),
            "finetune": tuned.get(job.key, {}).get("finetune"),
            "step_ms": 1000 * step_s,
            "train_s": found["steps"] * step_s,
            "epoch_s": found["steps"] / job.epochs * step_s,
            "flops": float(sum(step_flops(config, codes).values()) * clips),
            "preparation_s": facts["tokenizer_s"] + tokenize["s"] if codes else 0.0,
            "preparation_flops": facts["tokenizer_flops"] + tokenize["flops"] if codes else 0.0,
        }


def _shown(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial without what only this program reads."""
    return {name: value for name, value in trial.items() if name != "key"}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value)


def _machine(workers: int) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{workers} {'core' if workers == 1 else 'cores'} of {model}"


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
        around(options.page)  # what cannot be written in the end is said now
    try:
        run = Run(setting, out, _real_clips(options), minutes=options.minutes)
        try:
            results = run.all()
        finally:
            run.note_time()
    except UserError as error:
        print(f"convergence: error: {error}", file=sys.stderr)
        return 2
    page = options.page or Path(shutil.copy(PAGE, out / PAGE.name))
    (out / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    write_page(results, page)
    print(f"{len(run.done)} trainings; {page}, {out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
