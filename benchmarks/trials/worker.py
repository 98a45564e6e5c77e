"""What the processes of a convergence run do: a training, or the timing of all steps."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import statistics
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmarks.trials import prepared, real, trial
from benchmarks.trials.jobs import Job, trained_by
from benchmarks.trials.selection import REAL_JUDGED
from benchmarks.trials.settings import ABLATIONS, Setting, finetuning, pretraining
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.files import written_aside
from mam2.engine.model.encoder import Encoder

WARM_UP_ROUNDS = 2


def config_of(setting: Setting, job: Job) -> PretrainConfig:
    config = pretraining(setting, dict(job.changes), epochs=job.epochs, base_lr=job.base_lr, seed=job.seed)
    check(config)
    return config


def begin() -> None:
    """Main function of a process that trains; it ends when the process that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    limit_threads()


def limit_threads() -> None:
    """One thread on a CPU, where as many processes as cores work side by side: so all that is timed has the same."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    # one process compiles every variant
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024


def encoder_file(out: Path, job: Job) -> Path:
    """Where the encoder of a training is kept."""
    return out / "encoders" / f"{hashlib.sha256(job.key.encode()).hexdigest()[:16]}.safetensors"


def run_job(setting: Setting, out: Path, job: Job) -> dict[str, Any]:
    """In a process of its own: one training with what is measured of it, or one fine-tuning."""
    config = config_of(setting, job)
    clips = prepared.load(out / job.data, config.tokenizer.codes_per_patch)
    start, cpu = time.perf_counter(), time.process_time()
    if job.group == "finetune":
        encoder = _kept_encoder(setting, out, trained_by(job))
        tuned = trial.finetune(encoder, clips, finetuning(setting, config), labelled=setting.labelled)
        return {"finetune": tuned, "wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    if job.group == "random":
        pretrained = trial.Pretrained(trial.pretraining(config, clips).model.encoder, 0, {})
    else:
        pretrained = trial.pretrain(config, clips)
    spent = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    if job.group in ("main", "random", "real"):
        file = encoder_file(out, job)
        file.parent.mkdir(exist_ok=True)
        with written_aside(file) as aside:
            save_file(pretrained.encoder.state_dict(), aside)
    found: dict[str, Any] = {"steps": pretrained.steps, "losses": pretrained.losses, **spent}
    if job.group == "real sweep":
        found[REAL_JUDGED] = real.judge(pretrained.encoder, real.load_questions(out / "real"), config)
    elif job.data == "real":
        found["answers"] = _answers(pretrained.encoder, out, config)
    else:
        accuracy = trial.probe(pretrained.encoder, clips, config)
        found |= accuracy["test"] | {f"{name}_validation": value for name, value in accuracy["validation"].items()}
    return found | {"measuring_cpu_s": time.process_time() - cpu - spent["cpu_s"]}


def ask_again(setting: Setting, out: Path, job: Job, kinds: Collection[str]) -> dict[str, Any]:
    """In a process of its own: answers of these kinds to the questions about real clips, of the encoder that a training
    left."""
    cpu = time.process_time()
    answers = _answers(_kept_encoder(setting, out, job), out, config_of(setting, job), kinds)
    return {"answers": answers, "measuring_cpu_s": time.process_time() - cpu}


def _kept_encoder(setting: Setting, out: Path, job: Job) -> Encoder:
    config = config_of(setting, job)
    clips = prepared.load(out / job.data, config.tokenizer.codes_per_patch)
    encoder: Encoder = trial.pretraining(config, clips).model.encoder
    encoder.load_state_dict(load_file(encoder_file(out, job)))
    return encoder


def _answers(
    encoder: Encoder, out: Path, config: PretrainConfig, kinds: Collection[str] = real.KINDS
) -> dict[str, dict[str, Any]]:
    answers = real.ask(encoder, real.load_questions(out / "real"), config, kinds)
    return {question: {kind: found._asdict() for kind, found in each.items()} for question, each in answers.items()}


def time_steps(setting: Setting, folder: Path, variants: Collection[str]) -> dict[str, float]:
    """Median milliseconds of a step of each of these variants, all of `timed`.

    They take turns, in another order each round, so that a change of clocks, and what one leaves in the caches for the
    next, meets all of them.

    On a CPU it is the time of the processor, on one thread: what else the machine does takes none of it.
    """
    configs = {variant: pretraining(setting, timed(setting)[variant]) for variant in variants}
    clips = {depth: prepared.load(folder, depth) for depth in depths(configs.values())}
    own = {variant: clips[config.tokenizer.codes_per_patch] for variant, config in configs.items()}
    steps = {variant: trial.pretraining(config, own[variant]) for variant, config in configs.items()}
    streams = {variant: trial.batches(config, own[variant]) for variant, config in configs.items()}
    samples: dict[str, list[float]] = {variant: [] for variant in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for number in tqdm(range(WARM_UP_ROUNDS + setting.rounds), desc="steps", unit="round"):
        shuffle(order)
        for variant in order:
            batch = next(streams[variant])
            start = clock()
            steps[variant](number, [batch], 1e-4, inspect=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP_ROUNDS:
                samples[variant].append(clock() - start)
    return {variant: 1000 * statistics.median(found) for variant, found in samples.items()}


def timed(setting: Setting) -> dict[str, Any]:
    """Changes of everything whose steps are timed, by its name."""
    return {**setting.variants, **ablations_of(setting)}


def depths(configs: Iterable[PretrainConfig]) -> list[int]:
    """Numbers of codes per patch that occur."""
    return sorted({config.tokenizer.codes_per_patch for config in configs})


def ablations_of(setting: Setting) -> dict[str, Any]:
    """Changes of the default, by the label of the ablation."""
    default = setting.variants[setting.default]
    return {label: {**default, **changes} for family, label, changes in ABLATIONS if family in setting.families}
