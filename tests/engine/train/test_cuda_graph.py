"""The choice between launching a step's kernels one by one and replaying them; on a CPU with a simulated recorder."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime import cuda
from mam2.engine.runtime.distributed import World
from mam2.engine.train import cuda_graph
from mam2.engine.train.cuda_graph import StepGraph
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.engine.train import graph_ranks
from tests.helpers.commands import torchrun
from tests.helpers.runs import same_tensors

CODES, BATCH = 16, 4


class Replayer:
    """Replays recorded work by calling it; each call advances a simulated clock by the given seconds."""

    def __init__(self, monkeypatch, *, launched=2.0, replayed=1.0):
        self.now, self.launched, self.replayed = 0.0, launched, replayed
        monkeypatch.setattr(cuda_graph.time, "perf_counter", lambda: self.now)

    def record(self, work):
        values = {}

        def replay():
            values.update(work())
            self.now += self.replayed - self.launched  # `work` has added the other

        return replay, values

    def timed(self, take):
        def slow(arguments, inspect):
            self.now += self.launched
            return take(arguments, inspect)

        return slow

    def warm_up(self, work):
        work()

    def wait(self):
        pass

    def release(self):
        pass


def build(device="cpu", optimizer="adamw", **run):
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, width=24, depth=2, heads=2),
        optim=dataclasses.replace(recipe.optim, batch=BATCH, name=optimizer),
        run=dataclasses.replace(recipe.run, **{"compile": False, **run}),
    )
    torch.manual_seed(0)
    return PretrainStep(config, MAM2(config, CODES), torch.device(device), World())


def batch(number, device="cpu"):
    generator = torch.Generator().manual_seed(number)
    clips = torch.randint(0, 256, (BATCH, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    return clips.to(device), torch.randint(CODES, (BATCH, 64), generator=generator).to(device)


def choose(take, recorder, **options):
    (arguments,) = take._passes(0, [batch(0)])
    choice = cuda_graph.choose_step(
        recorder.timed(take._one_pass), arguments, take.model, take.optimizer, recorder, **options
    )
    take._run = choice.step_function
    return choice


def state(take):
    moments = [value for entries in take.optimizer.state.values() for value in entries.values()]
    return [tensor.detach().clone() for tensor in [*take.model.parameters(), *moments]]


def run_steps(take, first=0, last=4):
    # a graph reads the rate as a float32: these are the same numbers there
    return [take(step, [batch(step)], 2.0**-10 * (step + 1), inspect=step % 2 == 1) for step in range(first, last)]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_replayed_run_has_the_bits_of_a_launched_one(monkeypatch, optimizer):
    plain, replayed = build(optimizer=optimizer), build(optimizer=optimizer)
    choice = choose(replayed, Replayer(monkeypatch))
    assert isinstance(choice.step_function, StepGraph)
    assert choice.reason == "one CUDA graph: a step of 1000 ms replayed, 2000 ms launched kernel by kernel"
    expected, found = run_steps(plain), run_steps(replayed)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert equal(list(mine.values()), list(theirs.values()))
    assert equal(state(replayed), state(plain))


@pytest.mark.slow
@pytest.mark.parametrize(("replayed", "optimizer"), [(1.0, "adamw"), (3.0, "adamw"), (1.0, "muon"), (3.0, "muon")])
def test_a_choice_in_the_middle_of_a_run_changes_nothing(monkeypatch, replayed, optimizer):
    plain, chosen = build(optimizer=optimizer), build(optimizer=optimizer)
    run_steps(plain, last=2), run_steps(chosen, last=2)
    before = state(chosen)
    choice = choose(chosen, Replayer(monkeypatch, replayed=replayed))
    assert isinstance(choice.step_function, StepGraph) == (replayed < 2)
    assert equal(state(chosen), before)
    assert all(parameter.grad is None for parameter in chosen.model.parameters())
    run_steps(plain, 2), run_steps(chosen, 2)
    assert equal(state(chosen), state(plain))


def test_a_slower_graph_is_not_taken(monkeypatch):
    take = build()
    choice = choose(take, Replayer(monkeypatch, replayed=2.11))
    assert not isinstance(choice.step_function, StepGraph)
    assert choice.reason.startswith("launched kernel by kernel: a CUDA graph is slower (a step of 2110 ms")
    assert [(group["lr"], group["capturable"]) for group in take.optimizer.param_groups] == [(0.0, False)] * 2


def test_of_two_equally_fast_ways_the_graph_is_taken(monkeypatch):
    """Other work of the host does not prolong a replay."""
    choice = choose(build(), Replayer(monkeypatch, replayed=2.09))
    assert choice.reason == "one CUDA graph: a step of 2090 ms replayed, 2000 ms launched kernel by kernel"


@pytest.mark.slow
def test_a_graph_that_does_something_else_is_not_taken(monkeypatch):
    class Forgets(Replayer):
        """Replays without learning anything."""

        def record(self, work):
            replay, values = super().record(work)

            def and_forget():
                weights = [parameter.detach().clone() for parameter in take.model.parameters()]
                replay()
                with torch.no_grad():
                    for parameter, weight in zip(take.model.parameters(), weights, strict=True):
                        parameter.copy_(weight)

            return and_forget, values

    take, plain = build(), build()
    choice = choose(take, Forgets(monkeypatch))
    assert "as a CUDA graph loss/" in choice.reason
    assert "of step 2 is" in choice.reason
    run_steps(take), run_steps(plain)
    assert equal(state(take), state(plain))


@pytest.mark.slow
def test_what_cannot_be_recorded_is_launched(monkeypatch):
    class Refuses(Replayer):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    take, plain = build(), build()
    choice = choose(take, Refuses(monkeypatch))
    assert choice.reason == (
        "launched kernel by kernel: it cannot be captured as a CUDA graph "
        "(operation not permitted when stream is capturing)"
    )
    run_steps(take), run_steps(plain)
    assert equal(state(take), state(plain))


@pytest.mark.slow
def test_an_error_without_a_message_is_named_by_its_kind(monkeypatch):
    class Refuses(Replayer):
        def record(self, work):
            raise NotImplementedError

    reason = choose(build(), Refuses(monkeypatch)).reason
    assert reason.endswith("it cannot be captured as a CUDA graph (NotImplementedError)")


@pytest.mark.slow
def test_memory_of_launched_steps_is_released_before_a_graph_takes_its_own(monkeypatch):
    class Watched(Replayer):
        def __init__(self, patch):
            super().__init__(patch)
            self.events, self.depth = [], 0

        def note(self, name, work):
            def noted(*arguments):
                if not self.depth and (not self.events or self.events[-1] != name):
                    self.events.append(name)
                self.depth += 1
                found = work(*arguments)
                self.depth -= 1
                return found

            return noted

        def timed(self, take):
            return self.note("launch", super().timed(take))

        def record(self, work):
            replay, values = self.note("record", super().record)(work)
            return self.note("replay", replay), values

        def release(self):
            self.events.append("release")

    recorder = Watched(monkeypatch)
    choose(build(), recorder)
    assert recorder.events == ["launch", "release", "launch", "release", "record", "replay", "release"]


@pytest.mark.slow
def test_a_graph_that_is_asked_for_is_not_compared(monkeypatch):
    plain, asked = build(), build()
    choice = choose(asked, Replayer(monkeypatch, replayed=3.0), compare=False)
    assert isinstance(choice.step_function, StepGraph)
    assert choice.reason == "one CUDA graph: run.graph is on, without a comparison"
    run_steps(plain), run_steps(asked)
    assert equal(state(asked), state(plain))


def test_a_graph_that_is_asked_for_and_cannot_be_is_an_error(monkeypatch):
    class Refuses(Replayer):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UserError, match=r"run\.graph on: .*not permitted.*; set run\.graph auto or off"):
        choose(build(), Refuses(monkeypatch), compare=False)
    with pytest.raises(UserError, match=r"run\.graph on: a CUDA graph needs a GPU"):
        build(graph="on").maybe_capture_cuda_graph(0, [batch(0)])


@pytest.mark.slow
def test_the_host_is_at_most_two_steps_ahead():
    done, queued = [], []

    class Event:
        def record(self):
            queued.append(self)

        def synchronize(self):
            done.append(self)

        def elapsed_time(self, end):
            assert queued.index(end) == queued.index(self) + 1
            return 7.0

    take = build()
    take.lead = cuda.Lead(Event)
    for step in range(5):
        take(step, [batch(step)], 1e-3, inspect=False)
        assert len(queued) == 2 * (step + 1)  # where a step begins and where it ends
        assert done == queued[1::2][: max(step - 1, 0)]
    assert (take.lead.done, take.lead.device_ms) == (3, 21.0)


@pytest.mark.slow
def test_recomputing_reads_no_random_state(monkeypatch):
    """It cannot be read while a graph is recorded."""
    plain, again = build(), build(recompute=True)
    expected = run_steps(plain)
    monkeypatch.setattr(torch, "get_rng_state", None)
    for mine, theirs in zip(run_steps(again), expected, strict=True):
        assert equal(list(mine.values()), list(theirs.values()))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_left_out_by_a_replay_too(monkeypatch):
    take = build()
    choose(take, Replayer(monkeypatch))
    run_steps(take, last=1)
    before = state(take)
    weight = take.model.encoder.norm.weight
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    assert take(1, [batch(1)], 1e-3, inspect=False)["bad"] == 1
    weight.data.copy_(kept)
    assert equal(state(take), before)


@pytest.mark.slow
def test_a_whole_run_is_settled_before_its_first_step(monkeypatch, tmp_path, synthetic_clips):

    synthetic_clips(tmp_path / "clips", train=16)
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        tokenizer=dataclasses.replace(recipe.tokenizer, steps=2, codes=CODES),
        model=dataclasses.replace(recipe.model, width=24, depth=2, heads=2),
        optim=dataclasses.replace(recipe.optim, batch=8, epochs=2.0),
        run=dataclasses.replace(recipe.run, precision="float32", compile=False, log_every=2),
    )
    plain = pretrain(config, tmp_path / "clips" / "train", tmp_path / "plain", progress=False)

    def maybe_capture_cuda_graph(self, step, micro_batches):
        (arguments,) = self._passes(step, micro_batches)
        self._run, reason = cuda_graph.choose_step(
            self._one_pass, arguments, self.model, self.optimizer, Replayer(monkeypatch, launched=0.0, replayed=-1.0)
        )
        return reason

    monkeypatch.setattr(PretrainStep, "maybe_capture_cuda_graph", maybe_capture_cuda_graph)
    replayed = pretrain(config, tmp_path / "clips" / "train", tmp_path / "replayed", progress=False)
    weights = [load_file(result.checkpoint / "model.safetensors") for result in (plain, replayed)]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-3, atol=1e-5)
    assert "step    " in (tmp_path / "replayed" / "log.txt").read_text()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of both ranks, by case of graph_ranks.py."""
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    done = torchrun(2, Path(graph_ranks.__file__), out)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


REASONS = {
    "faster": "one CUDA graph: a step of 1000 ms replayed, 2000 ms launched kernel by kernel",
    "slower on one": "launched kernel by kernel: a CUDA graph is slower (a step of 3000 ms",
    "fails on one": "launched kernel by kernel: it cannot be captured as a CUDA graph (operation not permitted",
    "asked for": "one CUDA graph: run.graph is on, without a comparison",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REASONS)
def test_all_processes_choose_the_same_and_keep_the_bits_of_ddp(case, two_processes):
    """With balanced gradients, whose norms are exchanged in the backward pass, and values that differ between ranks."""
    plain = two_processes["plain"][0]
    for rank in two_processes[case]:
        assert rank["reason"].startswith(REASONS[case])
        assert rank["ddp"] == ("launched" in REASONS[case][:8]), "DDP is released for a graph only"
        assert rank["released"], "its nodes of autograd must be gone before a graph is captured"
        assert rank["values"] == plain["values"]
        assert same_tensors(rank["weights"], plain["weights"])


def test_what_cannot_be_a_graph_of_several_processes_is_named(monkeypatch):
    take = build()
    monkeypatch.setattr(take, "device", torch.device("cuda"))
    assert take._why_no_graph(1) is None
    assert "one pass per step" in take._why_no_graph(2)
    take._sharded = True
    assert take._why_no_graph(1).startswith("a CUDA graph needs run.sharding ddp")


def test_a_cpu_has_nothing_to_choose():
    assert build().maybe_capture_cuda_graph(0, [batch(0)]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("compiled", "optimizer"), [(False, "adamw"), (True, "adamw"), (False, "muon")])
def test_a_cuda_graph_has_the_losses_of_launched_kernels(monkeypatch, compiled, optimizer):
    monkeypatch.setattr(cuda_graph, "MARGIN", math.inf)  # taken if it is right, however long it needs
    plain, replayed = (build("cuda:0", optimizer, compile=compiled, precision="float32") for _ in range(2))
    (arguments,) = replayed._passes(0, [batch(0, "cuda:0")])
    choice = cuda_graph.choose_step(
        replayed._one_pass, arguments, replayed.model, replayed.optimizer, cuda.CudaRecorder()
    )
    assert isinstance(choice.step_function, StepGraph), choice.reason
    replayed._run = choice.step_function
    expected, found = (
        [float(take(step, [batch(step, "cuda:0")], 1e-3, inspect=False)["loss/motion"]) for step in range(5)]
        for take in (plain, replayed)
    )
    assert found == pytest.approx(expected, rel=1e-3)
