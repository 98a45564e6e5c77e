"""`mam2 plan`: its table, its estimates, and its memory against that of a real step."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.machines import GPUS, UTILIZATION
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.planning import plan
from mam2.engine.runtime.device import autocast
from mam2.engine.runtime.peak import measured_peak_flops, used_gib
from mam2.engine.train.objective import build_objective
from mam2.engine.train.optimizer import build_optimizer
from mam2.kernels import tube_mask
from tests.helpers.commands import outcome


def changed(config: PretrainConfig, **tables: dict[str, Any]) -> PretrainConfig:
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


def test_the_plan_says_what_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(capsys, "plan", "mam2-fast", "--gpu", "h200", "--videos", "240000")
    assert status == 0
    lines = out.splitlines()
    for start in ("memory", "speed", "time"):
        (line,) = (line for line in lines if line.startswith(start))
        assert "(estimated" in line
    (saving,) = (line for line in lines if line.startswith("saving"))
    assert saving.endswith("per checkpoint, and as much pinned memory of the host, kept while it trains")
    assert "NVIDIA H200 SXM (data sheet): 989 TFLOP/s bfloat16" in out
    assert "31 % of that peak is assumed, not measured" in out
    for part in ("encoder", "regressor", "appearance decoder", "motion decoder", "tokenizer", "all"):
        assert any(line.split("  ")[1].strip() == part for line in lines if line.startswith("  ")), part


def test_this_machine_is_measured_and_flags_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(
        capsys, "plan", "videomae", "--size", "tiny", "--optim.batch", "8", "--optim.micro-batch", "4"
    )
    assert status == 0
    assert "(measured product)" in out
    assert "8 clips: 2 passes of 4 clips on 1 device" in out
    assert "hours" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mam2-fast", "--gpu", "h2000"], "--gpu h2000: expected one of b200, h200"),
        (["mam2-fast", "--gpu", "h100", "--run.precision", "float32"], "known only for bfloat16"),
        (["mam2-fast", "--gpu", "h100", "--utilization", "40"], "a share from 0 to 1"),
        (
            ["mam2-fast", "--gpu", "h100", "--gpus", "3"],
            "optim.batch 64: expected a multiple of 3 (3 processes × data.views 1)",
        ),
        (["mam2-fast", "--videos", "many"], "--videos many: expected a number"),
        (["mam2-fast", "--data.size", "225"], "data.size 225 is not a multiple"),
        ([], "expected a recipe as first argument: mam2 plan RECIPE"),
    ],
)
def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, _, err = outcome(capsys, "plan", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090", "4090", "RTX4090"])
def test_a_card_is_known_in_any_spelling(name: str) -> None:
    assert plan(load_recipe("videomae"), gpu=name).machine.startswith("NVIDIA GeForce RTX 4090 ")


def test_unknown_and_old_cards_are_one_line_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = outcome(capsys, "plan", "videomae", "--gpu", "RTX 4099")
    assert (status, err.count("\n")) == (2, 1)
    assert "did you mean rtx409" in err
    status, _, err = outcome(capsys, "plan", "videomae", "--gpu", "Tesla T4")
    assert (status, err.count("\n")) == (2, 1)
    assert "has no bfloat16 products" in err


@pytest.mark.parametrize(("epochs", "expected"), [(1.0, "seconds"), (50.0, "minutes"), (4e3, "hours"), (1e5, "days")])
def test_numbers_have_units_that_a_person_reads(epochs: float, expected: str) -> None:
    config = changed(load_recipe("mam2-fast"), optim={"epochs": epochs})
    text = plan(config, gpu="h200").report(10_000)
    (line,) = (line for line in text.splitlines() if line.startswith("time"))
    value, unit = line.split()[1:3]
    assert unit == expected
    assert 1 <= float(value.replace(",", "")) < 200
    assert "e+" not in text
    assert "1 pass of 64 clips" in text
    assert "10,000 videos" in text


def test_hours_follow_from_clips_per_s() -> None:
    config = changed(load_recipe("mam2-fast"), data={"views": 2})
    planned = plan(config, gpu="h200")
    assert planned.hours(1000) == pytest.approx(1000 * 2 * 400 / planned.clips_per_s / 3600)
    flops = sum(cost.flops for cost in planned.parts.values())
    most = UTILIZATION["data sheet"] * GPUS["h200"].bf16_tflop_per_s * 1e12 / flops
    assert planned.clips_per_s <= most * (1 + 1e-9)
    assert plan(config, gpu="h200", utilization=0.2).hours(1000) > planned.hours(1000)
    assert plan(config, gpu="h200", gpus=8).hours(1000) < planned.hours(1000) / 7


def test_a_cache_of_codes_saves_the_tokenizers_work() -> None:
    config = load_recipe("mam2-fast")
    cached = changed(config, tokenizer={"cache": "codes"}, data={"recorded": 4})
    assert "tokenizer" in plan(config, gpu="h200").parts
    assert "tokenizer" not in plan(cached, gpu="h200").parts


def test_a_plan_that_does_not_fit_says_so() -> None:
    config = changed(load_recipe("mam2-cae"), optim={"batch": 256})
    report = plan(config, gpu="a10").report()
    assert "DOES NOT FIT: --optim.micro-batch " in report
    fitting = int(report.split("--optim.micro-batch ")[1].split()[0])
    smaller = changed(config, optim={"batch": 256, "micro_batch": fitting})
    assert "DOES NOT FIT" not in plan(smaller, gpu="a10").report()
    larger = changed(config, optim={"batch": 256, "micro_batch": 2 * fitting})
    assert "DOES NOT FIT" in plan(larger, gpu="a10").report()
    huge = changed(config, model={"width": 8192, "heads": 64}, optim={"batch": 1})
    assert "no optim.micro_batch fits; try --run.recompute" in plan(huge, gpu="a10").report()
    small = changed(config, optim={"batch": 256, "micro_batch": 8})
    assert "DOES NOT FIT" not in plan(small, gpu="a10").report()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mam2", "videomae"])
@pytest.mark.parametrize(
    ("precision", "optimizer_name"), [("float32", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")]
)
def test_memory_is_what_a_step_holds(objective: str, precision: str, optimizer_name: str) -> None:
    """Within a third: temporaries of operators are not declared, and some activations are freed before others exist."""
    config = load_recipe("demo")
    config = changed(
        config,
        data={"size": 64, "prefetch": 1, "recorded": 1},
        optim={"batch": 16, "name": optimizer_name},
        run={"device": "cpu", "precision": precision},
    )
    config = changed(config, model={"objective": objective}, tokenizer={"cache": "codes"})
    model = VideoMAE(config) if objective == "videomae" else MAM2(config, config.tokenizer.codes)
    compute = build_objective(model, config, lambda part: part)
    optimizer = build_optimizer(model, config.optim)
    mask = tube_mask(16, config.grid, config.mask.ratio, seed=0, device="cpu")
    video = torch.randint(0, 256, (16, 8, 64, 64, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    codes = torch.randint(config.tokenizer.codes, (16, mask.as_bool().shape[1]))

    def step() -> None:
        with autocast(config.run, video.device):
            loss = compute(video, mask, codes)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    planned = plan(config)
    estimated = planned.memory
    parts = estimated["gradients"] + estimated.get("weights cast", 0) + estimated["activations"]
    assert parts == pytest.approx(peak, rel=1 / 3)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert estimated["weights"] == held
    moments = [value for entries in optimizer.state.values() for name, value in entries.items() if name != "step"]
    assert estimated["moments"] == sum(value.nbytes for value in moments)
    assert planned.checkpoint_bytes == held + sum(value.nbytes for value in moments)


def test_gradients_are_kept_with_all_activations_only_between_passes_and_by_several_processes() -> None:
    config = changed(load_recipe("mam2-fast"), optim={"batch": 32})
    alone, ranks = plan(config, gpu="h200"), plan(config, gpu="h200", gpus=2)
    passes = plan(changed(config, optim={"batch": 32, "micro_batch": 16}), gpu="h200")
    assert alone.memory["gradients"] == 0
    assert ranks.memory["gradients"] == passes.memory["gradients"] == 4 * alone.parameters
    wide = changed(config, model={"width": 3072}, optim={"batch": 1})
    found = plan(wide, gpu="h200")
    held = sum(cost.held_bytes for name, cost in found.parts.items() if name != "tokenizer")
    assert found.memory["gradients"] == 4 * found.parameters - held > 0


def test_a_gpu_holds_the_tokenizers_activations_next_to_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the tokenizer finishes before the step begins."""
    config = changed(load_recipe("demo"), run={"device": "cpu", "precision": "bfloat16"})
    with_cache = changed(config, tokenizer={"cache": "codes"}, data={"recorded": 1})
    on_gpu, cached = (plan(one, gpu="h200").memory["activations"] for one in (config, with_cache))
    on_cpu = plan(config).memory["activations"]
    planned = plan(config, gpu="h200")
    frames = min(64, config.optim.batch * config.tokenized_frames)
    tokenizing = planned.parts["tokenizer"].held_bytes * frames / config.tokenized_frames
    assert on_gpu == cached + tokenizing
    assert on_cpu == max(cached, tokenizing)


def test_memory_in_use_counts_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    assert used_gib(torch.device("cuda", 0)) == 20


def test_the_peak_is_measured_once() -> None:
    device = torch.device("cpu")
    measured_peak_flops.cache_clear()
    first = measured_peak_flops(device, torch.float32)
    assert 1e8 < first < 1e14
    assert measured_peak_flops(device, torch.float32) == first
    assert measured_peak_flops.cache_info().misses == 1


def test_an_index_gives_the_number_of_videos(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from mam2.engine.data.manifest import Manifest, write_manifest

    write_manifest(Manifest(()), tmp_path / "index.jsonl")
    status, out, _ = outcome(capsys, "plan", "mam2-fast", "--gpu", "h200", "--videos", str(tmp_path / "index.jsonl"))
    assert status == 0
    assert "time" not in out.split()
    (tmp_path / "other.jsonl").write_text("nothing of the kind\n", encoding="utf-8")
    assert outcome(capsys, "plan", "mam2-fast", "--videos", str(tmp_path / "other.jsonl"))[0] == 2


def test_plan_refuses_an_unknown_gpu() -> None:
    with pytest.raises(UserError, match="expected one of"):
        plan(load_recipe("mam2-fast"), gpu="abacus")
