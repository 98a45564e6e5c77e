"""The validated model: the weights of the trained one without a copy, one compiled graph for all its batches."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.runtime.distributed import World
from mam2.engine.train import finetune as finetune_module
from mam2.engine.train.augment import Prepared
from mam2.engine.train.classifier_step import FinetuneStep
from mam2.engine.train.finetune import finetune
from mam2.engine.train.validation_model import in_equal_batches, share_weights

pytestmark = pytest.mark.usefixtures("float32")
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone", "aten::_foreach_copy_"}


class Copied(TorchDispatchMode):
    """Records the shapes of all copied tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in COPIES:
            self.shapes.append(tuple(args[0].shape))
        return result


def classifier(config):
    torch.manual_seed(3)
    return build_classifier(config)


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_it_has_the_weights_after_each_step_or_their_average(average, small_finetuning):
    config = small_finetuning(model={"classes": 3}, optim={"batch": 4, "ema": average})
    step = FinetuneStep(config, classifier(config), torch.device("cpu"), World(0, 1))
    judge = build_classifier(config).eval().requires_grad_(False)
    gather = share_weights(judge, lambda: step.model.state_dict() | dict(step.average))
    video = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8)
    targets = torch.eye(3)[[0, 1, 2, 0]]
    seen = []
    for number in range(2):
        step(number, [(video, Prepared(video, targets, None, None))], 1e-2, inspect=False)
        gather()
        expected = build_classifier(config).eval()
        expected.load_state_dict(step.model.state_dict() | dict(step.average))
        with torch.no_grad():
            seen.append(judge(video))
            assert torch.equal(seen[-1], expected(video))
    assert not torch.equal(*seen)
    assert all(parameter.requires_grad for parameter in step.model.parameters())
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_a_validation_copies_no_weights(clips, tmp_path, monkeypatch, small_finetuning):
    """In float32; with bfloat16, autocast converts each matrix, as in a step."""
    validate, copied = finetune_module._Finetuning._validate, Copied()

    def watched(self):
        with copied:
            return validate(self)

    monkeypatch.setattr(finetune_module._Finetuning, "_validate", watched)
    config = small_finetuning(optim={"epochs": 0.5, "ema": 0.9})
    finetune(config, clips, tmp_path, val=clips, encoder=None, progress=False)
    weights = {tuple(p.shape) for p in build_classifier(small_finetuning(model={"classes": 4})).parameters()}
    matrices = {shape for shape in weights if len(shape) == 2}
    assert copied.shapes
    assert not matrices.intersection(copied.shapes)


def test_a_short_batch_needs_no_graph_of_its_own(small_finetuning):
    model = classifier(small_finetuning(model={"classes": 3})).eval().requires_grad_(False)
    counter = CompileCounter()
    classify = in_equal_batches(torch.compile(model, backend=counter, fullgraph=True, dynamic=False), 4)
    video = torch.randint(0, 256, (7, 3, 8, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = torch.cat([classify(video[:4]), classify(video[4:])])
        expected = model(video)
    assert logits.shape == (7, 3)
    torch.testing.assert_close(logits, expected)
    assert counter.frame_count == 1
