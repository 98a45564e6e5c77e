"""Recipes and configs: round trips, unknown keys, values that cannot work together."""

import dataclasses
import json

import pytest

from mam2.engine.config import PretrainConfig, UserError, check
from mam2.engine.recipe import RECIPES, from_dict, load_recipe, to_dict


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_shipped_recipes_load_and_fit_together(name):
    check(load_recipe(name))


def test_a_config_survives_json():
    config = load_recipe("demo")
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_recipe_file_and_a_saved_config_are_read(tmp_path):
    (tmp_path / "mine.toml").write_text("[optim]\nbase_lr = 1\n[data]\nframes = 8\n")
    config = load_recipe(str(tmp_path / "mine.toml"))
    assert config.optim.base_lr == 1.0
    assert isinstance(config.optim.base_lr, float)
    assert config.data.frames == 8
    assert config.model == PretrainConfig().model
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert load_recipe(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[data]\nframe = 8", "unknown key 'frame'; did you mean 'frames'?"),
        ("[modle]\nwidth = 8", "unknown key 'modle'; did you mean 'model'?"),
        ("[data]\nframes = 8.5", "'frames' expects int, found 8.5"),
        ("[data]\nflip = 1", "'flip' expects bool, found 1"),
        ("[data]\nfront_end = 'ffmpeg'", "'front_end' expects 'auto' or 'nvdec'"),
        ("[optim]\nbase_lr = true", "'base_lr' expects float, found True"),
        ("data = 3", "'data' is a table of keys, found 3"),
        ("[data", "not a TOML file"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(tmp_path, text, told):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert told in str(error.value)
    assert "wrong.toml" in str(error.value)
    assert "\n" not in str(error.value).partition("TOML file")[0]


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean mam2-fast"):
        load_recipe("mam2-fats")


def _changed(**tables):
    config = load_recipe("demo")
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"data": {"size": 65}}, "data.size 65 is not a multiple of model.patch"),
        ({"data": {"frames": 7}}, "data.frames 7 is not a multiple of model.tubelet"),
        ({"mask": {"ratio": 1.0}}, "leave at least one visible"),
        ({"mask": {"ratio": 0.0}}, "must hide at least one"),
        ({"optim": {"batch": 7}}, "optim.batch 7 cannot be shared out to 1 processes"),
        ({"model": {"heads": 7}}, "is not a multiple of model.heads"),
        ({"data": {"min_area": 0.0}}, "expected 0 < min_area"),
        ({"loss": {"motion": 0.0}}, "needs loss.motion above 0"),
        ({"run": {"log_every": 0}}, "run.log_every must be positive"),
        ({"model": {"tubelet": 1}, "loss": {"motion_target": "intra"}}, "'intra' needs model.tubelet"),
    ],
)
def test_values_that_cannot_work_are_named(tables, told):
    with pytest.raises(UserError) as error:
        check(_changed(**tables))
    assert told in str(error.value)
