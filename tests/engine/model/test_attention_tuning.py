"""The choice of an attention implementation: only correct ones are timed; the choice is stored and used."""

import contextlib
import copy
import dataclasses
import importlib
import json
import math

import pytest
import torch

from mam2.engine import doctor
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model import attention_tuning
from mam2.engine.model.attention import attention
from mam2.engine.model.attention_tuning import (
    FILE,
    Shape,
    classifier_shapes,
    measure,
    measure_or_read,
    shapes_of,
    tune_attention,
)
from mam2.engine.model.blocks import Attention, CrossAttention, VideoTransformer
from mam2.engine.model.build import build_model
from mam2.engine.train.finetune import finetune
from mam2.engine.train.pretrain import pretrain
from tests.helpers import small_models

CPU = torch.device("cpu")
attention_module = importlib.import_module("mam2.engine.model.attention")
TINY = Shape(2, 6, 9, 2, 16)


def test_shapes_are_those_of_the_method():
    shapes = shapes_of(load_recipe("mam2-fast"), 64)
    assert shapes["encoder"] == Shape(64, 160, 160, 12, 64)
    assert shapes["regressor"] == Shape(64, 1408, 160, 6, 64)
    assert shapes["decoders"] == Shape(64, 1408, 1408, 6, 64)
    assert shapes_of(load_recipe("mam2-cae"), 64)["regressor"].keys == 1568
    assert shapes_of(load_recipe("videomae"), 64)["decoder"].queries == 1568
    config = load_recipe("mam2-fast")
    aligned = dataclasses.replace(config, loss=dataclasses.replace(config.loss, alignment=2.0))
    assert shapes_of(aligned, 64)["alignment"] == Shape(64, 1408, 1408, 12, 64)
    latents = dataclasses.replace(config, loss=dataclasses.replace(config.loss, appearance_target="latents"))
    assert shapes_of(latents, 64)["teacher"] == Shape(64, 1568, 1568, 12, 64)
    tuned = load_recipe("kinetics400/finetune", FinetuneConfig)
    assert classifier_shapes(tuned, 8) == {"encoder": Shape(8, 1568, 1568, 12, 64)}
    regressor = dataclasses.replace(config.model.regressor, depth=0)
    shapes = shapes_of(dataclasses.replace(config, model=dataclasses.replace(config.model, regressor=regressor)), 64)
    assert shapes.keys() == {"encoder", "decoders"}
    assert shapes["decoders"] == Shape(64, 1568, 1568, 6, 64)


def test_what_is_wrong_or_does_not_run_is_not_timed(monkeypatch):
    found = measure(TINY, CPU, torch.float32)
    assert {"sdpa", "products"} <= found.keys()
    assert not {"xformers", "cudnn", "efficient"} & found.keys()
    assert list(found.values()) == sorted(found.values())

    def wrong(q, k, v, *, backend):
        return attention(q, k, v, backend=backend) * (1.1 if backend == "products" else 1)

    monkeypatch.setattr("mam2.engine.model.attention_tuning.attention", wrong)
    assert "products" not in measure(TINY, CPU, torch.float32)


def test_scores_of_gigabytes_are_not_written(monkeypatch):
    monkeypatch.setattr(attention_tuning, "MOST_SCORES", 2 * 2 * 6 * 9 * 4)
    assert "products" in measure(TINY, CPU, torch.float32)
    assert "products" not in measure(TINY._replace(batch=3), CPU, torch.float32)


def test_a_batch_that_fits_no_memory_is_measured_with_fewer_clips():
    """The batch of `optim.micro_batch auto` is divided only later."""
    assert "sdpa" in measure(TINY._replace(batch=10**10), CPU, torch.float32)


def test_what_a_graph_cannot_hold_is_no_candidate(monkeypatch):
    """On a GPU calls are replayed, so that the host's time does not count."""

    def replayed(call, device):
        call()
        if len(seen) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1.0

    seen = []
    monkeypatch.setattr(attention_tuning, "_median_ms", lambda *given: seen.append(1) or replayed(*given))
    found = measure(TINY, CPU, torch.float32)
    assert len(found) == len(seen) - 1


def test_the_choice_is_used_written_down_and_read_again(tmp_path, products_calls):
    shapes = shapes_of(load_recipe("demo"), 2)
    shape = shapes["encoder"]
    choices, lines = measure_or_read(shapes, CPU, torch.float32, tmp_path)
    assert len(lines) == 3
    assert all("measured" in line for line in lines)
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved["device"] == "cpu"
    row = saved["parts"]["encoder"]
    assert row["backend"] == min(row["milliseconds"], key=row["milliseconds"].get)
    assert choices[("cpu", torch.float32, *shape[1:])] == row["backend"]

    for row in saved["parts"].values():
        row["backend"] = "products"
    (tmp_path / FILE).write_text(json.dumps(saved))
    choices, lines = measure_or_read(shapes, CPU, torch.float32, tmp_path)
    assert "products, from" in lines[0]
    products_calls.clear()
    q = torch.randn(2, shape.queries, shape.heads, shape.head_dim)
    attention(q, q, q, choices=choices)
    assert len(products_calls) == 1
    attention(q[:, :3], q, q, choices=choices)  # a shape that was not measured
    attention(q, q, q)
    assert len(products_calls) == 1

    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match=FILE):
        measure_or_read(shapes, CPU, torch.float32, tmp_path)


@pytest.fixture
def products_calls(monkeypatch):
    """A list with an entry per call of the implementation `products`, also during tracing."""
    calls = []
    products = attention_module._products
    monkeypatch.setattr(attention_module, "_products", lambda *given: calls.append(None) or products(*given))
    return calls


def test_every_model_of_a_process_has_its_own_choices(products_calls):
    config = load_recipe("demo")
    torch.manual_seed(0)
    ours, theirs = build_model(config, 16), build_model(config, 16)
    kept = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    clip = torch.zeros(1, 3, config.data.frames, config.data.size, config.data.size, dtype=torch.uint8)
    tokens, width = math.prod(config.grid), config.model.width // config.model.heads
    ours.set_attention({("cpu", torch.float32, tokens, tokens, config.model.heads, width): "products"})
    theirs.encode(clip)
    assert not products_calls
    first = ours.encode(clip)
    assert len(products_calls) == config.model.depth
    copy.deepcopy(ours).encode(clip)
    assert len(products_calls) == 2 * config.model.depth, "a copy keeps the choices"
    assert ours.state_dict().keys() == kept.keys(), "checkpoints do not change"
    ours.set_attention({})
    torch.testing.assert_close(ours.encode(clip), first)
    assert len(products_calls) == 2 * config.model.depth


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_runs_model_and_its_copy_for_validation_get_the_choices(
    verb, synthetic_clips, tmp_path, small, small_finetuning, monkeypatch
):
    synthetic_clips(tmp_path, train=16, test=16)
    choices = {("cpu", torch.float32, 6, 9, 2, 16): "products"}
    tuned = lambda *given, run, broadcast: (choices, [f"attention stored in {run.name}"])  # noqa: E731
    monkeypatch.setattr(f"mam2.engine.train.{verb}.tune_attention", tuned)
    models = {}
    set_attention = VideoTransformer.set_attention
    monkeypatch.setattr(
        VideoTransformer,
        "set_attention",
        lambda self, given: models.setdefault(id(self), self) and set_attention(self, given),
    )
    places = {"val": tmp_path / "test", "progress": False}
    if verb == "pretrain":
        config = small(data={"views": 1}, model={"objective": "videomae"}, optim={"epochs": 1.0, "warmup_epochs": 0.0})
        pretrain(config, tmp_path / "train", tmp_path / "run", **places)
    else:
        config = small_finetuning(optim={"epochs": 1.0, "batch": 16, "warmup_epochs": 0.0})
        finetune(config, tmp_path / "train", tmp_path / "run", encoder=None, **places)
    assert len(models) == 2
    assert [model.encoder.blocks[0].attn.choices for model in models.values()] == [choices, choices]
    assert "attention stored in run" in (tmp_path / "run" / "log.txt").read_text()


def test_every_attention_of_every_model_holds_the_choices():
    choices = {("cpu", torch.float32, 6, 9, 2, 16): "products"}
    models = [
        build_model(load_recipe("demo"), 16),
        build_model(load_recipe("videomae")),
        small_models.classifier(),
        small_models.encoder(),
    ]
    for model in models:
        model.set_attention(choices)
        held = [module.choices for module in model.modules() if isinstance(module, Attention | CrossAttention)]
        assert held
        assert all(found == choices for found in held)


def test_a_compiled_model_follows_its_own_choices():
    """Models of one class share compiled code, which therefore must depend on the choices."""
    seen = []

    def noting(graph, _inputs):
        seen.append(any(node.target == "softmax" for node in graph.graph.nodes))  # `products` alone calls it
        return graph.forward

    ours, theirs, clip = small_models.encoder(), small_models.encoder(), small_models.clip()
    torch.compiler.reset()
    compiled = [torch.compile(encoder.encode, fullgraph=True, backend=noting) for encoder in (ours, theirs)]
    ours.set_attention({("cpu", torch.float32, 18, 18, 4, 12): "products"})
    first, second = (encode(clip) for encode in compiled)
    assert seen == [True, False]
    torch.testing.assert_close(first, second)
    theirs.set_attention({("cpu", torch.float32, 18, 18, 4, 12): "products"})
    compiled[1](clip)
    ours.set_attention({})
    compiled[0](clip)
    assert len(seen) == 2, "the graph of the other model serves"


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [("NVIDIA L4", "sdpa", "measured on NVIDIA L4, this is cpu"), ("cpu", "flash4", "flash4 does not run here")],
)
def test_a_choice_of_another_machine_is_measured_again(device, backend, message, tmp_path):
    shapes = {"encoder": TINY}
    (tmp_path / FILE).write_text(json.dumps({"device": device, "parts": {"encoder": {"backend": backend}}}))
    _, lines = measure_or_read(shapes, CPU, torch.float32, tmp_path)
    assert message in lines[0]
    assert "measured" in lines[1]
    assert json.loads((tmp_path / FILE).read_text())["device"] == "cpu"


def test_other_processes_are_told_the_winners(tmp_path, monkeypatch):
    """Other ranks neither measure nor read the file, because a network file system may show it late."""
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(attention_tuning, "measure_or_read", None)
    winners = {("cuda", torch.bfloat16, 6, 9, 2, 16): "cudnn"}, ["a line"]
    shapes = {"encoder": TINY}
    assert tune_attention(shapes, gpu, torch.bfloat16, run=tmp_path, broadcast=lambda _: winners) == winners
    assert not list(tmp_path.iterdir())


def test_on_a_cpu_nothing_is_chosen_or_written(tmp_path):
    assert tune_attention({"encoder": TINY}, CPU, torch.float32, run=tmp_path) == ({}, [])
    assert not list(tmp_path.iterdir())


def test_a_forced_kernel_compiles_into_one_graph():
    q = torch.randn(2, 8, 2, 16)
    compiled = torch.compile(lambda x: attention(x, x, x, backend="flash"), fullgraph=True)
    torch.testing.assert_close(compiled(q), attention(q, q, q, backend="sdpa"))


def test_the_gpu_measures_several_implementations():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = measure(Shape(8, 160, 160, 12, 64), torch.device("cuda"), torch.bfloat16)
    assert len(found) >= 3


def test_doctor_says_what_packages_run_and_why_others_do_not(monkeypatch):
    reasons = {"xformers": "", "flash4": "OSError: libcudart.so.12: cannot open shared object file"}
    monkeypatch.setattr(doctor, "measure", lambda *_: {"cudnn": 1.5})
    monkeypatch.setattr(doctor, "why_not", lambda package, *_: reasons[package])
    monkeypatch.setattr(doctor, "operator_name", lambda *_: "fa2F@2.5.7-pt")
    lines = doctor._attention(torch.device("cuda"), torch.bfloat16)
    assert lines[:3] == [
        "bfloat16; measured for a run and kept, else sdpa",
        "xformers: fa2F@2.5.7-pt",
        f"flash-attn-4: not used: {reasons['flash4']}",
    ]
    assert lines[3].endswith("cudnn 1.5 ms")


def test_a_kernel_that_waits_for_the_device_is_not_recorded(monkeypatch):
    """A failed capture leaves PyTorch's random generator of the GPU unusable, which the run needs next."""
    recorded = []

    class Recorder:
        def warm_up(self, work):
            work()
            raise RuntimeError("called a synchronizing CUDA operation")

        def record(self, work):
            recorded.append(work)

    monkeypatch.setattr(attention_tuning, "CudaRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    calls = []
    with pytest.raises(RuntimeError, match="synchronizing"):
        attention_tuning._replayed_ms(lambda: calls.append(None), torch.device("cuda"))
    assert (len(calls), recorded) == (1, [])


def test_where_nothing_can_be_measured_the_run_takes_pytorchs_choice(monkeypatch):
    monkeypatch.setattr(attention_tuning, "measure", lambda *_: {})
    choices, lines = measure_or_read({"encoder": TINY}, CPU, torch.float32)
    assert choices == {("cpu", torch.float32, 6, 9, 2, 16): "sdpa"}
    assert lines[0].endswith("sdpa, because none could be measured")
