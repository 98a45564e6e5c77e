"""The step benchmark: both sides have one objective, no time is reported if the losses differ, every part is timed."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.attention_tuning import shapes_of

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.bench_step")


def compare(bench: ModuleType, name: str, precision: str = "float32") -> list[dict[str, Any]]:
    config = bench.sized(name, bench.TINY, precision)
    rows = bench.compare(name, config, 2, CPU, compiled=False, rounds=2)
    return [row for row in rows if row.get("timed") != "alone"]


def everything(bench: ModuleType) -> Any:
    """The settings of `make gpu ARGS=--dry-run`."""
    return importlib.import_module("benchmarks.sections").Selection(dry_run=True, compiled=False)


def test_a_row_with_wide_heads_changes_only_regressor_and_decoders(bench: ModuleType) -> None:
    recipe, wide = load_recipe("mam2-fast").model, bench.sized("mam2-fast heads of 128", None, "float32").model
    assert (wide.regressor.width // wide.regressor.heads, wide.decoder.width // wide.decoder.heads) == (128, 128)
    assert wide.heads == recipe.heads
    tiny = bench.sized("mam2-fast heads of 128", bench.TINY, "float32").model
    assert (tiny.decoder.width, tiny.decoder.heads, tiny.regressor.heads) == (48, 1, 1)


@pytest.mark.slow
def test_a_way_has_its_row_before_the_next_is_built(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are yielded one by one, so that a time limit keeps the measured ones."""
    pytest.importorskip("transformers")
    config = bench.sized("videomae", bench.TINY, "float32")
    built = []
    theirs = bench.theirs
    monkeypatch.setattr(bench, "theirs", lambda *given: built.append(given) or theirs(*given))
    rows = bench.compare("videomae", config, 2, CPU, compiled=False, rounds=1)
    first = next(row for row in rows if "timed" in row)
    assert (first["provider"], first["step"], first["timed"]) == ("ours", "eager", "alone")
    assert first["clips_per_s"] > 0
    assert not built
    later = list(rows)
    assert built
    assert [row["timed"] for row in later if "timed" in row] == ["alone", "in turns", "in turns"]


def test_ways_are_chosen_and_late_ones_named(bench: ModuleType) -> None:
    config = bench.sized("mam2-fast", bench.TINY, "float32")
    options = {"compiled": False, "rounds": 1}
    late = list(bench.compare("mam2-fast", config, 2, CPU, deadline=0.0, **options))
    assert {row["step"]: row["reason"] for row in late}["eager"] == "out of time"
    assert not any("median_ms" in row for row in late)
    rows = list(bench.compare("mam2-fast", config, 2, CPU, takes=lambda way: way in ("ours", "eager"), **options))
    assert {row["step"] for row in rows} == {"eager"}


def test_every_objective_has_its_best_way_before_another_is_built(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit keeps the rows that matter: those of the four objectives of `make gpu`, then slower variants."""
    plan, sections = (importlib.import_module(f"benchmarks.{name}") for name in ("step_plan", "sections"))
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(bench, "compare", lambda name, *_, ways, **more: asked.append((name, ways)) or [])
    monkeypatch.setattr(bench, "part_rows", lambda name, *_: asked.append((name, "parts")) or [])
    monkeypatch.setattr(bench, "why_not", lambda *_: None)
    objectives = ("mam2-fast", "mam2-fast half decoded")

    def run(**options: Any) -> list[tuple[str, Any]]:
        asked.clear()
        assert not list(
            bench.rows(CPU, float("inf"), sections.Selection(False, True, **options), objectives=objectives)
        )
        return list(asked)

    ours = [way for way in plan.WAYS if way[1] == "ours"]
    best, quick = (plan.BEST, "ours"), [way for way in ours if way[0] not in ("compiled", "compiled graph")]
    stages = ((best,), tuple(quick), "parts", tuple(ours))
    assert run() == [(name, ways) for ways in stages for name in objectives]
    found = run(ways=("ours", plan.BEST, "eager"))
    stages = ((best,), (best, ("eager", "ours")))
    assert found == [(name, ways) for ways in stages for name in objectives]
    assert run(ways=("ours", "parts")) == [(name, "parts") for name in objectives]
    assert list(plan.stages(lambda _: True, lambda _: None, peers=True)) == list(plan.STAGES)


def test_objectives_of_a_step_are_chosen(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sections, asked = importlib.import_module("benchmarks.sections"), []
    monkeypatch.setattr(bench, "rows", lambda *_, objectives: asked.append(list(objectives)) or [])
    for given in ((), ("mam2-fast heads of 128",)):
        wanted = sections.Selection(True, False, objectives=given)
        assert not list(sections.rows_of("step", CPU, 0.0, wanted))
    assert asked[0][0] == "mam2-fast"
    assert len(asked[0]) == 4
    assert asked[1] == ["mam2-fast heads of 128"]


def test_a_way_that_cannot_run_here_is_named_once(bench: ModuleType) -> None:
    everywhere = everything(bench)
    rows = list(bench.rows(CPU, float("inf"), everywhere, objectives=("mam2-fast",)))
    skipped = [row["step"] for row in rows if row.get("verdict") == "skipped"]
    assert sorted(skipped) == ["compiled", "compiled blocks", "compiled blocks graph", "compiled graph", "graph"]
    assert sum(row.get("timed") == "in turns" for row in rows) == 1


def test_the_loss_of_every_way_is_that_of_the_eager_step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the eager step is not timed, or later."""
    config = bench.sized("mam2-fast", bench.TINY, "float32")
    ours = bench.ours

    def off(config: Any, batch: int, device: Any, step: str, choices: Any = None) -> Any:
        found = ours(config, batch, device, "eager", choices)
        return found if step == "eager" else dataclasses.replace(found, step=step, loss=lambda: 1.1 * found.loss())

    monkeypatch.setattr(bench, "ours", off)
    monkeypatch.setattr(bench, "why_not", lambda *_: None)
    (row,) = bench.compare("mam2-fast", config, 2, CPU, compiled=True, rounds=1, ways=[("compiled blocks", "ours")])
    assert (row["verdict"], "median_ms" in row) == ("wrong", False)
    assert "that of the eager step" in row["reason"]


def test_a_known_attention_is_not_measured_again(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.sized("mam2-fast", bench.TINY, "bfloat16")
    asked = []
    monkeypatch.setattr(bench, "tune_attention", lambda shapes, *_: asked.append(set(shapes)) or ({}, []))
    bench.choose_attention(config, 2, CPU)
    shape = shapes_of(config, 2)["encoder"]
    known = {("cpu", torch.bfloat16, *shape[1:]): "products"}
    assert bench.choose_attention(config, 2, CPU, known) == (known, [])
    assert asked == [{"encoder", "regressor", "decoders"}, {"regressor", "decoders"}]


def test_a_step_takes_the_attention_that_a_run_chooses(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.sized("mam2-fast", bench.TINY, "bfloat16")
    choices = {("cpu", torch.bfloat16, 6, 6, 3, 16): "products"}
    asked = []
    monkeypatch.setattr(bench, "tune_attention", lambda *given: asked.append(given) or (choices, ["encoder: products"]))
    assert bench.choose_attention(config, 2, torch.device("cuda")) == (choices, ["encoder: products"])
    assert asked == [(shapes_of(config, 2), torch.device("cuda"), torch.bfloat16)]

    built = []
    build = bench.build_model
    monkeypatch.setattr(bench, "build_model", lambda *given: built.append(build(*given)) or built[-1])
    ways = {"compiled": False, "rounds": 1, "takes": lambda way: way in ("ours", "eager")}
    assert list(bench.compare("mam2-fast", config, 2, CPU, choices=choices, **ways))
    assert [model.encoder.blocks[0].attn.choices for model in built] == [choices]


def test_a_step_without_a_triton_launch_is_no_data_point(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "fallback", lambda device, counter: "fell back to PyTorch" * (not counter.names))
    rows = compare(bench, "mam2-fast")
    eager = next(row for row in rows if row["step"] == "eager")
    assert (eager["verdict"], eager["reason"]) == ("failed", "fell back to PyTorch")
    assert "median_ms" not in eager


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_sides_are_one_objective(bench: ModuleType, precision: str) -> None:
    pytest.importorskip("transformers")
    rows = {(row["provider"], row["step"]): row for row in compare(bench, "videomae", precision)}
    ours, theirs = rows["ours", "eager"], rows["hugging_face", "eager"]
    assert (ours["verdict"], theirs["verdict"]) == ("right", "right")
    assert ours["precision"] == precision
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=bench.TOLERANCE[getattr(torch, precision)])
    assert ours["ratio"] == ours["ratio_to_best"] == theirs["median_ms"] / ours["median_ms"]
    assert rows["ours", "compiled"]["verdict"] == "skipped"
    assert rows["ours", "graph"] == rows["ours", "graph"] | {"verdict": "skipped", "reason": "CUDA graphs need a GPU"}


def test_gradients_of_both_sides_agree(bench: ModuleType) -> None:
    pytest.importorskip("transformers")
    config = bench.sized("videomae", bench.TINY, "float32")
    norms = []
    for candidate in (bench.ours(config, 2, CPU, "eager"), bench.theirs(config, 2, CPU, "eager", "hugging_face")):
        candidate.loss().backward()
        parameters = [p for group in candidate.optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_another_loss_gets_no_number(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pixels = bench.hugging_face.pixels
    monkeypatch.setattr(bench.hugging_face, "pixels", lambda video: pixels(255 - video))
    rows = {(row["provider"], row["step"]): row for row in compare(bench, "videomae")}
    assert rows["hugging_face", "eager"]["verdict"] == "wrong"
    assert "median_ms" not in rows["hugging_face", "eager"]
    assert rows["ours", "eager"]["verdict"] == "right"
    assert "ratio" not in rows["ours", "eager"]


def test_without_transformers_it_says_so(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = {(row["provider"], row["step"]): row for row in compare(bench, "videomae")}
    theirs = rows["hugging_face", "eager"]
    assert (theirs["verdict"], theirs["reason"]) == ("skipped", "transformers is not installed")
    assert rows["ours", "eager"]["median_ms"] > 0


def test_one_that_breaks_leaves_the_others(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench, "theirs", broken)
    rows = {(row["provider"], row["step"]): row for row in compare(bench, "videomae")}
    assert rows["hugging_face", "eager"]["reason"] == "RuntimeError: no memory"
    assert rows["ours", "eager"]["median_ms"] > 0


@pytest.mark.slow
def test_rows_hold_every_objective_and_part(bench: ModuleType) -> None:
    rows = list(bench.rows(CPU, float("inf"), everything(bench)))
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "part" in row:
            parts.setdefault(row["objective"], []).append(row)
    assert set(parts) == set(bench.OBJECTIVES)
    assert [row["part"] for row in parts["mam2-cae"]] == [
        *("encoder", "regressor", "appearance decoder and loss", "motion decoder and loss", "AdamW", "tokenizer"),
        *("Muon and AdamW", "torch.optim.Muon and AdamW"),
    ]
    for found in parts.values():
        assert all(row["median_ms"] > 0 for row in found[-2:])
        found = found[:-2]
        assert sum(row["percent"] for row in found) == pytest.approx(100)
        assert sum(row["percent_of_flops"] for row in found) == pytest.approx(100)
    assert not [row for row in rows if row.get("verdict") in ("wrong", "failed")]


def test_what_there_is_no_time_for_is_named(bench: ModuleType) -> None:
    rows = list(bench.rows(CPU, 0.0, everything(bench)))
    assert [(row["objective"], row["reason"]) for row in rows] == [(name, "out of time") for name in bench.OBJECTIVES]
