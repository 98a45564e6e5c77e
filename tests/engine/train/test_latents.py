"""Training on a teacher's latents: resume, bad steps, CUDA graphs, initial weights, and the warning of a collapse."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.channels import GRAY, gray_encoder
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.checkpoints.model_card import model_card
from mam2.engine.evaluation.plots import PANELS
from mam2.engine.model import teacher as teachers
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import sample_masks
from mam2.engine.planning import plan
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.train import collapse, cuda_graph
from mam2.engine.train.collapse import Collapse
from mam2.engine.train.initial_weights import complete_config, read_initial_weights, take_weights
from mam2.engine.train.objective import build_objective
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.small_models import shaken

pytestmark = pytest.mark.usefixtures("float32")
LATENTS = {"loss": {"appearance_target": "latents", "visible": 0.5, "teacher_momentum": 0.9}}


def built(config):
    torch.manual_seed(0)
    return PretrainStep(config, MAM2(config, 0), torch.device("cpu"), World())


def batch(number, clips=4):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (clips, 3, 8, 32, 32), dtype=torch.uint8, generator=generator), None


def weights(run):
    return load_file(checkpoint.newest(run) / checkpoint.WEIGHTS)


def test_after_a_step_the_teacher_is_the_average_by_the_schedule(small):
    """With two passes per step the teacher is updated once, after the optimizer. A bad step changes neither."""
    step = built(small(**LATENTS, optim={"batch": 8, "micro_batch": 4}))
    encoder, teacher = step.model.encoder.state_dict(), step.model.teacher.state_dict()
    expected = {name: tensor.double() for name, tensor in teacher.items()}
    for number, progress in enumerate((0.0, 0.5)):
        step(number, [batch(2 * number), batch(2 * number + 1)], 1e-2, inspect=False, progress=progress)
        keep = 0.9 + 0.1 * progress
        expected = {name: keep * old + (1 - keep) * encoder[name].double() for name, old in expected.items()}
        for name, found in teacher.items():
            torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(encoder[name], found) for name, found in teacher.items())
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    head = step.model.motion_decoder.head.bias
    head.data[0] = torch.nan
    assert step(2, [batch(4), batch(5)], 1e-2, inspect=False)["bad"] == 1
    head.data.copy_(before["motion_decoder.head.bias"])
    assert all(torch.equal(before[name], found) for name, found in step.model.state_dict().items())


class Replayer:
    """Replays recorded work by calling it again."""

    def record(self, work):
        values = {}
        return lambda: values.update(work()), values

    def warm_up(self, work):
        work()

    def wait(self):
        pass

    def release(self):
        pass


def test_a_graph_reads_the_momentum_of_each_step(small):
    plain, replayed = built(small(**LATENTS)), built(small(**LATENTS))
    before = {name: tensor.clone() for name, tensor in replayed.model.state_dict().items()}
    choice = cuda_graph.choose_step(
        replayed._one_pass,
        replayed._passes(0, [batch(0)])[0],
        replayed.model,
        replayed.optimizer,
        Replayer(),
        compare=False,
    )
    assert all(torch.equal(before[name], found) for name, found in replayed.model.state_dict().items())
    replayed._run = choice.step_function
    for number in range(3):
        for one in (plain, replayed):  # a graph reads the rate as a float32: 2^-8 is the same number there
            one(number, [batch(number)], 2.0**-8, inspect=number == 1, progress=number / 3)
    expected = plain.model.state_dict()
    assert all(torch.equal(expected[name], found) for name, found in replayed.model.state_dict().items())


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, small, clips):
    """The run is stopped in the middle of the schedule of the momentum. There are no files of a tokenizer."""
    config = small(**LATENTS, run={"save_every": 3, "keep": 10})
    pretrain(config, clips, tmp_path / "whole", progress=False)
    last = checkpoint.newest(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole").rename(tmp_path / "kept")
    pretrain(config, clips, tmp_path / "cut", progress=False)
    expected = weights(tmp_path / "kept")
    assert all(torch.equal(expected[name], found) for name, found in weights(tmp_path / "cut").items())
    for folder in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        if folder.name != "step-00000003":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    pretrain(config, clips, tmp_path / "cut", resume=True, progress=False)
    assert checkpoint.newest(tmp_path / "cut").name == last.name
    found = weights(tmp_path / "cut")
    assert {name.split(".")[0] for name in found} >= {"teacher", "encoder"}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(found[f"teacher.{name}"], found[f"encoder.{name}"]) for name in ("norm.weight",))
    line = read_log(tmp_path / "kept")[-1]
    assert 1 <= line["teacher/rank"] <= 24
    assert 0 < line["teacher/deviation"] <= 1
    assert not (tmp_path / "kept" / "tokenizer.safetensors").exists()
    text = (tmp_path / "kept" / "log.txt").read_text()
    assert "collapse" not in text
    assert re.search(r"model .*\bteacher \d", text), "the log names the teacher's parameters"
    encoder = load_encoder(tmp_path / "kept").state_dict()
    assert all(
        torch.equal(tensor, expected[f"encoder.{name}"]) for name, tensor in encoder.items() if "pos" not in name
    )


def test_a_run_starts_from_a_checkpoint_with_or_without_a_teacher(tmp_path, small):
    latents, plain = small(**LATENTS), small(loss={"appearance_target": "pixels"})
    for name, config in (("latents", latents), ("plain", plain)):
        checkpoint.write(tmp_path / name, 7, dict(shaken(MAM2(config, 0)).state_dict()), {}, config, {})
    for name in ("latents", "plain"):
        start = read_initial_weights(tmp_path / name, {})
        torch.manual_seed(1)
        model = MAM2(complete_config(latents, start), 0)
        lines = take_weights(model, latents, start, same_tokenizer=False)
        source = load_model(tmp_path / name).state_dict()
        prefix = "teacher." if name == "latents" else "encoder."
        for key, found in model.teacher.state_dict().items():
            assert torch.equal(found, source[prefix + key]), key
        assert ("the same encoder" in lines[0]) == (name == "plain")
        assert ("appearance head (another target)" in " ".join(lines)) == (name == "plain")
    start = read_initial_weights(tmp_path / "latents", {})
    deeper = dataclasses.replace(latents, loss=dataclasses.replace(latents.loss, teacher_blocks=3))
    lines = take_weights(MAM2(latents, 0), deeper, start, same_tokenizer=False)
    assert "appearance head (another target)" in lines[1]


@pytest.mark.parametrize("teacher", [True, False])
def test_a_gray_teacher_starts_from_an_rgb_checkpoint(teacher, tmp_path, small):
    """From its teacher, or from its encoder if it has none: with the weights of the three colors added up."""
    tables = LATENTS if teacher else {"loss": {"appearance_target": "pixels"}}
    rgb, gray = small(**tables), small(**LATENTS, data={"channels": 1})
    checkpoint.write(tmp_path / "rgb", 7, dict(shaken(MAM2(rgb, 0)).state_dict()), {}, rgb, {})
    start = read_initial_weights(tmp_path / "rgb", {})
    model = MAM2(complete_config(gray, start), 0)
    lines = take_weights(model, gray, start, same_tokenizer=False)
    assert GRAY in lines
    source = load_model(tmp_path / "rgb")
    for trained, origin in ((model.encoder, source.encoder), (model.teacher, source.teacher or source.encoder)):
        expected = gray_encoder(origin, gray.data).state_dict()
        for key, found in trained.state_dict().items():
            assert torch.equal(found, expected[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("same", ["every token", "on a line"])
def test_collapsed_features_are_a_warning_once(same, tmp_path, monkeypatch, small, clips):
    def collapsed(teacher, video, blocks):
        features = torch.ones(len(video), 64, 24)
        return features if same == "every token" else features * torch.randn(len(video), 64, 1)

    monkeypatch.setattr("mam2.engine.model.mam2.latent_targets", collapsed)
    pretrain(small(**LATENTS), clips, tmp_path / "run", progress=False)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("warning: steps 1 to 2: the teacher's features collapse: effective rank") == 1
    assert text.count("features collapse") == 1
    assert len(read_log(tmp_path / "run")) == 4


def test_the_warning_states_the_limits():
    watch = Collapse()
    good = {"teacher/rank": collapse.LOWEST_RANK, "teacher/deviation": collapse.LOWEST_DEVIATION}
    assert watch.warning(range(2), {"loss/motion": 1.0}) is None
    assert watch.warning(range(2), good) is None
    message = watch.warning(range(2, 4), good | {"teacher/deviation": 0.01})
    assert "steps 2 to 3" in message
    assert "standard deviation 0.01 (limit 0.1)" in message
    assert watch.warning(range(4, 6), good | {"teacher/rank": 1.0}) is None
    assert Collapse().warning(range(2), good | {"teacher/rank": 1.0})
    columns = {name for panel in PANELS for name in panel.columns}
    assert {"teacher/rank", "teacher/deviation", "validation/latents_relative"} <= columns


def test_a_plan_counts_the_teacher_apart(small):
    latents, pixels = small(**LATENTS), small(loss={"appearance_target": "pixels"})
    with torch.device("meta"):
        model = MAM2(latents, 0)
    planned = plan(latents, gpu="h100")
    assert planned.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.parts["teacher"].parameters == sum(p.numel() for p in model.teacher.parameters())
    assert planned.parts["teacher"].backward_flops == planned.parts["teacher"].held_bytes == 0
    encoder = planned.parts["teacher"].parameters
    head = planned.parts["latent head and loss"].parameters
    other = plan(pixels, gpu="h100")
    assert planned.parameters == other.parameters + head - other.parts["pixel head and loss"].parameters
    weights = planned.memory["weights"] - 4 * planned.parameters
    assert weights == 4 * encoder
    assert "teacher" in planned.report()
    assert teachers.teacher_of(model.encoder) is not model.encoder


def test_the_card_says_whose_weights_are_shared(tmp_path, small):
    for name, loss in (("latents", LATENTS["loss"]), ("pixels", {"appearance_target": "pixels"})):
        config = small(loss=loss)
        checkpoint.write(tmp_path / name, 7, dict(MAM2(config, 0).state_dict()), {}, config, {})
        card = model_card(
            tmp_path / name, load_model(tmp_path / name), name="me/it", license="mit", to="mam2", classes=(), scores=()
        )
        assert ("those of the trained encoder, not of its teacher" in card) == (name == "latents")
        assert ("teacher_momentum | 0.9" in card.replace("`", "")) == (name == "latents")


@pytest.mark.slow
def test_targets_loss_and_figures_are_compiled_as_whole_graphs(small):
    config, video = small(**LATENTS), batch(0)[0]
    mask = sample_masks(video, config, step=0)
    torch.manual_seed(0)
    model = MAM2(config, 0)
    names = []

    def traced(part):
        names.append(part.__name__)
        return torch.compile(part, fullgraph=True, dynamic=False, backend="eager")

    plain, compiled = build_objective(model, config, lambda part: part), build_objective(model, config, traced)
    assert {"latent_targets", "latent_loss"} <= set(names)
    compiled._figures = traced(compiled._inspect)
    expected, found = (objective(video, mask, None, inspect=True) for objective in (plain, compiled))
    torch.testing.assert_close(found[0], expected[0])
    assert found[2].keys() == expected[2].keys() == {"teacher/rank", "teacher/deviation", "loss/motion_relative"}
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-5)
