"""`optim.micro_batch auto` under a simulated memory limit: the fewest passes that fit, the same result, resumed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import from_dict, to_dict
from mam2.engine.config.training import equal_passes
from mam2.engine.errors import PeerFailed, UserError
from mam2.engine.model.mam2 import MAM2
from mam2.engine.planning import plan
from mam2.engine.runtime.distributed import World
from mam2.engine.train import held_out
from mam2.engine.train import session as session_module
from mam2.engine.train.augment import Prepared, feature_scales, path_scales
from mam2.engine.train.classifier_step import ClassifierObjective, FinetuneStep
from mam2.engine.train.loop import CLIPS_PER_PASS
from mam2.engine.train.objective import MAM2Objective
from mam2.engine.train.pass_size import PassChoice, fewest_passes
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep, Step
from tests.engine.train import pass_ranks
from tests.helpers.commands import outcome, torchrun
from tests.helpers.runs import same_tensors, same_weights

pytestmark = pytest.mark.usefixtures("float32")
CPU = torch.device("cpu")


class Ranks(World):
    """This rank, and the answers of the others."""

    def all_gather(self, value):
        return [value, *OTHERS]


OTHERS: list[int] = []


@pytest.fixture
def limit(monkeypatch):
    """limit(n): a pass of more than n clips runs out of memory. Returns the list of the sizes that are run."""

    originals = {objective: objective.forward for objective in (MAM2Objective, ClassifierObjective)}

    def limited(most):
        sizes = []
        for objective, original in originals.items():

            def forward(self, video, *arguments, forward=original, **options):
                sizes.append(len(video))
                if len(video) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
                return forward(self, video, *arguments, **options)

            monkeypatch.setattr(objective, "forward", forward)
        monkeypatch.setattr(Step, "tries_passes", True)
        return sizes

    return limited


def pretraining(small, world=None, loss=None, **optim):
    config = small(optim={"batch": 8, "micro_batch": "auto", **optim}, data={"views": 1}, loss=loss or {})
    torch.manual_seed(0)
    step = PretrainStep(config, MAM2(config, 16), CPU, world or World())
    clips = torch.randint(0, 256, (8, 3, 8, 32, 32), dtype=torch.uint8)
    return step, [(clips, torch.randint(0, 16, (8, 64)))]


def finetuning(small_finetuning):
    config = small_finetuning(model={"classes": 3}, optim={"batch": 8, "micro_batch": "auto"}, data={"views": 1})
    torch.manual_seed(0)
    step = FinetuneStep(config, build_classifier(config), CPU, World())
    clips = torch.randint(0, 256, (8, 3, 8, 32, 32), dtype=torch.uint8)
    draws = {"seed": 0, "step": 0, "first_sample": 0, "device": CPU}
    scales = path_scales(8, config.model.depth, 0.3, **draws), feature_scales(8, config.model.width, 0.3, **draws)
    return step, [(clips, Prepared(clips, torch.eye(3)[torch.arange(8) % 3], *scales))]


def gradients(step, batches):
    passes = step._passes(0, batches)
    values = step._gradients(passes, len(passes), inspect=False)
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return {name: value for name, value in values.items() if name.startswith("loss/")}, found


@pytest.mark.parametrize("kind", ["pre-training", "fine-tuning"])
def test_the_fewest_passes_that_fit_give_the_gradients_of_one(kind, limit, small, small_finetuning):
    step, batches = pretraining(small) if kind == "pre-training" else finetuning(small_finetuning)
    losses, expected = gradients(step, batches)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    sizes = limit(3)
    message = step.choose_passes(0, batches)
    assert message == "optim.micro_batch auto: 2 clips per pass, 4 per step and process; 4 do not fit"
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert step.passes == 4
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(value.any() for state in step.optimizer.state.values() for value in state.values())
    assert all(parameter.grad is None for parameter in step.model.parameters())
    found_losses, found = gradients(step, batches)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(found_losses, losses)


def test_what_fits_whole_is_one_pass_and_a_cpu_is_not_tried(limit, small, monkeypatch):
    step, batches = pretraining(small)
    assert "8 clips per pass, the whole share; only a GPU's memory is tried" in step.choose_passes(0, batches)
    assert pretraining(small, micro_batch=4)[0].choose_passes(0, batches) is None
    sizes = limit(8)
    assert step.choose_passes(0, batches) == "optim.micro_batch auto: 8 clips per pass, 1 per step and process"
    assert sizes == [8]


def test_all_ranks_take_the_most_passes_that_any_needs(monkeypatch):
    def step(passes):
        if passes < 2:
            raise torch.OutOfMemoryError("too much")

    for others, expected in (([1, 4], 4), ([1, 1], 2), ([0, 2], 0)):
        monkeypatch.setattr(f"{__name__}.OTHERS", others)
        assert fewest_passes([1, 2, 4], step, CPU, Ranks()) == PassChoice(expected, "too much")


def test_where_nothing_fits_it_is_one_line_with_remedies(limit, small):
    step, batches = pretraining(small)
    limit(0)
    with pytest.raises(UserError, match=r"out of GPU memory with 1 clip per pass: CUDA out of memory\. .* Set "):
        step.choose_passes(0, batches)
    assert step.forward is step.objective
    other, batches = pretraining(small, world=World(rank=1))
    with pytest.raises(PeerFailed):
        other.choose_passes(0, batches)


@pytest.mark.parametrize(("clips", "group", "passes"), [(8, 1, [1, 2, 4, 8]), (12, 4, [1, 3]), (6, 6, [1])])
def test_groups_are_not_divided(clips, group, passes):
    assert equal_passes(clips, group) == passes


@pytest.mark.slow
def test_processes_with_different_memory_agree_and_keep_the_same_weights(tmp_path):
    """With DDP and balanced gradients: a process that tries sizes alone must not wait for exchanges.

    With fixed weights of the losses, the result is also that of one process and one pass; balanced gradients have a
    factor per pass.
    """
    done = torchrun(2, Path(pass_ranks.__file__), tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    for (first, weights), (second, others) in found.values():
        assert (first, second) == (2, 2)  # 4 clips each; the second process fits 2
        assert same_tensors(weights, others)
    passes, alone = pass_ranks.train(World(), "fixed")
    assert passes == 1
    for name, weight in alone.items():
        torch.testing.assert_close(found["fixed"][0][1][name], weight, rtol=2e-3, atol=1e-4, msg=name)


def test_balanced_gradients_have_a_factor_per_pass(small):
    """The declared difference between passes: each scales its codes' gradient by the norms of its own clips."""
    step, batches = pretraining(small, loss={"balance": "gradient", "appearance": 1.0}, micro_batch=4)
    (clips, codes), halves = batches[0], (slice(4), slice(4, 8))
    _, both = gradients(step, [(clips[half], codes[half]) for half in halves])
    each = []
    for number, half in enumerate(halves):
        (arguments,) = [step.arguments(0, 4 * number, clips[half], codes[half])]
        step._gradients([arguments], 1, inspect=False)
        each.append({name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None})
        step.optimizer.zero_grad()
    _, whole = gradients(step, batches)
    assert not torch.allclose(whole["encoder.patch_embed.weight"], both["encoder.patch_embed.weight"], rtol=1e-3)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
def test_validation_does_not_take_the_whole_share_at_once(limit, clips, tmp_path, small, monkeypatch):
    """It fits the memory that the passes of the training were tried for."""
    monkeypatch.setattr(session_module, "MOST_UNTRIED", 3)
    monkeypatch.setattr(held_out, "ClipLoader", lambda *given, batch, **rest: batches.append(batch) or stop())
    batches = []

    def stop():
        raise InterruptedError

    for micro_batch in ("auto", 8):
        config = small(optim={"micro_batch": micro_batch}, validation={"videos": 4})
        with pytest.raises(InterruptedError):
            pretrain(config, clips, tmp_path / str(micro_batch), val=clips, progress=False)
    assert batches == [3, 8]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_passes_and_reaches_the_same_bits(limit, clips, tmp_path, small):
    def config(epochs):
        return small(optim={"micro_batch": "auto", "epochs": epochs}, run={"save_every": 2})

    limit(9)
    pretrain(config(2.0), clips, tmp_path / "whole", progress=False)
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "optim.micro_batch auto: 8 clips per pass, 2 per step and process; 16 do not fit" in log
    assert checkpoint.read_metadata(checkpoint.newest(tmp_path / "whole"))[CLIPS_PER_PASS] == "8"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["optim"]["micro_batch"] == "auto"
    for path in (tmp_path / "whole" / "checkpoints").iterdir():
        target = tmp_path / "again" / "checkpoints" / path.name
        if path.name == "step-00000004":
            target.mkdir(parents=True)
            for file in path.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
    for name in ("manifest.jsonl", "tokenizer.safetensors"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    sizes = limit(16)  # now the whole batch would fit
    pretrain(config(2.0), clips, tmp_path / "again", resume=True, progress=False)
    assert set(sizes) == {8}
    assert "8 clips per pass, as in the resumed checkpoint" in (tmp_path / "again" / "log.txt").read_text()
    assert same_weights(tmp_path / "whole", tmp_path / "again")


def test_the_plan_estimates_the_passes():
    config = from_dict(PretrainConfig, {"optim": {"batch": 512, "micro_batch": "auto"}})
    found = plan(config, gpu="a10")
    assert found.fits
    assert 1 <= found.clips_per_pass < 512
    larger = dataclasses.replace(config.optim, micro_batch=2 * found.clips_per_pass)
    assert not plan(dataclasses.replace(config, optim=larger), gpu="a10").fits
    assert f"passes of {found.clips_per_pass} clips on 1 device" in found.report()
    assert "(optim.micro_batch auto: estimated here, tried by the run)" in found.report()


def test_the_key_takes_a_number_or_auto(capsys, tmp_path):
    config = from_dict(PretrainConfig, {"optim": {"micro_batch": "auto"}})
    assert from_dict(PretrainConfig, to_dict(config)) == config
    with pytest.raises(UserError, match="'micro_batch' expects int or 'auto', found 'most'"):
        from_dict(PretrainConfig, {"optim": {"micro_batch": "most"}})
    status, out, _ = outcome(capsys, "plan", "mam2-fast", "--gpu", "a10", "--optim.micro-batch", "auto")
    assert (status, "micro_batch auto: estimated" in out) == (0, True)
    flags = ["--optim.micro-batch", "auto", "--run.sharding", "fsdp"]
    status, _, error = outcome(capsys, "plan", "mam2-fast", "--gpu", "a10", "--gpus", "2", *flags)
    assert status == 2
    assert "no process can try passes alone; set a number of clips" in error
