"""The choice of an attention implementation: only right ones are timed, the choice is remembered and used."""

import dataclasses
import json

import pytest
import torch

from mam2.engine.config import UserError
from mam2.engine.model import attention as module
from mam2.engine.model.attention import attention
from mam2.engine.model.attention_choice import FILE, Shape, choose, measure, shapes_of
from mam2.engine.recipe import load_recipe

CPU = torch.device("cpu")
TINY = Shape(2, 6, 9, 2, 16)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(module, "CHOSEN", {})
    monkeypatch.setattr("mam2.engine.model.attention_choice.CHOSEN", module.CHOSEN)


def test_shapes_are_those_of_the_method():
    shapes = shapes_of(load_recipe("mam2-fast"), 64)
    assert shapes["encoder"] == Shape(64, 160, 160, 12, 64)
    assert shapes["regressor"] == Shape(64, 1408, 160, 6, 64)
    assert shapes["decoders"] == Shape(64, 1408, 1408, 6, 64)
    assert shapes_of(load_recipe("mam2-cae"), 64)["regressor"].keys == 1568
    assert shapes_of(load_recipe("videomae"), 64)["decoder"].queries == 1568
    config = load_recipe("mam2-fast")
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

    monkeypatch.setattr("mam2.engine.model.attention_choice.attention", wrong)
    assert "products" not in measure(TINY, CPU, torch.float32)


def test_the_choice_is_used_written_down_and_read_again(tmp_path, monkeypatch):
    config = load_recipe("demo")
    shape = shapes_of(config, 2)["encoder"]
    lines = list(choose(config, 2, CPU, torch.float32, tmp_path))
    assert len(lines) == 3
    assert all("measured" in line for line in lines)
    rows = json.loads((tmp_path / FILE).read_text())
    assert rows["encoder"]["backend"] == min(rows["encoder"]["milliseconds"], key=rows["encoder"]["milliseconds"].get)

    rows["encoder"]["backend"] = "products"
    (tmp_path / FILE).write_text(json.dumps(rows))
    assert "products, from" in next(iter(choose(config, 2, CPU, torch.float32, tmp_path)))
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *a: seen.append(None) or softmax(self, *a))
    q = torch.randn(2, shape.queries, shape.heads, shape.head_dim)
    attention(q, q, q)
    assert seen
    attention(q[:, :3], q, q)  # a shape that was not measured
    assert len(seen) == 1

    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match=FILE):
        list(choose(config, 2, CPU, torch.float32, tmp_path))


def test_a_forced_kernel_compiles_into_one_graph():
    q = torch.randn(2, 8, 2, 16)
    compiled = torch.compile(lambda x: attention(x, x, x, backend="flash"), fullgraph=True)
    torch.testing.assert_close(compiled(q), attention(q, q, q, backend="sdpa"))


def test_the_gpu_measures_several_implementations():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = measure(Shape(8, 160, 160, 12, 64), torch.device("cuda"), torch.bfloat16)
    assert len(found) >= 3
