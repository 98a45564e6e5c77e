"""Recipes and configs: round trips, unknown keys, values that cannot work together."""

import dataclasses
import json

import pytest

from mam2.engine.commands.options import with_present_flags
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.limits import KEY, check_limits
from mam2.engine.config.pretrain import MaskConfig, PretrainConfig, check
from mam2.engine.config.recipe import RECIPES, from_dict, load_recipe, to_dict
from mam2.engine.errors import UserError


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
    ("text", "message"),
    [
        ("[data]\nframe = 8", "unknown key 'frame'; did you mean 'frames'?"),
        ("[modle]\nwidth = 8", "unknown key 'modle'; did you mean 'model'?"),
        ("[data]\nframes = 8.5", "'frames' expects int, found 8.5"),
        ("[data]\nflip = 1", "'flip' expects bool, found 1"),
        ("[data]\ndecoder = 'ffmpeg'", "'decoder' expects 'auto' or 'nvdec'"),
        ("[optim]\nbase_lr = true", "'base_lr' expects float, found True"),
        ("data = 3", "'data' is a table of keys, found 3"),
        ("[data", "not a TOML file"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert message in str(error.value)
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
    ("tables", "message"),
    [
        ({"data": {"size": 65}}, "data.size 65 is not a multiple of model.patch"),
        ({"data": {"frames": 7}}, "data.frames 7 is not a multiple of model.tubelet"),
        ({"mask": {"ratio": 1.0}}, "leave at least one visible"),
        ({"mask": {"ratio": 0.0}}, "must mask at least one"),
        ({"optim": {"batch": 7}}, "optim.batch 7: expected a multiple of 2 (1 process × data.views 2)"),
        ({"model": {"heads": 7}}, "is not a multiple of model.heads"),
        ({"data": {"min_area": 0.0}}, "data.min_area 0.0: expected above 0 and at most 1"),
        ({"data": {"min_area": 0.9, "max_area": 0.5}}, "data.min_area 0.9 is above data.max_area 0.5"),
        ({"loss": {"motion": 0.0}}, "needs loss.motion above 0"),
        ({"run": {"log_every": 0}}, "run.log_every 0: expected at least 1"),
        ({"model": {"tubelet": 1}, "loss": {"motion_target": "intra"}}, "'intra' needs model.tubelet"),
    ],
)
def test_values_that_cannot_work_are_named(tables, message):
    with pytest.raises(UserError) as error:
        check(_changed(**tables))
    assert message in str(error.value)


def _numbers(kind, prefix=""):
    """(key, default, declared limits) of every number in a config, nested tables included."""
    config = kind()
    for item in dataclasses.fields(kind):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(type(value), f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            bases = (cls.__dict__.get("__dataclass_fields__", {}) for cls in kind.__mro__)
            limits = [fields[item.name].metadata[KEY] for fields in bases if KEY in _metadata(fields, item.name)]
            yield f"{prefix}{item.name}", value, limits[0] if limits else None


def _metadata(fields, name):
    return fields[name].metadata if name in fields else {}


def _with(config, key, value):
    table, _, rest = key.partition(".")
    return dataclasses.replace(config, **{table: _with(getattr(config, table), rest, value) if rest else value})


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_number_declares_its_limits_and_has_a_default_within(kind):
    undeclared = [key for key, default, limits in _numbers(kind) if limits is None or default not in limits]
    assert undeclared == []


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_a_number_beyond_any_limit_is_named(kind):
    for key, default, limits in _numbers(kind):
        wrong = [] if isinstance(default, int) else [float("nan"), float("inf"), float("-inf")]
        wrong += [edge - 1 for edge in (limits.at_least, limits.above) if edge is not None]
        wrong += [edge + 1 for edge in (limits.at_most, limits.below) if edge is not None]
        wrong += [edge for edge in (limits.above, limits.below) if edge is not None]
        assert wrong
        for value in wrong:
            with pytest.raises(UserError) as error:
                check_limits(_with(kind(), key, value))
            assert str(error.value).startswith(f"{key} ")
            assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": {"tubelet": 0}}, "model.tubelet 0: expected at least 1"),
        ({"model": {"patch": 0}}, "model.patch 0: expected at least 1"),
        ({"model": {"heads": 0}}, "model.heads 0: expected at least 1"),
        ({"tokenizer": {"channels": 31}}, "tokenizer.channels 31: expected a multiple of 8"),
        ({"data": {"views": 0}}, "data.views 0: expected at least 1"),
        ({"data": {"threads": -1}}, "data.threads -1: expected at least 0"),
        ({"run": {"seed": -1}}, "run.seed -1: expected at least 0"),
        ({"optim": {"epochs": float("inf")}}, "optim.epochs inf: expected a finite number, above 0"),
        ({"mask": {"ratio": float("nan")}}, "mask.ratio nan: expected"),
        ({"optim": {"beta2": 1.5}}, "optim.beta2 1.5: expected at least 0 and below 1"),
        ({"loss": {"label_smoothing": 2.0}}, "loss.label_smoothing 2.0: expected at least 0 and at most 1"),
        ({"optim": {"base_lr": float("nan")}}, "optim.base_lr nan: expected"),
        ({"optim": {"base_lr": -1.0}}, "optim.base_lr -1.0: expected at least 0"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay -0.1: expected at least 0"),
        ({"optim": {"clip_norm": -1.0}}, "optim.clip_norm -1.0: expected at least 0"),
        ({"loss": {"appearance": -1.0}}, "loss.appearance -1.0: expected at least 0"),
        ({"optim": {"batch": 1_000_000}}, "optim.batch 1000000: expected at least 1 and at most 131072"),
    ],
)
def test_values_that_broke_a_run_with_a_stack_trace_are_refused(tables, message):
    with pytest.raises(UserError) as error:
        check(_changed(**tables))
    assert message in str(error.value)


def test_a_renamed_key_is_still_read_with_one_warning(tmp_path, caplog):
    (tmp_path / "old.toml").write_text('[data]\nfront_end = "pyav"\n')
    (tmp_path / "new.toml").write_text('extends = ["old.toml"]\n[data]\ndecoder = "nvdec"\n')
    assert load_recipe(str(tmp_path / "old.toml")).data.decoder == "pyav"
    assert [record.getMessage() for record in caplog.records] == [
        "recipe old.toml: the key data.front_end is now called data.decoder"
    ]
    assert load_recipe(str(tmp_path / "new.toml")).data.decoder == "nvdec"
    saved = to_dict(PretrainConfig())
    saved["data"]["front_end"] = saved["data"].pop("decoder")
    assert from_dict(PretrainConfig, saved) == PretrainConfig()  # a checkpoint of an earlier version


@pytest.mark.parametrize(
    ("flag", "now"),
    [
        ("--data.front-end", "--data.decoder"),
        ("--data.front_end", "--data.decoder"),
        ("--utilisation", "--utilization"),
    ],
)
def test_a_renamed_flag_is_still_read_with_one_warning(flag, now, caplog):
    assert with_present_flags([flag, "pyav", f"{flag}=pyav", "--data.frames", "8"]) == [
        *(now, "pyav", f"{now}=pyav", "--data.frames", "8")
    ]
    assert {record.getMessage() for record in caplog.records} == {f"the flag {flag} is now called {now}"}


def test_the_sizes_of_a_clip_name_what_is_predicted() -> None:
    config = PretrainConfig(mask=MaskConfig(ratio=0.9))
    assert config.clip_sizes == "16 frames of 224²: 1568 tokens, 160 visible"
    half = dataclasses.replace(config, mask=MaskConfig(ratio=0.9, decoded=0.5))
    assert half.clip_sizes == "16 frames of 224²: 1568 tokens, 160 visible, 704 predicted"
