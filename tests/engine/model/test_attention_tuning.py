"""The choice of an attention implementation: only right ones are timed, the choice is remembered and used."""

import contextlib
import dataclasses
import json

import pytest
import torch

from mam2.engine import doctor
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model import attention as module
from mam2.engine.model import attention_tuning as attention_choice
from mam2.engine.model.attention import attention
from mam2.engine.model.attention_tuning import (
    FILE,
    AttentionChoice,
    Shape,
    choose_attention,
    classifier_shapes,
    measure,
    shapes_of,
    use,
    use_fastest,
)

CPU = torch.device("cpu")
TINY = Shape(2, 6, 9, 2, 16)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})


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
    monkeypatch.setattr(attention_choice, "MOST_SCORES", 2 * 2 * 6 * 9 * 4)
    assert "products" in measure(TINY, CPU, torch.float32)
    assert "products" not in measure(TINY._replace(batch=3), CPU, torch.float32)


def test_what_a_graph_cannot_hold_is_no_candidate(monkeypatch):
    """On a GPU calls are replayed, so that the host's time does not count."""

    def replayed(call, device):
        call()
        if len(seen) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1.0

    seen = []
    monkeypatch.setattr(attention_choice, "_median_ms", lambda *given: seen.append(1) or replayed(*given))
    found = measure(TINY, CPU, torch.float32)
    assert len(found) == len(seen) - 1


def test_the_choice_is_used_written_down_and_read_again(tmp_path, monkeypatch):
    shapes = shapes_of(load_recipe("demo"), 2)
    shape = shapes["encoder"]
    choice = choose_attention(shapes, CPU, torch.float32, tmp_path)
    assert len(choice.lines) == 3
    assert all("measured" in line for line in choice.lines)
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved["device"] == "cpu"
    row = saved["parts"]["encoder"]
    assert row["backend"] == min(row["milliseconds"], key=row["milliseconds"].get)

    for row in saved["parts"].values():
        row["backend"] = "products"
    (tmp_path / FILE).write_text(json.dumps(saved))
    choice = choose_attention(shapes, CPU, torch.float32, tmp_path)
    assert "products, from" in choice.lines[0]
    assert not module._chosen, "choosing changes nothing"
    use(choice, shapes, CPU, torch.float32)
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *a: seen.append(None) or softmax(self, *a))
    q = torch.randn(2, shape.queries, shape.heads, shape.head_dim)
    attention(q, q, q)
    assert seen
    attention(q[:, :3], q, q)  # a shape that was not measured
    assert len(seen) == 1
    use_fastest(shapes, CPU, torch.float32)
    assert not module._chosen, "a run on a CPU takes nothing from the one before"

    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match=FILE):
        choose_attention(shapes, CPU, torch.float32, tmp_path)


@pytest.mark.parametrize(
    ("device", "backend", "told"),
    [("NVIDIA L4", "sdpa", "measured on NVIDIA L4, this is cpu"), ("cpu", "flash4", "flash4 does not run here")],
)
def test_a_choice_of_another_machine_is_made_anew(device, backend, told, tmp_path):
    shapes = {"encoder": TINY}
    (tmp_path / FILE).write_text(json.dumps({"device": device, "parts": {"encoder": {"backend": backend}}}))
    choice = choose_attention(shapes, CPU, torch.float32, tmp_path)
    assert told in choice.lines[0]
    assert "measured" in choice.lines[1]
    assert json.loads((tmp_path / FILE).read_text())["device"] == "cpu"


def test_other_processes_are_told_the_winners(tmp_path, monkeypatch):
    """They neither measure nor read the file, which a network file system may show them late."""
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(attention_choice, "choose_attention", None)
    winners = AttentionChoice({"encoder": "cudnn"}, ["a line"])
    assert use_fastest({"encoder": TINY}, gpu, torch.bfloat16, run=tmp_path, broadcast=lambda _: winners) == ["a line"]
    assert module._chosen == {("cuda", torch.bfloat16, 6, 9, 2, 16): "cudnn"}
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
    """A capture that fails leaves PyTorch's random numbers on the GPU unusable, which the run draws from next."""
    recorded = []

    class Recorder:
        def warm_up(self, work):
            work()
            raise RuntimeError("called a synchronizing CUDA operation")

        def record(self, work):
            recorded.append(work)

    monkeypatch.setattr(attention_choice, "CudaRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    calls = []
    with pytest.raises(RuntimeError, match="synchronizing"):
        attention_choice._replayed_ms(lambda: calls.append(None), torch.device("cuda"))
    assert (len(calls), recorded) == (1, [])


def test_where_nothing_can_be_measured_the_run_takes_pytorchs_choice(monkeypatch):
    monkeypatch.setattr(attention_choice, "measure", lambda *_: {})
    choice = choose_attention({"encoder": TINY}, CPU, torch.float32)
    assert choice.backends == {"encoder": "sdpa"}
    assert choice.lines[0].endswith("sdpa, because none could be measured")
