"""Does MAM2 need fewer epochs than VideoMAE, and less time? `make convergence`, or `python -m benchmarks.convergence`.

    prepare    hard synthetic clips as files, decoded once; a tokenizer, and its codes (seconds and FLOPs noted)
    steps      a training step of every variant, all taking turns: the seconds of a training are its steps times that
    sweep      the same learning rates for both methods, judged by a linear probe on validation clips; then the two best
               of each once more, at the largest budget with all seeds
    main       both methods at several budgets of epochs, each a training with its own schedule; probe and fine-tuning
    ablations  one change of MAM2 each, at one budget
    real       both methods on labelled real clips (--real-train, --real-test), where there are any

Trainings run side by side, one on each CPU core (on a GPU one after the other). Every one that is done is kept in
OUT/trials.jsonl: an interrupted run goes on where it stopped. OUT gets results.json, the page and its pictures.
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
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.trials import prepared, trial
from benchmarks.trials.clips import write_hard_dataset
from benchmarks.trials.report import around, write_page
from benchmarks.trials.selection import JUDGED, grouped, values
from benchmarks.trials.settings import ABLATIONS, SETTINGS, Setting, finetuning, pretraining
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.recipe import to_dict
from mam2.engine.costs import step_flops
from mam2.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "convergence.md"
PACKAGES = ("mam2", "torch", "numpy")
WARM_UP_ROUNDS = 2
BEYOND, FINALISTS = 2, 2
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Job:
    """One training."""

    group: str
    variant: str
    changes: tuple[tuple[str, Any], ...]
    epochs: float
    base_lr: float
    seed: int
    finetuned: bool = False
    data: str = "synthetic"
    family: str = ""
    label: str = ""

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.astuple(self))


class Run:
    """A run in its folder, with what it has done so far."""

    def __init__(self, setting: Setting, out: Path, real: tuple[Path, Path] | None) -> None:
        self.setting, self.out, self.real = setting, out, real
        self.workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        self.steps_ms: dict[str, float] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.start = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps([dataclasses.asdict(setting), list(map(str, real or ())), ABLATIONS]))
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
        self.prepare()
        self.measure()
        sweep, best = self.sweep()
        final = final_jobs(self.setting, best)
        rates = {method: ranked[0] for method, ranked in ranked_rates(self.train(final)).items()}
        jobs = main_jobs(self.setting, rates, real_epochs=self.real_epochs())
        self.train(jobs)
        return self.results([*sweep, *jobs], final)

    def sweep(self) -> tuple[list[Job], dict[str, list[float]]]:
        """The trainings of the sweep's first round, and the `FINALISTS` best learning rates of each method.

        Where a method's best is the lowest or highest tried, one beyond it is tried as well, `BEYOND` times at most.
        """
        tried = {method: sorted(self.setting.rates) for method in self.setting.methods}
        for left in reversed(range(BEYOND + 1)):
            jobs = sweep_jobs(self.setting, tried)
            ranked = ranked_rates(self.train(jobs))
            further = {method: beyond(tried[method], rates[0]) for method, rates in ranked.items()}
            if not left or not any(further.values()):
                break
            tried = {method: sorted([*tried[method], *further[method]]) for method in tried}
        return jobs, {method: rates[:FINALISTS] for method, rates in ranked.items()}

    def prepare(self) -> None:
        _limit_threads(self.workers)
        base = pretraining(self.setting, {})
        videos = self.out / "videos"
        write_hard_dataset(videos, self.setting.counts, size=64 if base.data.size <= 64 else 128)
        sources = {"synthetic": {split: videos / split for split in SPLITS}}
        if self.real:
            sources["real"] = {"train": self.real[0], "test": self.real[1]}
        for name, paths in sources.items():
            prepared.prepare(paths, self.out / name, base, recorded=self.setting.recorded, views=self.setting.views)

    def real_epochs(self) -> float:
        """Passes over the real training clips that `real_steps` make, 0 without such clips."""
        if not self.real:
            return 0.0
        batch = pretraining(self.setting, {}).optim.batch
        return self.setting.real_steps * batch / len(prepared.load(self.out / "real").splits["train"].labels)

    def measure(self) -> None:
        """Milliseconds of a step of every variant, in a process of its own with nothing beside it."""
        file = self.out / "steps.json"
        if not file.is_file():
            with self._pool(1) as pool:
                found = pool.submit(_measure, self.setting, self.out / "synthetic").result()
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        self.steps_ms = json.loads(file.read_text(encoding="utf-8"))

    def train(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """What came of the jobs; runs those that are not done."""
        left = [job for job in jobs if job.key not in self.done]
        with self._pool(self.workers) as pool, (self.out / "trials.jsonl").open("a", encoding="utf-8") as file:
            running = {pool.submit(_train, self.setting, self.out, job): job for job in left}
            bar = tqdm(as_completed(running), total=len(left), desc="trainings", unit="training")
            for future in bar:
                job = running[future]
                try:
                    found = future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                self.done[job.key] = {"key": job.key, **dataclasses.asdict(job), **found}
                file.write(json.dumps(self.done[job.key]) + "\n")
                file.flush()
                self.note_time()
                bar.set_postfix_str(f"{job.group} {job.label or job.variant}: {100 * found['probe']:.1f} %")
        return [self.done[job.key] for job in jobs]

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (self.workers,))

    def results(self, jobs: list[Job], final: list[Job]) -> dict[str, Any]:
        """What the report is made of. final: the sweep's last round, of which the winners are among the jobs, too."""
        facts = {
            name: json.loads((self.out / name / prepared.PREPARED).read_text(encoding="utf-8"))
            for name in ("synthetic", *(["real"] if self.real else []))
        }
        trials = [self._trial(job, facts[job.data]) for job in jobs if job.group != "random"]
        trials += [{**self._trial(job, facts[job.data]), "group": "sweep"} for job in final]
        trials += [
            {**trial, "group": "ablation", "family": "default", "label": "default"}
            for trial in trials
            if (trial["group"], trial["variant"], trial["epochs"]) == ("main", "mam2", self.setting.ablation_epochs)
        ]
        untrained: dict[str, dict[str, list[float]]] = {}
        for job in jobs:
            if job.group == "random":
                measures = untrained.setdefault(job.data, {"probe": [], "finetune": []})
                for measure, found in measures.items():
                    if self.done[job.key][measure] is not None:
                        found.append(self.done[job.key][measure])
        return {
            "machine": _machine(self.workers),
            "setting": self.setting.name,
            "config": to_dict(pretraining(self.setting, {})),
            "date": datetime.date.today().isoformat(),
            "wall_s": self.wall_s,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "data": {name: {"validation": 0, **fact["videos"], "classes": fact["classes"]}
                     for name, fact in facts.items()},
            "preparation": {name: facts["synthetic"][name] for name in
                            ("tokenizer_s", "tokenize_s", "tokenizer_flops", "tokenize_flops")},
            "steps_ms": self.steps_ms,
            "trials": trials,
            "random": untrained,
        }  # fmt: skip

    def _trial(self, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in self.done[job.key].items() if name not in ("key", "changes")}
        config = _config(self.setting, job)
        codes = facts["codebook_size"] if config.needs_codes else 0
        frames = config.model.tubelet if config.code_shape else 1
        clips = found["steps"] * config.optim.batch
        step_s = self.steps_ms[job.variant] / 1000
        tokenize = {unit: frames * facts[f"tokenize_{unit}"] for unit in ("s", "flops")}
        return found | {
            "changes": dict(job.changes),
            "step_ms": self.steps_ms[job.variant],
            "train_s": found["steps"] * step_s,
            "epoch_s": found["steps"] / job.epochs * step_s,
            "flops": float(sum(step_flops(config, codes).values()) * clips),
            "preparation_s": facts["tokenizer_s"] + tokenize["s"] if codes else 0.0,
            "preparation_flops": facts["tokenizer_flops"] + tokenize["flops"] if codes else 0.0,
        }


def _config(setting: Setting, job: Job) -> PretrainConfig:
    config = pretraining(setting, dict(job.changes), epochs=job.epochs, base_lr=job.base_lr, seed=job.seed)
    check(config)
    return config


def _begin_worker(processes: int) -> None:
    """Of a process that trains; it ends with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _limit_threads(processes)


def _limit_threads(processes: int) -> None:
    """One thread where as many processes as cores work side by side: so all that is timed has the same."""
    if processes > 1:
        torch.set_num_threads(1)
    # one process compiles every variant
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024


def _train(setting: Setting, out: Path, job: Job) -> dict[str, Any]:
    """In a process of its own: one training with what is measured of it."""
    clips, config = prepared.load(out / job.data), _config(setting, job)
    start = time.perf_counter()
    if job.group == "random":
        encoder: Any = trial.pretraining(config, clips).model.encoder
        pretrained = trial.Pretrained(encoder, 0, {})
    else:
        pretrained = trial.pretrain(config, clips)
    trained_s = time.perf_counter() - start
    accuracy = trial.probe(pretrained.encoder, clips, config)
    tuned = None
    if job.finetuned:
        tuned = trial.finetune(pretrained.encoder, clips, finetuning(setting, config), labelled=setting.labelled)
    return {
        "steps": pretrained.steps,
        "losses": pretrained.losses,
        "probe": accuracy["test"],
        "probe_validation": accuracy.get("validation"),
        "finetune": tuned,
        "wall_s": trained_s,
    }


def _measure(setting: Setting, folder: Path) -> dict[str, float]:
    """Median milliseconds of a step of each variant. They take turns, in another order each round, so that a change of
    clocks, and what one leaves in the caches for the next, meets all of them."""
    clips = prepared.load(folder)
    variants = {**setting.methods, **{label: changes for _, label, changes in ABLATIONS}}
    configs = {variant: pretraining(setting, changes) for variant, changes in variants.items()}
    takes = {variant: trial.pretraining(config, clips) for variant, config in configs.items()}
    streams = {variant: trial.batches(config, clips) for variant, config in configs.items()}
    samples: dict[str, list[float]] = {variant: [] for variant in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    for number in tqdm(range(WARM_UP_ROUNDS + setting.rounds), desc="steps", unit="round"):
        shuffle(order)
        for variant in order:
            batch = next(streams[variant])
            start = time.perf_counter()
            takes[variant](number, [batch], 1e-4, inspect=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP_ROUNDS:
                samples[variant].append(time.perf_counter() - start)
    return {variant: 1000 * statistics.median(found) for variant, found in samples.items()}


def _machine(workers: int) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{workers} cores of {model}"


def sweep_jobs(setting: Setting, rates: Mapping[str, Sequence[float]]) -> list[Job]:
    """A training for each method and each of its learning rates."""
    return [
        Job("sweep", method, tuple(changes.items()), setting.sweep_epochs, rate, 100)
        for method, changes in setting.methods.items()
        for rate in rates[method]
    ]


def beyond(tried: Sequence[float], best: float) -> list[float]:
    """The next learning rate past an end of those tried, if the best is there and there are others to tell."""
    if len(tried) < 2 or best not in (min(tried), max(tried)):
        return []
    return [best * 2 if best == max(tried) else best / 2]


def final_jobs(setting: Setting, rates: Mapping[str, Sequence[float]]) -> list[Job]:
    """The sweep's last round: some learning rates of each method at the largest budget with all seeds."""
    return [
        main_job(setting, method, max(setting.budgets), rate, seed)
        for seed in range(setting.seeds)
        for method, tried in rates.items()
        for rate in tried
    ]


def main_job(setting: Setting, method: str, epochs: float, rate: float, seed: int) -> Job:
    return Job("main", method, tuple(setting.methods[method].items()), epochs, rate, seed, finetuned=True)


def main_jobs(setting: Setting, rates: dict[str, float], *, real_epochs: float = 0.0) -> list[Job]:
    """All but the sweep, the longest first, so that no core is idle at the end. real_epochs: 0 without real clips."""
    jobs = [
        main_job(setting, method, epochs, rates[method], seed)
        for epochs in sorted(setting.budgets, reverse=True)
        for seed in range(setting.seeds)
        for method in setting.methods
    ]
    if real_epochs:
        jobs += [
            Job("real", method, tuple(changes.items()), real_epochs, rates[method], seed, data="real")
            for seed in range(setting.seeds)
            for method, changes in setting.methods.items()
        ]
    jobs += [
        Job("ablation", label, tuple(changes.items()), setting.ablation_epochs, rates["mam2"], seed,
            family=family, label=label)
        for seed in range(setting.ablation_seeds)
        for family, label, changes in ABLATIONS
    ]  # fmt: skip
    jobs += [
        Job("random", "random", (), 1.0, rates["mam2"], seed, finetuned=data == "synthetic", data=data)
        for data in ("synthetic", *(["real"] if real_epochs else []))
        for seed in range(setting.seeds)
    ]
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--setting", choices=list(SETTINGS), default=default, help=f"sizes; here {default}")
    parser.add_argument("--quick", action="store_const", const="quick", dest="setting", help="all of it in small")
    parser.add_argument("--out", type=Path, help="folder of the run; runs/convergence-SETTING if not given")
    parser.add_argument(
        "--real-train", type=Path, help="labelled real clips to train on: a folder of classes, or a list"
    )
    parser.add_argument("--real-test", type=Path, help="labelled real clips to measure on, of the same classes")
    parser.add_argument("--page", type=Path, help="page to bring up to date; a copy of {PAGE.name} in OUT if not given")
    options = parser.parse_args()
    if (options.real_train is None) != (options.real_test is None):
        parser.error("--real-train and --real-test belong together")
    setting: Setting = SETTINGS[options.setting]
    out = options.out or ROOT / "runs" / f"convergence-{setting.name}"
    real = (options.real_train, options.real_test) if options.real_train else None
    if options.page:
        around(options.page)  # what cannot be written in the end is said now
    try:
        run = Run(setting, out, real)
        try:
            results = run.all()
        finally:
            run.note_time()
    except UserError as error:
        print(f"convergence: error: {error}", file=sys.stderr)
        return 2
    page = options.page or Path(shutil.copy(PAGE, out / PAGE.name))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results, page)
    print(f"{len(run.done)} trainings; {page}, {out / 'results.json'}")
    return 0


def ranked_rates(trials: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each method's learning rates, that of the best mean accuracy on validation clips first."""
    ranked: dict[str, list[float]] = {}
    for (method,), mine in grouped(trials, "variant").items():
        means = {rate: statistics.fmean(values(cell, JUDGED)) for (rate,), cell in grouped(mine, "base_lr").items()}
        ranked[method] = sorted(means, key=lambda rate: -means[rate])
    return ranked


if __name__ == "__main__":
    sys.exit(main())
