"""Shipped recipes: all data sets and methods, inheritance, and the claims in their comments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import check
from mam2.engine.config.recipe import RECIPES, load_recipe, recipe_names
from mam2.engine.errors import UserError
from mam2.engine.planning import plan

SETS = ("demo", "kinetics400", "ssv2", "ucf101", "hmdb51")
METHODS = ("mam2-fast", "mam2-cae", "videomae")
FIELD = [f"{data}/{method}" for data in SETS[1:] for method in METHODS]


def head(name: str) -> str:
    """The comment lines at the head of a recipe's file, joined."""
    lines = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def test_every_data_set_has_every_method() -> None:
    assert set(recipe_names()) == {f"{data}/{method}" for data in SETS for method in METHODS} | {
        "demo",
        "laptop",
        *METHODS,
    }
    for name in recipe_names():
        check(load_recipe(name))


@pytest.mark.parametrize("method", METHODS)
def test_a_data_sets_recipe_is_the_methods_with_its_own_values(method: str) -> None:
    plain = load_recipe(method)
    for data in SETS[1:]:
        config = load_recipe(f"{data}/{method}")
        assert config.model == plain.model
        assert config.loss == plain.loss
        assert config.data.stride == (2 if data == "ssv2" else 4)
        assert config.data.flip == (data != "ssv2" and method != "videomae")
        assert config.data.crop == ("multi-scale" if method == "videomae" else "random-resized")
        assert config.mask.ratio == (0.75 if data in ("ucf101", "hmdb51") else 0.9)
        assert config.optim.base_lr == (3e-4 if data == "ucf101" else 1.5e-4)
        assert config.optim.warmup_epochs == (20 if config.optim.epochs <= 400 else 40)
    assert load_recipe(f"kinetics400/{method}") == plain


def test_the_laptops_model_is_small_in_every_part() -> None:
    planned = plan(load_recipe("laptop"), gpu="rtx4060")
    assert planned.parameters < 5e6
    assert sum(cost.flops for cost in planned.parts.values()) < 3e9


def test_the_demo_in_other_methods() -> None:
    assert load_recipe("demo/mam2-fast") == load_recipe("demo")
    assert load_recipe("demo/mam2-cae").model.regressor.keys == "all"
    assert load_recipe("demo/videomae").model.objective == "videomae"
    assert load_recipe("demo/videomae").data == load_recipe("demo").data


@pytest.mark.parametrize("name", recipe_names())
def test_every_head_gives_the_command(name: str) -> None:
    assert re.search(rf"mam2 pretrain {re.escape(name)} --data|make demo", head(name))


@pytest.mark.parametrize("name", FIELD)
def test_heads_promise_what_the_plan_estimates(name: str) -> None:
    text = head(name)
    found = re.search(r"(\S+) hours on one H200, estimated by `mam2 plan (\S+) --gpu h200 --videos (\d+)`", text)
    memory = re.search(r"one GPU with (\S+) GiB free", text)
    assert found
    assert memory
    planned = plan(load_recipe(name), gpu="h200")
    assert found[2] == name
    assert f"{planned.hours(int(found[3])):.3g}" == found[1]
    assert f"{sum(planned.memory.values()) / 2**30:.1f}" == memory[1]
    assert "Expected score: " in text
    assert "not reproduced here yet" in text


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_later_and_nearer_values_count_more(tmp_path: Path) -> None:
    write(
        tmp_path,
        low="[optim]\nbatch = 8\nepochs = 3\n[model.decoder]\ndepth = 2",
        high="[optim]\nbatch = 16\n",
        mine='extends = ["mam2-cae", "low.toml", "high.toml"]\n[optim]\nbase_lr = 1.0\n',
    )
    config = load_recipe(str(tmp_path / "mine.toml"))
    assert (config.optim.batch, config.optim.epochs, config.optim.base_lr) == (16, 3, 1)
    assert (config.model.decoder.depth, config.model.decoder.width) == (2, 768)
    assert config.loss.balance == load_recipe("mam2-cae").loss.balance


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine": 'extends = ["mine.toml"]'}, "extends itself"),
        ({"mine": 'extends = ["other.toml"]', "other": 'extends = ["mine.toml"]'}, "extends itself"),
        ({"mine": 'extends = ["mam2-fats"]'}, "did you mean mam2-fast"),
        ({"mine": 'extends = "mam2-fast"'}, "'extends' expects a list"),
        ({"mine": 'extends = ["other.toml"]', "other": "[optim]\nbach = 3"}, "other.toml, [optim]: unknown key 'bach'"),
        ({"mine": 'extend = ["mam2-fast"]'}, "unknown key 'extend'"),
    ],
)
def test_a_wrong_inheritance_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(UserError) as error:
        load_recipe(str(tmp_path / "mine.toml"))
    assert message in str(error.value)


def test_a_misspelt_recipe_of_a_set_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean ssv2/mam2-fast"):
        load_recipe("ssv2/mam2-fsat")


def test_fine_tuning_recipes_hold_the_methods_values() -> None:
    loaded = {name: load_recipe(name, FinetuneConfig) for name in recipe_names(FinetuneConfig)}
    names = ("kinetics400", "ssv2", "ucf101", "hmdb51", "demo", "laptop")
    assert loaded.keys() == {f"{name}/finetune" for name in names}
    for name, config in loaded.items():
        config.check()
        text = (RECIPES / f"{name}.toml").read_text()
        assert f"mam2 finetune {name} --data" in text
        if name in ("demo/finetune", "laptop/finetune"):
            continue
        augment, small_set = config.augment, name.startswith(("ucf101", "hmdb51"))
        assert (augment.operations, augment.magnitude, augment.magnitude_std) == (4, 7, 0.5)
        assert (augment.erase, augment.mixup, augment.cutmix, augment.label_smoothing) == (0.25, 0.8, 1.0, 0.1)
        assert (config.optim.beta2, config.optim.warmup_epochs) == (0.999, 5)
        assert config.optim.layer_decay == (0.7 if small_set else 0.75)
        assert config.optim.drop_path == (0.2 if small_set else 0.1)
        assert config.head.dropout == (0.5 if small_set else 0.0)
        assert config.data.views == (2 if small_set else 1)
        ssv2 = name.startswith("ssv2")
        assert (config.data.sampling, config.data.flip) == (("uniform", False) if ssv2 else ("dense", True))
        assert (config.test.temporal, config.test.spatial) == (2 if ssv2 else 5, 3)
        assert config.optim.epochs == (50 if ssv2 else 100)
        videos = config.optim.batch / config.data.views
        rate = config.optim.base_lr * config.optim.batch / videos  # VideoMAE's, for 256 videos
        assert rate == (1e-3 if name.startswith("kinetics") else 5e-4)
